"""What images show is told right where it is known, and a planted flaw of each kind is seen."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ddim.data.fashion_text import COLOURS, GARMENTS, combine, compose, extract_garments, hues
from ddim.evaluation.classifier import load_classifier
from fashion_judge import (
    Asked,
    frame_brightness,
    frame_spread,
    garment_hue,
    hue_distance,
    judge,
    nearest_hue,
    saturated,
    summarise,
)

PALETTE = list(hues().values())


@pytest.fixture(scope="module")
def real():
    """Real garments of every combination, and what was asked for."""
    with np.load(Path(__file__).parent / "data" / "fashion_mnist_2048.npz") as file:
        images, labels = file["test_images"], file["test_labels"]
    seen, composed, asked = [0] * 10, [], []
    for image, label in zip(images[:600], labels[:600], strict=True):
        combination = combine(label, seen[label])
        seen[label] += 1
        composed.append(compose(image, combination))
        asked.append(Asked(*combination.numbers))
    return torch.from_numpy(np.stack(composed)).permute(0, 3, 1, 2).float() / 255, asked


def told(images, asked):
    garments = torch.from_numpy(extract_garments(images.permute(0, 2, 3, 1).numpy()))
    return judge(images, garments, asked, palette=PALETTE, classifier=load_classifier()[0])


def test_real_images_are_what_they_are_said_to_be(real):
    images, asked = real
    judged = told(images, asked)
    assert judged.error.abs().max() < 1e-6
    assert frame_spread(images).max() < 1e-6
    assert judged.hue_right.all()
    assert (
        judged.class_right.double().mean() > 0.9
    )  # the classifier's own limit, 0.934 over all test images


def test_other_backgrounds_hues_and_garments_are_seen(real):
    images, asked = real
    assert not told(
        images.roll(1, dims=1), asked
    ).hue_right.any()  # red, green, blue become green, blue, red: 120 degrees
    wrong = [a._replace(garment=(a.garment + 5) % len(GARMENTS)) for a in asked]
    assert told(images, wrong).class_right.double().mean() < 0.05
    brighter = told((images + 0.1).clamp(max=1), asked)
    dark = torch.tensor([a.brightness < 0.9 for a in asked])
    torch.testing.assert_close(brighter.error[dark], torch.full((int(dark.sum()),), 0.1))


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("background", [0.0, 0.3, 1.0])
def test_a_background_weighs_nothing_in_a_hue(name, background):
    image = torch.full((1, 3, 32, 32), background)
    image[:, :, 10:14, 10:20] = torch.tensor(COLOURS[name])[None, :, None, None] * 0.5
    hue, strength = garment_hue(image)
    assert hue_distance(hue, hues()[name]).item() < 1e-3
    assert strength.item() > 0.005
    assert nearest_hue(hue, PALETTE).item() == list(COLOURS).index(name)


def test_an_image_without_colour_has_no_right_hue():
    grey = torch.full((2, 3, 32, 32), 0.5)
    assert not told(grey, [Asked(0.5, colour, 0) for colour in (0, 3)]).hue_right.any()


def test_hues_lie_on_a_circle():
    assert hue_distance(
        torch.tensor([359.0, 10.0, 180.0]), torch.tensor([1.0, 350.0, 0.0])
    ).tolist() == [2.0, 20.0, 180.0]


def test_saturated_values_are_those_at_both_ends():
    image = torch.tensor([0.0, 1.0, 0.001, 0.5]).view(1, 1, 2, 2)
    assert saturated(image).item() == 0.75  # 0.001 is 0 in a picture of 256 levels


def test_frames_are_measured_without_what_they_frame():
    image = torch.zeros(1, 3, 8, 8)
    image[:, :, 2:-2, 2:-2] = 1
    assert frame_brightness(image).item() == 0
    assert frame_brightness(image, width=3).item() == pytest.approx(12 / 60)
    with pytest.raises(ValueError, match="leave an image within; got 4"):
        frame_brightness(image, width=4)


def test_numbers_must_agree():
    with pytest.raises(ValueError, match="one garment and one caption an image; got 1, 1 and 0"):
        judge(
            torch.zeros(1, 3, 32, 32),
            torch.zeros(1, 28, 28),
            [],
            palette=PALETTE,
            classifier=torch.nn.Identity(),
        )
    with pytest.raises(ValueError, match="no values"):
        summarise(torch.empty(0))
