"""Images in the columns of a table: parquet files, and data sets of the hub."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ddim.data.arrays import MOST_RATIO
from ddim.data.captions import CAPTION_COLUMNS, one_caption
from ddim.data.dataset import Columns, EncodedImages, Source
from ddim.data.folders import Found
from ddim.data.splits import NoSuchSplit, choose_split, split_of
from ddim.errors import DataError, first_line
from ddim.files import file_hash, replacing

__all__ = ["are_data", "find_tables", "open_hub", "open_parquet"]

_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")

_ROWS = 64
"""Rows of a table that are decoded at a time."""

_LEAST_BOUND = 2**30
"""Bytes that every table may decode to, however small it is."""


@dataclass(frozen=True, eq=False)
class _Column(EncodedImages):
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

    def undecodable(self, index: int, error: Exception) -> DataError:
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


def are_data(found: Sequence[Found]) -> bool:
    """Whether there are tables where data lie, so that pictures beside them explain them: in the
    folder itself, in its ``data``, or where the path says a split."""
    tables = (file.parts for file in found if file.path.suffix == ".parquet")
    return any(parts[:-1] in ((), ("data",)) or split_of(_split_name(parts)) for parts in tables)


def find_tables(
    source: str, found: Sequence[Found], split: str
) -> tuple[list[Path], tuple[str, ...]]:
    """Picks the parquet files of a split out of the files of a folder, and says which are left out.

    They lie in the folder or in its ``data``, else anywhere below it. The split is a word of the
    first part of a path that says one: ``train/0000.parquet``, ``data/train-00000.parquet``.
    """
    every = [file for file in found if file.path.suffix == ".parquet"]
    at_top = [file for file in every if len(file.parts) == 1]
    mine = at_top or [file for file in every if file.parts[:-1] == ("data",)] or every
    notes = _left_out(source, "in its folders", [file for file in every if file not in mine])
    names = {file.path: _split_name(file.parts) for file in mine}
    tables = list(names)
    chosen = choose_split(source, names.values(), split)
    if chosen is not None:
        tables = [path for path, name in names.items() if name in chosen]
        rest = [f for f in mine if names[f.path] not in chosen and not split_of(names[f.path])]
        notes += _left_out(source, "of no split", rest)
    return tables, notes + _missing_parts(source, tables)


def _split_name(parts: tuple[str, ...]) -> str:
    names = (*parts[:-1], parts[-1].removesuffix(".parquet"))
    return next((name for name in names if split_of(name)), "/".join(names))


def _left_out(source: str, where: str, files: Sequence[Found]) -> tuple[str, ...]:
    if not files:
        return ()
    what = f"tables of {source} that are {where} are left out: {len(files)}"
    return (f"{what}, such as {'/'.join(files[0].parts)}.",)


def _missing_parts(source: str, tables: list[Path]) -> tuple[str, ...]:
    """Says that tables such as ``train-00000-of-00005`` are not all there."""
    counts = [int(found[1]) for t in tables if (found := re.search("-of-([0-9]{1,9})$", t.stem))]
    if len(counts) != len(tables) or len(tables) >= max(counts):
        return ()
    return (f"{source} has {len(tables)} of the {max(counts)} tables that their names count.",)


def open_parquet(source: str, files: list[Path], columns: Columns) -> Source:
    """Opens parquet files as one table.

    The columns that are read are decoded once, into the cache of ``datasets``, under the hash of
    the files' bytes. No host is asked.
    """
    datasets = _import_datasets(source)
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is no regular file; give a .parquet.")
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(files[0])
        features = datasets.Features.from_arrow_schema(schema)
        chosen = _choose(source, features, columns)
        key = hashlib.sha256(repr([file_hash(files), chosen.names]).encode()).hexdigest()[:16]
        cached = Path(datasets.config.HF_DATASETS_CACHE) / "ddim" / f"{key}.arrow"
        if not cached.is_file():
            _check_claims(source, files, chosen.names)
            _decode(source, files, chosen.names, cached)
        table = datasets.Dataset.from_file(str(cached))
    except DataError:
        raise
    except Exception as error:
        reason = f"cannot be read as parquet ({first_line(error.__cause__ or error)})"
        raise DataError(f"{source} {reason}; check the file, or write it again.") from error
    return _read(source, table, chosen)


def _most(files: list[Path]) -> int:
    """Bytes that these files may decode to. A dictionary that rows repeat, or a compressor, can
    make any number of a few bytes; pictures are compressed already."""
    return max(_LEAST_BOUND, MOST_RATIO * sum(path.stat().st_size for path in files))


def _check_claims(source: str, files: list[Path], names: Sequence[str]) -> None:
    """Checks the sizes that the columns claim, before any memory is taken for them."""
    import pyarrow.parquet as pq

    claimed = 0
    for path in files:
        about = pq.read_metadata(path)
        for group in map(about.row_group, range(about.num_row_groups)):
            claimed += group.num_rows
            chunks = map(group.column, range(group.num_columns))
            read = (c for c in chunks if c.path_in_schema.split(".")[0] in names)
            claimed += sum(chunk.total_uncompressed_size for chunk in read)
    if claimed > _most(files):
        raise _too_large(source, files, "claims")


def _too_large(source: str, files: list[Path], verb: str) -> DataError:
    return DataError(
        f"{source} {verb} more than the {_most(files)} bytes that are decoded of a table of its "
        "size; give the images as files in a folder."
    )


def _decode(source: str, files: list[Path], names: Sequence[str], target: Path) -> None:
    """Writes columns of parquet files as one Arrow stream, a few rows at a time: what a row group
    holds is known only when it is decoded."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    taken, fields = 0, list(map(pq.read_schema(files[0]).field, names))
    plain = [field.with_type(_plain_type(field.type)) for field in fields]
    schema = pa.schema(plain, metadata=pq.read_schema(files[0]).metadata)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial, pa.ipc.new_stream(partial, schema) as stream:
        for path in files:
            with pq.ParquetFile(path) as table:
                for batch in table.iter_batches(_ROWS, columns=list(names), use_threads=False):
                    rows = pa.Table.from_batches([batch]).select(list(names)).cast(schema)
                    taken += rows.nbytes
                    if taken > _most(files):
                        raise _too_large(source, files, "decodes to")
                    stream.write_table(rows)


