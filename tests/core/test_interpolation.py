import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ddim.core.interpolation import interpolate, interpolate_grid, lerp, slerp
from ddim.errors import DDIMError


def pair(seed=0, shape=(3, 2, 5, 5)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.randn(
        shape, generator=generator, dtype=torch.float64
    )


def norms(x):
    return x.flatten(1).norm(dim=1)


def angle(a, b):
    cosine = (a * b).flatten(1).sum(1) / (norms(a) * norms(b))
    return cosine.clamp(-1, 1).acos()


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_the_circle_is_the_papers_formula_where_lengths_agree(weight, seed):
    a, b = pair(seed)
    b = b * (norms(a) / norms(b)).reshape(-1, 1, 1, 1)
    theta = angle(a, b).reshape(-1, 1, 1, 1)
    paper = (
        torch.sin((1 - weight) * theta) / torch.sin(theta) * a
        + torch.sin(weight * theta) / torch.sin(theta) * b
    )
    assert torch.allclose(slerp(a, b, weight), paper, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_angle_and_length_run_evenly(weight, seed):
    a, b = pair(seed)
    b = 3 * b
    x = slerp(a, b, weight)
    assert torch.allclose(angle(a, x), weight * angle(a, b), atol=1e-6)
    assert torch.allclose(norms(x), (1 - weight) * norms(a) + weight * norms(b), atol=1e-12)


def test_the_line_leaves_the_sphere_and_the_circle_does_not():
    a, b = pair(shape=(4, 3, 32, 32))
    assert torch.allclose(
        norms(lerp(a, b, 0.5)) / norms(a),
        torch.full((4,), math.sqrt(0.5), dtype=torch.float64),
        atol=0.03,
    )
    assert torch.allclose(
        norms(slerp(a, b, 0.5)) / norms(a), torch.ones(4, dtype=torch.float64), atol=0.03
    )


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_collinear_ends_leave_a_straight_line(weight):
    a, _ = pair()
    assert torch.allclose(slerp(a, a, weight), a)
    assert torch.allclose(slerp(a, 4 * a, weight), (1 + 3 * weight) * a)
    assert torch.allclose(slerp(a, a * (1 + 1e-13), weight), a)


def test_opposite_ends_go_across_and_a_zero_latent_is_no_nan():
    a, _ = pair()
    middle = slerp(a, -a, 0.5)
    assert torch.allclose(norms(middle), norms(a))
    assert torch.allclose(
        (middle * a).flatten(1).sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-12
    )
    assert torch.allclose(slerp(a, -a, 1.0), -a, atol=1e-12)
    assert torch.allclose(slerp(a, torch.zeros_like(a), 0.5), a / 2)
    assert torch.equal(slerp(torch.zeros_like(a), torch.zeros_like(a), 0.5), torch.zeros_like(a))
    assert slerp(a[:0], a[:0], 0.5).shape == (0, 2, 5, 5)


def test_each_sample_has_its_own_path_in_its_own_dtype():
    a, b = pair()
    whole = slerp(a, b, 0.3)
    assert torch.equal(whole[1:2], slerp(a[1:2], b[1:2], 0.3))
    half = slerp(a.half(), b.half(), 0.3)
    assert half.dtype == torch.float16
    assert torch.allclose(half.double(), whole, atol=5e-3)


@pytest.mark.parametrize("kind", ["spherical", "linear"])
def test_a_path_has_its_ends_to_the_bit(kind):
    a, b = (x[0].float() for x in pair())
    path = interpolate(a, b, 11, kind=kind)
    assert path.shape == (11, 2, 5, 5)
    assert torch.equal(path[0], a)
    assert torch.equal(path[-1], b)
    assert torch.allclose(path.flip(0), interpolate(b, a, 11, kind=kind), atol=1e-6)


def test_a_grid_has_its_corners_and_its_edges_are_paths():
    corners = torch.cat(pair(shape=(2, 1, 4, 4)))
    grid = interpolate_grid(corners, 3, 5).reshape(3, 5, 1, 4, 4)
    assert torch.equal(grid[[0, 0, 2, 2], [0, 4, 0, 4]], corners)
    assert torch.equal(grid[:, 0], interpolate(corners[0], corners[2], 3))
    assert torch.equal(grid[0], interpolate(corners[0], corners[1], 5))


def test_errors_by_their_text():
    a, b = pair()
    with pytest.raises(
        DDIMError, match=r"a and b must have one shape; got \[3, 2, 5, 5\] and \[2, 2, 5, 5\]"
    ):
        slerp(a, b[:2], 0.5)
    with pytest.raises(DDIMError, match="count must be a whole number from 2 to 1000000; got 1"):
        interpolate(a[0], b[0], 1)
    with pytest.raises(
        DDIMError, match="interpolation must be one of spherical, linear; got 'cubic'"
    ):
        interpolate(a[0], b[0], 3, kind="cubic")
    with pytest.raises(DDIMError, match=r"a grid has four corners, .*; got \[3, 2, 5, 5\]"):
        interpolate_grid(a, 2, 2)
