import math

import pytest
import torch
from diffusers import DDPMScheduler

from ddim.core.prediction import PREDICTION_TYPES, from_x0_eps
from ddim.core.schedule import BETA_SCHEDULES, NoiseSchedule, make_betas, rescale_zero_terminal_snr
from ddim.core.step import (
    SIGMA_HAT,
    StepCoefficients,
    check_eta,
    check_order,
    ddim_step,
    linear_step,
    multistep_weight,
    step_coefficients,
)
from ddim.core.timesteps import SPACINGS, select_timesteps, step_pairs
from ddim.errors import DDIMError

LINEAR = NoiseSchedule.from_betas(make_betas())


def level(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("kind", BETA_SCHEDULES)
@pytest.mark.parametrize("rescaled", [False, True])
def test_a_step_keeps_the_marginal_variance(eta, kind, rescaled):
    betas = make_betas(kind)
    schedule = NoiseSchedule.from_betas(rescale_zero_terminal_snr(betas) if rescaled else betas)
    for spacing in SPACINGS:
        for count in (2, 7, 10, 20, 25, 333):
            pairs = step_pairs(select_timesteps(1000, count, spacing))
            t, s = (schedule.alpha_bar(torch.tensor(column)) for column in zip(*pairs, strict=True))
            c = step_coefficients(t, s, eta=eta)
            assert all(torch.isfinite(part).all() for part in c)
            torch.testing.assert_close(c.x0**2, s)  # x_s carries exactly alpha_s of the data
            torch.testing.assert_close(c.eps**2 + c.noise**2, 1 - s)  # and exactly sigma_s of noise


def test_eta_one_is_the_ddpm_posterior():
    for t in (1, 2, 500, 999):
        a_t, a_s = LINEAR.alpha_bar(t), LINEAR.alpha_bar(t - 1)
        beta = 1 - a_t / a_s
        c = step_coefficients(a_t, a_s, eta=1.0)
        x0, eps = level(0.7), level(-1.3)
        x_t = a_t.sqrt() * x0 + (1 - a_t).sqrt() * eps
        mean = a_s.sqrt() * beta / (1 - a_t) * x0 + (1 - beta).sqrt() * (1 - a_s) / (1 - a_t) * x_t
        assert float(c.x0 * x0 + c.eps * eps) == pytest.approx(float(mean), rel=1e-9)
        assert float(c.noise**2) == pytest.approx(float(beta * (1 - a_s) / (1 - a_t)), rel=1e-9)


def test_eta_scales_the_standard_deviation():
    half, full = (
        step_coefficients(LINEAR.alpha_bar(600), LINEAR.alpha_bar(500), eta=e).noise
        for e in (0.5, 1.0)
    )
    assert float(half / full) == pytest.approx(0.5, rel=1e-12)


def test_sigma_hat_draws_more_but_keeps_the_direction():
    a_t, a_s = LINEAR.alpha_bar(600), LINEAR.alpha_bar(500)
    hat, full = step_coefficients(a_t, a_s, eta=SIGMA_HAT), step_coefficients(a_t, a_s, eta=1.0)
    assert hat.eps == full.eps
    assert float(hat.noise) == pytest.approx(math.sqrt(1 - float(a_t / a_s)), rel=1e-12)
    assert hat.noise > full.noise
    assert torch.isfinite(
        torch.stack(step_coefficients(level(0.0), level(0.1), eta=SIGMA_HAT))
    ).all()


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, SIGMA_HAT])
def test_a_step_to_clean_data_is_its_mean(eta):
    levels = torch.arange(len(LINEAR))
    weights = step_coefficients(LINEAR.alpha_bar(levels), torch.ones(1000).double(), eta=eta)
    assert weights.noise.eq(0).all()
    assert weights.eps.eq(0).all()
    assert weights.x0.eq(1).all()


