"""Guidance on raw predictions: its laws, its edges, and diffusers' numbers."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given, settings, strategies as st

from ddim.core.guidance import guide, guided
from ddim.errors import DDIMError


def predictions(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64).to(dtype) * spread + 0.2
        for spread in (1.0, 0.7)
    )


def std(x):
    return x.double().flatten(1).std(1)


def test_scale_1_is_the_conditional_prediction_and_scale_0_the_other():
    c, u = predictions(torch.float32)
    assert torch.equal(guide(c, u, scale=1.0), c)
    assert torch.equal(guide(c, u, scale=0.0), u)


@given(scale=st.floats(0, 30), phi=st.floats(0, 1), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_the_equation_and_diffusers_agree(scale, phi, seed):
    c, u = predictions(seed=seed)
    g = u + scale * (c - u)
    torch.testing.assert_close(guide(c, u, scale=scale), g)
    expected = phi * (std(c) / std(g)).reshape(-1, 1, 1, 1) * g + (1 - phi) * g
    torch.testing.assert_close(guide(c, u, scale=scale, rescale=phi), expected)
    torch.testing.assert_close(rescale_noise_cfg(g, c, phi), expected)


@pytest.mark.parametrize("scale", [1.5, 7.5, 30.0])
def test_rescale_1_has_the_conditional_std_of_each_sample_and_less_lies_between(scale):
    c, u = predictions()
    torch.testing.assert_close(std(guide(c, u, scale=scale, rescale=1.0)), std(c))
    half, none = (std(guide(c, u, scale=scale, rescale=phi)) for phi in (0.5, 0.0))
    assert (std(c) < half).all()
    assert (half < none).all()


def test_guidance_is_linear_without_rescale_and_of_degree_one_with_it():
    (c, u), (d, v) = predictions(seed=1), predictions(seed=2)
    torch.testing.assert_close(
        guide(2 * c + d, 2 * u + v, scale=7.5), 2 * guide(c, u, scale=7.5) + guide(d, v, scale=7.5)
    )
    torch.testing.assert_close(
        guide(3 * c, 3 * u, scale=7.5, rescale=0.7), 3 * guide(c, u, scale=7.5, rescale=0.7)
    )
    apart = guide(c, u, scale=7.5, rescale=0.7) + guide(d, v, scale=7.5, rescale=0.7)
    assert not torch.allclose(guide(c + d, u + v, scale=7.5, rescale=0.7), apart, rtol=1e-3)


@pytest.mark.parametrize(
    "shape",
    [
        (3, 50),
        (3, 2, 25),
        (3, 4, 5, 6),
        (3, 2, 3, 4, 5),
        (2, 64, 33, 17),
        (2, 1, 6, 6),
        (2, 9, 1, 1),
    ],
)
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_the_rescale_knows_every_shape_and_layout_and_a_mean_far_from_0(shape, mean):
    generator = torch.Generator().manual_seed(0)
    c, u = (torch.randn(shape, generator=generator) * spread + mean for spread in (1.0, 0.7))
    combined = torch.lerp(u, c, 7.5)
    expected = (
        0.3 * combined
        + 0.7 * combined * (std(c) / std(combined)).reshape(-1, *[1] * (len(shape) - 1)).float()
    )
    transposed = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in (c, u)]
    expanded = [torch.stack([x, x], 1)[:, 0] for x in (c, u)]
    for pair in ((c, u), transposed, expanded):
        torch.testing.assert_close(
            guide(*pair, scale=7.5, rescale=0.7), expected, rtol=1e-5, atol=1e-5 * (1 + mean)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e-3, -40.0])
def test_a_constant_prediction_stays_what_it_is_and_diffusers_gives_nan(dtype, value):
    c = torch.full((2, 4, 8, 8), value, dtype=dtype)
    found = guide(c, c, scale=7.5, rescale=0.7)
    torch.testing.assert_close(found, c.float())
    zero = torch.zeros(1, 4, 8, 8)
    assert rescale_noise_cfg(zero, zero, 0.7).isnan().all()
    assert torch.equal(guide(zero, zero, scale=7.5, rescale=1.0), zero)


@pytest.mark.parametrize("recorded", [False, True])
def test_two_constants_are_not_rescaled_with_a_gradient_either(recorded):
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 10.0, 100.0):
        c, u = (
            size * torch.randn(64, 1, 1, 1, generator=generator).expand(-1, 4, 17, 13)
            for _ in range(2)
        )
        found = guide(c.contiguous().requires_grad_(recorded), u, scale=7.5, rescale=0.7)
        torch.testing.assert_close(found.detach(), guide(c, u, scale=7.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(2, 1), (2, 1, 1, 1), (0, 4, 2, 2), (2,)])
def test_samples_of_one_element_and_empty_batches_are_no_nan(shape):
    c, u = (
        torch.arange(1.0, 1 + shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape),
        torch.zeros(shape),
    )
    assert torch.equal(guide(c, u, scale=2.0, rescale=0.5), 2 * c)


def test_half_precision_is_combined_in_float32():
    c, u = predictions(torch.float16)
    huge = guide(c * 3000, u * -3000, scale=30.0, rescale=0.5)
    assert huge.dtype == torch.float32
    assert torch.isfinite(huge).all()
    exact = guide(c.double(), u.double(), scale=7.5, rescale=0.7)
    torch.testing.assert_close(
        guide(c, u, scale=7.5, rescale=0.7).double(), exact, rtol=1e-5, atol=1e-5
    )


def network(x_t, t, condition):
    """A prediction of another sample's condition, or level, shows."""
    return x_t * condition.reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000


