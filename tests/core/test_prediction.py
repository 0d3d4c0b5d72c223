import hypothesis.strategies as st
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings

from ddim.core.prediction import (
    PREDICTION_TYPES,
    clip_static,
    from_x0_eps,
    prediction_row,
    solve,
    threshold_dynamic,
    to_eps,
    to_x0_eps,
)
from ddim.errors import DDIMError

LEVELS = st.floats(1e-4, 1 - 1e-4)


@given(alpha_bar=LEVELS, kind=st.sampled_from(PREDICTION_TYPES), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_conversion_there_and_back_is_the_identity(alpha_bar, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x0, eps = (
        torch.randn((2, 3, 4), generator=generator, dtype=torch.float64),
        torch.randn((2, 3, 4), generator=generator, dtype=torch.float64),
    )
    level = torch.tensor(alpha_bar, dtype=torch.float64)
    x_t = level.sqrt() * x0 + (1 - level).sqrt() * eps
    output = from_x0_eps(x0, eps, alpha_bar_t=level, prediction_type=kind)
    found = to_x0_eps(output, x_t, alpha_bar_t=level, prediction_type=kind)
    torch.testing.assert_close(found.x0, x0, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.eps, eps, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_solution_inverts_the_system_and_its_determinant_is_as_documented(kind):
    level = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    (p, q), s = prediction_row(kind, level), solve(kind, level)
    alpha, sigma = level.sqrt(), (1 - level).sqrt()
    torch.testing.assert_close(s.x0_x * alpha + s.x0_m * p, torch.ones_like(level))
    torch.testing.assert_close(
        s.x0_x * sigma + s.x0_m * q, torch.zeros_like(level), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(s.eps_x * sigma + s.eps_m * q, torch.ones_like(level))
    determinant = {"epsilon": alpha, "sample": -sigma, "v_prediction": torch.ones_like(level)}[kind]
    torch.testing.assert_close(alpha * q - sigma * p, determinant)


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_zero_snr_is_solved_exactly(kind):
    level, x_t, output = (
        torch.tensor(0.0, dtype=torch.float64),
        torch.randn(2, 8),
        torch.randn(2, 8),
    )
    x0, eps = to_x0_eps(output, x_t, alpha_bar_t=level, prediction_type=kind)
    assert torch.equal(eps, x_t)
    assert torch.equal(x0, output if kind == "sample" else -output)


def test_levels_where_nothing_can_be_solved_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(
        DDIMError,
        match=r"epsilon prediction cannot be used where the SNR is 0.*use v_prediction or sample",
    ):
        to_x0_eps(
            x,
            x,
            alpha_bar_t=torch.tensor([0.5, 0.0], dtype=torch.float64),
            prediction_type="epsilon",
        )
    with pytest.raises(DDIMError, match="sample prediction cannot be used at clean data"):
        to_x0_eps(
            x, x, alpha_bar_t=torch.tensor(1.0, dtype=torch.float64), prediction_type="sample"
        )
    with pytest.raises(
        DDIMError, match="prediction_type must be one of epsilon, sample, v_prediction; got 'flow'"
    ):
        to_x0_eps(x, x, alpha_bar_t=torch.tensor(0.5, dtype=torch.float64), prediction_type="flow")


def test_derived_eps_completes_the_clipped_pair():
    level, x_t = (
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.randn(2, 6, dtype=torch.float64) * 3,
    )
    x0 = clip_static(torch.randn(2, 6, dtype=torch.float64) * 3)
    eps = to_eps(x0, x_t, alpha_bar_t=level)
    torch.testing.assert_close(level.sqrt()[:, None] * x0 + (1 - level).sqrt()[:, None] * eps, x_t)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("max_value", [1.0, 1.5, 100.0])
def test_dynamic_threshold_equals_diffusers(ratio, max_value):
    x0 = torch.randn(3, 2, 9, 7) * torch.tensor([0.2, 1.0, 4.0]).reshape(3, 1, 1, 1)
    reference = DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=max_value
    )._threshold_sample(x0)
    torch.testing.assert_close(threshold_dynamic(x0, ratio=ratio, max_value=max_value), reference)


def test_dynamic_threshold_has_no_size_limit():
    x0 = torch.arange(17_000_000, dtype=torch.float32).reshape(1, -1) / 17_000_000 * 10
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x0, 0.5, dim=1)
    assert float(threshold_dynamic(x0, ratio=0.5, max_value=100.0).max()) == 1.0
    assert float(
        (threshold_dynamic(x0, ratio=0.5, max_value=100.0) < 1).float().mean()
    ) == pytest.approx(0.5, abs=1e-3)


def test_dynamic_threshold_takes_any_rank_and_refuses_odd_options():
    assert threshold_dynamic(torch.tensor([3.0, -0.5])).tolist() == [1.0, -0.5]
    assert threshold_dynamic(torch.zeros(0, 3)).shape == (0, 3)
    with pytest.raises(DDIMError, match=r"ratio must lie in \[0, 1\]; got 1.5"):
        threshold_dynamic(torch.zeros(1, 3), ratio=1.5)
    with pytest.raises(DDIMError, match="max_value must be at least 1 and finite; got 0.5"):
        threshold_dynamic(torch.zeros(1, 3), max_value=0.5)
