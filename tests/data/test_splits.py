"""A split is a word of a name, or the folder is refused."""

import numpy as np
import pytest
from tests.data.conftest import GREY, labels, stack, write_idx, write_parquet, write_png

from ddim.data.sources import load_images
from ddim.data.splits import NoSuchSplit, family, split_of
from ddim.errors import DataError


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(
            (name, "train")
            for name in ("train", "Train", "TRAIN", "training", "train_0", "train.0")
        ),
        *((name, "train") for name in ("mnist-train", "Train-0", "train2017", "TrainImages")),
        *((name, "test") for name in ("test", "Testing", "test-00000-of-00001", "x_test")),
        *((name, "validation") for name in ("val", "valid", "Validation", "val2017")),
        *((name, None) for name in ("cat", "trains", "contest", "evaluate", "train-test", "")),
    ],
)
def test_a_split_is_a_word_of_a_name(name, split):
    assert split_of(name) == split


def test_names_are_of_one_family_if_the_split_is_all_that_differs():
    assert family(["mnist-train", "mnist-test", "docs"]).keys() == {"mnist-train", "mnist-test"}
    assert family(["bullet_train", "test_tube", "zebra"]) == {}


def fill(folder, *names):
    """Two pictures in each folder, or a picture of that name; all different."""
    number = 0
    for name in names:
        for file in [name] if name.endswith(".png") else [f"{name}/0.png", f"{name}/1.png"]:
            write_png(folder / file, GREY[0] // 2 + number)
            number += 1


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("training", "testing"),
        ("mnist-train", "mnist-test"),
        ("Train-0", "Test-0"),
        ("train.0", "test.0"),
        ("images/train", "images/test"),
        ("train/images", "test/images"),
    ],
)
def test_folders_are_splits_in_any_spelling(tmp_path, train, test):
    fill(tmp_path, test, train)
    found = load_images(str(tmp_path))
    assert np.array_equal(stack(found)[:, 0], [GREY[0] // 2 + 2, GREY[0] // 2 + 3])
    assert len(load_images(str(tmp_path), split="test")) == 2
    with pytest.raises(NoSuchSplit, match=r"has no split 'val'; it has test, train\."):
        load_images(str(tmp_path), split="val")


@pytest.mark.parametrize("beside", ["preview.png", "docs"])
def test_what_lies_beside_splits_is_left_out_and_told(tmp_path, beside):
    fill(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog", beside)
    found = load_images(str(tmp_path))
    assert (found.class_names, labels(found)) == (("cat", "dog"), [0, 0, 1, 1])
    (note,) = found.notes
    assert "that lie in no split are left out:" in note
    assert beside in note


def test_splits_inside_class_folders_are_splits(tmp_path):
    fill(tmp_path, "cat/train", "cat/test", "dog/train", "dog/test")
    found = load_images(str(tmp_path), split="test")
    assert (found.class_names, labels(found)) == (("cat", "dog"), [0, 0, 1, 1])


def test_pictures_whose_names_are_splits_are_divided(tmp_path):
    fill(tmp_path, "train_0.png", "train_1.png", "test_0.png")
    assert len(load_images(str(tmp_path))) == 2
    assert len(load_images(str(tmp_path), split="test")) == 1


@pytest.mark.parametrize(
    "names", [("train", "car"), ("mnist-train", "docs"), ("bullet_train", "test_tube", "zebra")]
)
def test_a_folder_that_may_be_a_split_or_a_class_is_refused(tmp_path, names):
    fill(tmp_path, *names)
    with pytest.raises(DataError, match="so it may be a split or a class; name .* as the data, or"):
        load_images(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train_0", "test_0"),
        ("mnist-train", "mnist-test"),
        ("Train-0", "Test-0"),
        ("a.train", "b.test"),
    ],
)
def test_tables_are_of_the_split_that_a_word_of_their_name_says(tmp_path, datasets, train, test):
    for name, images in ((train, GREY[:4]), (test, GREY[4:]), ("more", GREY[:1])):
        write_parquet(datasets, tmp_path / "set" / f"{name}.parquet", image=images)
    found = load_images(str(tmp_path / "set"))
    assert np.array_equal(stack(found)[:, 0], GREY[:4])
    assert "that are of no split are left out: 1, such as" in found.notes[0]
    assert "more.parquet" in found.notes[0]
    assert len(load_images(str(tmp_path / "set"), split="test")) == 2


def test_a_single_file_has_no_other_split_than_its_name_says(tmp_path, datasets):
    write_parquet(datasets, tmp_path / "a.parquet", image=GREY)
    write_parquet(datasets, tmp_path / "test-0.parquet", image=GREY)
    write_idx(tmp_path / "train-images-idx3-ubyte", GREY)
    for name in ("a.parquet", "train-images-idx3-ubyte"):
        with pytest.raises(NoSuchSplit, match="has no split 'test'"):
            load_images(str(tmp_path / name), split="test")
    for split in ("train", "test"):
        assert len(load_images(str(tmp_path / "test-0.parquet"), split=split)) == 6


def test_arrays_have_splits_in_any_case(tmp_path):
    np.savez(tmp_path / "a.npz", Train_images=GREY, Test_images=GREY[:2], Test_labels=[3, 4])
    found = load_images(str(tmp_path / "a.npz"), split="test")
    assert labels(found) == [3, 4]
