"""Images in the columns of a table: parquet files, and data sets of the hub."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddim.data.captions import CAPTION_COLUMNS, one_caption
from ddim.data.dataset import Columns, NoSuchSplit, Source, no_such_split
from ddim.data.folders import SPLITS
from ddim.errors import DataError, first_line

__all__ = ["files_of_split", "open_hub", "open_parquet"]

_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


@dataclass(frozen=True, eq=False)
class _Column:
    """Decodes the images of a table of ``datasets`` on access."""

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


def files_of_split(source: str, tables: list[Path], split: str) -> list[Path]:
    """Picks the parquet files of a split by the start of their names, as the hub writes them
    (``test-00000-of-00001.parquet``)."""
    starts = {p: p.stem.split("-")[0] for p in tables}
    chosen = [p for p in tables if starts[p] == split]
    splits = set(starts.values()) & set(SPLITS)
    if not chosen and (splits or split != "train"):
        raise no_such_split(source, splits, split)
    return chosen or tables


def open_parquet(source: str, files: list[Path], columns: Columns) -> Source:
    """Opens parquet files as one table."""
    try:
        table = _load_dataset("parquet", source, data_files=[str(p) for p in files], split="train")
    except DataError:
        raise
    except Exception as error:
        reason = f"cannot be read as parquet ({first_line(error.__cause__ or error)})"
        raise DataError(f"{source} {reason}; check the file, or write it again.") from error
    return _open_columns(source, table, columns)


def open_hub(name: str, hub_id: str, split: str, columns: Columns) -> Source:
    """Opens a data set of the hub, which the user called ``name``."""
    unreachable = None
    try:
        with _without_retries(hub_id) as unreachable:
            table = _load_dataset(hub_id, name, split=split)
    except DataError:
        raise
    except Exception as error:
        raise _hub_error(name, hub_id, split, error, unreachable) from error
    return _open_columns(name, table, columns)


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


def _load_dataset(kind: str, source: str, **options: Any) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        message = (
            f"{source} needs datasets, which is not installed; run: pip install 'ddim[train]'."
        )
        raise DataError(message) from error
    return datasets.load_dataset(kind, **options)


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


def _open_columns(name: str, table: Any, columns: Columns) -> Source:
    import datasets

    names, features = list(table.column_names), table.features
    for asked in (columns.image, columns.label, columns.caption):
        if asked is not None and asked not in names:
            raise DataError(f"{name} has no column {asked!r}; it has {', '.join(names)}.")
    images = _open_images(name, table, columns.image)
    usual = (c for c in _LABEL_COLUMNS if c in names and _is_scalar(features[c]))
    label, labels, class_names, captions = columns.label or next(usual, None), None, None, None
    if label is not None:
        labels = table[label][:]
        is_class = isinstance(features[label], datasets.ClassLabel)
        class_names = tuple(features[label].names) if is_class else None
    caption = columns.caption or next((c for c in CAPTION_COLUMNS if c in names), None)
    if columns.captions and caption is not None:
        where = f"column {caption!r} of {name}"
        captions = [one_caption(v, f"row {i} of {where}") for i, v in enumerate(table[caption][:])]
    return Source(images, labels, class_names, captions)


def _open_images(name: str, table: Any, column: str | None) -> _Column:
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
    pictures = table.select_columns([column])
    if column not in typed:
        try:
            pictures = pictures.cast_column(column, datasets.Image())
        except Exception as error:
            reason = f"does not hold images ({first_line(error)})"
            raise DataError(f"column {column!r} of {name} {reason}; name another.") from error
    return _Column(name, pictures, column)


def _is_scalar(feature: Any) -> bool:
    """Whether a column that was not asked for can be labels: a class, a whole number or a word."""
    import datasets

    kinds = ("int", "uint", "bool", "string")
    is_value = isinstance(feature, datasets.Value) and feature.dtype.startswith(kinds)
    return isinstance(feature, datasets.ClassLabel) or is_value
