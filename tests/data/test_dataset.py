"""Images are brought to one size and mode, and can be sent to a loader."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.conftest import COLOUR, GREY, LABELS, NPZ, labels, stack, write_parquet, write_png
from torch.utils.data import DataLoader

from ddim.data.sources import load_images
from ddim.errors import DataError


def test_an_item_is_a_uint8_tensor_and_an_int_and_the_callers_own(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY)
    data = load_images(str(tmp_path / "a.npz"))
    image, label = data[2]
    assert image.dtype == torch.uint8
    assert image.shape == (1, 5, 7)
    assert type(label) is int
    image.zero_()
    assert np.array_equal(data[2][0][0], GREY[2])


def test_an_index_beyond_the_end_is_an_index_error():
    with pytest.raises(IndexError):
        load_images("digits", split="test")[297]


def test_labels_that_are_all_minus_one_are_none(tmp_path):
    np.savez(tmp_path / "a.npz", images=GREY, labels=np.full(6, -1))
    data = load_images(str(tmp_path / "a.npz"))
    assert (data.class_names, data[0][1]) == (None, -1)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (33, 20)])
def test_resolution_resizes_the_shorter_side_and_keeps_the_centre(tmp_path, size):
    picture = np.zeros((*size, 3), np.uint8)
    middle = np.s_[size[0] // 2 - 5 : size[0] // 2 + 5, size[1] // 2 - 5 : size[1] // 2 + 5]
    picture[middle] = 255
    write_png(tmp_path / "0.png", picture)
    data = load_images(str(tmp_path), resolution=10)
    image = data[0][0].float()
    assert (data.resolution, tuple(image.shape)) == ((10, 10), (3, 10, 10))
    assert image[:, 4:6, 4:6].min() > 240  # Lanczos rings by up to 10 of 255 beside a step
    assert image[:, 0].max() < 10
    assert image[:, :, 0].max() < 10
    assert (image - image.flip(-1)).abs().max() <= 1


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    write_png(tmp_path / "0.png", stripes)
    image = load_images(str(tmp_path), resolution=16)[0][0].float()
    assert (image[:, :, 2:-2] - 127.5).abs().max() < 4


def test_a_resolution_of_two_numbers_is_covered_and_cut(tmp_path):
    write_png(tmp_path / "0.png", np.kron(GREY[0], np.ones((2, 4), np.uint8)))  # 10x28
    write_png(tmp_path / "1.png", np.kron(GREY[1], np.ones((2, 2), np.uint8)))  # 10x14
    data = load_images(str(tmp_path), resolution=(5, 7))
    assert data.resolution == (5, 7)
    assert stack(data).shape == (2, 1, 5, 7)
    with pytest.raises(DataError, match="resolution must be a side of at least 1"):
        load_images(str(tmp_path), resolution=(0, 7))


def test_resolution_leaves_images_of_that_size_alone(tmp_path):
    np.savez(tmp_path / "a.npz", images=COLOUR[:, :, :5])
    assert np.array_equal(
        stack(load_images(str(tmp_path / "a.npz"), resolution=5)),
        COLOUR[:, :, :5].transpose(0, 3, 1, 2),
    )


def test_center_crop_does_not_resize(tmp_path):
    write_png(tmp_path / "0.png", GREY[0])
    write_png(tmp_path / "1.png", np.ascontiguousarray(GREY[1].T))
    data = load_images(str(tmp_path), center_crop=True)
    assert data.resolution == (5, 5)
    assert np.array_equal(stack(data)[:, 0], [GREY[0, :, 1:6], GREY[1].T[1:6]])


def test_grey_to_colour_and_back(tmp_path):
    np.savez(tmp_path / "grey.npz", images=GREY)
    np.savez(tmp_path / "colour.npz", images=np.stack([GREY] * 3, axis=-1))
    assert np.array_equal(
        stack(load_images(str(tmp_path / "grey.npz"), channels=3)), np.stack([GREY] * 3, axis=1)
    )
    assert np.array_equal(stack(load_images(str(tmp_path / "colour.npz"), channels=1))[:, 0], GREY)


def test_alpha_goes_over_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    write_png(tmp_path / "f" / "0.png", rgba)
    np.savez(tmp_path / "a.npz", images=rgba[None])
    for source in (tmp_path / "f", tmp_path / "a.npz"):
        data = load_images(str(source))
        assert data.channels == 3
        assert data[0][0][:, 0, 0].tolist() == [10, 20, 30]
        assert (data[0][0][:, 1] == 255).all()


def test_a_palette_counts_as_colour(tmp_path):
    Image.new("RGB", (4, 4), (200, 10, 10)).convert("P").save(tmp_path / "0.png")
    data = load_images(str(tmp_path))
    assert data.channels == 3
    assert data[0][0][:, 0, 0].tolist() == pytest.approx([200, 10, 10], abs=30)


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    write_png(tmp_path / "0.png", (GREY[0].astype(np.uint16) << 8) + 17)
    data = load_images(str(tmp_path))
    assert data.channels == 1
    assert np.array_equal(stack(data)[0, 0], GREY[0])


def test_floating_point_pixels_are_refused(tmp_path):
    write_png(tmp_path / "0.tif", GREY[0].astype(np.float32) / 255)
    with pytest.raises(
        DataError,
        match=r"0\.tif: the image has floating-point pixels of unknown range; convert it to 8 bits",
    ):
        load_images(str(tmp_path))[0]


def test_every_kind_of_data_survives_being_sent_to_a_worker(tmp_path, datasets):
    np.savez(tmp_path / "a.npz", images=GREY, labels=LABELS)
    for i in range(6):
        write_png(tmp_path / "folder" / f"{i}.png", GREY[i])
    write_parquet(datasets, tmp_path / "a.parquet", image=GREY)
    for name in ("a.npz", "folder", "a.parquet"):
        data = pickle.loads(pickle.dumps(load_images(str(tmp_path / name))))
        assert np.array_equal(stack(data)[:, 0], GREY)


def test_a_loader_batches_it():
    images, targets = next(iter(DataLoader(load_images(str(NPZ)), batch_size=8)))
    assert (images.shape, images.dtype) == ((8, 1, 28, 28), torch.uint8)
    assert targets.tolist() == labels(load_images(str(NPZ)))[:8]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_whole_numbers_of_unknown_range_are_refused(tmp_path, dtype):
    """A 32-bit picture of 0..255 would be black."""
    write_png(tmp_path / "0.tif", GREY[0].astype(dtype))
    with pytest.raises(DataError, match=r"0\.tif: the image has whole numbers from \d+ to \d+"):
        load_images(str(tmp_path))[0]
    write_png(tmp_path / "0.tif", GREY[0].astype(dtype) * 257)
    assert np.array_equal(stack(load_images(str(tmp_path)))[0, 0], GREY[0])


def test_labels_that_are_numbers_in_words_are_sorted_as_numbers(tmp_path):
    words = [str(i % 12) for i in range(24)]
    np.savez(tmp_path / "a.npz", images=GREY[[0] * 24], labels=words)
    data = load_images(str(tmp_path / "a.npz"))
    assert data.class_names == tuple(map(str, range(12)))
    assert labels(data) == [i % 12 for i in range(24)]


def test_a_crop_is_drawn_by_its_seed_from_all_places(tmp_path):
    picture = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9)
    write_png(tmp_path / "0.png", picture)
    data = load_images(str(tmp_path), center_crop=True)
    cut = [data.crop(0, seed)[0][0].numpy() for seed in range(60)]
    assert {int(image[0, 0]) for image in cut} == {0, 1, 2, 3}
    assert all(np.array_equal(image, picture[:, image[0, 0] :][:, :6]) for image in cut)
    assert torch.equal(data.crop(0, 5)[0], data.crop(0, 5)[0])
    assert int(data[0][0][0, 0, 0]) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_mode_are_read_or_refused_in_a_sentence(tmp_path, mode, channels):
    Image.new(mode, (4, 4)).save(tmp_path / "0.tif")
    try:
        data = load_images(tmp_path, channels=channels)
        assert data[0][0].shape == (channels, 4, 4)
    except DataError as error:
        if mode == "YCbCr":  # some versions of Pillow cannot read what they write
            assert "0.tif is not an image that can be read" in str(error)  # noqa: PT017
            return
        assert (mode, channels) == ("LAB", 1)
        assert "0.tif: the image has pixels of mode LAB" in str(error)  # noqa: PT017
