"""Batches of a data set for networks and for statistics: floats in [-1, 1]."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ddim.core.prior import DataPrior, fit_prior
from ddim.data.dataset import ImageData

__all__ = ["as_batches", "measure_prior", "spread", "stack_images"]


def stack_images(data: ImageData, indices: Iterable[int]) -> Tensor:
    """Returns the images with these indices, [B, C, H, W] in [-1, 1]."""
    return torch.stack([data[i][0] for i in indices]).float().div(127.5).sub(1)


def as_batches(
    data: ImageData, indices: Sequence[int] | None = None, *, size: int
) -> Iterator[Tensor]:
    """Yields the images with these indices, or all, in batches of at most ``size``."""
    chosen = range(len(data)) if indices is None else indices
    for first in range(0, len(chosen), size):
        yield stack_images(data, chosen[first : first + size])


def spread(total: int, most: int) -> range:
    """Returns at most ``most`` indices, evenly spread over ``total`` images, which may be sorted by
    class."""
    return range(0, total, max(1, total // most))[:most]


def measure_prior(data: ImageData, *, most: int = 10_000) -> DataPrior:
    """Measures the mean and covariance of images, from about ``most`` of them."""
    chosen = range(0, len(data), max(1, len(data) // most))
    return fit_prior(as_batches(data, chosen, size=512))
