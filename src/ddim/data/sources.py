"""Where training images come from: folders, arrays, IDX files, parquet, the hub, and sets that need
no path.

Every source becomes an :class:`ImageData`: a map-style data set of (uint8 image [C, H, W], label),
with a caption an image where captions are asked for. Arrays stay arrays in memory; files are
decoded when they are asked for. A data set can be sent to other processes (a loader's workers)."""

import contextlib
import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim.core.prior import DataPrior, fit_prior
from ddim.data.captions import CAPTION_COLUMNS, captions_of_files, one_caption
from ddim.errors import DataError
from ddim.models.images import convert_mode, crop_square, fit_picture

__all__ = [
    "FASHION_MNIST_CLASSES",
    "ImageData",
    "NamedSource",
    "check_source",
    "load_images",
    "load_test_images",
    "measure_prior",
    "read_idx",
    "stack_images",
]

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

FASHION_MNIST_FOLDER = (
    "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts it
)
FASHION_MNIST_HUB = "zalando-datasets/fashion_mnist"

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_FILES = {
    *_SUFFIXES,
    ".npz",
    ".npy",
    ".parquet",
    ".gz",
    ".zip",
    ".tar",
}  # never the end of a hub data set's name
_SHEETS = {
    "grid",
    "strip",
    "path",
    "sheet",
    "distance",
    "reconstruction",
    "flaws",
    "quality-evaluations",
    "quality-seconds",
}
_IDX_PREFIX = {"train": "train", "test": "t10k"}
_SPLITS = ("train", "test", "val", "valid", "validation")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
_MOST_CLASSES = (
    100_000  # a label above it is an identity or damage, and would make as many class names
)


class _NoSuchSplit(DataError):
    """The data has no split of that name."""


class _Shape(TypedDict):
    resolution: int | tuple[int, int] | None
    channels: int | None
    center_crop: bool


@dataclass(frozen=True)
class _Columns:
    """Which columns of a table are meant; None: found by their names."""

    image: str | None
    label: str | None
    caption: str | None
    captions: bool
    """Whether captions are wanted at all: reading them may take as many files as there are
    images."""


class ImageData(Protocol):
    """Images, labels and captions by index."""

    @property
    def name(self) -> str:
        """The source, as the user named it."""
        ...

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        ...

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """None where there are no labels."""
        ...

    @property
    def captions(self) -> Sequence[str] | None:
        """A caption an image, in the order of the images; None where none were asked for."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A uint8 image [C, H, W] and its label; -1 where there are none."""
        ...


