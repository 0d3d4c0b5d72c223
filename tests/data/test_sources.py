"""Every source gives the images that were put in; every flaw of a source is told by its own
sentence."""

import gzip
import io
import json
import pickle
import re
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import ddim
from ddim.data.sources import (
    _NAMED,
    _SHEETS,
    FASHION_MNIST_CLASSES,
    FASHION_MNIST_FOLDER,
    NamedSource,
    load_images,
    load_test_images,
    read_idx,
)
from ddim.errors import DataError

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


# Captions


def three(folder, *names):
    for i, name in enumerate(names or ("a.png", "b.png", "c.png")):
        write_png(folder / name, GREY[i])


def captions_of(source, **options):
    return list(load_images(str(source), captions=True, **options).captions)


def test_captions_are_read_only_where_they_are_asked_for(tmp_path):
    three(tmp_path)
    (tmp_path / "a.txt").write_text("one of three")
    assert load_images(str(tmp_path)).captions is None


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_of_an_image_folder(tmp_path, name):
    three(tmp_path, "a.png", "deep/b.png", "c.png")
    rows = [("c.png", "last, with a comma"), ("deep/b.png", 'a "quoted" word'), ("./a.png", "été")]
    if name.endswith("csv"):
        lines = [
            "text,file_name",
            *('"' + text.replace('"', '""') + f'",{file}' for file, text in rows),
        ]
    else:
        lines = [json.dumps({"file_name": file, "text": text, "n": 1}) for file, text in rows]
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert captions_of(tmp_path) == ["été", "last, with a comma", 'a "quoted" word']


def test_each_split_has_its_own_metadata_and_the_column_a_name(tmp_path):
    for split in ("train", "test"):
        three(tmp_path / split)
        lines = [
            json.dumps({"file_name": f"{n}.png", "said": [f"{split} {n}", "another"]})
            for n in "abc"
        ]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    assert captions_of(tmp_path, split="test", caption_column="said") == [
        "test a",
        "test b",
        "test c",
    ]
    with pytest.raises(
        DataError,
        match=(
            r"metadata\.jsonl must have columns file_name and text \(or --caption-column\); it has "
            r"file_name, said"
        ),
    ):
        captions_of(tmp_path)