@pytest.mark.parametrize("t", [999, 500, 1, 0])
@pytest.mark.parametrize(("eta", "variance"), [(1.0, "fixed_small"), (SIGMA_HAT, "fixed_large")])
def test_one_level_at_a_time_it_is_the_step_of_ddpm(eta, variance, t):
    ddpm = DDPMScheduler(variance_type=variance, clip_sample=False)
    x_t, eps = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3))
    theirs = ddpm.step(eps, t, x_t, generator=torch.Generator().manual_seed(3)).prev_sample
    levels = {"alpha_bar_t": LINEAR.alpha_bar(t), "alpha_bar_s": LINEAR.alpha_bar(t - 1)}
    x0 = (x_t - (1 - levels["alpha_bar_t"]).sqrt() * eps) / levels["alpha_bar_t"].sqrt()
    ours = ddim_step(x0.float(), eps, **levels, eta=eta, noise=noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_there_and_back_with_a_frozen_pair_is_the_identity(kind):
    x0, eps = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    down = ddim_step(x0, eps, alpha_bar_t=LINEAR.alpha_bar(700), alpha_bar_s=LINEAR.alpha_bar(300))
    up = ddim_step(x0, eps, alpha_bar_t=LINEAR.alpha_bar(300), alpha_bar_s=LINEAR.alpha_bar(700))
    a_s, a_t = LINEAR.alpha_bar(300), LINEAR.alpha_bar(700)
    torch.testing.assert_close(down, a_s.sqrt() * x0 + (1 - a_s).sqrt() * eps)
    torch.testing.assert_close(up, a_t.sqrt() * x0 + (1 - a_t).sqrt() * eps)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0, SIGMA_HAT])
def test_the_linear_form_is_the_same_step(kind, eta):
    x0, eps, z = (torch.randn(4, 6, dtype=torch.float64) for _ in range(3))
    a_t, a_s = (
        LINEAR.alpha_bar(torch.tensor([999, 600, 30, 2])),
        LINEAR.alpha_bar(torch.tensor([600, 30, 2, -1])),
    )
    x_t = a_t.sqrt()[:, None] * x0 + (1 - a_t).sqrt()[:, None] * eps
    output = from_x0_eps(x0, eps, alpha_bar_t=a_t, prediction_type=kind)
    c = linear_step(kind, a_t, a_s, eta=eta)
    folded = c.x[:, None] * x_t + c.output[:, None] * output + c.noise[:, None] * z
    torch.testing.assert_close(
        folded,
        ddim_step(
            x0, eps, alpha_bar_t=a_t, alpha_bar_s=a_s, eta=eta, noise=None if eta == 0 else z
        ),
    )


def test_one_level_a_sample_equals_one_call_a_sample():
    x0, eps = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    t, s = torch.tensor([999, 400, 3]), torch.tensor([800, 399, -1])
    together = ddim_step(x0, eps, alpha_bar_t=LINEAR.alpha_bar(t), alpha_bar_s=LINEAR.alpha_bar(s))
    for i in range(3):
        alone = ddim_step(
            x0[i : i + 1],
            eps[i : i + 1],
            alpha_bar_t=LINEAR.alpha_bar(int(t[i])),
            alpha_bar_s=LINEAR.alpha_bar(int(s[i])),
        )
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_sample_keeps_its_dtype(dtype):
    x = torch.ones(2, 3, dtype=dtype)
    assert (
        ddim_step(x, x, alpha_bar_t=level(0.3), alpha_bar_s=level(0.5), eta=1.0, noise=x).dtype
        == dtype
    )


def test_errors():
    x = torch.ones(1, 2)
    with pytest.raises(
        DDIMError,
        match="noise is required when eta is not 0, and for the analytic variance; got eta=0.5",
    ):
        ddim_step(x, x, alpha_bar_t=level(0.3), alpha_bar_s=level(0.5), eta=0.5)
    with pytest.raises(DDIMError, match="eta must be at least 0 and finite; got -1"):
        check_eta(-1)
    with pytest.raises(DDIMError, match="eta must be at least 0 and finite; got nan"):
        check_eta(float("nan"))
    with pytest.raises(DDIMError, match="eta must be a number or 'sigma-hat'; got 'big'"):
        check_eta("big")
    with pytest.raises(
        DDIMError, match="would draw more noise than the level can hold.*use at most"
    ):
        step_coefficients(level(0.0), level(0.1), eta=1.5)


