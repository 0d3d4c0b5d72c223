"""Opens the images that a user names: a folder, arrays, a table, a hub data set, or a named set.

Arrays stay arrays in memory; files are decoded on access. Every data set can be sent to a loader's
workers."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddim.data.archives import open_archives
from ddim.data.arrays import open_idx, open_idx_folder, open_npz
from ddim.data.dataset import Columns, ImageData, Source
from ddim.data.folders import SHEETS, SUFFIXES, open_folder, walk
from ddim.data.named import NAMED, fashion_mnist_folder, open_fashion_mnist
from ddim.data.parquet import are_data, find_tables, open_hub, open_parquet
from ddim.data.splits import NoSuchSplit, no_such_split, split_of
from ddim.data.survey import survey
from ddim.errors import DataError

__all__ = ["check_source", "is_here", "load_images", "load_test_images"]

_FILES = {*SUFFIXES, ".npz", ".npy", ".parquet", ".gz", ".zip", ".tar"}
"""Endings that no name of a hub data set has."""


def load_images(
    source: str | os.PathLike[str],
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
    """Opens a data set of (uint8 image [C, H, W], label), with captions if they are asked for.

    Args:
        source: A folder of images (its subfolders name the classes if all images lie in them), a
            ``.npz``, IDX files (the folder or the images file), a ``.parquet`` file or a folder of
            them, ``digits``, ``fashion-mnist``, ``fashion-text`` (:mod:`ddim.data.fashion_text`),
            or a hub dataset id. Write ``./digits`` for a folder that has the name of a set. Grids
            and plots of this program that lie beside its ``run.json`` are left out.
        split: ``train``, ``test``, or whatever the source has. A word of a name says it, in any
            case: subfolders ``Train``, arrays ``test_images``, files ``test-*.parquet``. A source
            without splits is all ``train``.
        resolution: An int resizes the shorter side to it and cuts out the centre square; (height,
            width) is covered, and the centre cut out. None: all images must have one size.
        channels: 1 for grey, 3 for colour (transparency over white). None: colour if an image is.
        center_crop: Cut out the centre square without resizing; ``resolution`` crops anyway.
        image_column: Column of parquet or hub data. None: the first one that holds images.
        label_column: Column of labels. None: ``label``, ``labels``, ``fine_label`` or ``class`` if
            there is one.
        captions: Whether to read captions. A folder has them in ``metadata.jsonl`` or
            ``metadata.csv`` (columns ``file_name``, relative to that file, and the caption), as in
            Hugging Face's imagefolder, or in ``NAME.txt`` beside each image; a table in a column; a
            ``.npz`` in an array ``captions``. The first is taken if an image has several.
        caption_column: Column of captions. None: ``text``, ``caption``, ``captions`` or ``prompt``.

    Raises:
        DataError: If the source is missing, damaged, of an unusable shape, or without the captions
            asked for; the message says what to do.
    """
    source = os.fspath(source)
    sides = resolution if isinstance(resolution, tuple) else (resolution,) * 2
    if resolution is not None and not (
        len(sides) == 2 and all(isinstance(side, int) and side >= 1 for side in sides)
    ):
        what = "a side of at least 1, or height and width"
        raise DataError(f"resolution must be {what}; got {resolution}.")
    if channels not in (None, 1, 3):
        raise DataError(f"channels must be 1 (grey) or 3 (colour); got {channels}.")
    opened = _open(source, split, Columns(image_column, label_column, caption_column, captions))
    sized: dict[str, Any] = {"resolution": resolution, "center_crop": center_crop}
    channels, notes = survey(source, opened, channels=channels, **sized)
    opened = opened._replace(notes=opened.notes + notes)
    if not captions:
        opened = opened._replace(captions=None)
    data = ImageData.of_source(source, opened, channels=channels, **sized)
    if captions and data.captions is None:
        raise DataError(
            f"{source} has no captions; put metadata.jsonl (with file_name and text) or NAME.txt "
            "beside the images of a folder, or name a table's column with --caption-column."
        )
    return data


def _open(source: str, split: str, columns: Columns) -> Source:
    if source in NAMED:
        _refuse_columns(source, columns)
        return NAMED[source](split)
    if source == "fashion-mnist":
        return open_fashion_mnist(split, columns)
    path = check_source(source)
    if not os.path.exists(path):
        return open_hub(source, source, split, columns)
    if path.is_file() and path.suffix != ".parquet":
        _refuse_columns(source, columns)
    if path.is_dir():
        return _open_folder(source, path, split, columns)
    if not path.is_file():  # a pipe or a device would be read without end
        raise DataError(f"{source} is neither a folder nor a regular file; give one of these.")
    if path.suffix == ".tar":
        return open_archives(source, [path], split, columns)
    if path.suffix == ".npz":
        return open_npz(source, path, split)
    if split != "train" and split_of(path.name.replace("t10k", "test")) != split:
        raise no_such_split(source, [], split)
    if "idx3-ubyte" in path.name:
        return open_idx(source, path)
    if path.suffix == ".parquet":
        return open_parquet(source, [path], columns)
    raise DataError(
        f"{source} is not a data set this reads; give a folder of images, a .npz, IDX files, a "
        ".parquet, or a hub dataset id."
    )


def _open_folder(source: str, path: Path, split: str, columns: Columns) -> Source:
    """Opens a folder of tables, of IDX files, or of pictures."""
    found, notes = walk(path)
    is_ours = (path / "run.json").is_file()  # whose grid is no data
    pictures = [
        file
        for file in found
        if file.path.suffix.lower() in SUFFIXES and not (is_ours and file.path.stem in SHEETS)
    ]
    has_tables = any(file.path.suffix == ".parquet" for file in found)
    if are_data(found) or (has_tables and not pictures):
        tables, told = find_tables(source, found, split)
        opened = open_parquet(source, tables, columns)
        if pictures:
            what = f"pictures of {source} that lie beside its tables are left out: {len(pictures)}"
            told += (f"{what}, such as {pictures[0].path}.",)
    elif not pictures and (archives := sorted(path.glob("*.tar"))):
        _refuse_columns(source, columns)
        return open_archives(source, archives, split, columns)
    elif next(path.glob("*idx3-ubyte*"), None) is not None:
        _refuse_columns(source, columns)
        return open_idx_folder(source, path, split)
    else:
        _refuse_columns(source, replace(columns, caption=None))
        opened, told = open_folder(source, path, found, split, columns), ()
    return opened._replace(notes=notes + told + opened.notes)


def _refuse_columns(source: str, columns: Columns) -> None:
    """Refuses the name of a column, which would have no effect on data that are no table."""
    for kind in ("image", "label", "caption"):
        if (name := getattr(columns, kind)) is not None:
            raise DataError(
                f"{source} is no table, so it has no column {name!r}; leave out --{kind}-column."
            )


def is_here(source: str) -> bool:
    """Whether a source can be opened without asking a host."""
    if source in ("fashion-mnist", "fashion-text"):
        return fashion_mnist_folder().is_dir()
    return source in NAMED or os.path.exists(check_source(source))


def check_source(source: str) -> Path:
    """Returns the path of a source that can only be a path; names of sets and hub ids pass, too.

    Raises:
        DataError: If the source can only be a path, and nothing is there.
    """
    path = Path(os.path.expanduser(source))
    must_be_path = (
        source.startswith((".", "/", "~"))
        or path.suffix in _FILES
        or source.count("/") > 1
        or "ubyte" in path.name
    )
    if not source or (must_be_path and not os.path.exists(path)):  # also a name that is too long
        raise DataError(f"there is no data at {source!r}; check the path.")
    return path


def load_test_images(
    source: str,
    *,
    split: str | None = None,
    resolution: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> tuple[ImageData, str]:
    """Opens the images to measure on with :func:`load_images`: those of ``split``, or by default
    the split ``test`` if the data has one, else ``train``, which is all of undivided data.

    Returns:
        The data set and the name of its split.
    """
    if split is None:
        try:
            return load_test_images(source, split="test", resolution=resolution, channels=channels)
        except NoSuchSplit:
            split = "train"
    return load_images(source, split=split, resolution=resolution, channels=channels), split
