"""Data sets that have a name of their own: digits, Fashion-MNIST, and fashion-text."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ddim.data.arrays import open_idx_folder
from ddim.data.dataset import Columns, ImageData, Source
from ddim.data.fashion_text import FashionText
from ddim.data.parquet import open_hub
from ddim.data.splits import NoSuchSplit
from ddim.errors import DataError

__all__ = ["FASHION_MNIST_CLASSES", "FASHION_MNIST_FOLDER", "NAMED"]
__all__ += ["fashion_mnist_folder", "open_fashion_mnist"]

FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts it."""

FASHION_MNIST_HUB = "zalando-datasets/fashion_mnist"


def fashion_mnist_folder() -> Path:
    """Where Fashion-MNIST lies on this machine, if it is there."""
    return Path(os.environ.get("DDIM_FASHION_MNIST") or FASHION_MNIST_FOLDER)


def open_fashion_mnist(split: str, columns: Columns) -> Source:
    """Opens Fashion-MNIST: the folder that ``DDIM_FASHION_MNIST`` names, Debian's package, or the
    hub."""
    chosen, folder = os.environ.get("DDIM_FASHION_MNIST"), fashion_mnist_folder()
    if folder.is_dir():
        return open_idx_folder("fashion-mnist", folder, split, FASHION_MNIST_CLASSES)
    if chosen:
        raise DataError(
            f"DDIM_FASHION_MNIST names {chosen}, which is no folder; correct it, or unset it."
        )
    return open_hub("fashion-mnist", FASHION_MNIST_HUB, split, columns)


def _digits(split: str) -> Source:
    part = {"train": slice(0, 1500), "test": slice(1500, None)}.get(split)
    if part is None:
        raise NoSuchSplit(f"digits has splits train and test; got {split!r}.")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        message = (
            "digits needs scikit-learn, which is not installed; run: pip install 'ddim[train]'."
        )
        raise DataError(message) from error
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[part]
    return Source(images, digits.target[part], tuple("0123456789"))


def _fashion_text(split: str) -> Source:
    data = ImageData.of_source("fashion-mnist", open_fashion_mnist(split, Columns()))
    pairs = [data[i] for i in range(len(data))]
    labels = np.array([label for _, label in pairs])
    images = FashionText.of_garments(np.stack([image[0].numpy() for image, _ in pairs]), labels)
    return Source(images, labels, FASHION_MNIST_CLASSES, images.captions)


NAMED: dict[str, Callable[[str], Source]] = {"digits": _digits, "fashion-text": _fashion_text}
"""The sets that need no path, each as a function of the split's name. They import what they need
when they are called."""