def test_captions_in_text_files_beside_the_images(tmp_path):
    three(tmp_path)
    for name, text in zip("abc", ("one\n", "", " two "), strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    assert captions_of(tmp_path) == ["one", "", "two"]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(
        DataError,
        match=(
            r"^1 of 3 images of .* have no caption: .*b\.txt is missing; an empty file will do\.$"
        ),
    ):
        captions_of(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"is no UTF-8 text \(.*\); save it as UTF-8"):
        captions_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            '{"file_name": "a.png", "text": "x"}',
            r"has no row for 2 of 3 images of .*, such as .*b\.png; add it, or move the image away",
        ),
        (
            '{"file_name": "a.png", "text": null}',
            r"row 1 of .*metadata\.jsonl has no caption but None; an empty text will do",
        ),
        (
            '{"file": "a.png", "text": "x"}',
            r"must have columns file_name and text \(or --caption-column\); it has file, text",
        ),
        ('{"file_name"', r"metadata\.jsonl cannot be read \(.*\); write one row an image"),
        ("", r"must hold a row an image with file_name and a caption; got nothing"),
        ("[1]", r"must hold a row an image with file_name and a caption; got other values"),
    ],
)
def test_messages_of_metadata(tmp_path, content, text):
    three(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(DataError, match=text):
        captions_of(tmp_path)


def test_captions_of_a_table(tmp_path, datasets):
    path = write_parquet(
        datasets,
        tmp_path / "a.parquet",
        image=GREY,
        caption=list("abcdef"),
        other=[[c, "x"] for c in "uvwxyz"],
        n=[1, 2] * 3,
    )
    assert captions_of(path) == list("abcdef")
    assert captions_of(path, caption_column="other") == list("uvwxyz")
    with pytest.raises(DataError, match=r"has no column 'said'; it has image, caption, other, n"):
        captions_of(path, caption_column="said")
    with pytest.raises(
        DataError, match=r"row 0 of column 'n' of .* has no caption but 1; an empty text will do"
    ):
        captions_of(path, caption_column="n")


def test_captions_of_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY, captions=np.array(list("abcdef")))
    assert captions_of(tmp_path / "a.npz") == list("abcdef")
    np.savez(tmp_path / "a.npz", images=GREY, captions=np.array(["x"]))
    with pytest.raises(
        DataError, match="holds 6 images but 1 captions; there must be one caption an image"
    ):
        captions_of(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", images=GREY, captions=LABELS)
    with pytest.raises(
        DataError,
        match=r"captions of .*a\.npz must be text, one an image; got int64 of shape \[6\]",
    ):
        captions_of(tmp_path / "a.npz")


@pytest.mark.parametrize("source", ["digits", "folder", "npz", "parquet"])
def test_data_without_captions(tmp_path, datasets, source):
    three(tmp_path / "folder")
    np.savez(tmp_path / "npz.npz", images=GREY)
    write_parquet(datasets, tmp_path / "parquet.parquet", image=GREY)
    place = {"digits": "digits", "folder": tmp_path / "folder"}.get(
        source, tmp_path / f"{source}.{source}"
    )
    with pytest.raises(
        DataError,
        match=(
            r"has no captions; put metadata\.jsonl \(with file_name and text\) or NAME\.txt beside"
        ),
    ):
        captions_of(place)


def test_a_named_source_may_have_captions(monkeypatch):
    named = NamedSource(COLOUR, LABELS, tuple("abc"), tuple("uvwxyz"))
    monkeypatch.setitem(_NAMED, "drawn", lambda split: named)
    assert captions_of("drawn") == list("uvwxyz")
    assert load_images("drawn").captions is None
    assert np.array_equal(stack(load_images("drawn")), COLOUR.transpose(0, 3, 1, 2))


# Arrays


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


def test_an_item_is_a_uint8_tensor_and_an_int_and_the_callers_own(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY)
    data = load_images(str(tmp_path / "a.npz"))
    image, label = data[2]
    assert image.dtype == torch.uint8
    assert image.shape == (1, 5, 7)
    assert type(label) is int
    image.zero_()
    assert np.array_equal(data[2][0][0], GREY[2])


def test_an_index_beyond_the_end_is_an_index_error():
    with pytest.raises(IndexError):
        load_images("digits", split="test")[297]


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


def test_labels_that_are_all_minus_one_are_none(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY, labels=np.full(6, -1))
    data = load_images(str(tmp_path / "a.npz"))
    assert (data.class_names, data[0][1]) == (None, -1)


def test_digits_are_scaled_to_bytes_and_split_at_1500():
    train, test = load_images("digits"), load_images("digits", split="test")
    assert (len(train), len(test), train.channels, train.resolution) == (1500, 297, 1, (8, 8))
    assert train.class_names == tuple("0123456789")
    values = np.unique(stack(test))
    assert (values.min(), values.max(), len(values)) == (0, 255, 17)


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


def test_fashion_mnist_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    write_idx(tmp_path / "train-images-idx3-ubyte", GREY)
    write_idx(tmp_path / "train-labels-idx1-ubyte", LABELS.astype(np.uint8))
    monkeypatch.setenv("DDIM_FASHION_MNIST", str(tmp_path))
    data = load_images("fashion-mnist")
    assert (len(data), data.name, data.class_names) == (6, "fashion-mnist", FASHION_MNIST_CLASSES)
    assert FASHION_MNIST_CLASSES[9] == "Ankle boot"


def test_read_idx_keeps_any_shape(tmp_path):
    array = RNG.integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    assert np.array_equal(read_idx(write_idx(tmp_path / "x", array)), array)


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", images=GREY)
    monkeypatch.setenv("HOME", str(tmp_path))
    data = load_images("~/a.npz")
    assert (len(data), data.name) == (6, "~/a.npz")


# Folders


def test_folder_with_classes(tmp_path):
    for i, name in enumerate(["b", "a", "b/deeper"]):
        write_png(tmp_path / name / f"{i}.png", COLOUR[i])
    (tmp_path / "a" / "notes.txt").write_text("not an image, and not called one")
    write_png(tmp_path / ".thumbnails" / "x.png", COLOUR[3])
    data = load_images(str(tmp_path))
    assert (data.class_names, labels(data), data.channels, data.resolution) == (
        ("a", "b"),
        [0, 1, 1],
        3,
        (5, 7),
    )
    assert np.array_equal(stack(data), COLOUR[[1, 0, 2]].transpose(0, 3, 1, 2))


def test_folder_without_classes_is_sorted_by_path(tmp_path):
    for i in (2, 0, 1):
        write_png(tmp_path / f"{i}.PNG", GREY[i])
    write_png(tmp_path / "more" / "3.png", GREY[3])
    data = load_images(str(tmp_path))
    assert (data.class_names, data.channels, labels(data)) == (None, 1, [-1] * 4)
    assert np.array_equal(stack(data)[:, 0], GREY[:4])


def test_subfolders_called_train_and_test_are_splits_not_classes(tmp_path):
    for i, name in enumerate(["train/a", "train/b", "test/a"]):
        write_png(tmp_path / name / f"{i}.png", GREY[i])
    train, test = load_images(str(tmp_path)), load_images(str(tmp_path), split="test")
    assert (len(train), train.class_names, labels(train)) == (2, ("a", "b"), [0, 1])
    assert (len(test), test.class_names) == (1, ("a",))
    with pytest.raises(DataError, match=r"has no split 'validation'; it has test, train\."):
        load_images(str(tmp_path), split="validation")


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    write_png(tmp_path / "0.png", np.ascontiguousarray(np.rot90(GREY[0])), exif=exif)
    write_png(tmp_path / "1.png", GREY[1])
    data = load_images(str(tmp_path))
    assert np.array_equal(stack(data)[:, 0], GREY[:2])


# Sizes and channels


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (33, 20)])
def test_resolution_resizes_the_shorter_side_and_keeps_the_centre(tmp_path, size):
    picture = np.zeros((*size, 3), np.uint8)
    middle = np.s_[size[0] // 2 - 5 : size[0] // 2 + 5, size[1] // 2 - 5 : size[1] // 2 + 5]
    picture[middle] = 255
    write_png(tmp_path / "0.png", picture)
    data = load_images(str(tmp_path), resolution=10)
    image = data[0][0].float()
    assert (data.resolution, tuple(image.shape)) == ((10, 10), (3, 10, 10))
    assert image[:, 4:6, 4:6].min() > 240  # Lanczos rings by up to 10 of 255 beside a step
    assert image[:, 0].max() < 10
    assert image[:, :, 0].max() < 10
    assert (image - image.flip(-1)).abs().max() <= 1


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    write_png(tmp_path / "0.png", stripes)
    image = load_images(str(tmp_path), resolution=16)[0][0].float()
    assert (image[:, :, 2:-2] - 127.5).abs().max() < 4


def test_a_resolution_of_two_numbers_is_covered_and_cut(tmp_path):
    write_png(tmp_path / "0.png", np.kron(GREY[0], np.ones((2, 4), np.uint8)))  # 10x28
    write_png(tmp_path / "1.png", np.kron(GREY[1], np.ones((2, 2), np.uint8)))  # 10x14
    data = load_images(str(tmp_path), resolution=(5, 7))
    assert data.resolution == (5, 7)
    assert stack(data).shape == (2, 1, 5, 7)
    with pytest.raises(DataError, match="resolution must be at least 1"):
        load_images(str(tmp_path), resolution=(0, 7))


def test_resolution_leaves_images_of_that_size_alone(tmp_path):
    np.savez(tmp_path / "a.npz", images=COLOUR[:, :, :5])
    assert np.array_equal(
        stack(load_images(str(tmp_path / "a.npz"), resolution=5)),
        COLOUR[:, :, :5].transpose(0, 3, 1, 2),
    )


def test_center_crop_does_not_resize(tmp_path):
    write_png(tmp_path / "0.png", GREY[0])
    write_png(tmp_path / "1.png", np.ascontiguousarray(GREY[1].T))
    data = load_images(str(tmp_path), center_crop=True)
    assert data.resolution == (5, 5)
    assert np.array_equal(stack(data)[:, 0], [GREY[0, :, 1:6], GREY[1].T[1:6]])


def test_grey_to_colour_and_back(tmp_path):
    np.savez(tmp_path / "grey.npz", images=GREY)
    np.savez(tmp_path / "colour.npz", images=np.stack([GREY] * 3, axis=-1))
    assert np.array_equal(
        stack(load_images(str(tmp_path / "grey.npz"), channels=3)), np.stack([GREY] * 3, axis=1)
    )
    assert np.array_equal(stack(load_images(str(tmp_path / "colour.npz"), channels=1))[:, 0], GREY)


def test_alpha_goes_over_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    write_png(tmp_path / "f" / "0.png", rgba)
    np.savez(tmp_path / "a.npz", images=rgba[None])
    for source in (tmp_path / "f", tmp_path / "a.npz"):
        data = load_images(str(source))
        assert data.channels == 3
        assert data[0][0][:, 0, 0].tolist() == [10, 20, 30]
        assert (data[0][0][:, 1] == 255).all()


def test_a_palette_counts_as_colour(tmp_path):
    Image.new("RGB", (4, 4), (200, 10, 10)).convert("P").save(tmp_path / "0.png")
    data = load_images(str(tmp_path))
    assert data.channels == 3
    assert data[0][0][:, 0, 0].tolist() == pytest.approx([200, 10, 10], abs=30)


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    write_png(tmp_path / "0.png", (GREY[0].astype(np.uint16) << 8) + 17)
    data = load_images(str(tmp_path))
    assert data.channels == 1
    assert np.array_equal(stack(data)[0, 0], GREY[0])


def test_floating_point_pixels_are_refused(tmp_path):
    write_png(tmp_path / "0.tif", GREY[0].astype(np.float32) / 255)
    with pytest.raises(
        DataError,
        match=r"0\.tif: the image has floating-point pixels of unknown range; convert it to 8 bits",
    ):
        load_images(str(tmp_path))[0]


# Tables


def test_parquet_file(tmp_path, datasets):
    names = datasets.ClassLabel(names=["cat", "dog", "eel"])
    path = write_parquet(
        datasets, tmp_path / "a.parquet", image=COLOUR, label=(names, LABELS.tolist())
    )
    data = load_images(str(path))
    assert (data.name, data.class_names, labels(data)) == (
        str(path),
        ("cat", "dog", "eel"),
        LABELS.tolist(),
    )
    assert (data.channels, data.resolution) == (3, (5, 7))
    assert np.array_equal(stack(data), COLOUR.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("inside", ["", "data"])
def test_parquet_folder_with_splits(tmp_path, datasets, inside):
    whole, words = datasets.Value("int64"), datasets.Value("string")
    write_parquet(
        datasets,
        tmp_path / "set" / inside / "train-00000-of-00002.parquet",
        image=GREY[:2],
        other=(whole, [7, 7]),
    )
    write_parquet(
        datasets,
        tmp_path / "set" / inside / "train-00001-of-00002.parquet",
        image=GREY[2:4],
        other=(whole, [7, 7]),
    )
    write_parquet(
        datasets,
        tmp_path / "set" / inside / "test-00000-of-00001.parquet",
        image=GREY[4:],
        label=(words, ["b", "a"]),
    )
    train, test = (
        load_images(str(tmp_path / "set")),
        load_images(str(tmp_path / "set"), split="test"),
    )
    assert np.array_equal(stack(train)[:, 0], GREY[:4])
    assert train.class_names is None
    assert np.array_equal(stack(test)[:, 0], GREY[4:])
    assert (test.class_names, labels(test)) == (("a", "b"), [1, 0])
    with pytest.raises(DataError, match=r"has no split 'val'; it has test, train\."):
        load_images(str(tmp_path / "set"), split="val")


def encode(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_columns_by_name(tmp_path, datasets):
    write_parquet(
        datasets,
        tmp_path / "a.parquet",
        scan=[encode(a) for a in GREY],
        kind=LABELS.tolist(),
        label=[[0, 1]] * 6,
    )
    data = load_images(str(tmp_path / "a.parquet"), image_column="scan", label_column="kind")
    assert np.array_equal(stack(data)[:, 0], GREY)
    assert (labels(data), data.class_names) == (LABELS.tolist(), ("0", "1", "2"))
    unasked = load_images(str(tmp_path / "a.parquet"), image_column="scan")
    assert unasked.class_names is None  # lists are not labels
    with pytest.raises(DataError, match=r"has columns scan, kind, label, and none is called image"):
        load_images(str(tmp_path / "a.parquet"))
    for wrong in ({"image_column": "photo"}, {"label_column": "photo"}):
        with pytest.raises(DataError, match=r"has no column 'photo'; it has scan, kind, label\."):
            load_images(str(tmp_path / "a.parquet"), **wrong)
    with pytest.raises(DataError, match="column 'kind' of .* does not hold images"):
        load_images(str(tmp_path / "a.parquet"), image_column="kind")
    with pytest.raises(
        DataError, match="labels of .* must be whole numbers, one an image; got int64 of shape"
    ):
        load_images(str(tmp_path / "a.parquet"), image_column="scan", label_column="label")


def test_rows_without_a_usable_image(tmp_path, datasets):
    write_parquet(
        datasets, tmp_path / "a.parquet", image_bytes=[encode(GREY[0]), None, b"no image"]
    )
    data = load_images(str(tmp_path / "a.parquet"), image_column="image_bytes")
    with pytest.raises(DataError, match="image 1 of .* is empty; remove its row"):
        data[1]
    with pytest.raises(DataError, match="image 2 of .* cannot be decoded"):
        data[2]


def test_damaged_parquet(tmp_path, datasets):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(
        DataError,
        match=r"a\.parquet cannot be read as parquet \(.*\); check the file, or write it again\.",
    ):
        load_images(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("source", ["owner/set", "plain", "owner/set-v1.0"])
def test_a_hub_data_set_is_asked_for_by_its_id_and_split(datasets, monkeypatch, source):
    asked = []
    table = datasets.Dataset.from_dict(
        {"img": [encode(a) for a in GREY], "fine_label": LABELS.tolist()}
    )
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or table
    )
    data = load_images(source, split="validation")
    assert asked == [((source,), {"split": "validation"})]
    assert (data.name, labels(data)) == (source, LABELS.tolist())
    assert np.array_equal(stack(data)[:, 0], GREY)


def test_fashion_mnist_comes_from_the_hub_where_the_package_is_missing(
    tmp_path, datasets, monkeypatch
):
    asked = []
    table = datasets.Dataset.from_dict({"image": [encode(a) for a in GREY]})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: asked.append(args) or table
    )
    monkeypatch.delenv("DDIM_FASHION_MNIST", raising=False)
    monkeypatch.setattr(
        sys.modules[load_images.__module__], "FASHION_MNIST_FOLDER", str(tmp_path / "none")
    )
    assert len(load_images("fashion-mnist")) == 6
    assert asked == [("zalando-datasets/fashion_mnist",)]


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        (
            "owner/set",
            ConnectionError("Couldn't reach 'owner/set' on the Hub (LocalEntryNotFoundError)"),
            (
                r"^there is no folder or file 'owner/set' here, and the hub cannot be reached \(no "
                r"route to the hub\); check the path"
            ),
        ),
        (
            "fashion-mnist",
            ConnectionError("no route"),
            (
                "^'fashion-mnist' is not on this machine, and the hub cannot be reached .*; "
                "install Debian's package dataset-fashion-mnist"
            ),
        ),
        (
            "owner/set",
            FileNotFoundError("Dataset 'owner/set' doesn't exist"),
            "is neither a path that exists nor a hub data set open to you",
        ),
        (
            "owner/set",
            ValueError("Unknown split \"train\". Should be one of ['all']."),
            r"owner/set has no split 'train' \(.*\['all'\]\)",
        ),
        (
            "owner/set",
            ValueError("Config name is missing.\nPick one"),
            r"owner/set cannot be opened \(Config name is missing\); see its page",
        ),
    ],
)
def test_messages_of_the_hub(tmp_path, datasets, monkeypatch, source, error, text):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.delenv("DDIM_FASHION_MNIST", raising=False)
    monkeypatch.setattr(
        sys.modules[load_images.__module__], "FASHION_MNIST_FOLDER", str(tmp_path / "none")
    )
    with pytest.raises(DataError, match=text):
        load_images(source)


