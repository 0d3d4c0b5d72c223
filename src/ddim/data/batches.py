"""Batches of a data set for networks and for statistics: floats in [-1, 1]."""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim.core.prior import DataPrior, fit_prior
from ddim.data.dataset import ImageData

__all__ = ["as_batches", "data_hash", "hold_out", "measure_prior", "pick", "stack_images"]


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


def pick(
    total: int, most: int, *, labels: NDArray[np.integer] | None = None, seed: int = 0
) -> list[int]:
    """Picks at most ``most`` of ``total`` images by a permutation, which is the same for a seed.

    Even steps through the data would meet data of periodic order always at the same phase.

    Args:
        total: Number of images.
        most: Number of images to pick; all, where there are fewer.
        labels: The classes, shape [total]. Each class then has its share, to within one image.
        seed: Seed of the permutation.

    Returns:
        The indices, rising.
    """
    generator, count = torch.Generator().manual_seed(seed), min(total, most)
    order = torch.randperm(total, generator=generator).numpy()
    if labels is not None:
        order = order[np.argsort(labels[order], kind="stable")]
    return sorted(int(order[i * total // count]) for i in range(count))


def hold_out(data: ImageData, most: int, *, seed: int) -> list[int]:
    """Picks images that are not trained on: at most ``most``, and at most a tenth, in each class
    its share, and never the last image of a class. They come in random order, since the loss on
    them is taken at levels that rise along the list."""
    trained: NDArray[np.integer] = np.empty(0, np.int64)
    if data.labels is not None:  # one image of each class stays
        trained = np.unique(data.labels, return_index=True)[1]
    free = np.setdiff1d(np.arange(len(data)), trained)
    labels, count = None if data.labels is None else data.labels[free], min(most, len(data) // 10)
    chosen = pick(len(free), count, labels=labels, seed=seed)
    return [int(free[i]) for i in random.Random(seed).sample(chosen, len(chosen))]


def data_hash(data: ImageData, *, most: int = 256) -> str:
    """Tells data apart: 16 hex digits of a SHA-256 over the labels, the captions, the names and
    sizes of the files, and the content of ``most`` images."""
    digest = hashlib.sha256()
    labels = [] if data.labels is None else data.labels.tolist()
    sizes = [(path.name, path.stat().st_size) for path in data.paths or ()]
    captions = None if data.captions is None else list(data.captions)
    digest.update(json.dumps([len(data), labels, captions, sizes]).encode())
    read = getattr(data.items, "raw", None)
    for index in pick(len(data), most):
        content = read(index) if read else np.ascontiguousarray(data.items[index]).tobytes()
        digest.update(content)
    return digest.hexdigest()[:16]


def measure_prior(data: ImageData, *, mirrored: bool = False, most: int = 10_000) -> DataPrior:
    """Measures the mean and covariance of images, from at most ``most`` of them; ``mirrored`` where
    half of them are mirrored, which only the mean image shows."""
    chosen = pick(len(data), most, labels=data.labels)
    batches = as_batches(data, chosen, size=512)
    return fit_prior((x + x.flip(-1)) / 2 if mirrored else x for x in batches)
