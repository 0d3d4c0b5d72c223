"""The sets that have a name of their own."""

import numpy as np
import pytest
from tests.data.conftest import GREY, LABELS, encode, stack, write_idx

from ddim.data.named import FASHION_MNIST_CLASSES
from ddim.data.sources import load_images
from ddim.errors import DataError


def test_digits_are_scaled_to_bytes_and_split_at_1500():
    train, test = load_images("digits"), load_images("digits", split="test")
    assert (len(train), len(test), train.channels, train.resolution) == (1500, 297, 1, (8, 8))
    assert train.class_names == tuple("0123456789")
    values = np.unique(stack(test))
    assert (values.min(), values.max(), len(values)) == (0, 255, 17)


def test_fashion_mnist_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    write_idx(tmp_path / "train-images-idx3-ubyte", GREY)
    write_idx(tmp_path / "train-labels-idx1-ubyte", LABELS.astype(np.uint8))
    monkeypatch.setenv("DDIM_FASHION_MNIST", str(tmp_path))
    data = load_images("fashion-mnist")
    assert (len(data), data.name, data.class_names) == (6, "fashion-mnist", FASHION_MNIST_CLASSES)
    assert FASHION_MNIST_CLASSES[9] == "Ankle boot"


def test_fashion_mnist_comes_from_the_hub_where_the_package_is_missing(
    tmp_path, datasets, monkeypatch
):
    asked = []
    table = datasets.Dataset.from_dict({"image": [encode(a) for a in GREY]})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: asked.append(args) or table
    )
    monkeypatch.delenv("DDIM_FASHION_MNIST", raising=False)
    monkeypatch.setattr("ddim.data.named.FASHION_MNIST_FOLDER", str(tmp_path / "none"))
    assert len(load_images("fashion-mnist")) == 6
    assert asked == [("zalando-datasets/fashion_mnist",)]


def test_labels_beyond_the_class_names(tmp_path, monkeypatch):
    write_idx(tmp_path / "train-images-idx3-ubyte", GREY)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([0, 1, 2, 3, 4, 10], np.uint8))
    monkeypatch.setenv("DDIM_FASHION_MNIST", str(tmp_path))
    with pytest.raises(DataError, match=r"labels of fashion-mnist must lie in 0\.\.9; got 10"):
        load_images("fashion-mnist")


def test_a_folder_for_fashion_mnist_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("DDIM_FASHION_MNIST", str(tmp_path / "none"))
    with pytest.raises(
        DataError,
        match="DDIM_FASHION_MNIST names .*none, which is no folder; correct it, or unset it",
    ):
        load_images("fashion-mnist")
