"""Arrays in ``.npz`` and IDX files come back as they were written; damage is named."""

import gzip
import io
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.conftest import COLOUR, GREY, LABELS, NPZ, RNG, labels, stack, write_idx

from ddim.data.arrays import read_idx
from ddim.data.named import FASHION_MNIST_FOLDER
from ddim.data.sources import load_images
from ddim.errors import DataError


def test_npz_with_splits_is_the_first_images_of_fashion_mnist():
    train, test = load_images(str(NPZ)), load_images(str(NPZ), split="test")
    assert (len(train), len(test), train.channels, train.resolution) == (1024, 1024, 1, (28, 28))
    assert train.name == str(NPZ)
    assert train.class_names == tuple("0123456789")
    with np.load(NPZ) as file:
        assert np.array_equal(stack(train)[:, 0], file["train_images"])
        assert np.array_equal(stack(test)[:, 0], file["test_images"])
        assert labels(test) == file["test_labels"].tolist()


@pytest.mark.skipif(
    not Path(FASHION_MNIST_FOLDER).is_dir(),
    reason="Debian's package dataset-fashion-mnist is not installed",
)
@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_the_excerpt_is_the_start_of_the_package(split, count, monkeypatch):
    monkeypatch.delenv("DDIM_FASHION_MNIST", raising=False)
    whole, part = load_images("fashion-mnist", split=split), load_images(str(NPZ), split=split)
    assert len(whole) == count
    assert all(
        torch.equal(whole[i][0], part[i][0]) and whole[i][1] == part[i][1] for i in range(1024)
    )


def test_npz_without_splits(tmp_path):
    np.savez(tmp_path / "a.npz", images=COLOUR, labels=LABELS)
    data = load_images(str(tmp_path / "a.npz"))
    assert (data.channels, data.resolution, data.class_names) == (3, (5, 7), ("0", "1", "2"))
    assert np.array_equal(stack(data), COLOUR.transpose(0, 3, 1, 2))
    assert labels(data) == LABELS.tolist()


def test_npz_without_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY[..., None])
    data = load_images(str(tmp_path / "a.npz"))
    assert (data.channels, data.class_names, labels(data)) == (1, None, [-1] * 6)
    assert np.array_equal(stack(data)[:, 0], GREY)


@pytest.mark.parametrize(
    ("second", "expected"),
    [(LABELS, LABELS.tolist()), (np.linspace(0, 1, 6), [-1] * 6), (np.arange(4), [-1] * 6)],
)
def test_npz_without_names_takes_a_second_array_that_looks_like_labels(tmp_path, second, expected):
    np.savez(tmp_path / "a.npz", GREY, second)
    assert labels(load_images(str(tmp_path / "a.npz"))) == expected


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_folder_and_file(tmp_path, end):
    other = "" if end else ".gz"  # images and labels need not both be gzipped
    write_idx(tmp_path / f"train-images-idx3-ubyte{end}", GREY)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{other}", LABELS.astype(np.uint8))
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{end}", GREY[:2])
    train, test = load_images(str(tmp_path)), load_images(str(tmp_path), split="test")
    named = load_images(str(tmp_path / f"t10k-images-idx3-ubyte{end}"))
    assert np.array_equal(stack(train)[:, 0], GREY)
    assert labels(train) == LABELS.tolist()
    assert (len(test), test.class_names, len(named)) == (2, None, 2)


