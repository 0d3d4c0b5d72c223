"""Every example runs, does what it says, and stays short."""

import pathlib
import runpy
import warnings

import numpy as np
import pytest
from PIL import Image

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_numbered_and_short(path):
    assert path.name[:2].isdigit()
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.slow
def test_the_path_between_two_images_ends_at_them(tmp_path):
    example = runpy.run_path(str(EXAMPLES / "10_interpolate.py"))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # how well an implicit step is solved is not what this is about
        missed = example["main"](str(tmp_path / "path.png"), steps=8)
    assert missed < 1e-5
    with Image.open(tmp_path / "path.png") as picture:
        assert picture.width > 11 * 28


def test_codes_come_back_under_their_own_prompt_and_take_the_colour_of_another(tmp_path):
    drawn, again, blue, green = runpy.run_path(str(EXAMPLES / "11_edit.py"))["main"](
        out=str(tmp_path / "edit.png"), steps=6, count=2
    )
    assert np.abs(again.astype(float) - drawn).mean() < 2
    colours = [sheet.astype(float).max((1, 2)) for sheet in (drawn, blue, green)]
    assert [colour.argmax(-1).tolist() for colour in colours[:2]] == [[0, 0], [2, 2]]
    assert green.min(-1).max((1, 2)).tolist() > [200, 200]  # a white background
    with Image.open(tmp_path / "edit.png") as picture:
        assert picture.height > 4 * 32 * 3


def test_a_seed_is_one_picture_at_every_number_of_steps_without_fresh_noise_alone(tmp_path):
    example = runpy.run_path(str(EXAMPLES / "12_eta.py"))
    sheet = example["main"](out=str(tmp_path / "eta.png"), steps=(5, 10), count=2).astype(float)
    assert sheet.shape == (4, 2, 28, 56, 1)
    moved = np.abs(sheet[:, 0] - sheet[:, 1]).mean((1, 2, 3))
    assert moved[0] < 8
    assert moved[1:].min() > 16, moved
    with Image.open(tmp_path / "eta.png") as picture:
        assert picture.height > 4 * 56


def test_guidance_moves_the_picture_and_its_rescale_moves_it_again(tiny_text, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rows = runpy.run_path(str(EXAMPLES / "20_text_to_image.py"))["main"](
            str(tiny_text), str(tmp_path / "text.png"), steps=4
        )
    sheets = [np.stack([np.asarray(picture) for picture in row]) for row in rows]
    assert len({sheet.tobytes() for sheet in sheets}) == len(sheets) == 5
    with Image.open(tmp_path / "text.png") as picture:
        assert picture.height > 5 * 16
