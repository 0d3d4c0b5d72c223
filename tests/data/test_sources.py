"""Every source is opened by what it is, and a flaw of one is named."""

import sys

import numpy as np
import pytest
from PIL import Image
from tests.data.conftest import GREY, NPZ, write_idx, write_png

from ddim.data.sources import load_images, load_test_images
from ddim.errors import DataError


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", images=GREY)
    monkeypatch.setenv("HOME", str(tmp_path))
    data = load_images("~/a.npz")
    assert (len(data), data.name) == (6, "~/a.npz")


@pytest.mark.parametrize(
    ("module", "source"), [("datasets", "owner/set"), ("sklearn.datasets", "digits")]
)
def test_a_missing_extra_says_what_to_install(monkeypatch, module, source):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"not installed; run: pip install 'ddim\[train\]'\."):
        load_images(source)


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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"resolution": 0}, "resolution must be a side of at least 1, .*; got 0"),
        ({"resolution": -4}, "resolution must be a side of at least 1, .*; got -4"),
        ({"resolution": (4,)}, r"resolution must be a side .*, or height and width; got \(4,\)"),
        ({"resolution": 4.5}, r"resolution must be a side .*, or height and width; got 4\.5"),
        ({"channels": 2}, r"channels must be 1 \(grey\) or 3 \(colour\); got 2"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(DataError, match=text):
        load_images("digits", **options)


@pytest.mark.parametrize("kind", ["npz", "idx", "folder", "digits"])
def test_the_name_of_a_column_is_refused_where_there_are_none(tmp_path, kind):
    np.savez(tmp_path / "a.npz", images=GREY)
    write_idx(tmp_path / "train-images-idx3-ubyte", GREY)
    write_png(tmp_path / "folder" / "0.png", GREY[0])
    place = {"npz": "a.npz", "idx": "train-images-idx3-ubyte", "folder": "folder"}.get(kind)
    source = kind if place is None else str(tmp_path / place)
    for option in ("image", "label", *(["caption"] if kind != "folder" else [])):
        with pytest.raises(DataError, match=f"no column 'x'; leave out --{option}-column"):
            load_images(source, **{f"{option}_column": "x"})


def test_a_source_is_a_text_or_a_path_of_any_length(tmp_path):
    write_png(tmp_path / "0.png", GREY[0])
    data = load_images(tmp_path)
    assert (len(data), data.name) == (1, str(tmp_path))
    with pytest.raises(DataError, match="there is no data at"):
        load_images("./" + "x" * 5000)