def test_read_idx_keeps_any_shape(tmp_path):
    array = RNG.integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    assert np.array_equal(read_idx(write_idx(tmp_path / "x", array)), array)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        (
            {"images": GREY.astype(np.float32)},
            r"must be uint8 of shape \[N, H, W\] or .*; got float32 of shape \[6, 5, 7\]",
        ),
        ({"images": GREY[0]}, r"got uint8 of shape \[5, 7\]"),
        ({"images": COLOUR[..., :2]}, r"got uint8 of shape \[6, 5, 7, 2\]"),
        ({"images": GREY[:, :0]}, r"got uint8 of shape \[6, 0, 7\]"),
        ({"images": GREY[:0]}, "holds no images"),
        (
            {"images": GREY, "labels": LABELS[:4]},
            "holds 6 images but 4 labels; there must be one label per image",
        ),
        (
            {"images": GREY, "labels": LABELS / 2},
            r"must be whole numbers, one per image; got float64 of shape \[6\]",
        ),
        (
            {"images": GREY, "labels": np.eye(6, dtype=int)},
            r"must be whole numbers, one per image; got int64 of shape \[6, 6\]",
        ),
        ({"images": GREY, "labels": LABELS - 1}, r"must lie in 0\.\.99999; got -1"),
        ({"images": GREY, "labels": LABELS + 10**9}, r"must lie in 0\.\.99999; got 1000000002"),
        (
            {"pictures": GREY},
            r"a\.npz holds pictures; its images must be called train_images, images or arr_0",
        ),
        ({}, r"a\.npz holds no arrays; its images must be called"),
        (
            {"images": np.array([None])},
            (
                r"a\.npz cannot be read as an \.npz file of plain arrays \(.*; write it again with "
                r"numpy\.savez"
            ),
        ),
    ],
)
def test_messages_of_npz(tmp_path, arrays, text):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=text):
        load_images(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("damage", ["words", "cut", "npy"])
def test_damaged_npz(tmp_path, damage):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=GREY)
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, GREY)
    else:
        path.write_bytes(b"words" if damage == "words" else path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"a\.npz cannot be read as an \.npz file of plain arrays"):
        load_images(str(path))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not an IDX file of bytes: it starts with nothing instead of 000008"),
        (b"words", "it starts with 776f7264 instead of 000008"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 0]), "it starts with 00000d01 instead of 000008"),
        (bytes([0, 0, 8, 3]), "is damaged: it ends within its header of 16 bytes"),
        (
            bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2]),
            r"is damaged: its header promises 9 bytes of shape \[9\], and it holds 2",
        ),
        (bytes([0, 0, 8, 1, 0, 0, 0, 1, 1, 2]), r"promises 1 bytes of shape \[1\], and it holds 2"),
        (
            bytes([0, 0, 8, 3]) + b"\xff" * 12,
            "is damaged: its header promises 79228162458924105385300197375 bytes",
        ),
        (gzip.compress(b"\x00\x00\x08\x01", mtime=0)[:-6], "cannot be read as an IDX file"),
        (b"\x1f\x8b\x08 and no more", "cannot be read as an IDX file"),
    ],
)
def test_messages_of_idx(tmp_path, content, text):
    (tmp_path / "x-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=text):
        read_idx(tmp_path / "x-images-idx3-ubyte")
    with pytest.raises(DataError, match=text):
        load_images(str(tmp_path / "x-images-idx3-ubyte"))


def test_read_idx_of_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="there is no file .*none; check the path"):
        read_idx(tmp_path / "none")


def test_idx_images_must_have_three_dimensions(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", LABELS.astype(np.uint8))
    with pytest.raises(DataError, match=r"must be uint8 of shape .*; got uint8 of shape \[6\]"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("claim", [(1 << 40, 28, 28), (4000, 28, 28)])
def test_a_header_that_claims_more_than_the_file_can_hold_takes_no_memory(tmp_path, claim):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": claim}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("images.npy", head.getvalue() + bytes(100))
    packed = struct.pack(">4B3I", 0, 0, 8, 3, claim[0] % 2**32 or 2**31, *claim[1:])
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(packed + bytes(100)))
    tracemalloc.start()
    for name in ("a.npz", "train-images-idx3-ubyte.gz"):
        with pytest.raises(DataError, match="is damaged: its header promises"):
            load_images(str(tmp_path / name))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_numbers_that_do_not_fit_this_machine_are_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((500, 28, 28), np.uint8))
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((500, 28, 28), np.uint8))
    monkeypatch.setattr("ddim.data.arrays._memory", lambda: 100_000)
    for name in ("a.npz", "train-images-idx3-ubyte.gz"):
        with pytest.raises(DataError, match="of numbers, and this machine has"):
            load_images(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.npz", "a.parquet", "train-images-idx3-ubyte", "a"])
def test_a_pipe_in_place_of_a_data_file_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="is neither a folder nor a regular file"):
        load_images(str(tmp_path / name))


def test_arrays_that_are_not_read_are_told(tmp_path):
    np.savez(tmp_path / "b.npz", GREY, np.linspace(0, 1, 6))
    np.savez(tmp_path / "c.npz", images=GREY, labels=LABELS)
    assert load_images(str(tmp_path / "b.npz")).notes == (
        f"{tmp_path / 'b.npz'} also holds arr_1, which is not read.",
    )
    assert load_images(str(tmp_path / "c.npz")).notes == ()