class ImageItems(Protocol):
    """Images by index: arrays [H, W(, C)] of bytes, or Pillow images. Not closures, which a
    loader's workers could not be sent."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class NamedSource(NamedTuple):
    """What the function behind a source of a name of its own (:data:`_NAMED`) gives for a split."""

    images: ImageItems
    """Images by index, drawn when they are asked for, the same each time."""
    labels: Sequence[int] | NDArray[Any] | None = None
    class_names: tuple[str, ...] | None = None
    captions: Sequence[str] | None = None
    """A caption an image, by the same index; may compute it when it is asked for."""


def load_images(
    source: str,
    *,
    split: str = "train",
    resolution: int | tuple[int, int] | None = None,
    channels: int | None = None,
    center_crop: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    captions: bool = False,
    caption_column: str | None = None,
) -> ImageData:
    """Opens a data set.

    Args:
        source: A folder of images (class names from its subfolders, if the images lie there), a
            ``.npz``, IDX files (the folder or the images file), a ``.parquet`` file or a folder of
            them, ``digits``, ``fashion-mnist``, ``fashion-text`` (:mod:`ddim.data.fashion_text`),
            or a hub dataset id. A folder that is called like a named set is meant by ``./digits``.
            Grids and plots of this program, which lie beside its ``run.json``, are none of a
            folder's images.
        split: ``train``, ``test``, or whatever the source has: subfolders of these names, arrays
            ``test_images``, files ``test-*.parquet``. A source without splits is all ``train``; a
            file named by itself is what it is.
        resolution: Resize the shorter side to this and cut out the centre square; or bring to
            (height, width), resized to cover it and cut in the centre. None: all images must have
            one size.
        channels: 1 grey, 3 colour (alpha over white). None: as the first image.
        center_crop: Without ``resolution``, which crops anyway: cut out the centre square, and do
            not resize.
        image_column: Column of parquet or hub data; None: the first one that holds images.
        label_column: Column of labels; None: ``label``, ``labels``, ``fine_label`` or ``class`` if
            there is one.
        captions: Whether to read captions: of a folder from ``metadata.jsonl`` or ``metadata.csv``
            (columns ``file_name``, relative to that file, and the caption), as Hugging Face's
            imagefolder has it, else from ``NAME.txt`` beside each image; of a table from a column;
            of a ``.npz`` from an array ``captions``. Where an image has several, the first is
            taken.
        caption_column: Column of captions; None: ``text``, ``caption``, ``captions`` or ``prompt``.

    Returns:
        The data set.

    Raises:
        DataError: If the source is missing, damaged, of an unusable shape, or without the captions
            asked for; the message says what to do.
    """
    if (
        resolution is not None
        and min(resolution if isinstance(resolution, tuple) else (resolution,)) < 1
    ):
        raise DataError(f"resolution must be at least 1; got {resolution}.")
    if channels not in (None, 1, 3):
        raise DataError(f"channels must be 1 (grey) or 3 (colour); got {channels}.")
    shape = _Shape(resolution=resolution, channels=channels, center_crop=center_crop)
    data = _open(
        source, split, _Columns(image_column, label_column, caption_column, captions), **shape
    )
    if captions and data.captions is None:
        raise DataError(
            f"{source} has no captions; put metadata.jsonl (with file_name and text) or NAME.txt "
            "beside the images of a folder, "
            "or name a table's column with --caption-column."
        )
    return data


def measure_prior(data: ImageData, *, most: int = 10_000) -> DataPrior:
    """The prior of images, from at most that many, spread over the data: as many as a mean and a
    covariance need."""
    chosen = range(0, len(data), max(1, len(data) // most))
    return fit_prior(
        stack_images(data, chosen[first : first + 512]) for first in range(0, len(chosen), 512)
    )


def stack_images(data: ImageData, places: Iterable[int]) -> Tensor:
    """The images at these places, [B, C, H, W] in [-1, 1]."""
    return torch.stack([data[i][0] for i in places]).float().div(127.5).sub(1)


def _open(source: str, split: str, columns: _Columns, **shape: Unpack[_Shape]) -> "_Images":
    if source in _NAMED:
        images, labels, class_names, captions = _NAMED[source](split)
        return _Images.of_items(
            source, images, labels, class_names, captions if columns.captions else None, **shape
        )
    if source == "fashion-mnist":
        chosen = os.environ.get("DDIM_FASHION_MNIST")
        folder = Path(chosen or FASHION_MNIST_FOLDER)
        if folder.is_dir():
            return _Images.of_arrays(
                source, *_read_idx_folder(folder, split), FASHION_MNIST_CLASSES, **shape
            )
        if chosen:
            raise DataError(
                f"DDIM_FASHION_MNIST names {chosen}, which is no folder; correct it, or unset it."
            )
        return _from_hub(source, FASHION_MNIST_HUB, split, columns, **shape)
    path = check_source(source)
    if not path.exists():
        return _from_hub(source, source, split, columns, **shape)
    if path.is_dir():
        if tables := sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet")):
            return _from_parquet(source, _of_split(source, tables, split), columns, **shape)
        if next(path.glob("*idx3-ubyte*"), None):
            return _Images.of_arrays(source, *_read_idx_folder(path, split), None, **shape)
        return _from_folder(source, path, split, columns, **shape)
    if path.suffix == ".npz":
        images, labels, captions = _read_npz(path, split)
        return _Images.of_arrays(
            source, images, labels, None, captions if columns.captions else None, **shape
        )
    if "idx3-ubyte" in path.name:
        return _Images.of_arrays(source, read_idx(path), _labels_beside(path), None, **shape)
    if path.suffix == ".parquet":
        return _from_parquet(source, [path], columns, **shape)
    raise DataError(
        f"{source} is not a data set this reads; give a folder of images, a .npz, IDX files, a "
        ".parquet, or a hub dataset id."
    )


def check_source(source: str) -> Path:
    """The path that a source is, if it is one: names of sets and of hub data sets are left as they
    are.

    Raises:
        DataError: If it can only be a path, and there is nothing.
    """
    path = Path(os.path.expanduser(source))
    must_be = (
        source.startswith((".", "/", "~"))
        or path.suffix in _FILES
        or source.count("/") > 1
        or "ubyte" in path.name
    )
    if not source or (must_be and not path.exists()):
        raise DataError(f"there is no data at {source!r}; check the path.")
    return path


def load_test_images(
    source: str,
    *,
    split: str | None = None,
    resolution: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> tuple[ImageData, str]:
    """Opens the images to measure on: the split ``test`` where the data has one, else ``train``,
    which is all of undivided data.

    Args:
        source: As of :func:`load_images`.
        split: This one, and no other.
        resolution: As there.
        channels: As there.

    Returns:
        The data set, and the split that it is.

    Raises:
        DataError: As :func:`load_images`.
    """
    if split is None:
        try:
            return load_images(
                source, split="test", resolution=resolution, channels=channels
            ), "test"
        except _NoSuchSplit:
            split = "train"
    return load_images(source, split=split, resolution=resolution, channels=channels), split


@dataclass(frozen=True, eq=False)
class _Files:
    """Image files, decoded when asked for."""

    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Any:
        from PIL import Image, ImageOps

        path = self.paths[index]
        try:
            with Image.open(path) as picture:
                return ImageOps.exif_transpose(picture)  # a copy, upright as viewers show it
        except Exception as error:
            raise _not_an_image(path, error) from error

    def check_sizes(self, source: str, *, center_crop: bool) -> None:
        """Reads the header of every file, so that a stray size ends a run before it starts and not
        hours into it."""
        from PIL import Image

        first: list[int] | None = None
        for index, path in enumerate(self.paths):
            try:
                with Image.open(path) as picture:
                    size = (
                        [min(picture.size)] if center_crop else sorted(picture.size)
                    )  # sorted: EXIF may turn it on its side
            except Exception as error:
                raise _not_an_image(path, error) from error
            first = first or size
            if size != first:
                sizes = ["x".join(map(str, self[number].size)) for number in (index, 0)]
                raise DataError(
                    f"{path} is {sizes[0]} and the first image of {source} {sizes[1]} (width x "
                    f"height); {_to_one_size(min(first))}."
                )


def _to_one_size(side: int) -> str:
    return (
        "bring all to one size: with --resize where a command has it, in training with "
        f"--resolution {side}"
    )


def _not_an_image(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not an image that can be read ({error}); remove or replace it.")


@dataclass(frozen=True, eq=False)
class _Column:
    """The images of a table of ``datasets``, decoded when asked for."""

    name: str
    table: Any
    column: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int, /) -> Any:
        try:
            picture = self.table[index][self.column]
        except IndexError:
            raise
        except Exception as error:
            raise DataError(
                f"image {index} of {self.name} cannot be decoded ({error}); remove or replace it."
            ) from error
        if picture is None:
            raise DataError(f"image {index} of {self.name} is empty; remove its row.")
        return picture


@dataclass(frozen=True, eq=False)
class _Images:
    """A data set over a list of images, which it brings to one size and number of channels."""

    name: str
    items: ImageItems
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None
    captions: Sequence[str] | None
    channels: int
    resolution: tuple[int, int]
    resize: bool
    center_crop: bool

    @classmethod
    def of_arrays(
        cls,
        name: str,
        images: NDArray[Any],
        labels: NDArray[Any] | None,
        class_names: tuple[str, ...] | None,
        captions: Sequence[str] | None = None,
        **shape: Unpack[_Shape],
    ) -> "_Images":
        usable = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))
        if images.dtype != np.uint8 or not usable or 0 in images.shape[1:]:
            raise DataError(
                f"images in {name} must be uint8 of shape [N, H, W] or [N, H, W, C] with 1, 3 or 4 "
                "channels; "
                f"got {images.dtype} of shape {list(images.shape)}."
            )
        return cls.of_items(name, images, labels, class_names, captions, **shape)

    @classmethod
    def of_items(
        cls,
        name: str,
        items: ImageItems,
        labels: Sequence[int] | Sequence[str] | NDArray[Any] | None,
        class_names: tuple[str, ...] | None,
        captions: Sequence[str] | None = None,
        *,
        resolution: int | tuple[int, int] | None,
        channels: int | None,
        center_crop: bool,
    ) -> "_Images":
        if len(items) == 0:
            raise DataError(f"{name} holds no images.")
        if captions is not None and len(captions) != len(items):
            raise DataError(
                f"{name} holds {len(items)} images but {len(captions)} captions; there must be one "
                "caption an image."
            )
        numbers, class_names = _number_labels(name, labels, class_names, len(items))
        first = items[0]
        if isinstance(first, np.ndarray):
            height, width = first.shape[:2]
            grey = first.ndim == 2 or first.shape[2] == 1
        else:
            width, height = first.size
            grey = first.mode in ("1", "L", "LA", "I", "F") or first.mode.startswith("I;16")
        if isinstance(resolution, tuple):
            height, width = resolution
        elif resolution or center_crop:
            height = width = resolution or min(height, width)
        size, depth = (height, width), channels or (1 if grey else 3)
        return cls(
            name,
            items,
            numbers,
            class_names,
            captions,
            depth,
            size,
            resize=resolution is not None,
            center_crop=center_crop,
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.items[index]
        label = -1 if self.labels is None else int(self.labels[index])
        if isinstance(image, np.ndarray):
            image = image[..., None] if image.ndim == 2 else image
            if image.shape == (*self.resolution, self.channels):
                return torch.from_numpy(image.transpose(2, 0, 1).copy()), label
            image = image[..., 0] if image.shape[2] == 1 else image
        return torch.from_numpy(self._shaped(image, index)), label

    def _told(self, index: int) -> str:
        return (
            str(self.items.paths[index])
            if isinstance(self.items, _Files)
            else f"image {index} of {self.name}"
        )

    def _shaped(self, image: Any, index: int) -> NDArray[np.uint8]:
        """Converts mode and size with Pillow: a new array [C, H, W]."""
        from PIL import Image

        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        try:
            picture = convert_mode(picture, self.channels)
        except DataError as error:
            raise DataError(f"{self._told(index)}: {error}") from None
        height, width = self.resolution
        if self.resize:
            picture = fit_picture(picture, height, width)
        elif self.center_crop:
            picture = crop_square(picture)
        if picture.size != (width, height):
            raise DataError(
                f"{self._told(index)} is {picture.width}x{picture.height} and the first is "
                f"{width}x{height} (width x height); "
                f"{_to_one_size(min(height, width))}."
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
    the hub, are none."""
    if labels is None:
        return None, None
    array = np.asarray(labels)
    if array.ndim == 1 and len(array) != count:
        raise DataError(
            f"{name} holds {count} images but {len(array)} labels; there must be one label an "
            "image."
        )
    if array.ndim == 1 and array.dtype.kind == "U":
        words, numbers = np.unique(array, return_inverse=True)
        array, class_names = numbers, tuple(str(w) for w in words)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise DataError(
            f"labels of {name} must be whole numbers, one an image; got {array.dtype} of shape "
            f"{list(array.shape)}."
        )
    if (array == -1).all():
        return None, None
    limit = _MOST_CLASSES if class_names is None else len(class_names)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= limit:
        raise DataError(
            f"labels of {name} must lie in 0..{limit - 1}; got {low if low < 0 else high}."
        )
    return array.astype(np.int64), class_names or tuple(str(i) for i in range(high + 1))


