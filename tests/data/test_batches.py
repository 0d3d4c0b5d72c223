"""Batches hold the images that were asked for, as floats."""

import numpy as np
import pytest
import torch
from tests.data.conftest import COLOUR

from ddim.data.batches import as_batches, data_hash, hold_out, measure_prior, pick, stack_images
from ddim.data.dataset import ImageData, Source
from ddim.data.sources import load_images


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "a.npz", images=COLOUR)
    return load_images(str(tmp_path / "a.npz"))


def test_batches_are_the_images_in_order_from_minus_1_to_1(data):
    batches = list(as_batches(data, size=4))
    assert [len(batch) for batch in batches] == [4, 2]
    expected = torch.from_numpy(COLOUR.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1
    torch.testing.assert_close(torch.cat(batches), expected)
    assert torch.equal(next(as_batches(data, [5, 0], size=4)), stack_images(data, [5, 0]))


@pytest.mark.parametrize(("total", "most"), [(10, 3), (10, 10), (3, 10), (1, 1), (0, 5)])
def test_a_pick_is_as_long_as_can_be_and_the_same_every_time(total, most):
    indices = pick(total, most)
    assert len(set(indices)) == min(total, most)
    assert all(0 <= index < total for index in indices)
    assert indices == pick(total, most) == sorted(indices)
    assert total <= most or indices != pick(total, most, seed=1)


@pytest.mark.parametrize("period", range(2, 20))
@pytest.mark.parametrize(("total", "most"), [(2047, 1024), (20_000, 10_000), (511, 256)])
def test_a_pick_has_no_phase_in_data_of_periodic_order(total, most, period):
    phases = np.bincount(np.array(pick(total, most)) % period, minlength=period)
    share = most / period
    assert np.abs(phases - share).max() < 5 * np.sqrt(share)


@pytest.mark.parametrize("order", [np.arange(600) % 6, np.arange(600) // 100])
def test_each_class_has_its_share_of_a_pick(order):
    assert np.bincount(order[pick(600, 60, labels=order)]).tolist() == [10] * 6


def labelled(labels):
    source = Source(np.zeros((len(labels), 4, 4), np.uint8), np.asarray(labels))
    return ImageData.of_source("a", source)


def test_the_last_image_of_a_class_is_never_held_out():
    labels = np.array([0] * 50 + [1] * 48 + [2, 3])
    for seed in range(20):
        held = hold_out(labelled(labels), 512, seed=seed)
        assert len(held) == 10
        assert {98, 99}.isdisjoint(held)
    assert hold_out(labelled(np.arange(100)), 512, seed=0) == []


def test_images_held_out_come_in_no_order_of_their_classes():
    """Each place in the list has a level of its own, so that a class would have the low ones."""
    labels = np.repeat(np.arange(4), 100)
    held = np.array(hold_out(labelled(labels), 40, seed=0))
    halves = [np.bincount(labels[part], minlength=4) for part in np.split(held, 2)]
    assert np.bincount(labels[held]).tolist() == [10] * 4
    assert min(half.min() for half in halves) >= 2


def test_data_of_other_content_have_another_hash():
    hashes = {data_hash(labelled(labels)) for labels in ([0, 1, 0], [0, 0, 1], [0, 1])}
    lit = ImageData.of_source("a", Source(np.full((3, 4, 4), 9, np.uint8), np.array([0, 1, 0])))
    assert len(hashes | {data_hash(lit)}) == 4
    assert data_hash(labelled([0, 1, 0])) in hashes


def test_a_prior_is_that_of_all_images_where_there_are_few(data):
    pixels = stack_images(data, range(len(data)))
    assert measure_prior(data).mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)


def test_a_prior_of_images_that_alternate_is_that_of_all():
    """Every second image would be black."""
    images = np.zeros((20_000, 1, 1), np.uint8)
    images[1::2] = 255
    prior = measure_prior(ImageData.of_source("a", Source(images)))
    assert prior.mean[0] == pytest.approx(0, abs=0.03)
    assert prior.covariance[0][0] == pytest.approx(1, abs=0.01)


def test_the_prior_of_a_mirrored_run_is_of_the_mirrored_images_too():
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 6), dtype=np.uint8)
    both = np.concatenate([images, images[:, :, ::-1]])
    of_both = measure_prior(ImageData.of_source("a", Source(both)))
    found = measure_prior(ImageData.of_source("a", Source(images)), mirrored=True)
    np.testing.assert_allclose(found.image, of_both.image, atol=1e-4)
    assert found.mean == pytest.approx(of_both.mean, abs=1e-6)
    plain = measure_prior(ImageData.of_source("a", Source(images)))
    np.testing.assert_allclose(found.covariance, plain.covariance, rtol=1e-6)
