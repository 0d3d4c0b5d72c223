"""The captioned garments: pure functions of the index, exact at the border, and readable back."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ddim.data.fashion_text import (
    BACKGROUNDS,
    COLOURS,
    FRAME,
    GARMENTS,
    Combination,
    FashionText,
    combine,
    compose,
    extract_garments,
    hues,
)
from ddim.data.sources import load_images

EVERY = [combine(garment, rank) for garment in range(10) for rank in range(30)]


@pytest.fixture(scope="module")
def garments() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    with np.load(Path(__file__).parents[1] / "data" / "fashion_mnist_2048.npz") as file:
        return file["train_images"], file["train_labels"]


def test_ranks_go_round_all_pairs_of_colour_and_background():
    assert len(set(EVERY)) == 300
    assert {c.caption for c in EVERY} == {
        f"a {c} {g} on a {b} background" for c in COLOURS for g in GARMENTS for b in BACKGROUNDS
    }
    assert combine(3, 30) == combine(3, 0)


def test_all_combinations_are_used_equally_often(garments):
    images, labels = garments
    data = FashionText.of_garments(images, labels)
    for label in range(10):
        counts = Counter(data.captions[i] for i in np.flatnonzero(labels == label))
        assert len(counts) == 30
        assert max(counts.values()) - min(counts.values()) <= 1
    assert all(
        GARMENTS[label] in caption for label, caption in zip(labels, data.captions, strict=True)
    )


def test_the_frame_is_pure_background_and_black_and_white_are_exact(garments):
    images, _ = garments
    frame = np.ones((32, 32), dtype=bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    for name, level in BACKGROUNDS.items():
        picture = compose(images[0], Combination("red", "bag", name))
        assert picture.shape == (32, 32, 3)
        assert picture.dtype == np.uint8
        assert (picture[frame] == level).all()
    assert (BACKGROUNDS["black"], BACKGROUNDS["white"]) == (0, 255)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_garment_is_read_back_from_any_colour_and_background(garments, colour, background):
    images, _ = garments
    composed = (
        np.stack([compose(image, Combination(colour, "bag", background)) for image in images[:50]])
        / 255
    )
    np.testing.assert_allclose(extract_garments(composed), images[:50] / 255, atol=0.01)


def test_no_garment_is_saturated_nor_hidden_by_its_background(garments):
    images, _ = garments
    for combination in EVERY[:30]:
        picture = compose(images[7], combination)
        garment = picture[FRAME:-FRAME, FRAME:-FRAME][images[7] > 64].astype(int)
        assert garment.min() > 0
        assert garment.max() < 255
        assert (garment.max(1) - garment.min(1)).min() > 50  # a background has no chroma


def test_hues_are_sixty_degrees_apart():
    assert sorted(hues().values()) == [0, 60, 120, 180, 240, 300]


def test_the_named_set_has_captions_and_the_garments_of_fashion_mnist(
    monkeypatch, tmp_path, garments
):
    images, labels = garments
    for name, array in (("images-idx3", images[:40]), ("labels-idx1", labels[:40])):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (tmp_path / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    monkeypatch.setenv("DDIM_FASHION_MNIST", str(tmp_path))
    data = load_images("fashion-text", captions=True)
    assert (data.channels, data.resolution, len(data)) == (3, (32, 32), 40)
    assert data.captions is not None
    image, label = data[5]
    expected = combine(label, int((labels[:5] == label).sum()))
    assert data.captions[5] == expected.caption
    np.testing.assert_array_equal(image.permute(1, 2, 0), compose(images[5], expected))
