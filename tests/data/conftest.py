"""Pictures, files of every kind that hold them, and how they are read back."""

import gzip
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NPZ = Path(__file__).parents[1] / "data" / "fashion_mnist_2048.npz"
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def stack(data):
    return np.stack([data[i][0].numpy() for i in range(len(data))])


def labels(data):
    return [data[i][1] for i in range(len(data))]


def write_idx(path, array, *, type_code=8):
    content = (
        bytes([0, 0, type_code, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_png(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def claiming_png(width, height):
    """A PNG of a few bytes that claims a size."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, with its cache in the test's folder and no way out to the hub."""
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


def write_parquet(datasets, path, **columns):
    """Writes columns of plain values; an array becomes a column of images, and a pair is a type and
    its values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    typed = {
        name: (datasets.Image(), [Image.fromarray(a) for a in column])
        if isinstance(column, np.ndarray)
        else column
        for name, column in columns.items()
    }
    table = datasets.Dataset.from_dict(
        {name: column[1] if isinstance(column, tuple) else column for name, column in typed.items()}
    )
    for name, column in typed.items():
        if isinstance(column, tuple):
            table = table.cast_column(name, column[0])
    table.to_parquet(path)
    return path


def encode(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()