class ConnectError(Exception):
    """As the hub's client has it, of no built-in kind."""


ConnectError.__module__ = "httpx2"


@pytest.mark.parametrize(
    ("error", "offline"),
    [(ConnectError("no name"), True), (TimeoutError(), True), (ValueError("gated"), False)],
)
def test_a_hub_that_cannot_be_reached_is_tried_once(datasets, monkeypatch, error, offline):
    """Its libraries would go on for half a minute, with a line of a warning a try; what they have
    in their cache they give offline too."""
    import huggingface_hub

    constants, seen = huggingface_hub.constants, []

    def refuse(*args, **options):
        raise error

    def load(*args, **options):
        seen.append(constants.HF_HUB_OFFLINE)
        return datasets.Dataset.from_dict({"image": [encode(a) for a in GREY]})

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_images("nothere")) == 6
    assert seen == [offline]
    assert constants.HF_HUB_OFFLINE is False


def test_a_name_that_is_neither_here_nor_reached_says_so_at_once(datasets, monkeypatch, caplog):
    """With the libraries themselves, which find no hub in a fraction of a second."""
    began = time.perf_counter()
    with pytest.raises(
        DataError,
        match=(
            r"^there is no folder or file 'nothere' here, and the hub cannot be reached \(no route"
        ),
    ):
        load_images("nothere")
    assert time.perf_counter() - began < 5
    assert "Retry" not in caplog.text