def read_idx(path: Path | str) -> NDArray[np.uint8]:
    """Reads an IDX file of bytes (MNIST's format), gzipped or not, into an array of its own shape.

    Raises:
        DataError: If the file is missing, of another type, or not as long as its header says.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; check the path.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as an IDX file ({error}); fetch it again."
        ) from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(
            f"{path} is not an IDX file of bytes: it starts with {content[:4].hex() or 'nothing'} "
            "instead of 000008."
        )
    ndim = content[3]
    header, body = content[4 : 4 + 4 * ndim], content[4 + 4 * ndim :]
    if len(header) != 4 * ndim:
        raise DataError(
            f"{path} is damaged: it ends within its header of {4 + 4 * ndim} bytes; fetch it again."
        )
    shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(0, 4 * ndim, 4))
    if len(body) != math.prod(shape):
        raise DataError(
            f"{path} is damaged: its header promises {math.prod(shape)} bytes of shape "
            f"{list(shape)}, and it holds {len(body)}; "
            "fetch it again."
        )
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _read_idx_folder(
    folder: Path, split: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    prefix = _IDX_PREFIX.get(split, split)
    images = next(iter(sorted(folder.glob(f"{prefix}-images*idx3-ubyte*"))), None)
    if images is None:
        there = ", ".join(sorted(p.name for p in folder.glob("*idx3-ubyte*"))) or "no images at all"
        raise _NoSuchSplit(
            f"{folder} holds no images of split {split!r}, which would be "
            f"{prefix}-images-idx3-ubyte[.gz]; it holds {there}."
        )
    return read_idx(images), _labels_beside(images)


def _labels_beside(images: Path) -> NDArray[np.uint8] | None:
    """Reads the labels that MNIST's naming puts beside an images file, whichever of the two is
    gzipped."""
    plain = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    found = next(
        (p for p in (images.with_name(plain), images.with_name(f"{plain}.gz")) if p.exists()), None
    )
    return None if found is None else read_idx(found)


def _digits(split: str) -> NamedSource:
    part = {"train": slice(0, 1500), "test": slice(1500, None)}.get(split)
    if part is None:
        raise _NoSuchSplit(f"digits has splits train and test; got {split!r}.")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError(
            "the data set digits comes with scikit-learn, which is not installed; run: pip install "
            "'ddim[train]'."
        ) from error
    digits = load_digits()
    return NamedSource(
        np.round(digits.images * (255 / 16)).astype(np.uint8)[part],
        digits.target[part],
        tuple("0123456789"),
    )


def _fashion_text(split: str) -> NamedSource:
    from ddim.data.fashion_text import FashionText

    garments = load_images("fashion-mnist", split=split)
    pairs = [garments[i] for i in range(len(garments))]
    labels = np.array([label for _, label in pairs])
    images = FashionText.of_garments(np.stack([image[0].numpy() for image, _ in pairs]), labels)
    return NamedSource(images, labels, FASHION_MNIST_CLASSES, images.captions)


# Sets with a name and no path, each a function of the split's name; they import what they need when
# they are called.
_NAMED: dict[str, Callable[[str], NamedSource]] = {"digits": _digits, "fashion-text": _fashion_text}


def _read_npz(path: Path, split: str) -> tuple[NDArray[Any], NDArray[Any] | None, list[str] | None]:
    try:
        with (
            path.open("rb") as raw,
            np.load(raw, allow_pickle=False) as file,
        ):  # opened here: numpy leaves a damaged file open
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise TypeError("it holds a single array")
            names = list(file.files)
            images_key, labels_key = _npz_keys(path, names, split)
            images, labels = file[images_key], file[labels_key] if labels_key in names else None
            captions_key = images_key.replace(
                "images", "captions"
            )  # arrays without names have none
            captions = (
                file[captions_key] if captions_key != images_key and captions_key in names else None
            )
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as an .npz file of plain arrays ({error}); write it again with "
            "numpy.savez."
        ) from error
    if (
        labels_key == "arr_1"
        and labels is not None
        and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1])
    ):
        labels = None  # the arrays have no names, and the second is something else
    if captions is not None and (captions.ndim != 1 or captions.dtype.kind != "U"):
        raise DataError(
            f"{captions_key} of {path} must be text, one an image; got {captions.dtype} of shape "
            f"{list(captions.shape)}."
        )
    return images, labels, None if captions is None else captions.tolist()


def _npz_keys(path: Path, names: list[str], split: str) -> tuple[str, str]:
    """Names the arrays of images and of labels (which need not be there)."""
    splits = [n.removesuffix("_images") for n in names if n.endswith("_images")]
    if split in splits:
        return f"{split}_images", f"{split}_labels"
    if splits:
        raise _no_such_split(str(path), splits, split)
    keys = next((k for k in (("images", "labels"), ("arr_0", "arr_1")) if k[0] in names), None)
    if keys is None:
        raise DataError(
            f"{path} holds {', '.join(names) or 'no arrays'}; its images must be called "
            f"{split}_images, images or arr_0."
        )
    if split != "train":
        raise _no_such_split(str(path), [], split)
    return keys


def _no_such_split(source: str, splits: Iterable[str], split: str) -> _NoSuchSplit:
    there = ", ".join(sorted(splits))
    has = f"it has {there}" if there else "it is not divided into splits, so leave out --split"
    return _NoSuchSplit(f"{source} has no split {split!r}; {has}.")


def _from_folder(
    source: str, folder: Path, split: str, columns: _Columns, **shape: Unpack[_Shape]
) -> _Images:
    found = [
        (p, p.relative_to(folder).parts) for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES
    ]
    ours = {parent for parent in {p.parent for p, _ in found} if _is_ours(parent)}
    found = [(p, parts) for p, parts in found if p.parent not in ours or p.stem not in _SHEETS]
    files = sorted(
        (p, parts)
        for p, parts in found
        if not any(part.startswith(".") for part in parts) and p.is_file()
    )
    if not files:
        raise DataError(f"the folder {source} holds no images ({', '.join(sorted(_SUFFIXES))}).")
    tops = {parts[0] if len(parts) > 1 else "" for _, parts in files}
    if tops <= set(_SPLITS):
        if split not in tops:
            raise _no_such_split(source, tops, split)
        files = [(p, parts[1:]) for p, parts in files if parts[0] == split]
        tops = {parts[0] if len(parts) > 1 else "" for _, parts in files}
    elif split != "train":
        raise _no_such_split(source, [], split)
    names = None if "" in tops else tuple(sorted(tops))
    labels = None if names is None else [names.index(parts[0]) for _, parts in files]
    items = _Files([p for p, _ in files])
    captions = (
        captions_of_files(source, folder, items.paths, columns.caption)
        if columns.captions
        else None
    )
    if shape["resolution"] is None:
        items.check_sizes(source, center_crop=shape["center_crop"])
    return _Images.of_items(source, items, labels, names, captions, **shape)


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds results of this program's commands, whose grids and plots are no
    images of it."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(record, dict)
        and isinstance(record.get("protocol"), dict)
        and "command" in record["protocol"]
    )


def _of_split(source: str, tables: list[Path], split: str) -> list[Path]:
    """Picks the parquet files of a split by the start of their names, as the hub writes them
    (``test-00000-of-00001.parquet``)."""
    starts = {p: p.stem.split("-")[0] for p in tables}
    chosen = [p for p in tables if starts[p] == split]
    splits = set(starts.values()) & set(_SPLITS)
    if not chosen and (splits or split != "train"):
        raise _no_such_split(source, splits, split)
    return chosen or tables


def _open_dataset(kind: str, source: str, **options: Any) -> Any:
    """Calls ``datasets.load_dataset``; whatever that raises comes through."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            f"reading {source} needs datasets, which is not installed; run: pip install "
            "'ddim[train]'."
        ) from error
    return datasets.load_dataset(kind, **options)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _from_parquet(
    source: str, files: list[Path], columns: _Columns, **shape: Unpack[_Shape]
) -> _Images:
    try:
        table = _open_dataset("parquet", source, data_files=[str(p) for p in files], split="train")
    except DataError:
        raise
    except Exception as error:
        reason = _first_line(error.__cause__ or error)
        raise DataError(
            f"{source} cannot be read as parquet ({reason}); check the file, or write it again."
        ) from error
    return _from_columns(source, table, columns, **shape)