def test_an_eta_that_is_one_but_for_rounding_is_no_error_at_zero_snr():
    c = step_coefficients(level(0.0), level(0.1), eta=1 + 1e-13)
    assert float(c.eps) == 0.0
    assert float(c.noise) == pytest.approx(math.sqrt(0.9))


def test_the_largest_eta_that_the_error_names_works():
    a_t, a_s = LINEAR.alpha_bar(600), LINEAR.alpha_bar(500)
    with pytest.raises(DDIMError) as caught:
        step_coefficients(a_t, a_s, eta=50.0)
    largest = float(str(caught.value).split("use at most ")[1].split(" for")[0])
    assert torch.isfinite(step_coefficients(a_t, a_s, eta=largest * 0.999).eps)
    with pytest.raises(DDIMError):
        step_coefficients(a_t, a_s, eta=largest * 1.01)


def test_the_multistep_is_the_published_formula():
    previous, t, s = (LINEAR.alpha_bar(i) for i in (800, 700, 550))
    x_t, x0, x0_previous = (torch.randn(7, dtype=torch.float64) for _ in range(3))
    eps = (x_t - t.sqrt() * x0) / (1 - t).sqrt()
    ours = ddim_step(x0, eps, alpha_bar_t=t, alpha_bar_s=s) + multistep_weight(previous, t, s) * (
        x0 - x0_previous
    )
    l_previous, l_t, l_s = (((a / (1 - a)).sqrt()).log() for a in (previous, t, s))
    h = l_s - l_t
    d = x0 + (x0 - x0_previous) / (2 * (l_t - l_previous) / h)
    torch.testing.assert_close(
        ours, ((1 - s) / (1 - t)).sqrt() * x_t - s.sqrt() * torch.expm1(-h) * d
    )


def test_the_multistep_is_ddim_where_a_log_snr_is_infinite_or_two_levels_are_one():
    for levels in (
        (0.0, 0.2, 0.5),
        (0.2, 0.5, 1.0),
        (1.0, 0.5, 0.2),
        (0.5, 0.2, 0.0),
        (0.1, 0.0, 0.2),
        (0.5, 1.0, 0.2),
        (0.5, 0.5, 0.2),
    ):
        assert float(multistep_weight(*map(level, levels))) == 0
    assert float(multistep_weight(level(0.1), level(0.2), level(0.2))) == 0
    assert float(multistep_weight(level(0.1), level(0.2), level(0.5))) > 0
    assert float(multistep_weight(level(0.5), level(0.2), level(0.1))) < 0


def test_orders_that_cannot_be_are_refused():
    for order in (0, 3, "2"):
        with pytest.raises(DDIMError, match=f"order of the solver must be 1 .* got {order!r}"):
            check_order(order)
    for eta in (0.5, SIGMA_HAT):
        assert check_order(1, eta=eta) == 1
        with pytest.raises(
            DDIMError,
            match=f"order 2 solves the deterministic flow and draws no noise; got eta={eta}",
        ):
            check_order(2, eta=eta)


def test_the_step_of_numbers_is_the_step_of_tensors():
    alpha_bar = LINEAR.alpha_bar(torch.tensor([900, 500, 100]))
    weights = step_coefficients(alpha_bar[:-1], alpha_bar[1:], eta=0.7)
    x0, eps, z = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).unbind()
    for i, row in enumerate(weights.rows()):
        same = StepCoefficients(*(column[i] for column in weights))
        for noise in (None, z):
            torch.testing.assert_close(row.apply(x0, eps, noise), same.apply(x0, eps, noise))
