"""What extractors leave of some images, as files: parts of a measurement that add up to it."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddim.errors import DataError
from ddim.evaluation.metrics import Statistics
from ddim.evaluation.protocol import Collected, Panel, Sketch

__all__ = ["load_collected", "save_collected"]


def save_collected(collected: Collected, path: Path, *, first: int) -> None:
    """Writes the sketches of a part of a stream of images.

    Args:
        collected: Of images ``first`` to ``first + collected.count - 1``, counted from 0.
        path: The file, of safetensors: for each extractor and piece the number of its images and
            what the metrics need of them.
        first: The place of the first image in the whole stream.
    """
    tensors: dict[str, Tensor] = {}
    for extractor, start, sketch in collected.pieces():
        name = f"{extractor}/{first + start}"
        tensors[f"{name}/count"] = torch.tensor(sketch.count)
        if sketch.statistics is not None:
            tensors[f"{name}/total"] = sketch.statistics.total
            tensors[f"{name}/outer"] = sketch.statistics.outer
        for kind in ("features", "projections"):
            if parts := getattr(sketch, kind):
                tensors[f"{name}/{kind}"] = torch.cat(parts)
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path)


def load_collected(paths: Iterable[Path], panel: Panel) -> Collected:
    """Adds up the files of all parts of a stream, in their order.

    Raises:
        DataError: If a file is damaged, or of other extractors.
    """
    whole = Collected()
    for path in paths:
        try:
            with safe_open(path, "pt") as file:  # which is no dictionary
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            pieces = sorted({(n.split("/")[0], int(n.split("/")[1])) for n in found})
            sketches = [_sketch(found, f"{name}/{start}") for name, start in pieces]
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            message = f"{path} is damaged ({error}); delete it, and it is made again."
            raise DataError(message) from error
        if {name for name, _ in pieces} != set(panel.extractors):
            raise DataError(f"{path} is of other extractors; delete it, and it is made again.")
        for (name, start), sketch in zip(pieces, sketches, strict=True):
            whole.add(name, start, sketch)
            if name == pieces[0][0]:
                whole.count += sketch.count
    return whole


def _sketch(tensors: dict[str, Tensor], name: str) -> Sketch:
    count = int(tensors[f"{name}/count"])
    statistics = None
    if f"{name}/total" in tensors:
        statistics = Statistics(count, tensors[f"{name}/total"], tensors[f"{name}/outer"])

    def of(kind: str) -> tuple[Tensor, ...]:
        key = f"{name}/{kind}"
        return (tensors[key],) if key in tensors else ()

    return Sketch(count, statistics, of("features"), of("projections"))