def _from_hub(
    name: str, hub_id: str, split: str, columns: _Columns, **shape: Unpack[_Shape]
) -> _Images:
    unreachable = None
    try:
        with _without_retries(hub_id) as unreachable:
            table = _open_dataset(hub_id, name, split=split)
    except DataError:
        raise
    except Exception as error:
        reason = _first_line(error)
        if "unknown split" in reason.lower():
            raise _NoSuchSplit(
                f"the hub data set {hub_id} has no split {split!r} ({reason})."
            ) from error
        if _is_unreachable(error):
            reason = _first_line(unreachable or error)
            if name == "fashion-mnist":
                missing = f"{name!r} is not on this machine"
                advice = (
                    "install Debian's package dataset-fashion-mnist, or name a folder with its "
                    "four files in DDIM_FASHION_MNIST"
                )
            else:
                missing = f"there is no folder or file {name!r} here"
                advice = "check the path if one was meant, else the network"
            raise DataError(
                f"{missing}, and the hub cannot be reached ({reason}); {advice}."
            ) from error
        if isinstance(error, FileNotFoundError):  # as datasets' DatasetNotFoundError is
            raise DataError(
                f"{name!r} is neither a path that exists nor a hub data set open to you "
                f"({reason}); check the name."
            ) from error
        raise DataError(
            f"the hub data set {hub_id} cannot be opened ({reason}); see its page on the hub."
        ) from error
    return _from_columns(name, table, columns, **shape)


