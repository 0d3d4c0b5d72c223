"""Folders of images: classes, splits, files that do not belong."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.data.conftest import COLOUR, GREY, RNG, claiming_png, labels, stack, write_png

import ddim
from ddim.data.dataset import in_order
from ddim.data.folders import SHEETS
from ddim.data.sources import load_images
from ddim.errors import DataError
from ddim.evaluation.report import PLOTS


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


def test_a_folder_without_images(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(DataError, match=r"holds no images that are read, such as \.png, .*webp\.$"):
        load_images(str(tmp_path))
    (tmp_path / "a.heic").write_text("a photo")
    with pytest.raises(DataError, match=r"holds no images .*; it holds 1 \.heic\.$"):
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
    (folder / "distance.svg").write_text("a plot of ours")
    data = load_images(str(tmp_path))
    assert (len(data), data.notes) == (1, ())
    (folder / "000000.png").unlink()
    with pytest.raises(DataError, match="holds no images"):
        load_images(str(tmp_path))


def test_every_grid_and_plot_that_a_command_writes_is_known_by_its_name():
    package, study = Path(ddim.__file__).parent, Path(__file__).parents[2] / "studies" / "flaws.py"
    rooms = (package / room for room in ("runs", "cli", "evaluation"))
    sources = [path.read_text() for room in rooms for path in room.glob("*.py")]
    sources.append(study.read_text())
    name = r"""["']([\w-]+)'?\}?\.(?:png|gif|\{[\w.]+\})["']"""
    found = (re.findall(name, source) for source in sources)
    written = {*PLOTS, *(name for names in found for name in names)}
    assert written == SHEETS


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


def test_a_class_folder_that_is_a_link_is_followed_and_told(tmp_path):
    write_png(tmp_path / "data" / "ant" / "0.png", GREY[0])
    write_png(tmp_path / "else" / "1.png", GREY[1])
    (tmp_path / "data" / "bee").symlink_to(tmp_path / "else")
    data = load_images(str(tmp_path / "data"))
    assert (data.class_names, labels(data)) == (("ant", "bee"), [0, 1])
    (note,) = data.notes
    assert "bee is a link to the folder" in note
    assert "and is followed" in note


@pytest.mark.parametrize("target", ["ant", ".", "..", "/"])
def test_a_link_to_a_folder_that_is_read_already_has_no_loop(tmp_path, target):
    write_png(tmp_path / "data" / "ant" / "0.png", GREY[0])
    write_png(tmp_path / "data" / "bee" / "1.png", GREY[1])
    (tmp_path / "data" / "again").symlink_to(target)
    data = load_images(str(tmp_path / "data"))
    assert (data.class_names, len(data)) == (("ant", "bee"), 2)
    assert "which is read already, and is left out" in data.notes[0]


def test_two_links_that_lead_to_one_another_have_an_end(tmp_path):
    for here, there in (("a", "b"), ("b", "a")):
        write_png(tmp_path / here / "0.png", GREY[0])
        (tmp_path / here / "on").symlink_to(tmp_path / there)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in").symlink_to(tmp_path / "a")
    assert len(load_images(str(tmp_path / "data"))) == 2


def test_class_folders_that_are_numbers_are_sorted_as_numbers(tmp_path):
    for number in range(12):
        write_png(tmp_path / str(number) / "0.png", GREY[0] // 2 + number)
    data = load_images(str(tmp_path))
    assert data.class_names == tuple(map(str, range(12)))
    assert [int(data[i][0][0, 0, 0]) - GREY[0, 0, 0] // 2 for i in range(12)] == labels(data)


def test_names_are_sorted_as_people_count():
    assert in_order(["x10", "x9", "a", "x09", "9" * 5000, "2", "10"]) == (
        *("2", "10", "9" * 5000, "a", "x09", "x9", "x10"),
    )


def test_what_pillow_opens_is_read_and_other_files_are_counted(tmp_path):
    ends = ("png", "pgm", "ppm", "jfif", "avif", "tga", "jp2")
    ends = [end for end in ends if f".{end}" in Image.registered_extensions()]
    for i, end in enumerate(ends):
        kind = {"jfif": "JPEG"}.get(end)
        Image.fromarray(COLOUR[0] if end == "ppm" else GREY[0]).save(tmp_path / f"{i}.{end}", kind)
    for name in ("a.svg", "b.heic", "c.heic", "notes.txt", "metadata.json"):
        (tmp_path / name).write_text("words")
    data = load_images(str(tmp_path))
    assert len(data) == len(ends)
    told = f"files of {tmp_path} that are no pictures are left out: 2 .heic, 1 .svg."
    assert told in data.notes


@pytest.mark.parametrize("resolution", [None, 5])
def test_one_coloured_picture_makes_all_coloured_and_is_told(tmp_path, resolution):
    write_png(tmp_path / "0.png", GREY[0])
    write_png(tmp_path / "1.png", COLOUR[0])
    data = load_images(str(tmp_path), resolution=resolution)
    assert (data.channels, len(set(data[1][0][:, 0, 0].tolist()))) == (3, 3)
    assert data.notes == (
        f"images of {tmp_path} are grey (1) and coloured (1); all are read in colour.",
    )
    read = f"the images of {tmp_path} are coloured, and read as grey."
    assert load_images(str(tmp_path), channels=1).notes == (read,)


def test_a_pipe_in_place_of_a_picture_or_a_record_is_passed_by(tmp_path):
    write_png(tmp_path / "0.png", GREY[0])
    for name in ("1.png", "run.json", "metadata.jsonl", "0.txt"):
        os.mkfifo(tmp_path / name)
    assert len(load_images(str(tmp_path))) == 1
    with pytest.raises(DataError, match="has no captions"):
        load_images(str(tmp_path), captions=True)


def test_a_picture_that_claims_more_pixels_than_there_can_be_is_refused(tmp_path):
    write_png(tmp_path / "0.png", GREY[0])
    (tmp_path / "1.png").write_bytes(claiming_png(60_000, 60_000))
    with pytest.raises(DataError, match=r"1\.png is not an image that can be read \(Image size"):
        load_images(str(tmp_path))
    with pytest.raises(DataError, match=r"1\.png is not an image that can be read \(Image size"):
        load_images(str(tmp_path), resolution=8)[1]


def test_pictures_that_are_read_in_part_or_changed_are_told(tmp_path):
    clear = np.zeros((12, 12, 4), np.uint8)
    write_png(tmp_path / "clear.png", clear)
    write_png(tmp_path / "deep.png", np.full((12, 12), 9999, np.uint16))
    write_png(tmp_path / "small.png", np.zeros((6, 12), np.uint8))
    frames = [Image.new("L", (12, 12), level) for level in (0, 99)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    notes = load_images(str(tmp_path), resolution=8, channels=3).notes
    assert [note.removeprefix(f"images of {tmp_path} ") for note in notes] == [
        "that are transparent are laid over white: 1.",
        "of 16 bits are read by their upper 8: 1.",
        "of several frames are read by the first: 1.",
        "smaller than 8x8 are enlarged: 1.",
        "larger than 8x8 are made smaller: 3.",
    ]


def test_pictures_that_are_links_out_of_the_folder_are_told(tmp_path):
    write_png(tmp_path / "else" / "0.png", GREY[0])
    write_png(tmp_path / "data" / "1.png", GREY[1])
    (tmp_path / "data" / "0.png").symlink_to(tmp_path / "else" / "0.png")
    (tmp_path / "data" / "2.png").symlink_to("1.png")
    data = load_images(str(tmp_path / "data"))
    assert len(data) == 3
    assert "that are links to files elsewhere are read: 1, such as" in data.notes[0]
