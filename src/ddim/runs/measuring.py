"""What requests that measure share: real images, metrics, and samples to compare with them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.core.route import Route
from ddim.data.batches import as_batches
from ddim.data.dataset import ImageData
from ddim.data.sources import load_images
from ddim.errors import DataError, DDIMError
from ddim.evaluation.protocol import (
    Panel,
    Reference,
    collect_reference,
    default_metrics,
    load_panel,
)
from ddim.models.images import from_pil, from_uint8
from ddim.runs.model import PixelJob, enough_memory
from ddim.runs.shared_options import Measured

__all__ = ["BATCH", "MeasuringJob"]

BATCH = 256
"""Images that pass through an extractor together. It changes a number only by rounding."""

FEW = 100
"""With fewer images, differences between models are smaller than the spread over seeds."""


class MeasuringJob(PixelJob):
    """A job that compares samples with real images.

    Attributes:
        real: The real images.
        panel: The metrics.
        shape: (C, H, W) of the samples.
        counts: The numbers of samples that are measured.
    """

    request: Measured
    real: ImageData
    panel: Panel

    def open_metrics(self, shape: tuple[int, int, int], counts: Sequence[int]) -> dict[str, Any]:
        """Opens the real images and the metrics; returns the part of the protocol about them.

        Raises:
            DataError: If the real images are of another size than the samples.
            DDIMError: If --weights is not NAME=PATH, or a metric does not fit.
        """
        request, self.shape, self.counts = self.request, shape, counts
        self.real = data = self._open_real()
        self.note_all(data.notes)
        pairs = [item.partition("=") for item in request.weights]
        if wrong := [name for name, _, path in pairs if not path]:
            raise DDIMError(
                f"--weights are NAME=PATH, such as inception=weights.pth; got {wrong[0]!r}."
            )
        paths = {name: Path(path).expanduser() for name, _, path in pairs}
        names = default_metrics(shape) if request.metrics is None else request.metrics
        panel = load_panel(names, image_shape=shape, weights=paths, device=self.device)
        if request.metrics is None:
            panel = panel.fitting(min(counts), len(data)) or panel
        panel.check_counts(counts, len(data))
        self.panel = panel
        resized = {"resolution": list(data.resolution)} if request.resize else {}
        named = {"name": data.name, "split": request.split, "images": len(data)}
        return {
            "reference": {**named, **resized},
            "metrics": list(panel.metrics),
            "extractors": {name: found.weight_hash for name, found in panel.extractors.items()},
        }

    def _open_real(self) -> ImageData:
        """The real images, grey or colour as the samples are; with --resize also of their size."""
        request, (channels, *sides) = self.request, self.shape
        size = (sides[0], sides[1])
        data = load_images(
            request.reference,
            split=request.split,
            channels=channels,
            resolution=size if request.resize else None,
        )
        if data.resolution != size:
            name = self._option("model", None)
            sizes = [f"{width}x{height}" for height, width in (size, data.resolution)]
            raise DataError(
                f"{name} has images of {sizes[0]} and the reference {request.reference} of "
                f"{sizes[1]} (width x height), and only equal sizes compare; give --resize to "
                "bring the reference to the size of the samples."
            )
        return data

    def note_few(self) -> None:
        """Says which metrics are left out because images are few, and that few say little."""
        least, available = min(self.counts), len(self.real)
        absent = [name for name in default_metrics(self.shape) if name not in self.panel.metrics]
        if absent and self.request.metrics is None:
            names = ", ".join(absent)
            self.control.note(
                f"{least} samples against {available} real images are too few for {names}."
            )
        if least < FEW:
            self.control.note(
                f"numbers of only {least} images say little; they vary much between seeds."
            )

    def collect_real(self) -> Reference:
        """The statistics of the real images, in a random order that is always the same."""
        count = len(self.real)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        images = as_batches(self.real, order.tolist(), size=BATCH)
        return collect_reference(images, self.panel, available=count, counts=self.counts)

    def sample_batches(
        self,
        route: Route,
        seeds: Sequence[int],
        *,
        batch_size: int,
        seconds: list[float],
        keep: Callable[[int, Any, int | None], None] | None = None,
    ) -> Iterator[Tensor]:
        """Images of the seeds in [-1, 1], of 256 grey levels as in a file; the seconds of each
        batch are added to ``seconds``, and ``keep`` is called with each seed, its Pillow image and
        its class."""
        with enough_memory(self.device, batch_size):
            for batch, pictures, took in self.draw(route, seeds, batch_size=batch_size):
                seconds.append(took)
                if keep is not None:
                    known = self.model.labels_of(batch)
                    labels: Sequence[int | None] = known or [None] * len(batch)
                    for seed, picture, label in zip(batch, pictures, labels, strict=True):
                        keep(seed, picture, label)
                yield from_uint8(from_pil(pictures))
