"""Batches hold the images that were asked for, as floats."""

import numpy as np
import pytest
import torch
from tests.data.conftest import COLOUR

from ddim.data.batches import as_batches, measure_prior, spread, stack_images
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
def test_a_spread_reaches_over_all_and_is_never_longer(total, most):
    indices = spread(total, most)
    assert len(indices) == min(total, most)
    assert all(index < total for index in indices)
    assert len({b - a for a, b in zip(indices, indices[1:], strict=False)}) <= 1


def test_a_prior_is_that_of_all_images_where_there_are_few(data):
    pixels = stack_images(data, range(len(data)))
    assert measure_prior(data).mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