def _is_unreachable(error: Exception) -> bool:
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(
        ("httpx", "requests")
    )


@contextlib.contextmanager
def _without_retries(hub_id: str) -> Iterator[Exception | None]:
    """Where the hub cannot be reached at the first try, has the libraries look into their cache
    alone, and not try on for half a minute.

    Gives the error of that try.
    """
    import huggingface_hub

    constants, unreachable = huggingface_hub.constants, None
    before = constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.HfApi().dataset_info(hub_id, timeout=10)
    except Exception as error:  # all others are told better by what follows
        unreachable = error if _is_unreachable(error) else None
    constants.HF_HUB_OFFLINE = before or unreachable is not None
    try:
        yield unreachable
    finally:
        constants.HF_HUB_OFFLINE = before


def _from_columns(name: str, table: Any, asked_for: _Columns, **shape: Unpack[_Shape]) -> _Images:
    import datasets

    columns, features = list(table.column_names), table.features
    for asked in (asked_for.image, asked_for.label, asked_for.caption):
        if asked is not None and asked not in columns:
            raise DataError(f"{name} has no column {asked!r}; it has {', '.join(columns)}.")
    typed = [c for c in columns if isinstance(features[c], datasets.Image)]
    column = asked_for.image or next(
        iter(typed + [c for c in ("image", "img", "images") if c in columns]), None
    )
    if column is None:
        raise DataError(
            f"{name} has columns {', '.join(columns)}, and none is called image or is of datasets' "
            "Image type; name it."
        )
    pictures = table.select_columns([column])
    if column not in typed:
        try:
            pictures = pictures.cast_column(column, datasets.Image())
        except Exception as error:
            raise DataError(
                f"column {column!r} of {name} does not hold images ({_first_line(error)}); name "
                "another."
            ) from error
    label = asked_for.label or next(
        (c for c in _LABEL_COLUMNS if c in columns and _is_scalar(features[c])), None
    )
    feature = None if label is None else features[label]
    class_names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    labels = None if label is None else table[label][:]
    captions = None
    caption = asked_for.caption or next((c for c in CAPTION_COLUMNS if c in columns), None)
    if asked_for.captions and caption is not None:
        captions = [
            one_caption(value, f"row {number} of column {caption!r} of {name}")
            for number, value in enumerate(table[caption][:])
        ]
    return _Images.of_items(
        name, _Column(name, pictures, column), labels, class_names, captions, **shape
    )


def _is_scalar(feature: Any) -> bool:
    """Whether a column that was not asked for can be labels: a class, a whole number or a word, not
    a list of them."""
    import datasets

    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value)
        and feature.dtype.startswith(("int", "uint", "bool", "string"))
    )
