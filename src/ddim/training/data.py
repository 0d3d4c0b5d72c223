"""Where training images come from: folders, arrays, IDX files, parquet, the hub, and two sets that need no path.

Every source becomes an :class:`ImageData`: a map-style data set of (uint8 image [C, H, W], label). Arrays stay arrays in
memory; files are decoded when they are asked for.
"""

import gzip
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim.errors import DataError

__all__ = ["FASHION_MNIST_CLASSES", "ImageData", "load_images", "read_idx"]

FASHION_MNIST_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts it
FASHION_MNIST_HUB = "zalando-datasets/fashion_mnist"

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_IDX_PREFIX = {"train": "train", "test": "t10k"}


class _Shape(TypedDict):
    resolution: int | None
    channels: int | None


class ImageData(Protocol):
    """Images and labels by index."""

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

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A uint8 image [C, H, W] and its label; -1 where there are none."""
        ...


def load_images(
    source: str,
    *,
    split: str = "train",
    resolution: int | None = None,
    channels: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageData:
    """Opens a data set.

    Args:
        source: A folder of images (class names from its subfolders, if the images lie there), a ``.npz``, IDX files (the
            folder or the images file), a ``.parquet`` file or a folder of them, ``digits``, ``fashion-mnist``, or a hub
            dataset id.
        split: ``train``, ``test``, or whatever the source has.
        resolution: Resize the shorter side to this and cut out the centre square. None: all images must have one size.
        channels: 1 grey, 3 colour (alpha over white). None: as the first image.
        image_column: Column of parquet or hub data; None: the first one that holds images.
        label_column: Column of labels; None: ``label``, ``labels``, ``fine_label`` or ``class`` if there is one.

    Returns:
        The data set.

    Raises:
        DataError: If the source is missing, damaged, or of an unusable shape; the message says what to do.
    """
    shape = _Shape(resolution=resolution, channels=channels)
    if source == "digits":
        return _Images.of_arrays(source, *_digits(split), tuple("0123456789"), **shape)
    if source == "fashion-mnist":
        folder = Path(os.environ.get("DDIM_FASHION_MNIST", FASHION_MNIST_FOLDER))
        if folder.is_dir():
            return _Images.of_arrays(source, *_read_idx_folder(folder, split), FASHION_MNIST_CLASSES, **shape)
        return _from_hub(source, FASHION_MNIST_HUB, split, image_column, label_column, **shape)
    path = Path(source)
    if path.suffix == ".npz":
        return _Images.of_arrays(source, *_read_npz(path, split), None, **shape)
    if "idx3-ubyte" in path.name:
        images = read_idx(path)
        beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        return _Images.of_arrays(source, images, read_idx(beside) if beside.exists() and beside != path else None, None, **shape)
    if path.suffix == ".parquet" or (path.is_dir() and next(path.glob("*.parquet"), None)):
        files = [str(path)] if path.is_file() else sorted(map(str, path.glob("*.parquet")))
        return _from_columns(source, _open_dataset("parquet", source, data_files=files, split="train"), image_column, label_column, **shape)
    if path.is_dir():
        if next(path.glob("*idx3-ubyte*"), None):
            return _Images.of_arrays(source, *_read_idx_folder(path, split), None, **shape)
        return _from_folder(source, path, **shape)
    if path.exists():
        raise DataError(
            f"{source} is not a data set this reads; give a folder of images, a .npz, IDX files, a .parquet, or a hub dataset id."
        )
    if source.startswith((".", "/", "~")) or path.suffix or source.count("/") > 1 or not source:
        raise DataError(f"there is no data at {source!r}; check the path.")
    return _from_hub(source, source, split, image_column, label_column, **shape)


@dataclass(frozen=True, eq=False)
class _Images:
    """A data set as a list of images behind a function, brought to one size and number of channels."""

    name: str
    count: int
    fetch: Callable[[int], Any]
    """Index to an array [H, W(, C)] or a PIL image."""
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None
    channels: int
    resolution: tuple[int, int]
    resize: bool

    @classmethod
    def of_arrays(
        cls,
        name: str,
        images: NDArray[Any],
        labels: NDArray[Any] | None,
        class_names: tuple[str, ...] | None,
        *,
        resolution: int | None,
        channels: int | None,
    ) -> "_Images":
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3, 4)):
            raise DataError(
                f"images in {name} must be uint8 of shape [N, H, W] or [N, H, W, C] with 1, 3 or 4 channels; "
                f"got {images.dtype} of shape {list(images.shape)}."
            )
        return cls.build(name, len(images), lambda i: images[i], labels, class_names, resolution=resolution, channels=channels)

    @classmethod
    def build(
        cls,
        name: str,
        count: int,
        fetch: Callable[[int], Any],
        labels: Sequence[int] | NDArray[Any] | None,
        class_names: tuple[str, ...] | None,
        *,
        resolution: int | None,
        channels: int | None,
    ) -> "_Images":
        if count == 0:
            raise DataError(f"{name} holds no images.")
        checked = None if labels is None else np.asarray(labels, dtype=np.int64)
        if checked is not None and len(checked) != count:
            raise DataError(f"{name} holds {count} images but {len(checked)} labels; there must be one label an image.")
        if checked is not None and class_names is None:
            class_names = tuple(str(i) for i in range(int(checked.max()) + 1))
        first = np.asarray(fetch(0))
        found = 1 if first.ndim == 2 or first.shape[2] == 1 else 3
        size = (resolution, resolution) if resolution else (first.shape[0], first.shape[1])
        return cls(
            name, count, fetch, checked, class_names if checked is not None else None, channels or found, size, resolution is not None
        )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.fetch(index)
        label = -1 if self.labels is None else int(self.labels[index])
        if (
            isinstance(image, np.ndarray)
            and image.shape[:2] == self.resolution
            and (image.ndim == 2 or image.shape[2] == 1)
            and self.channels == 1
        ):
            return torch.from_numpy(np.array(image)).reshape(1, *self.resolution), label
        return torch.from_numpy(self._shaped(image, index).copy()), label

    def _shaped(self, image: Any, index: int) -> NDArray[np.uint8]:  # noqa: ANN401 - an array or a PIL image
        """Converts mode and size with Pillow: [C, H, W]."""
        from PIL import Image

        picture = (
            image
            if isinstance(image, Image.Image)
            else Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
        )
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        height, width = self.resolution
        if self.resize and picture.size != (width, height):
            scale = height / min(picture.size)
            grown = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
            picture = picture.resize(grown, Image.Resampling.LANCZOS)
            left, top = (grown[0] - width) // 2, (grown[1] - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        if picture.size != (width, height):
            raise DataError(
                f"image {index} of {self.name} is {picture.height}x{picture.width} and the first is {height}x{width}; "
                f"use --resolution {min(height, width)} to bring all to one size."
            )
        array = np.asarray(picture, dtype=np.uint8)
        return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def read_idx(path: Path | str) -> NDArray[np.uint8]:
    """Reads an IDX file of bytes (MNIST's format), gzipped or not, into an array of its own shape.

    Raises:
        DataError: If the file is missing, of another type, or shorter than its header says.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an IDX file ({error}).") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of bytes: it starts with {content[:4].hex() or 'nothing'} instead of 000008.")
    ndim = content[3]
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim))
    body = content[4 + 4 * ndim :]
    if len(body) != int(np.prod(shape)):
        raise DataError(
            f"{path} is damaged: its header promises {int(np.prod(shape))} bytes of shape {list(shape)}, and it holds {len(body)}."
        )
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _read_idx_folder(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    prefix = _IDX_PREFIX.get(split, split)
    images = next(iter(sorted(folder.glob(f"{prefix}-images*idx3-ubyte*"))), None)
    if images is None:
        raise DataError(
            f"{folder} holds no images of split {split!r} ({prefix}-images-idx3-ubyte); it has splits train and test in MNIST's naming."
        )
    labels = next(iter(sorted(folder.glob(f"{prefix}-labels*idx1-ubyte*"))), None)
    return read_idx(images), None if labels is None else read_idx(labels)


def _digits(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError("the data set digits comes with scikit-learn, which is not installed; run: pip install 'ddim[train]'.") from error
    part = {"train": slice(0, 1500), "test": slice(1500, None)}.get(split)
    if part is None:
        raise DataError(f"digits has splits train and test; got {split!r}.")
    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8)[part], digits.target[part]


def _read_npz(path: Path, split: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    if not path.exists():
        raise DataError(f"there is no file {path}; check the path.")
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
            image_key = next((k for k in (f"{split}_images", "images", "arr_0") if k in names), None)
            if image_key is None:
                raise DataError(
                    f"{path} holds {', '.join(names)}, and images of split {split!r} are looked for under {split}_images, images or arr_0."
                )
            label_key = next((k for k in (f"{split}_labels", "labels") if k in names), None)
            return file[image_key], None if label_key is None else file[label_key]
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read as an .npz file ({type(error).__name__}: {error}).") from error


def _from_folder(source: str, folder: Path, *, resolution: int | None, channels: int | None) -> _Images:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file() and not p.name.startswith("."))
    if not files:
        raise DataError(f"the folder {source} holds no images ({', '.join(sorted(_SUFFIXES))}).")
    names = sorted({p.relative_to(folder).parts[0] for p in files if p.parent != folder})
    labelled = bool(names) and all(p.parent != folder for p in files)
    labels = [names.index(p.relative_to(folder).parts[0]) for p in files] if labelled else None

    def fetch(index: int) -> Any:  # noqa: ANN401 - a PIL image
        from PIL import Image

        try:
            with Image.open(files[index]) as picture:
                picture.load()
                return picture.copy()
        except Exception as error:
            raise DataError(f"{files[index]} is not an image that can be read ({error}); remove or replace it.") from error

    return _Images.build(source, len(files), fetch, labels, tuple(names) if labelled else None, resolution=resolution, channels=channels)


def _open_dataset(kind: str, source: str, **options: Any) -> Any:  # noqa: ANN401 - datasets has no types
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(f"reading {source} needs datasets, which is not installed; run: pip install 'ddim[train]'.") from error
    try:
        return datasets.load_dataset(kind, **options)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"the data set {source!r} cannot be opened: {first}") from error


