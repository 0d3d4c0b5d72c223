"""Pictures of a model's size, from files or a data set, to encode them or to start from them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddim.data.batches import stack_images
from ddim.data.dataset import ImageData
from ddim.data.sources import check_source, load_test_images
from ddim.errors import DataError, DDIMError
from ddim.inversion.codes import fingerprint
from ddim.models.facts import FoundModel
from ddim.models.images import from_pictures, open_picture

__all__ = ["DataPictures", "Pictures", "Selection", "check_images", "missing_images"]
__all__ += ["open_images", "read_images"]


class Pictures(NamedTuple):
    """Images to encode."""

    x0: Tensor
    """In [-1, 1], [B, C, H, W], of the model's size."""
    labels: list[int] | None
    """Their classes, where the model knows classes."""
    data: dict[str, Any]
    """What a protocol says of them: where they are from, and the hash of their pixels."""
    notes: tuple[str, ...] = ()
    """What a person should read of them."""

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
    label: int | str | None = None
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


class DataPictures(NamedTuple):
    """Images of a data set to encode, which are read in parts."""

    images: ImageData
    places: range
    """Their numbers in the data set."""
    source: dict[str, Any]
    """Where they are from: the name and the split."""
    label: int | None
    """Class of all; None: the data's own."""
    has_labels: bool
    """Whether the model knows classes."""

    def read(self, places: Sequence[int]) -> tuple[Tensor, list[int] | None]:
        """The images with these numbers, and their classes where the model knows classes."""
        labels, own = None, self.images.labels
        if self.has_labels and self.label is not None:
            labels = [self.label] * len(places)
        elif self.has_labels and own is not None:
            labels = own[list(places)].tolist()
        return stack_images(self.images, places), labels


def open_images(chosen: Selection, shape: tuple[int, int, int], model: FoundModel) -> DataPictures:
    """Opens a data set whose images are of the model's ``shape`` (C, H, W).

    Raises:
        DDIMError: If the images do not fit, there are too few, or a class is missing.
    """
    data, first, count = str(chosen.data), chosen.first, chosen.number
    size = shape[1:] if chosen.resize else None
    found, split = load_test_images(data, split=chosen.split, channels=shape[0], resolution=size)
    if missing := missing_images(len(found), first, count):
        asked = (
            f"--seed and --count ask for the {missing}" if first else f"--count asks for {count}"
        )
        raise DataError(f"{data} has {len(found)} images in its split {split}, and {asked}.")
    _check_size(f"the images of {data} are", found.resolution[::-1], shape)
    label = model.find_class(chosen.label, required=not found.class_names)
    places, source = range(len(found))[first:], {"name": data, "split": split}
    return DataPictures(found, places[:count], source, label, bool(model.classes))


def read_images(chosen: Selection, shape: tuple[int, int, int], model: FoundModel) -> Pictures:
    """Images of the model's ``shape`` (C, H, W), from files or a data set.

    Raises:
        DDIMError: If an image does not fit, or a class is missing.
    """
    if chosen.files is None:
        opened = open_images(chosen, shape, model)
        x0, labels = opened.read(opened.places)
        data = {**opened.source, "images": fingerprint(x0)}
        return Pictures(x0, labels, data, opened.images.notes)
    singles = [_read_file(file, shape, resize=chosen.resize) for file in chosen.files]
    x0 = torch.cat(singles) if singles else from_pictures([], shape)
    label = model.find_class(chosen.label, required=True)
    labels = None if label is None or not model.classes else [label] * len(x0)
    return Pictures(x0, labels, {"images": fingerprint(x0)})


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
