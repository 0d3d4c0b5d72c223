"""Images in arrays: NumPy's ``.npz``, and the IDX files of MNIST."""

import gzip
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddim.data.dataset import Source
from ddim.data.splits import NoSuchSplit, choose_split, no_such_split
from ddim.errors import DataError

__all__ = ["MOST_RATIO", "open_idx", "open_idx_folder", "open_npz", "read_idx"]

MOST_RATIO = 1100
"""Bytes that a byte of DEFLATE may stand for, rounded up from 1032."""


def read_idx(path: Path | str) -> NDArray[np.uint8]:
    """Reads an IDX file of bytes (MNIST's format), gzipped or not, into an array of its own shape.

    Raises:
        DataError: If the file is missing, of another type, or not as long as its header says.
    """
    path = Path(path)
    try:
        content = _read(path)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; check the path.") from error
    except (OSError, EOFError, zlib.error) as error:
        message = f"{path} cannot be read as an IDX file ({error}); fetch it again."
        raise DataError(message) from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(
            f"{path} is not an IDX file of bytes: it starts with {content[:4].hex() or 'nothing'} "
            "instead of 000008."
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(
            f"{path} is damaged: it ends within its header of {start} bytes; fetch it again."
        )
    shape, body = struct.unpack(f">{content[3]}I", content[4:start]), content[start:]
    if len(body) != math.prod(shape):
        raise DataError(
            f"{path} is damaged: its header promises {math.prod(shape)} bytes of shape "
            f"{list(shape)}, and it holds {len(body)}; fetch it again."
        )
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _read(path: Path) -> bytes:
    """Reads a file; of a gzipped one, a byte more than its header promises at most, so that a
    promise that it cannot keep takes no memory."""
    with path.open("rb") as raw:
        if raw.read(2) != b"\x1f\x8b":
            return path.read_bytes()
        raw.seek(0)
        file = gzip.GzipFile(fileobj=raw)
        head = file.read(4)
        axes = head[3] if len(head) == 4 and head[:3] == b"\x00\x00\x08" else 0
        sides = file.read(4 * axes)
        if len(sides) < 4 * axes or not axes:
            return bytes(head + sides)
        size = math.prod(struct.unpack(f">{axes}I", sides))
        _check_claim(path, size, path.stat().st_size * MOST_RATIO)
        return bytes(head + sides + file.read(size + 1))


def _check_claim(path: Path, size: int, most: int) -> None:
    """Refuses a size that the file cannot hold, or this machine."""
    if size > most:
        raise DataError(
            f"{path} is damaged: its header promises {size} bytes, and it can hold {most} at most; "
            "fetch it again."
        )
    if size > (memory := _memory()):
        raise DataError(
            f"{path} holds {size / 2**30:.0f} GiB of numbers, and this machine has "
            f"{memory / 2**30:.0f} GiB of memory; give the images as files in a folder."
        )


def _memory() -> float:
    """Bytes of this machine's memory; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return math.inf


def open_idx(source: str, path: Path, class_names: tuple[str, ...] | None = None) -> Source:
    """Opens an IDX file of images, with the labels beside it (by MNIST's names, gzipped or not)."""
    plain = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    beside = (path.with_name(plain), path.with_name(f"{plain}.gz"))
    labels = next((read_idx(p) for p in beside if p.is_file()), None)
    return Source(_checked(source, read_idx(path)), labels, class_names)


def open_idx_folder(
    source: str, folder: Path, split: str, class_names: tuple[str, ...] | None = None
) -> Source:
    """Opens the IDX files of a split, by MNIST's names."""
    prefix = "t10k" if split == "test" else split
    found = (p for p in folder.glob(f"{prefix}-images*idx3-ubyte*") if p.is_file())
    path = min(found, default=None)
    if path is None:
        names = ", ".join(sorted(p.name for p in folder.glob("*idx3-ubyte*")))
        raise NoSuchSplit(
            f"{folder} holds no images of split {split!r}, which would be "
            f"{prefix}-images-idx3-ubyte[.gz]; it holds {names or 'no images at all'}."
        )
    return open_idx(source, path, class_names)


def open_npz(source: str, path: Path, split: str) -> Source:
    """Opens the arrays of a split, with labels and captions if it has them."""
    try:
        # Opened here, since numpy leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise TypeError("it holds a single array")
            names = list(file.files)
            images_key, labels_key = _npz_keys(path, names, split)
            _check_members(path, zipfile.ZipFile(raw))
            captions_key = images_key.replace("images", "captions")
            images = file[images_key]
            labels = file[labels_key] if labels_key in names else None
            has_captions = captions_key != images_key and captions_key in names  # arr_0 has none
            captions = file[captions_key] if has_captions else None
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as an .npz file of plain arrays ({error}); write it again with "
            "numpy.savez."
        ) from error
    if labels_key == "arr_1" and labels is not None:
        # The arrays have no names, and the second may be something else.
        is_labels = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
        labels = labels if is_labels else None
    if captions is not None and (captions.ndim != 1 or captions.dtype.kind != "U"):
        raise DataError(
            f"{captions_key} of {path} must be text, one per image; got {captions.dtype} of shape "
            f"{list(captions.shape)}."
        )
    texts = None if captions is None else captions.tolist()
    kinds = ("images", "labels", "captions")
    other = [n for n in names if n.rpartition("_")[2] not in kinds and n != images_key]
    if labels is not None:
        other = [n for n in other if n != labels_key]
    notes = (f"{path} also holds {', '.join(other)}, which is not read.",) if other else ()
    return Source(_checked(source, images), labels, captions=texts, notes=notes)


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Checks the sizes that an archive and the headers of its arrays claim, before any memory is
    taken for them."""
    for member in archive.infolist():
        _check_claim(path, member.file_size, member.compress_size * MOST_RATIO)
        if not member.filename.endswith(".npy"):
            continue
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0}
            shape, _, dtype = read.get(version, np.lib.format.read_array_header_2_0)(file)
            _check_claim(path, math.prod(shape) * dtype.itemsize, member.file_size)


def _npz_keys(path: Path, names: list[str], split: str) -> tuple[str, str]:
    """Names the arrays of images and of labels (which need not be there)."""
    splits = [n.removesuffix("_images") for n in names if n.endswith("_images")]
    if split in splits:
        return f"{split}_images", f"{split}_labels"
    if splits:
        found = choose_split(str(path), splits, split) or []
        if len(found) != 1:
            raise no_such_split(str(path), splits, split)
        return f"{found[0]}_images", f"{found[0]}_labels"
    if not {"images", "arr_0"} & set(names):
        raise DataError(
            f"{path} holds {', '.join(names) or 'no arrays'}; its images must be called "
            f"{split}_images, images or arr_0."
        )
    if split != "train":
        raise no_such_split(str(path), [], split)
    return ("images", "labels") if "images" in names else ("arr_0", "arr_1")


def _checked(source: str, images: NDArray[Any]) -> NDArray[Any]:
    usable = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))
    if images.dtype != np.uint8 or not usable or 0 in images.shape[1:]:
        raise DataError(
            f"images in {source} must be uint8 of shape [N, H, W] or [N, H, W, C] with 1, 3 or 4 "
            f"channels; got {images.dtype} of shape {list(images.shape)}."
        )
    return images