def _from_hub(name: str, hub_id: str, split: str, image_column: str | None, label_column: str | None, **shape: Unpack[_Shape]) -> _Images:
    try:
        table = _open_dataset(hub_id, hub_id, split=split)
    except DataError as error:
        hint = f" Install Debian's package dataset-fashion-mnist, or put its files into a folder named by DDIM_FASHION_MNIST. ({error})"
        other = f" It is neither a path that exists nor a hub data set that can be reached now. ({error})"
        raise DataError(f"{name!r} cannot be loaded.{hint if name == 'fashion-mnist' else other}") from error
    return _from_columns(name, table, image_column, label_column, **shape)


def _from_columns(name: str, table: Any, image_column: str | None, label_column: str | None, **shape: Unpack[_Shape]) -> _Images:  # noqa: ANN401
    import datasets

    columns = list(table.column_names)
    pictures = [c for c in columns if isinstance(table.features[c], datasets.Image)] or [
        c for c in columns if c in ("image", "img", "images")
    ]
    column = image_column or next(iter(pictures), None)
    if column is None or column not in columns:
        raise DataError(
            f"{name} has columns {', '.join(columns)}, and none of them holds images; its image column must be of datasets' Image type."
        )
    if not isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image())
    label = label_column or next((c for c in ("label", "labels", "fine_label", "class") if c in columns), None)
    labels = None if label is None else np.asarray(table[label])
    feature = None if label is None else table.features[label]
    class_names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None

    def fetch(index: int) -> Any:  # noqa: ANN401 - a PIL image
        try:
            return table[index][column]
        except Exception as error:
            raise DataError(f"image {index} of {name} cannot be decoded ({error}).") from error

    return _Images.build(name, len(table), fetch, labels, class_names, resolution=shape["resolution"], channels=shape["channels"])
