"""What a data set is: images, labels and captions by index, all of one size and mode."""

import io
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim.errors import DataError
from ddim.models.images import (
    convert_mode,
    crop_square,
    fit_picture,
    has_alpha,
    has_deep_pixels,
    open_image,
)

__all__ = [
    "Columns",
    "EncodedImages",
    "Header",
    "ImageData",
    "MixedSizes",
    "Source",
    "in_order",
    "mixed_sizes",
]

# A larger label is an identity or damage, and would make as many class names.
_MOST_CLASSES = 100_000

_COUNTS = "{0} holds {1} images but {2} {3}s; there must be one {3} per image."


class ImageItems(Protocol):
    """Images by index: uint8 arrays [H, W(, C)] or Pillow images. A closure will not do, since it
    cannot be sent to a loader's workers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Header(NamedTuple):
    """What a picture says before its pixels are decoded."""

    size: tuple[int, int]
    """Width and height, as stored: EXIF may turn it on its side."""
    is_grey: bool
    is_clear: bool
    """Whether it has an alpha channel."""
    is_deep: bool
    """Whether it has whole numbers of more than 8 bits."""
    is_moving: bool
    """Whether it has several frames or pages; photos with a preview (MPO) do not count."""

    @classmethod
    def of(cls, picture: Any) -> "Header":
        """Reads an open Pillow image."""
        is_deep, is_clear = has_deep_pixels(picture), has_alpha(picture)
        is_moving = getattr(picture, "is_animated", False) and picture.format != "MPO"
        is_grey = is_deep or picture.mode in ("1", "L", "LA", "La", "F")
        return cls(picture.size, is_grey, is_clear, is_deep, is_moving)


class EncodedImages:
    """Decodes pictures on access from the bytes that hold them; subclasses say which these are."""

    def raw(self, index: int) -> bytes:
        """The encoded picture."""
        raise NotImplementedError

    def undecodable(self, index: int, error: Exception) -> DataError:
        """The error for bytes that are no picture."""
        raise NotImplementedError

    def __getitem__(self, index: int, /) -> Any:
        from PIL import ImageOps

        return self._read(index, ImageOps.exif_transpose)

    def header(self, index: int) -> Header:
        """Reads what a picture says before its pixels."""
        header: Header = self._read(index, Header.of)
        return header

    def _read(self, index: int, take: Callable[[Any], Any]) -> Any:
        try:
            with open_image(io.BytesIO(self.raw(index))) as picture:
                return take(picture)
        except (DataError, IndexError):
            raise
        except Exception as error:
            raise self.undecodable(index, error) from error


class Source(NamedTuple):
    """The content of one split of a source, before it is brought to one size. Every function that
    opens a kind of source returns one, or raises :class:`~ddim.errors.DataError`."""

    images: ImageItems
    """They may be read or drawn on access, but must be the same each time."""
    labels: Sequence[int] | Sequence[str] | NDArray[Any] | None = None
    class_names: tuple[str, ...] | None = None
    captions: Sequence[str] | None = None
    """One per image; they may be computed on access."""
    paths: Sequence[Path] | None = None
    """The file of each image, which error messages name."""
    notes: tuple[str, ...] = ()
    """Sentences that say what was left out or assumed."""


@dataclass(frozen=True)
class Columns:
    """The columns that the caller named. None: they are found by their usual names."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None
    captions: bool = False
    """Whether captions are wanted at all: reading them may open a file for each image."""


class MixedSizes(DataError):
    """Images are of several sizes."""

    what: str
    """The sentence, without what to do."""
    size: tuple[int, int]
    """Height and width of the first image."""


