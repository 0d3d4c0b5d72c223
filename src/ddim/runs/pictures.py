"""Images that are encoded, and what is counted and told while a network walks through codes."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim.data.sources import check_source, load_test_images
from ddim.errors import DataError, DDIMError
from ddim.inversion.codes import fingerprint
from ddim.inversion.ddim import ConvergenceWarning
from ddim.models.facts import FoundModel
from ddim.models.images import from_pictures, open_picture
from ddim.pipelines.unconditional import UnconditionalPipeline
from ddim.runs.engine import Control

__all__ = [
    "NetworkCalls",
    "Pictures",
    "Selection",
    "check_images",
    "missing_images",
    "note_levels",
    "read_images",
    "sheet_scale",
    "unsolved_note",
    "unsolved_steps",
]


class Pictures(NamedTuple):
    """Images to encode."""

    x0: Tensor
    """In [-1, 1], [B, C, H, W], of the model's size."""
    labels: list[int] | None
    """Their classes, where the model knows classes."""
    data: dict[str, Any]
    """What a protocol says of them: where they are from, and the hash of their pixels."""

    def part(self, first: int, count: int) -> "Pictures":
        """Some of them, from number ``first`` on."""
        chosen = slice(first, first + count)
        return Pictures(self.x0[chosen], self.labels and self.labels[chosen], self.data)


class Selection(NamedTuple):
    """Which images of a data set, or which files, and how they are brought to the model's size."""

    files: Sequence[str] | None = None
    data: str | None = None
    split: str | None = None
    """Split of the data; None: test where there is one, else train."""
    first: int = 0
    number: int | None = None
    """How many, from ``first`` on; None: all."""
    resize: bool = False
    label: int | None = None
    """Class of all images; None: the data's own."""

    @classmethod
    def of(cls, request: Any) -> "Selection":
        """What a request selects: all of its files, or COUNT images of its data from SEED on."""
        files, data = getattr(request, "images", None), getattr(request, "data", None)
        size = {"resize": request.resize, "label": request.class_}
        if data is None:
            return cls(files, **size)
        return cls(None, data, request.split, request.seed, request.count, **size)


def check_images(files: Sequence[str] | None, data: str | None) -> None:
    """Checks, before a model is loaded, that images are given and there.

    Raises:
        DDIMError: If neither or both are given, or there is no such file.
    """
    if (files is None) == (data is None):
        raise DDIMError(
            "give images as files (--images a.png,b.png) or as a data set (--data), one of the two."
        )
    for file in files or ():
        open_picture(file)
    if data is not None:
        check_source(data)


def missing_images(total: int, first: int, count: int | None) -> str | None:
    """In words, which images --seed and --count ask for beyond ``total``; None where all exist."""
    if count is None:
        return f"image {first}" if 0 < first >= total else None
    return f"images {first} to {first + count - 1}" if first + count > total else None


def read_images(pipe: UnconditionalPipeline, model: FoundModel, chosen: Selection) -> Pictures:
    """Images of the model's size, from files or a data set.

    Raises:
        DDIMError: If an image does not fit, or a class is missing.
    """
    shape, labels = pipe.image_shape, None
    source: dict[str, Any] = {}
    if chosen.files is not None:
        singles = [_read_file(file, shape, resize=chosen.resize) for file in chosen.files]
        x0 = torch.cat(singles) if singles else from_pictures([], shape)
    else:
        data = str(chosen.data)
        size = shape[1:] if chosen.resize else None
        found, split = load_test_images(
            data, split=chosen.split, channels=shape[0], resolution=size
        )
        first, count = chosen.first, chosen.number
        if missing := missing_images(len(found), first, count):
            asked = (
                f"--seed and --count ask for the {missing}"
                if first
                else f"--count asks for {count}"
            )
            raise DataError(f"{data} has {len(found)} images in its split {split}, and {asked}.")
        _check_size(f"the images of {data} are", found.resolution[::-1], shape)
        items = [found[i] for i in range(first, len(found) if count is None else first + count)]
        x0 = from_pictures(np.stack([image.permute(1, 2, 0).numpy() for image, _ in items]), shape)
        labels = [label for _, label in items] if found.class_names else None
        source = {"name": data, "split": split}
    model.check_class(chosen.label, required=labels is None)
    if chosen.label is not None:
        labels = [chosen.label] * len(x0)
    return Pictures(x0, labels if model.classes else None, {**source, "images": fingerprint(x0)})


def _read_file(file: str, shape: tuple[int, int, int], *, resize: bool) -> Tensor:
    picture = open_picture(file)
    if not resize:
        _check_size(f"{file} is", picture.size, shape)
    try:
        return from_pictures(picture, shape, resize=resize)
    except DDIMError as error:
        raise DataError(f"{file}: {error}") from error


def _check_size(what: str, size: tuple[int, int], shape: tuple[int, int, int]) -> None:
    width, height = shape[:0:-1]
    if size != (width, height):
        raise DataError(
            f"{what} {size[0]}x{size[1]} and the model's images {width}x{height} (width x height); "
            "give --resize, or bring all to that size."
        )


class NetworkCalls:
    """Counts, while it is held by ``with``, for how many images a network is called, and lets the
    run stop between two calls."""

    def __init__(self, pipe: UnconditionalPipeline, control: Control) -> None:
        self.images = 0
        self._network = pipe.unet
        self._control = control

    def __enter__(self) -> "NetworkCalls":
        self._hook = self._network.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, network: object, inputs: tuple[Tensor, ...]) -> None:
        self._control.step()
        self.images += len(inputs[0])

    def each(self, count: int) -> float:
        """Calls for each of ``count`` images: whole, unless images took different numbers."""
        return self.images // count if self.images % count == 0 else self.images / count


@contextlib.contextmanager
def unsolved_steps() -> Iterator[list[str]]:
    """Collects the warnings of implicit encoders about steps that they could not solve."""
    unsolved: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        yield unsolved
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            unsolved.append(str(warning.message))
        else:
            place = warning.filename, warning.lineno
            warnings.warn_explicit(warning.message, warning.category, *place)


def unsolved_note(steps: Sequence[str]) -> str:
    """A sentence about what :func:`unsolved_steps` collected; empty for nothing."""
    if not steps:
        return ""
    count = "1 step was" if len(steps) == 1 else f"{len(steps)} steps were"
    return f" {count} not solved to the tolerance; use more steps, or method o-belm."


def note_levels(control: Control, asked: Sequence[int], used: Sequence[int]) -> None:
    """Says where codes lie, if that is not the first level that was asked for."""
    if used[0] != asked[0]:
        control.note(
            f"level {asked[0]} has zero SNR and holds nothing of an image; the codes lie at level "
            f"{used[0]}."
        )


def sheet_scale(images: NDArray[np.uint8]) -> int:
    """How far small pictures are enlarged in a sheet for people: to about 96 pixels."""
    return max(1, 96 // int(images.shape[2]))
