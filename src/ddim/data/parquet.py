"""Images in the columns of a table: parquet files, and data sets of the hub."""

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddim.data.captions import CAPTION_COLUMNS, one_caption
from ddim.data.dataset import Columns, Header, Source
from ddim.data.splits import NoSuchSplit, choose_split, split_of
from ddim.errors import DataError, first_line
from ddim.files import file_hash
from ddim.models.images import open_image

__all__ = ["files_of_split", "open_hub", "open_parquet"]

_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


@dataclass(frozen=True, eq=False)
class _Column:
    """Decodes the images of a table of ``datasets`` on access.

    A row holds the bytes of a picture. A row that names a file or an address instead could name any
    file of this machine or have any host asked; it is read only where it names a file that
    ``datasets`` itself fetched for a set of the hub."""

    name: str
    table: Any
    column: str
    hub_id: str | None

    def __len__(self) -> int:
        return len(self.table)

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
            raise self._undecodable(index, error) from error

    def raw(self, index: int) -> bytes:
        """The encoded picture of a row."""
        value = self.table[index][self.column] or {}
        content, path = value.get("bytes"), value.get("path")
        if content is not None:
            return bytes(content)
        if path is None:
            raise DataError(f"image {index} of {self.name} is empty; remove its row.")
        if self.hub_id is None or not _is_fetched(path, self.hub_id):
            raise DataError(
                f"image {index} of {self.name} is no picture but the name {path!r}; a table must "
                "hold the pictures themselves."
            )
        if not path.startswith("hf://"):
            return Path(path).read_bytes()
        import huggingface_hub

        return bytes(huggingface_hub.HfFileSystem().read_bytes(path))

    def _undecodable(self, index: int, error: Exception) -> DataError:
        what = f"image {index} of {self.name} cannot be decoded"
        return DataError(f"{what} ({first_line(error)}); remove or replace it.")


def _is_fetched(path: str, hub_id: str) -> bool:
    """Whether a path is in the data set of the hub, or in the caches where its files lie."""
    import datasets
    from huggingface_hub import constants

    if path.startswith("hf://"):
        return path.startswith((f"hf://datasets/{hub_id}@", f"hf://datasets/{hub_id}/"))
    caches = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(cache)) for cache in caches)


def files_of_split(
    source: str, tables: list[Path], split: str
) -> tuple[list[Path], tuple[str, ...]]:
    """Picks the parquet files of a split by their names, and says which are of none."""
    chosen = choose_split(source, [path.stem for path in tables], split)
    if chosen is None:
        return tables, _missing_parts(source, tables)
    other = [path for path in tables if split_of(path.stem) is None and path.stem not in chosen]
    told = f"tables of {source} that are of no split are left out: {len(other)}, such as "
    notes = (f"{told}{other[0].name}.",) if other else ()
    tables = [path for path in tables if path.stem in chosen]
    return tables, notes + _missing_parts(source, tables)


def _missing_parts(source: str, tables: list[Path]) -> tuple[str, ...]:
    """Says that tables such as ``train-00000-of-00005`` are not all there."""
    counts = [int(found[1]) for t in tables if (found := re.search("-of-([0-9]{1,9})$", t.stem))]
    if len(counts) != len(tables) or len(tables) >= max(counts):
        return ()
    return (f"{source} has {len(tables)} of the {max(counts)} tables that their names count.",)


