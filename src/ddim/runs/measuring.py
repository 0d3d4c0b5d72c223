"""Real images and metrics, as requests that measure name them."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddim.core.route import Route
from ddim.data.batches import as_batches
from ddim.data.dataset import ImageData
from ddim.data.sources import load_images
from ddim.errors import DataError, DDIMError
from ddim.evaluation.protocol import Panel, default_metrics, load_panel
from ddim.models.images import from_uint8
from ddim.runs.engine import Control
from ddim.runs.model import PixelJob, enough_memory
from ddim.runs.requests import Measured

__all__ = [
    "describe_reference",
    "note_few",
    "open_panel",
    "open_reference",
    "sample_batches",
    "shuffled_batches",
]

BATCH = 256
"""Images that pass through an extractor together. It changes a number only by rounding."""

FEW = 100
"""With fewer images, differences between models are smaller than the spread over seeds."""


def open_reference(request: Measured, shape: tuple[int, int, int], *, whose: str) -> ImageData:
    """The real images, grey or colour as the samples are; with --resize also of their size.

    Raises:
        DataError: If they are of another size than ``shape`` (C, H, W), that of the samples
            ``whose``.
    """
    size = shape[1:] if request.resize else None
    source = request.reference
    data = load_images(source, split=request.split, channels=shape[0], resolution=size)
    if data.resolution != shape[1:]:
        sizes = [f"{width}x{height}" for height, width in (shape[1:], data.resolution)]
        raise DataError(
            f"{whose} has images of {sizes[0]} and the reference {source} of {sizes[1]} (width x "
            "height), and only equal sizes compare; give --resize to bring the reference to the "
            "size of the samples."
        )
    return data


def open_panel(
    request: Measured,
    *,
    shape: tuple[int, int, int],
    device: torch.device,
    counts: Iterable[int],
    available: int,
) -> Panel:
    """The metrics that were asked for, or those that fit the images and their numbers.

    Raises:
        DDIMError: If --weights is not NAME=PATH, or as :func:`load_panel` and
            :meth:`Panel.check_counts`.
    """
    pairs = [item.partition("=") for item in request.weights]
    for name, _, path in pairs:
        if not path:
            raise DDIMError(
                f"--weights are NAME=PATH, such as inception=weights.pth; got {name!r}."
            )
    paths = {name: Path(path).expanduser() for name, _, path in pairs}
    names = default_metrics(shape) if request.metrics is None else request.metrics
    panel = load_panel(names, image_shape=shape, weights=paths, device=device)
    counts = tuple(counts)
    if request.metrics is None:
        panel = panel.fitting(min(counts), available) or panel
    panel.check_counts(counts, available)
    return panel


def note_few(
    control: Control,
    request: Measured,
    panel: Panel,
    *,
    shape: tuple[int, int, int],
    counts: Iterable[int],
    available: int,
) -> None:
    """Says which metrics are left out because images are few, and that few images say little."""
    least = min(counts)
    absent = [name for name in default_metrics(shape) if name not in panel.metrics]
    if absent and request.metrics is None:
        control.note(
            f"{least} samples against {available} real images are too few for {', '.join(absent)}."
        )
    if least < FEW:
        control.note(f"numbers of only {least} images say little; they vary much between seeds.")


def describe_reference(request: Measured, data: ImageData, panel: Panel) -> dict[str, Any]:
    """The part of a protocol that says what samples are compared with, and by which numbers."""
    resized = {"resolution": list(data.resolution)} if request.resize else {}
    return {
        "reference": {"name": data.name, "split": request.split, "images": len(data), **resized},
        "metrics": list(panel.metrics),
        "extractors": {name: extractor.weight_hash for name, extractor in panel.extractors.items()},
    }


def shuffled_batches(data: ImageData) -> Iterator[Tensor]:
    """All images of the reference, in a random order that is always the same."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return as_batches(data, order.tolist(), size=BATCH)


def sample_batches(
    job: PixelJob, route: Route, seeds: Sequence[int], *, batch_size: int, seconds: list[float]
) -> Iterator[Tensor]:
    """Images of the seeds in [-1, 1], of 256 grey levels as in a file; the seconds of each batch
    are added to ``seconds``."""
    with enough_memory(job.device, batch_size):
        for _, pictures, took in job.draw(route, seeds, batch_size=batch_size):
            seconds.append(took)
            yield from_uint8(np.stack([np.atleast_3d(picture) for picture in pictures]))
