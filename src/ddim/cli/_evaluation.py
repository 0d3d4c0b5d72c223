"""What the commands that measure share: real images, and the metrics that are asked for."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddim.cli._model import draw, enough_memory, seed_label
from ddim.errors import DataError, DDIMError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddim.evaluation.protocol import Panel
    from ddim.pipelines import UnconditionalPipeline
    from ddim.training.data import ImageData

__all__ = ["describe_reference", "draw_batches", "image_batches", "open_panel", "open_reference", "shuffled_batches"]

BATCH = 256
"""Images that pass through an extractor together; it does not change a number but for rounding."""


def open_reference(source: str, *, split: str, shape: tuple[int, int, int], what: str) -> "ImageData":
    """The real images, grey or colour as the samples are.

    Raises:
        DataError: If they are of another size than ``shape`` (C, H, W), that of the samples; ``what`` names those.
    """
    from ddim.training.data import load_images

    data = load_images(source, split=split, channels=shape[0])
    if data.resolution != shape[1:]:
        told = ["x".join(map(str, size)) for size in (shape[1:], data.resolution)]
        raise DataError(
            f"{what} has images of {told[0]} and the reference {source} of {told[1]}; resize one of them, for only equal sizes compare."
        )
    return data


def open_panel(names: Sequence[str] | None, *, shape: tuple[int, int, int], weights: Sequence[str], device: "torch.device") -> "Panel":
    """The metrics that were asked for, or those that fit the images; ``weights`` are NAME=PATH."""
    from ddim.evaluation.protocol import default_metrics, load_panel

    pairs = [item.partition("=") for item in weights]
    for name, _, path in pairs:
        if not path:
            raise DDIMError(f"--weights are NAME=PATH, such as inception=weights.pth; got {name!r}.")
    paths = {name: Path(path).expanduser() for name, _, path in pairs}
    return load_panel(default_metrics(shape) if names is None else names, image_shape=shape, weights=paths, device=device)


def describe_reference(data: "ImageData", split: str, panel: "Panel") -> dict[str, Any]:
    """The part of a protocol that says what samples are compared with, and by which numbers."""
    return {
        "reference": {"name": data.name, "split": split, "images": len(data)},
        "metrics": list(panel.metrics),
        "extractors": {name: extractor.weight_hash for name, extractor in panel.extractors.items()},
    }


def image_batches(data: "ImageData", indices: Sequence[int]) -> "Iterator[Tensor]":
    """Images of a data set in [-1, 1], [B, C, H, W]."""
    import torch

    from ddim.images import from_uint8

    for first in range(0, len(indices), BATCH):
        images = torch.stack([data[i][0] for i in indices[first : first + BATCH]])
        yield from_uint8(images.permute(0, 2, 3, 1).numpy())


def shuffled_batches(data: "ImageData") -> "Iterator[Tensor]":
    """All images of the reference, in an order that means nothing and is always the same."""
    import torch

    return image_batches(data, torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist())


def draw_batches(
    pipe: "UnconditionalPipeline",
    seeds: Sequence[int],
    seconds: list[float],
    **options: Any,  # noqa: ANN401 - of ddim.cli._model.draw
) -> "Iterator[Tensor]":
    """Images of the seeds in [-1, 1], of 256 grey levels as in a file; the seconds of each batch are added to ``seconds``."""
    import numpy as np

    from ddim.images import from_uint8

    with enough_memory(pipe.device, options["batch_size"]):
        for _, pictures, took in draw(pipe, seeds, label=seed_label(pipe), **options):
            seconds.append(took)
            yield from_uint8(np.stack([np.atleast_3d(picture) for picture in pictures]))
