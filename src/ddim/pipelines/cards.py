"""What a model's folder knows beside its parts, kept by a pipeline that was opened from it:
guidance and how the weights were trained (``card.json``), and what its images look like
(``prior.json``). It is saved along as long as the weights are those that it describes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim.files import replacing
from ddim.pipelines.networks import weights_of

__all__ = ["keep_card", "save_card"]

_FILES = ("card.json", "prior.json")
_PARTS = ("unet", "vae", "text_encoder")
_PROBED = 16
"""Numbers of each weight that tell whether it was changed."""

Marks = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Card:
    files: Mapping[str, bytes]
    marks: Marks


def keep_card(pipe: Any, folder: Path, given: Collection[str]) -> None:
    """Keeps what a folder knows of a pipeline that was opened from it, unless one of the parts was
    given in place of the folder's."""
    found = {name: folder / name for name in _FILES if (folder / name).is_file()}
    if found and not set(_PARTS) & set(given):
        files = {name: path.read_bytes() for name, path in found.items()}
        pipe._card = _Card(files, _marks(pipe))


def save_card(pipe: Any, directory: str | Path) -> None:
    """Writes those files into a folder that a pipeline is saved to, unless its weights are others
    by now; another type of the same weights is none."""
    card, folder = getattr(pipe, "_card", None), Path(directory)
    if card is None or folder.is_file() or not _are_same(card.marks, _marks(pipe)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in card.files.items():
        with replacing(folder / name) as partial:
            partial.write_bytes(content)


def _marks(pipe: Any) -> Marks:
    """A few numbers of each weight of a pipeline's networks, on the CPU."""
    marks: Marks = {}
    for part in _PARTS:
        if isinstance(network := getattr(pipe, part, None), nn.Module):
            for name, weight in weights_of(network).items():
                flat = weight.detach().reshape(-1)
                few = flat[:: max(1, flat.numel() // _PROBED)]
                marks[f"{part}.{name}"] = few.to("cpu", torch.float32, copy=True)
    return marks


def _are_same(before: Marks, now: Marks) -> bool:
    """Whether these are the same weights, perhaps rounded to a smaller type since."""
    if before.keys() != now.keys():
        return False
    return any(
        all(torch.equal(before[name].to(dtype), now[name].to(dtype)) for name in before)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    )