def mixed_sizes(what: str, size: tuple[int, int]) -> MixedSizes:
    """The error for images of several sizes, the first of which has this height and width."""
    resize = "with --resize where a command has it"
    advice = f"bring all to one size: {resize}, in training with --resolution {min(size)}"
    error = MixedSizes(f"{what}; {advice}.")
    error.what, error.size = what, size
    return error


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sorts names as people count: the numbers in them as numbers, so that 2 is before 10."""

    def key(name: str) -> tuple[list[Any], str]:
        parts = re.split("([0-9]+)", name)  # digits stand at odd places
        for place in range(1, len(parts), 2):
            parts[place] = parts[place].lstrip("0")
        return [(len(p), p) if i % 2 else p for i, p in enumerate(parts)], name

    return tuple(sorted(names, key=key))


@dataclass(frozen=True, eq=False)
class ImageData:
    """A map-style data set of (uint8 image [C, H, W], label), all of one size and mode. The label
    is -1 if there are no labels.

    ``data[index]`` cuts out the centre where images are cut; :meth:`crop` cuts elsewhere."""

    name: str
    """The source, as the user named it."""
    items: ImageItems
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None
    captions: Sequence[str] | None
    """One per image; None if none were asked for."""
    paths: Sequence[Path] | None
    channels: int
    """1 for grey, 3 for colour."""
    resolution: tuple[int, int]
    """Height and width."""
    resize: bool
    center_crop: bool
    notes: tuple[str, ...] = ()
    """Sentences that say what was found, left out and assumed, for a person to read once."""

    @classmethod
    def of_source(
        cls,
        name: str,
        source: Source,
        *,
        resolution: int | tuple[int, int] | None = None,
        channels: int | None = None,
        center_crop: bool = False,
    ) -> "ImageData":
        """Checks a source; its first image decides what the options leave open."""
        items, captions = source.images, source.captions
        if len(items) == 0:
            raise DataError(f"{name} holds no images.")
        if captions is not None and len(captions) != len(items):
            raise DataError(_COUNTS.format(name, len(items), len(captions), "caption"))
        labels, class_names = _number_labels(name, source.labels, source.class_names, len(items))
        first = items[0]
        if isinstance(first, np.ndarray):
            height, width = first.shape[:2]
            grey = first.ndim == 2 or first.shape[2] == 1
        else:
            width, height = first.size
            grey = Header.of(first).is_grey
        if isinstance(resolution, tuple):
            height, width = resolution
        elif resolution or center_crop:
            height = width = resolution or min(height, width)
        channels, size, resize = channels or (1 if grey else 3), (height, width), bool(resolution)
        facts = (labels, class_names, captions, source.paths, channels, size)
        return cls(name, items, *facts, resize=resize, center_crop=center_crop, notes=source.notes)

    @property
    def empty_classes(self) -> tuple[int, ...]:
        """The classes without images, which labels from 1 to 5 or a part of a set leave."""
        if self.labels is None:
            return ()
        return tuple(sorted(set(range(len(self.class_names or ()))) - set(self.labels.tolist())))

    def with_classes(self, names: Sequence[str]) -> "ImageData":
        """Returns the same images with the numbers that their classes have in ``names``.

        Raises:
            DataError: If a class is not among them.
        """
        own, numbers = self.class_names or (), {name: i for i, name in enumerate(names)}
        if unknown := [name for name in own if name not in numbers]:
            raise DataError(
                f"{self.name} has the class {unknown[0]!r}, and the model knows "
                f"{', '.join(names[:20])}; rename the classes, or add --from-scratch."
            )
        table = np.array([numbers[name] for name in own], np.int64)
        labels = None if self.labels is None else table[self.labels]
        return replace(self, labels=labels, class_names=tuple(names))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._item(index, None)

    def crop(self, index: int, seed: int) -> tuple[Tensor, int]:
        """Returns an image as ``data[index]`` does, cut at a place that follows from the seed."""
        draw = random.Random(seed)
        return self._item(index, (draw.random(), draw.random()))

    def _item(self, index: int, place: tuple[float, float] | None) -> tuple[Tensor, int]:
        image = self.items[index]
        label = -1 if self.labels is None else int(self.labels[index])
        if isinstance(image, np.ndarray):
            image = image[..., None] if image.ndim == 2 else image
            if image.shape == (*self.resolution, self.channels):
                return torch.from_numpy(image.transpose(2, 0, 1).copy()), label
            image = image[..., 0] if image.shape[2] == 1 else image
        return torch.from_numpy(self._fitted(image, index, place)), label

    def _describe(self, index: int) -> str:
        return f"image {index} of {self.name}" if self.paths is None else str(self.paths[index])

    def _fitted(
        self, image: Any, index: int, place: tuple[float, float] | None
    ) -> NDArray[np.uint8]:
        """Converts mode and size with Pillow, into a new array [C, H, W]."""
        from PIL import Image

        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        try:
            picture = convert_mode(picture, self.channels)
        except DataError as error:
            raise DataError(f"{self._describe(index)}: {error}") from None
        height, width = self.resolution
        if self.resize:
            picture = fit_picture(picture, height, width, place=place)
        elif self.center_crop:
            picture = crop_square(picture, place=place)
        if picture.size != (width, height):
            raise mixed_sizes(
                f"{self._describe(index)} is {picture.width}x{picture.height} and the first is "
                f"{width}x{height} (width x height)",
                (height, width),
            )
        array = np.array(picture, dtype=np.uint8)
        return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def _number_labels(
    name: str,
    labels: Sequence[int] | Sequence[str] | NDArray[Any] | None,
    class_names: tuple[str, ...] | None,
    count: int,
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Checks labels, and numbers those that are words. Labels that are all -1, as in test sets of
    the hub, count as no labels."""
    if labels is None:
        return None, None
    array = np.asarray(labels)
    if array.ndim == 1 and len(array) != count:
        raise DataError(_COUNTS.format(name, count, len(array), "label"))
    if array.ndim == 1 and array.dtype.kind == "U":
        words, array = np.unique(array, return_inverse=True)
        class_names = in_order(map(str, words))
        numbers = {class_name: number for number, class_name in enumerate(class_names)}
        array = np.array([numbers[str(word)] for word in words], np.int64)[array]
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise DataError(
            f"labels of {name} must be whole numbers, one per image; got {array.dtype} of shape "
            f"{list(array.shape)}."
        )
    if (array == -1).all():
        return None, None
    limit = _MOST_CLASSES if class_names is None else len(class_names)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= limit:
        got = low if low < 0 else high
        raise DataError(f"labels of {name} must lie in 0..{limit - 1}; got {got}.")
    return array.astype(np.int64), class_names or tuple(str(i) for i in range(high + 1))