def open_parquet(source: str, files: list[Path], columns: Columns) -> Source:
    """Opens parquet files as one table, which is kept in the cache of ``datasets`` under the hash
    of their bytes: its own key is their time, which a file that is copied keeps."""
    datasets = _import_datasets(source)
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is no regular file; give a .parquet.")
        if set(str(path)) & set("*?[]") or "::" in str(path):  # a pattern, or a chain of addresses
            raise DataError(f"{path} has one of * ? [ ] :: in its name; rename it.")
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "ddim" / file_hash(files)
    try:
        names = [str(path.absolute()) for path in files]
        with _quiet(datasets):
            table = datasets.Dataset.from_parquet(names, cache_dir=str(cache))
    except Exception as error:
        reason = f"cannot be read as parquet ({first_line(error.__cause__ or error)})"
        raise DataError(f"{source} {reason}; check the file, or write it again.") from error
    return _open_columns(source, table, columns)


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keeps ``datasets`` from logging and from showing bars."""
    level, has_bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if has_bars:
            datasets.enable_progress_bars()


def open_hub(name: str, hub_id: str, split: str, columns: Columns) -> Source:
    """Opens a data set of the hub, which the user called ``name``."""
    datasets, unreachable = _import_datasets(name), None
    try:
        with _without_retries(hub_id) as unreachable:
            table = datasets.load_dataset(hub_id, split=split)
    except Exception as error:
        raise _hub_error(name, hub_id, split, error, unreachable) from error
    return _open_columns(name, table, columns, hub_id)


def _hub_error(
    name: str, hub_id: str, split: str, error: Exception, unreachable: Exception | None
) -> DataError:
    reason = first_line(error)
    if "unknown split" in reason.lower():
        return NoSuchSplit(f"the hub data set {hub_id} has no split {split!r} ({reason}).")
    if _is_unreachable(error):
        missing = f"there is no folder or file {name!r} here"
        advice = "check the path if one was meant, else the network"
        if name == "fashion-mnist":
            missing = f"{name!r} is not on this machine"
            advice = (
                "install Debian's package dataset-fashion-mnist, or name its folder in "
                "DDIM_FASHION_MNIST"
            )
        reason = first_line(unreachable or error)
        return DataError(f"{missing}, and the hub cannot be reached ({reason}); {advice}.")
    if isinstance(error, FileNotFoundError):  # as datasets' DatasetNotFoundError is
        return DataError(
            f"{name!r} is neither a path that exists nor a hub data set open to you ({reason}); "
            "check the name."
        )
    return DataError(f"the hub data set {hub_id} cannot be opened ({reason}); see its page there.")


def _import_datasets(source: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        message = (
            f"{source} needs datasets, which is not installed; run: pip install 'ddim[train]'."
        )
        raise DataError(message) from error
    return datasets


def _is_unreachable(error: Exception) -> bool:
    is_of_http = type(error).__module__.startswith(("httpx", "requests"))
    return isinstance(error, (ConnectionError, TimeoutError)) or is_of_http


@contextlib.contextmanager
def _without_retries(hub_id: str) -> Iterator[Exception | None]:
    """Tries once to reach the hub, and yields the error if that fails. The libraries then look only
    into their cache, instead of retrying for half a minute."""
    import huggingface_hub

    constants, unreachable = huggingface_hub.constants, None
    before = constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.HfApi().dataset_info(hub_id, timeout=10)
    except Exception as error:  # load_dataset explains all other errors better
        unreachable = error if _is_unreachable(error) else None
    constants.HF_HUB_OFFLINE = before or unreachable is not None
    try:
        yield unreachable
    finally:
        constants.HF_HUB_OFFLINE = before


def _open_columns(name: str, table: Any, columns: Columns, hub_id: str | None = None) -> Source:
    import datasets

    names, features = list(table.column_names), table.features
    for asked in (columns.image, columns.label, columns.caption):
        if asked is not None and asked not in names:
            raise DataError(f"{name} has no column {asked!r}; it has {', '.join(names)}.")
    images = _open_images(name, table, columns.image, hub_id)
    typed = [c for c in names if isinstance(features[c], datasets.Image)]
    is_told = columns.image is not None or len(typed) < 2
    notes: tuple[str, ...] = ()
    if not is_told:
        notes = (f"{name} has images in {', '.join(typed)}; {typed[0]} is read.",)
    usual = (c for c in _LABEL_COLUMNS if c in names and _is_scalar(features[c]))
    label, labels, class_names, captions = columns.label or next(usual, None), None, None, None
    if label is not None:
        labels = _plain(table, label)
        is_class = isinstance(features[label], datasets.ClassLabel)
        class_names = tuple(features[label].names) if is_class else None
    caption = columns.caption or next((c for c in CAPTION_COLUMNS if c in names), None)
    if columns.captions and caption is not None:
        where = f"column {caption!r} of {name}"
        rows = _plain(table, caption)
        captions = [one_caption(value, f"row {i} of {where}") for i, value in enumerate(rows)]
        if several := sum(isinstance(value, list) and len(value) > 1 for value in rows):
            notes += (f"images of {name} with several captions have the first: {several}.",)
    return Source(images, labels, class_names, captions, notes=notes)


def _plain(table: Any, column: str) -> list[Any]:
    """The values of a column as they are stored: nothing that they may name is opened."""
    values: list[Any] = table.with_format("arrow")[column][:].to_pylist()
    return values


def _open_images(name: str, table: Any, column: str | None, hub_id: str | None) -> _Column:
    """Opens the named column, or the first that holds images."""
    import datasets

    names = list(table.column_names)
    typed = [c for c in names if isinstance(table.features[c], datasets.Image)]
    usual = [c for c in ("image", "img", "images") if c in names]
    column = column or next(iter(typed + usual), None)
    if column is None:
        raise DataError(
            f"{name} has columns {', '.join(names)}, and none is called image or is of datasets' "
            "Image type; name it."
        )
    try:
        stored = datasets.Image(decode=False)
        pictures = table.select_columns([column]).cast_column(column, stored)
    except Exception as error:
        reason = f"does not hold images ({first_line(error)})"
        raise DataError(f"column {column!r} of {name} {reason}; name another.") from error
    found = _Column(name, pictures, column, hub_id)
    if hub_id is None:
        _check_bytes(found)
    return found


def _check_bytes(images: _Column) -> None:
    """Refuses a table some row of which names a picture in place of holding it."""
    import pyarrow.compute as pc

    cells = images.table.data.column(images.column)
    content, path = (pc.struct_field(cells, name) for name in ("bytes", "path"))
    names = path.filter(pc.and_(pc.is_null(content), pc.is_valid(path)))
    if len(names):
        raise DataError(
            f"{images.name} names pictures by a path or an address in place of holding them, such "
            f"as {names[0].as_py()!r}; write the pictures themselves into the table."
        )


def _is_scalar(feature: Any) -> bool:
    """Whether a column that was not asked for can be labels: a class, a whole number or a word."""
    import datasets

    kinds = ("int", "uint", "bool", "string")
    is_value = isinstance(feature, datasets.Value) and feature.dtype.startswith(kinds)
    return isinstance(feature, datasets.ClassLabel) or is_value
