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


def test_the_path_between_two_images_ends_at_them(tmp_path):
    example = runpy.run_path(str(EXAMPLES / "10_interpolate.py"))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # how well an implicit step is solved is not what this is about
        missed = example["main"](str(tmp_path / "path.png"))
    assert missed < 1e-5
    with Image.open(tmp_path / "path.png") as picture:
        assert picture.width > 11 * 28


def test_an_edit_of_strength_0_is_the_image_itself(tmp_path):
    rows = runpy.run_path(str(EXAMPLES / "11_edit.py"))["main"](
        str(tmp_path / "edit.png"), group=3, steps=5
    ).numpy()
    assert (rows[1] == rows[0]).all()
    moved = np.abs(rows.astype(float) - rows[0]).mean((1, 2, 3, 4))
    assert moved[3] > moved[2] > 5


def test_a_code_decoded_under_its_own_prompt_is_the_picture_and_under_another_an_edit(
    tiny_text, tmp_path
):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the tiny encoder reads twelve tokens
        rows = runpy.run_path(str(EXAMPLES / "20_text_to_image.py"))["main"](
            str(tiny_text), str(tmp_path / "text.png"), steps=4
        )
    first, again, edited = (
        np.stack([np.asarray(picture).astype(float) for picture in rows[i]]) for i in (0, -3, -1)
    )
    assert np.abs(again - first).mean() < np.abs(edited - first).mean()
    with Image.open(tmp_path / "text.png") as picture:
        assert picture.height > 8 * 16
