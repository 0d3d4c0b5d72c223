"""What the commands that measure share: real images, and the metrics that are asked for."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddim.cli._model import draw, enough_memory, seed_label
from ddim.errors import DataError, DDIMError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddim.data.dataset import ImageData
    from ddim.evaluation.protocol import Panel
    from ddim.pipelines.unconditional import UnconditionalPipeline

__all__ = [
    "describe_reference",
    "draw_batches",
    "image_batches",
    "note_few",
    "open_panel",
    "open_reference",
    "shuffled_batches",
]

BATCH = 256
"""Images that pass through an extractor together; it does not change a number but for rounding."""


FEW = 100
"""Below so many images, differences between models drown in the spread over seeds."""


def open_reference(
    source: str, *, split: str, shape: tuple[int, int, int], what: str, resize: bool = False
) -> "ImageData":
    """The real images, grey or colour as the samples are; with ``resize`` of their size, too.

    Raises:
        DataError: If they are of another size than ``shape`` (C, H, W), that of the samples;
            ``what`` names those.
    """
    from ddim.data.sources import load_images

    data = load_images(
        source, split=split, channels=shape[0], resolution=shape[1:] if resize else None
    )
    if data.resolution != shape[1:]:
        told = [f"{width}x{height}" for height, width in (shape[1:], data.resolution)]
        raise DataError(
            f"{what} has images of {told[0]} and the reference {source} of {told[1]} (width x "
            "height), and only equal sizes compare; "
            "give --resize to bring the reference to the size of the samples."
        )
    return data


def open_panel(
    names: Sequence[str] | None,
    *,
    shape: tuple[int, int, int],
    weights: Sequence[str],
    device: "torch.device",
    counts: Sequence[int],
    available: int,
) -> "Panel":
    """The metrics that were asked for, or those that fit the images and their numbers; ``weights``
    are NAME=PATH.

    Raises:
        DDIMError: As :func:`~ddim.evaluation.protocol.load_panel` and
            :meth:`~ddim.evaluation.protocol.Panel.check_counts`.
    """
    from ddim.evaluation.protocol import default_metrics, load_panel

    pairs = [item.partition("=") for item in weights]
    for name, _, path in pairs:
        if not path:
            raise DDIMError(
                f"--weights are NAME=PATH, such as inception=weights.pth; got {name!r}."
            )
    paths = {name: Path(path).expanduser() for name, _, path in pairs}
    panel = load_panel(
        default_metrics(shape) if names is None else names,
        image_shape=shape,
        weights=paths,
        device=device,
    )
    if names is None:
        panel = panel.fitting(min(counts), available) or panel
    panel.check_counts(counts, available)
    return panel


def note_few(
    panel: "Panel",
    *,
    shape: tuple[int, int, int],
    counts: Sequence[int],
    available: int,
    chosen: bool,
) -> None:
    """Says in a line what few images are too few for; ``chosen``: whether the metrics were asked
    for, so that none was left out."""
    from ddim.evaluation.protocol import default_metrics

    if absent := [
        name for name in default_metrics(shape) if name not in panel.metrics and not chosen
    ]:
        print(
            f"note: {min(counts)} samples against {available} real images are too few for "
            f"{', '.join(absent)}."
        )
    if min(counts) < FEW:
        print(
            f"note: numbers of only {min(counts)} images say little; they differ much from seeds "
            "to seeds."
        )


def describe_reference(
    data: "ImageData", split: str, panel: "Panel", *, resize: bool
) -> dict[str, Any]:
    """The part of a protocol that says what samples are compared with, and by which numbers."""
    resized = {"resolution": list(data.resolution)} if resize else {}
    return {
        "reference": {"name": data.name, "split": split, "images": len(data), **resized},
        "metrics": list(panel.metrics),
        "extractors": {name: extractor.weight_hash for name, extractor in panel.extractors.items()},
    }


def image_batches(data: "ImageData", indices: Sequence[int]) -> "Iterator[Tensor]":
    """Images of a data set in [-1, 1], [B, C, H, W]."""
    import torch

    from ddim.models.images import from_uint8

    for first in range(0, len(indices), BATCH):
        images = torch.stack([data[i][0] for i in indices[first : first + BATCH]])
        yield from_uint8(images.permute(0, 2, 3, 1).numpy())


def shuffled_batches(data: "ImageData") -> "Iterator[Tensor]":
    """All images of the reference, in an order that means nothing and is always the same."""
    import torch

    return image_batches(
        data, torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    )


def draw_batches(
    pipe: "UnconditionalPipeline",
    seeds: Sequence[int],
    seconds: list[float],
    **options: Any,
) -> "Iterator[Tensor]":
    """Images of the seeds in [-1, 1], of 256 grey levels as in a file; the seconds of each batch
    are added to ``seconds``."""
    import numpy as np

    from ddim.models.images import from_uint8

    with enough_memory(pipe.device, options["batch_size"]):
        for _, pictures, took in draw(pipe, seeds, label=seed_label(pipe), **options):
            seconds.append(took)
            yield from_uint8(np.stack([np.atleast_3d(picture) for picture in pictures]))