@pytest.mark.parametrize(
    ("module", "source"), [("datasets", "owner/set"), ("sklearn.datasets", "digits")]
)
def test_a_missing_extra_says_what_to_install(monkeypatch, module, source):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"not installed; run: pip install 'ddim\[train\]'\."):
        load_images(source)


# Errors of files


@pytest.mark.parametrize(
    "source",
    [
        "",
        "./none",
        "/none",
        "~none",
        "none.npz",
        "none.parquet",
        "a/b/c",
        "train-images-idx3-ubyte",
        "x.gz",
    ],
)
def test_a_path_that_does_not_exist(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if source:
        with pytest.raises(DataError, match=f"there is no data at '{source}'; check the path"):
            load_images(source)
    else:
        with pytest.raises(DataError, match="there is no data at ''"):
            load_images(source)


def test_a_file_of_no_known_kind(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(
        DataError, match=r"a\.txt is not a data set this reads; give a folder of images"
    ):
        load_images(str(tmp_path / "a.txt"))


def test_a_folder_without_images(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(DataError, match=r"the folder .* holds no images \(.*\.png"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("resolution", [None, 4])
def test_a_file_that_is_no_image_is_named(tmp_path, resolution):
    write_png(tmp_path / "0.png", GREY[0])
    (tmp_path / "1.png").write_text("words")
    with pytest.raises(
        DataError, match=r"1\.png is not an image that can be read .*; remove or replace it"
    ):
        load_images(str(tmp_path), resolution=resolution)[1]


def test_an_image_that_is_cut_off_is_named(tmp_path):
    path = write_png(tmp_path / "0.png", RNG.integers(0, 256, (64, 64), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"0\.png is not an image that can be read"):
        load_images(str(tmp_path))


def test_images_of_several_sizes_are_told_at_once_and_how_to_fix_them(tmp_path):
    write_png(tmp_path / "0.png", GREY[0])
    write_png(tmp_path / "1.png", GREY[1, :4])
    with pytest.raises(
        DataError,
        match=(
            r"1\.png is 7x4 and the first image of .* 7x5 \(width x height\); bring all to one "
            r"size: .*--resolution 5"
        ),
    ):
        load_images(str(tmp_path))
    with pytest.raises(
        DataError,
        match=r"1\.png is 7x4 and the first image of .* 7x5 \(width x height\); .*--resolution 5",
    ):
        load_images(str(tmp_path), center_crop=True)
    assert stack(load_images(str(tmp_path), resolution=5)).shape == (2, 1, 5, 5)


@pytest.mark.parametrize("below", ["", "digits"])
def test_grids_and_plots_are_left_out_where_a_record_of_this_program_lies_beside_them(
    below, tmp_path
):
    folder = tmp_path / below
    write_png(folder / "000000.png", GREY[0])
    write_png(folder / "grid.png", GREY[0, :4])
    with pytest.raises(DataError, match=r"grid\.png is 7x4"):
        load_images(str(tmp_path))
    for foreign in ("no json", "[]", "{}", '{"protocol": {}}'):
        (folder / "run.json").write_text(foreign)
        with pytest.raises(DataError, match=r"grid\.png is 7x4"):
            load_images(str(tmp_path))
    (folder / "run.json").write_text('{"protocol": {"command": "sample"}}')
    assert len(load_images(str(tmp_path))) == 1
    (folder / "000000.png").unlink()
    with pytest.raises(DataError, match="holds no images"):
        load_images(str(tmp_path))


def test_every_grid_and_plot_that_a_command_writes_is_known_by_its_name():
    sources = [
        path.read_text()
        for folder in ("cli", "evaluation")
        for path in (Path(ddim.__file__).parent / folder).glob("*.py")
    ]
    written = {
        name for source in sources for name in re.findall(r'"([\w-]+)\.(?:png|gif)"', source)
    }
    assert written == _SHEETS


def test_a_picture_on_its_side_is_told_when_it_is_read(tmp_path):
    write_png(tmp_path / "0.png", GREY[0])
    write_png(tmp_path / "1.png", np.ascontiguousarray(GREY[1].T))
    with pytest.raises(
        DataError,
        match=(
            r"1\.png is 5x7 and the first is 7x5 \(width x height\); bring all to one size: "
            r".*--resolution 5"
        ),
    ):
        load_images(str(tmp_path))[1]


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
            "holds 6 images but 4 labels; there must be one label an image",
        ),
        (
            {"images": GREY, "labels": LABELS / 2},
            r"must be whole numbers, one an image; got float64 of shape \[6\]",
        ),
        (
            {"images": GREY, "labels": np.eye(6, dtype=int)},
            r"must be whole numbers, one an image; got int64 of shape \[6, 6\]",
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


def test_labels_beyond_the_class_names(tmp_path, monkeypatch):
    write_idx(tmp_path / "train-images-idx3-ubyte", GREY)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([0, 1, 2, 3, 4, 10], np.uint8))
    monkeypatch.setenv("DDIM_FASHION_MNIST", str(tmp_path))
    with pytest.raises(DataError, match=r"labels of fashion-mnist must lie in 0\.\.9; got 10"):
        load_images("fashion-mnist")


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


def test_images_to_measure_on_are_the_test_split_where_there_is_one(
    tmp_path, datasets, monkeypatch
):
    np.savez(tmp_path / "a.npz", images=GREY)
    write_png(tmp_path / "folder" / "0.png", GREY[0])
    write_png(tmp_path / "divided" / "test" / "0.png", GREY[0])
    write_png(tmp_path / "divided" / "train" / "0.png", GREY[0])
    (tmp_path / "idx").mkdir()
    write_idx(tmp_path / "idx" / "train-images-idx3-ubyte", GREY)
    told = {"a.npz": "train", "folder": "train", "divided": "test", "idx": "train"}
    for name, split in told.items():
        assert load_test_images(str(tmp_path / name))[1] == split
    assert load_test_images("digits")[1] == "test"
    images, split = load_test_images(str(NPZ), resolution=(14, 14), channels=3)
    assert (split, images.resolution, images.channels) == ("test", (14, 14), 3)
    assert load_test_images(str(NPZ), split="train")[1] == "train"
    with pytest.raises(DataError, match="has no split 'test'"):
        load_test_images(str(tmp_path / "folder"), split="test")
    with pytest.raises(DataError, match="there is no data at"):
        load_test_images(str(tmp_path / "none.npz"))

    def of_the_hub(name, split):
        if split == "test":
            raise ValueError("Unknown split \"test\". Should be one of ['train'].")
        return datasets.Dataset.from_dict(
            {"image": [Image.fromarray(GREY[0])]},
            features=datasets.Features({"image": datasets.Image()}),
        )

    monkeypatch.setattr(datasets, "load_dataset", of_the_hub)
    assert load_test_images("owner/set")[1] == "train"


def test_splits_that_do_not_exist(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY)
    write_png(tmp_path / "folder" / "0.png", GREY[0])
    (tmp_path / "idx").mkdir()
    write_idx(tmp_path / "idx" / "t10k-images-idx3-ubyte", GREY)
    undivided = r"has no split 'test'; it is not divided into splits, so leave out --split\."
    with pytest.raises(DataError, match=r"a\.npz " + undivided):
        load_images(str(tmp_path / "a.npz"), split="test")
    with pytest.raises(DataError, match="folder " + undivided):
        load_images(str(tmp_path / "folder"), split="test")
    with pytest.raises(
        DataError, match=r"fashion_mnist_2048\.npz has no split 'val'; it has test, train\."
    ):
        load_images(str(NPZ), split="val")
    with pytest.raises(DataError, match="digits has splits train and test; got 'val'"):
        load_images("digits", split="val")
    with pytest.raises(
        DataError,
        match=(
            r"no images of split 'train', which would be train-images-idx3-ubyte.*; it holds "
            r"t10k-images-idx3-ubyte\."
        ),
    ):
        load_images(str(tmp_path / "idx"))


def test_a_folder_for_fashion_mnist_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("DDIM_FASHION_MNIST", str(tmp_path / "none"))
    with pytest.raises(
        DataError,
        match="DDIM_FASHION_MNIST names .*none, which is no folder; correct it, or unset it",
    ):
        load_images("fashion-mnist")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"resolution": 0}, "resolution must be at least 1; got 0"),
        ({"resolution": -4}, "resolution must be at least 1; got -4"),
        ({"channels": 2}, r"channels must be 1 \(grey\) or 3 \(colour\); got 2"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(DataError, match=text):
        load_images("digits", **options)


# In a loader


def test_every_kind_of_data_survives_being_sent_to_a_worker(tmp_path, datasets):
    np.savez(tmp_path / "a.npz", images=GREY, labels=LABELS)
    for i in range(6):
        write_png(tmp_path / "folder" / f"{i}.png", GREY[i])
    write_parquet(datasets, tmp_path / "a.parquet", image=GREY)
    for name in ("a.npz", "folder", "a.parquet"):
        data = pickle.loads(pickle.dumps(load_images(str(tmp_path / name))))
        assert np.array_equal(stack(data)[:, 0], GREY)


def test_a_loader_batches_it():
    images, targets = next(iter(DataLoader(load_images(str(NPZ)), batch_size=8)))
    assert (images.shape, images.dtype) == ((8, 1, 28, 28), torch.uint8)
    assert targets.tolist() == labels(load_images(str(NPZ)))[:8]
