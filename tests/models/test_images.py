import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.conftest import claiming_png

from ddim.data.sources import load_images
from ddim.errors import DataError, DDIMError
from ddim.files import write_text
from ddim.models.images import (
    from_uint8,
    label_rows,
    load_image,
    make_grid,
    open_picture,
    save_picture,
    to_pil,
    to_uint8,
)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_bytes_survive_the_round_trip(channels):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(channels, axis=3)
    images = from_uint8(pixels)
    assert images.shape == (1, channels, 16, 16)
    assert (images.min(), images.max()) == (-1, 1)
    assert np.array_equal(to_uint8(images), pixels)


def test_halves_round_up_and_what_is_outside_is_clamped():
    x = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, torch.inf]).reshape(1, 1, 1, 6)
    assert to_uint8(x).ravel().tolist() == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_floating_dtype_becomes_bytes(dtype):
    assert (
        to_uint8(torch.full((2, 3, 4, 4), 0.5, dtype=dtype)).tolist()
        == np.full((2, 4, 4, 3), 191).tolist()
    )


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (3, 4, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(DDIMError, match=r"\[B, C, H, W\] with 1 or 3 channels; got"):
        to_uint8(torch.zeros(shape))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_files_hold_the_bytes(channels, mode, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, channels), dtype=np.uint8)
    assert [p.mode for p in to_pil(pixels)] == [mode] * 2
    save_picture(pixels[0], tmp_path / "a.png")
    save_picture(to_pil(pixels)[1], tmp_path / "b.png", scale=3)
    assert np.array_equal(load_image(tmp_path / "a.png"), pixels[0])
    assert np.array_equal(load_image(tmp_path / "b.png")[::3, ::3], pixels[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_grid_shows_each_image_in_its_place():
    grid = make_grid(
        np.stack([np.full((4, 6, 1), 10 * i, np.uint8) for i in range(5)]),
        columns=3,
        padding=1,
        background=7,
    )
    assert grid.shape == (2 * 5 + 1, 3 * 7 + 1, 1)
    assert [int(grid[1 + i // 3 * 5, 1 + i % 3 * 7, 0]) for i in range(5)] == [0, 10, 20, 30, 40]
    assert grid[0, 0, 0] == grid[6, 15, 0] == 7
    assert make_grid(np.zeros((5, 4, 4, 3), np.uint8)).shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    with pytest.raises(DDIMError, match="at least one image"):
        make_grid(np.zeros((0, 4, 4, 1), np.uint8))


def test_what_is_no_picture_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no picture at .*none\.png"):
        load_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png is not a picture, or is damaged"):
        load_image(tmp_path / "text.png")
    save_picture(np.zeros((64, 64, 3), np.uint8), tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cut\.png is not a picture, or is damaged"):
        load_image(tmp_path / "cut.png")


def test_transparent_and_palette_pictures_become_colour(tmp_path):
    Image.new("RGBA", (3, 2), (10, 20, 30, 255)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").tolist() == [[[10, 20, 30]] * 3] * 2


def test_the_ending_of_a_name_is_the_format_of_a_picture(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for ending, kind in (("png", "PNG"), ("jpg", "JPEG"), ("JPEG", "JPEG"), ("webp", "WEBP")):
        save_picture(image, tmp_path / f"a.{ending}")
        with Image.open(tmp_path / f"a.{ending}") as picture:
            assert picture.format == kind
        change = np.abs(load_image(tmp_path / f"a.{ending}").astype(int) - image).max()
        assert bool(change) is (kind == "JPEG")
    with pytest.raises(DDIMError, match=r"must end in one of \.png, .*; got .*a\.bmp"):
        save_picture(image, tmp_path / "a.bmp")


def test_rows_stand_under_their_labels_and_all_under_those_of_the_columns():
    images = np.zeros((4, 50, 60, 1), np.uint8)
    plain, headed = (label_rows(images, ["a", "b"], columns=c) for c in ([], ["left", "right"]))
    assert headed.shape[0] == plain.shape[0] + 18
    assert np.array_equal(headed[18:], plain)
    dark = (headed[:18] < 128).any((0, 2)).nonzero()[0]
    assert dark.min() < 10
    assert 62 < dark.max() < 124
    assert not ((dark > 40) & (dark < 62)).any()
    larger = label_rows(images, ["a", "b"], scale=2)
    assert larger.shape[0] == plain.shape[0] + 2 * 50


@pytest.mark.parametrize(
    "write",
    [lambda p: save_picture(np.zeros((4, 4, 1), np.uint8), p), lambda p: write_text(p, "{}")],
)
def test_a_full_disk_leaves_nothing_behind(write, tmp_path, monkeypatch):
    path = tmp_path / "result.png"
    path.write_text("before")

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["result.png"]
    assert path.read_text() == "before"


def test_what_is_no_picture_file_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(claiming_png(60_000, 60_000))
    for name in ("pipe.png", ".", "large.png"):
        with pytest.raises(DataError, match="is not a picture"):
            open_picture(tmp_path / name)
    with pytest.raises(DataError, match="is not a picture"):
        open_picture("/dev/zero")
    with pytest.raises(DataError, match="there is no picture at"):
        open_picture(tmp_path / "none.png")


def test_the_content_of_a_picture_has_no_program_run(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    Image.new("L", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("ran a program"))
    with pytest.raises(DataError, match="is not a picture"):
        open_picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="is not an image that can be read"):
        load_images(str(tmp_path))