def test_a_guided_network_is_the_equation_over_two_evaluations_batched_or_not():
    x, t = torch.randn(3, 4, 2, 2), torch.tensor([1, 500, 999])
    cond, uncond = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.5, 0.0])
    expected = guide(network(x, t, cond), network(x, t, uncond), scale=5.0, rescale=0.7)
    sizes = []

    def counted(x_t, *rest):
        sizes.append(len(x_t))
        return (network(x_t, *rest),)

    for batched, calls in ((True, [6]), (False, [3, 3])):
        sizes.clear()
        torch.testing.assert_close(
            guided(counted, cond, uncond, scale=5.0, rescale=0.7, batched=batched)(x, t), expected
        )
        assert sizes == calls


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -3.0])
def test_a_scale_of_1_or_less_is_off(scale):
    x, t, cond = torch.randn(2, 1, 2, 2), torch.tensor([3, 4]), torch.tensor([1.0, 2.0])
    assert torch.equal(
        guided(network, cond, torch.zeros(2), scale=scale)(x, t), network(x, t, cond)
    )
    assert torch.equal(guided(network, cond, scale=scale)(x, t), network(x, t, cond))


def test_a_gradient_flows_through():
    c, u = predictions()
    c[0] = u[0] = 0.5  # a constant sample among others
    c.requires_grad_(), u.requires_grad_()
    guide(c, u, scale=7.5, rescale=0.7).square().sum().backward()
    assert c.grad.isfinite().all()
    assert float(u.grad.abs().max()) > 0
    doubles = [torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *pair: guide(*pair, scale=3.0, rescale=0.7), doubles)


def test_what_does_not_fit_is_refused():
    c, u = predictions()
    with pytest.raises(
        DDIMError, match=r"must have one shape; got \[3, 4, 5, 5\] and \[1, 4, 5, 5\]"
    ):
        guide(c, u[:1], scale=2.0)
    for rescale in (-0.1, 1.5, float("nan")):
        with pytest.raises(DDIMError, match=r"guidance_rescale must lie in \[0, 1\]"):
            guide(c, u, scale=2.0, rescale=rescale)
        with pytest.raises(DDIMError, match=r"guidance_rescale must lie in \[0, 1\]"):
            guided(network, torch.ones(3), scale=1.0, rescale=rescale)
    with pytest.raises(
        DDIMError, match="guidance needs an uncond of the shape of cond, .*; got None"
    ):
        guided(network, torch.ones(3), scale=2.0)
    with pytest.raises(DDIMError, match=r"of cond, \[3\]; got .*shape \[1\]"):
        guided(network, torch.ones(3), torch.ones(1), scale=2.0)
