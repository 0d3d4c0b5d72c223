"""Stores: how the pictures of a shard are kept in one file.

Each writes picture after picture, so that of a shard only one batch is in memory, and holds no
times, so that equal pictures make equal bytes. ``webdataset`` and ``parquet`` open with the
libraries of these names and with Hugging Face's ``datasets``; all three open with ``ddim train
--data`` and ``ddim evaluate``.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddim.data.archives import open_archives
from ddim.data.dataset import Columns
from ddim.errors import DDIMError
from ddim.files import replacing
from ddim.models.images import ENDINGS, save_picture

__all__ = ["SUFFIXES", "Picture", "first_pictures", "kept_pictures", "opened_store"]

SUFFIXES: dict[str, str] = {"webdataset": "tar", "parquet": "parquet", "npz": "npz"}
"""The ending of a shard's file, by store."""


class Picture(NamedTuple):
    """A picture, and what is known of it."""

    name: str
    """Its name without ending, which is its seed, after the number of its prompt where there are
    several."""
    image: Any
    """A Pillow image."""
    seed: int
    label: int | None
    prompt: str | None


@contextmanager
def opened_store(
    kind: str, path: Path, *, count: int, picture: str
) -> Iterator[Callable[[Picture], None]]:
    """Gives a function that adds a picture to a new file; it is whole when the block ends.

    Args:
        kind: ``webdataset``, ``parquet`` or ``npz``.
        path: The file.
        count: The number of pictures that will be added.
        picture: The format of the pictures, png, jpg or webp; ``npz`` keeps their pixels.

    Raises:
        DDIMError: If the package that writes such files is not installed.
    """
    with _STORES[kind](path, count, picture) as add:
        yield add


@contextmanager
def kept_pictures(
    kind: str, paths: Sequence[Path], *, count: int, picture: str
) -> Iterator[Callable[[Picture], None]]:
    """Gives a function that keeps a picture: in the one new file of ``paths``, which is there when
    the block ends; of ``files``, in one of them each, by its name, at once.

    Raises:
        DDIMError: If the package that writes such files is not installed.
    """
    if kind == "files":
        by_name = {path.stem: path for path in paths}
        yield lambda kept: save_picture(kept.image, by_name[kept.name], sync=True)
        return
    (path,) = paths
    with (
        replacing(path, sync=True) as partial,
        opened_store(kind, partial, count=count, picture=picture) as add,
    ):
        yield add


def _missing(package: str) -> DDIMError:
    return DDIMError(f"this --store needs {package}; install it with pip install {package}.")


def _encoded(picture: Any, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, **ENDINGS[f".{kind}"])
    return file.getvalue()


@contextmanager
def _webdataset(path: Path, count: int, kind: str) -> Iterator[Callable[[Picture], None]]:
    """A tar file of NAME.png, NAME.json, and where there are such NAME.cls and NAME.txt."""
    try:
        import webdataset
    except ImportError:
        raise _missing("webdataset") from None
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0.0, encoder=False) as tar:

        def add(picture: Picture) -> None:
            known = {"seed": picture.seed, "class": picture.label, "prompt": picture.prompt}
            facts = {key: value for key, value in known.items() if value is not None}
            sample: dict[str, Any] = {
                "__key__": picture.name,
                kind: _encoded(picture.image, kind),
                "json": json.dumps(facts).encode(),
            }
            if picture.label is not None:
                sample["cls"] = str(picture.label).encode()
            if picture.prompt is not None:
                sample["txt"] = picture.prompt.encode()
            tar.write(sample)

        yield add


_ROWS = 256
"""Pictures of a row group, which is in memory at once."""


@contextmanager
def _parquet(path: Path, count: int, kind: str) -> Iterator[Callable[[Picture], None]]:
    """A table whose column ``image`` is an image to ``datasets``, beside ``seed``, ``label`` and
    ``text``."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _missing("pyarrow") from None
    rows: list[dict[str, Any]] = []
    writer: Any = None

    def flush() -> None:
        nonlocal writer
        columns = {"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})}
        columns["seed"] = pyarrow.int64()
        features: dict[str, Any] = {"image": {"_type": "Image"}}
        features["seed"] = {"dtype": "int64", "_type": "Value"}
        for key, type_ in (("label", "int64"), ("text", "string")):
            if key in rows[0]:
                columns[key] = getattr(pyarrow, type_)()
                features[key] = {"dtype": type_, "_type": "Value"}
        if writer is None:
            told = json.dumps({"info": {"features": features}})
            schema = pyarrow.schema(columns.items(), metadata={"huggingface": told})
            writer = pyarrow.parquet.ParquetWriter(path, schema)
        writer.write_table(pyarrow.Table.from_pylist(rows, schema=writer.schema))
        rows.clear()

    def add(picture: Picture) -> None:
        name = f"{picture.name}.{kind}"
        row = {"image": {"bytes": _encoded(picture.image, kind), "path": name}}
        row["seed"] = picture.seed  # type: ignore[assignment]
        if picture.label is not None:
            row["label"] = picture.label  # type: ignore[assignment]
        if picture.prompt is not None:
            row["text"] = picture.prompt  # type: ignore[assignment]
        rows.append(row)
        if len(rows) == _ROWS:
            flush()

    try:
        yield add
        if rows:
            flush()
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _npz(path: Path, count: int, kind: str) -> Iterator[Callable[[Picture], None]]:
    """Arrays ``images`` (uint8, [N, H, W] or [N, H, W, 3]), ``seeds``, and where there are such
    ``labels`` and ``captions``. The pixels go to the disk as they come."""
    seeds: list[int] = []
    labels: list[int] = []
    captions: list[str] = []
    with zipfile.ZipFile(path, "w") as archive:  # its entries are of 1980, whatever the time
        entry: Any = None
        try:

            def add(picture: Picture) -> None:
                nonlocal entry
                pixels = np.asarray(picture.image)
                if entry is None:
                    entry = archive.open("images.npy", "w", force_zip64=True)
                    about = {"descr": "|u1", "fortran_order": False}
                    about["shape"] = (count, *pixels.shape)
                    np.lib.format.write_array_header_1_0(entry, about)
                entry.write(np.ascontiguousarray(pixels).tobytes())
                seeds.append(picture.seed)
                labels.extend([] if picture.label is None else [picture.label])
                captions.extend([] if picture.prompt is None else [picture.prompt])

            yield add
        finally:
            if entry is not None:
                entry.close()
        more: dict[str, NDArray[Any]] = {"seeds": np.array(seeds, dtype=np.int64)}
        if labels:
            more["labels"] = np.array(labels, dtype=np.int64)
        if captions:
            more["captions"] = np.array(captions)
        for name, array in more.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


_STORES = {"webdataset": _webdataset, "parquet": _parquet, "npz": _npz}


def first_pictures(path: Path, count: int) -> list[Any]:
    """The first pictures of a shard, as Pillow images."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return [Image.fromarray(pixels) for pixels in file["images"][:count]]
    if path.suffix == ".tar":
        images = open_archives(str(path), [path], "train", Columns()).images
        return [images[place] for place in range(min(count, len(images)))]
    import pyarrow.parquet

    found: list[bytes] = []
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(_ROWS, columns=["image"]):
        found += [row["image"]["bytes"] for row in batch.to_pylist()]
        if len(found) >= count:
            break
    return [Image.open(io.BytesIO(content)) for content in found[:count]]