def _plain_type(kind: Any) -> Any:
    """A type without dictionaries, whose values later steps would repeat uncounted."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_plain_type(f.type)) for f in kind])
    return kind


def open_hub(name: str, hub_id: str, split: str, columns: Columns) -> Source:
    """Opens a data set of the hub, which the user called ``name``."""
    datasets, unreachable = _import_datasets(name), None
    try:
        with _without_retries(hub_id) as unreachable:
            table = datasets.load_dataset(hub_id, split=split)
    except Exception as error:
        raise _hub_error(name, hub_id, split, error, unreachable) from error
    return _read(name, table, _choose(name, table.features, columns), hub_id)


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


class _Chosen(NamedTuple):
    """The columns of a table that are read."""

    image: str
    label: str | None
    caption: str | None
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Each column once."""
        return list(dict.fromkeys(n for n in (self.image, self.label, self.caption) if n))


def _choose(name: str, features: Any, columns: Columns) -> _Chosen:
    """Picks the named columns, or those that hold images, labels and captions by their type and
    name."""
    import datasets

    names = list(features)
    for asked in (columns.image, columns.label, columns.caption):
        if asked is not None and asked not in names:
            raise DataError(f"{name} has no column {asked!r}; it has {', '.join(names)}.")
    typed = [c for c in names if isinstance(features[c], datasets.Image)]
    usual = [c for c in ("image", "img", "images") if c in names]
    image = columns.image or next(iter(typed + usual), None)
    if image is None:
        raise DataError(
            f"{name} has columns {', '.join(names)}, and none is called image or is of datasets' "
            "Image type; name it."
        )
    notes: tuple[str, ...] = ()
    if columns.image is None and len(typed) > 1:
        notes = (f"{name} has images in {', '.join(typed)}; {image} is read.",)
    labels = (c for c in _LABEL_COLUMNS if c in names and _is_scalar(features[c]))
    captions = (c for c in CAPTION_COLUMNS if c in names)
    caption = columns.caption or next(captions, None) if columns.captions else None
    return _Chosen(image, columns.label or next(labels, None), caption, notes)


def _read(name: str, table: Any, chosen: _Chosen, hub_id: str | None = None) -> Source:
    """Reads labels and captions of a table, and opens its images."""
    import datasets

    images, notes = _open_images(name, table, chosen.image, hub_id), chosen.notes
    labels, class_names, captions = None, None, None
    if chosen.label is not None:
        labels, kind = _plain(table, chosen.label), table.features[chosen.label]
        class_names = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None
    if chosen.caption is not None:
        where = f"column {chosen.caption!r} of {name}"
        rows = _plain(table, chosen.caption)
        captions = [one_caption(value, f"row {i} of {where}") for i, value in enumerate(rows)]
        if several := sum(isinstance(value, list) and len(value) > 1 for value in rows):
            notes += (f"images of {name} with several captions have the first: {several}.",)
    return Source(images, labels, class_names, captions, notes=notes)


def _plain(table: Any, column: str) -> list[Any]:
    """The values of a column as they are stored: nothing that they may name is opened."""
    values: list[Any] = table.with_format("arrow")[column][:].to_pylist()
    return values


def _open_images(name: str, table: Any, column: str, hub_id: str | None) -> _Column:
    import datasets

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
