"""Fitted timesteps, on data whose flow is known and on the embedded model; and the variance that
the noise needs."""

import math

import pytest
import torch

from ddim.core.denoiser import ModelDenoiser
from ddim.core.noise import SeededNoise
from ddim.core.oracle import GaussianOracle
from ddim.core.prediction import Denoised
from ddim.core.sampler import sample, trajectory
from ddim.core.schedule import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from ddim.core.step import SIGMA_HAT, ddim_step, step_coefficients
from ddim.core.timesteps import SPACINGS, check_timesteps, select_timesteps, step_pairs
from ddim.errors import DDIMError
from ddim.fitting.timesteps import (
    SamplingProblem,
    estimate_eps_mean_square,
    fit_timesteps,
    geometric_mean,
    ode_error,
    ode_errors,
)

FEW = [
    (1, 1),
    (1, 5),
    (2, 10),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 1), (2, 5), (1, 10))),
]
"""Orders, and numbers of steps."""

SCHEDULE = NoiseSchedule.from_betas(make_betas())


def mixture(x_t, t, schedule=SCHEDULE):
    """The exact denoiser of data at -0.7 and 0.5, each point of a sample by itself: a curved
    flow."""
    a = schedule.alpha_bar(t).to(x_t)
    alpha, variance = a.sqrt(), 1 - a + a * 0.2**2
    centres = torch.tensor([-0.7, 0.5]).to(x_t)
    weights = (-((x_t[..., None] - alpha * centres) ** 2) / (2 * variance)).softmax(-1)
    means = centres + alpha * 0.2**2 / variance * (x_t[..., None] - alpha * centres)
    x0 = (weights * means).sum(-1)
    return Denoised(x0, (x_t - alpha * x0) / (1 - a).sqrt())


def noise(count, seed):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def test_the_error_is_in_pixels_and_of_finished_images():
    x, exact = torch.tensor([[-3.0, 1.0], [0.0, 0.5]]), torch.tensor([[-1.0, 5.0], [0.5, 0.5]])
    torch.testing.assert_close(
        ode_error(x, exact), torch.tensor([1e-14, 0.25**2 / 2], dtype=torch.float64)
    )
    torch.testing.assert_close(
        ode_error(x, exact, bound=None), torch.tensor([10.0, 0.125], dtype=torch.float64)
    )


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        found = geometric_mean((0.3 + torch.randn(64, generator=generator)).exp())
        inside += found.low < math.exp(0.3) < found.high
    assert 0.91 < inside / 400 < 0.98
    assert geometric_mean(torch.tensor([2.0, 8.0])).mean == pytest.approx(4)
    assert math.isnan(geometric_mean(torch.tensor([2.0])).low)


@pytest.mark.parametrize(("order", "steps"), FEW)
def test_fitted_steps_beat_every_spacing_on_noise_they_have_not_seen(order, steps):
    fit = fit_timesteps(
        SamplingProblem(mixture, noise(16, 0)),
        [SamplingProblem(mixture, noise(64, s)) for s in (1, 2)],
        schedule=SCHEDULE,
        steps=steps,
        order=order,
        evaluations=300,
    )
    assert len(check_timesteps(fit.timesteps, 1000)) == steps
    assert set(fit.errors) == {"fitted", "ddim-50", *SPACINGS}
    assert all(error.shape == (128,) for error in fit.errors.values())
    assert fit.name == "fitted"
    assert fit.ratio(fit.best_spacing).mean == max(fit.ratio(s).mean for s in SPACINGS)
    assert fit.ratio(fit.best_spacing).high < 1
    exact = sample(
        mixture, noise(64, 3), step_pairs(select_timesteps(1000, 1000)), schedule=SCHEDULE
    )  # the definition of the error
    errors = ode_errors(
        SamplingProblem(mixture, noise(64, 3)), exact, fit.paths, schedule=SCHEDULE, order=order
    )
    assert geometric_mean(errors["fitted"] / errors[fit.best_spacing]).high < 1


def test_a_spacing_is_returned_where_the_search_found_nothing_better():
    held_out, expected = (
        SamplingProblem(mixture, noise(32, 1)),
        select_timesteps(1000, 10, "quadratic"),
    )
    exact = sample(
        mixture, held_out.x_t, step_pairs(expected), schedule=SCHEDULE
    )  # as if that spacing were the truth
    fit = fit_timesteps(
        SamplingProblem(mixture, noise(4, 0)),
        [held_out],
        schedule=SCHEDULE,
        steps=10,
        evaluations=30,
        finish=lambda part: exact,
    )
    assert fit.name == fit.best_spacing == "quadratic"
    assert fit.timesteps == expected
    assert fit.ratio("quadratic").mean == 1
    assert fit.ratio("trailing").high < 1


@pytest.mark.parametrize("kind", ["v_prediction", pytest.param("sample", marks=pytest.mark.slow)])
def test_zero_snr_and_guided_networks_are_fitted_too(kind):
    schedule = NoiseSchedule.from_betas(rescale_zero_terminal_snr(make_betas()))
    oracle = GaussianOracle(schedule, mean=0.3, std=0.4)
    plain = oracle.network(kind)

    def guided(x, t):
        return plain(x, t) + 0.5 * (plain(x, t) - plain(0.9 * x, t))

    denoise = ModelDenoiser(guided, schedule, kind)
    fit = fit_timesteps(
        SamplingProblem(denoise, noise(8, 0)),
        [SamplingProblem(denoise, noise(32, 1))],
        schedule=schedule,
        steps=4,
        order=2,
    )
    assert fit.ratio(fit.best_spacing).mean <= 1


def test_every_step_count_has_a_fit_and_bad_ones_a_sentence():
    schedule = NoiseSchedule.from_betas(make_betas(num_train_timesteps=12, beta_end=0.4))
    batch = SamplingProblem(lambda x, t: mixture(x, t, schedule), noise(4, 0))
    for steps in range(1, 13):
        assert (
            len(
                check_timesteps(
                    fit_timesteps(
                        batch, [batch], schedule=schedule, steps=steps, evaluations=20
                    ).timesteps,
                    12,
                )
            )
            == steps
        )
    with pytest.raises(DDIMError, match="whole number from 1 to 12"):
        fit_timesteps(batch, [batch], schedule=schedule, steps=13)
    with pytest.raises(DDIMError, match="give at least one held-out batch"):
        fit_timesteps(batch, [], schedule=schedule, steps=3, evaluations=0)
    with pytest.raises(DDIMError, match="order of the solver must be 1"):
        fit_timesteps(batch, [batch], schedule=schedule, steps=3, order=3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_analytic_variance_restores_the_exact_marginal(eta):
    oracle = GaussianOracle(SCHEDULE, std=0.4)
    pairs = step_pairs(select_timesteps(1000, 10))[:-1]
    t, s = (torch.tensor(levels) for levels in zip(*pairs, strict=True))
    a_t, a_s, v_t, v_s = (
        SCHEDULE.alpha_bar(t),
        SCHEDULE.alpha_bar(s),
        oracle.variance(t),
        oracle.variance(s),
    )
    eps_mean_square = (1 - a_t) / v_t  # E eps^2, as eps = sigma x_t / V_t
    weights = step_coefficients(a_t, a_s, eta=eta, eps_mean_square=eps_mean_square)
    mean = weights.x0 * a_t.sqrt() * oracle.std**2 / v_t + weights.eps * (1 - a_t).sqrt() / v_t
    torch.testing.assert_close(mean**2 * v_t + weights.noise**2, v_s, rtol=1e-9, atol=0)
    plain = step_coefficients(a_t, a_s, eta=eta)
    assert bool((mean**2 * v_t + plain.noise**2 < v_s).all())
    assert torch.equal(weights.eps, plain.eps)
    # And by drawing, with eps_mean_square measured rather than known.
    data = oracle.std * torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    measured = estimate_eps_mean_square([(oracle.denoise, data)], t.tolist(), schedule=SCHEDULE)
    for level, exact in zip(t.tolist(), eps_mean_square.tolist(), strict=True):
        assert 1 - measured[level] == pytest.approx(1 - exact, rel=0.1, abs=5e-4)
    stream = SeededNoise(range(64), (256,))
    end = sample(
        oracle.denoise,
        oracle.draw((64, 256), t=999).float(),
        pairs,
        schedule=SCHEDULE,
        eta=eta,
        eps_mean_square=measured,
        noise=stream,
    )
    assert float(end.var() / v_s[-1]) == pytest.approx(1, abs=0.06)


def test_gamma_is_clamped_and_the_same_for_every_batch_size():
    data = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 0.3
    network = GaussianOracle(SCHEDULE, std=0.3).denoise
    whole = estimate_eps_mean_square([(network, data)], [999, 500, 0], schedule=SCHEDULE)
    parts = estimate_eps_mean_square(
        [(network, data[:4]), (network, data[4:])], [999, 500, 0], schedule=SCHEDULE
    )
    assert whole == pytest.approx(parts, rel=1e-6)
    assert all(0 <= value <= 1 for value in whole.values())
    assert estimate_eps_mean_square(
        [(lambda x, t: Denoised(x, 9 * x), data)], [500], schedule=SCHEDULE
    ) == {500: 1.0}
    with pytest.raises(DDIMError, match="eps_mean_square is measured on images; got none"):
        estimate_eps_mean_square([], [5], schedule=SCHEDULE)


def test_the_analytic_variance_draws_noise_at_eta_zero_and_refuses_what_it_cannot_do():
    oracle, x, pairs = GaussianOracle(SCHEDULE, std=0.4), noise(2, 0), step_pairs([900, 500, 100])
    eps_mean_square, drawn = {900: 0.9, 500: 0.8, 100: 0.5}, []

    def draw():
        drawn.append(noise(2, len(drawn)))
        return drawn[-1]

    states = list(
        trajectory(
            oracle.denoise, x, pairs, schedule=SCHEDULE, eps_mean_square=eps_mean_square, noise=draw
        )
    )
    assert len(drawn) == 3
    plain = sample(oracle.denoise, states[1].x_s, pairs[2:], schedule=SCHEDULE)
    assert torch.equal(states[2].x_s, plain)  # the step to clean data is the mean
    assert not torch.allclose(
        states[0].x_s, sample(oracle.denoise, x, pairs[:1], schedule=SCHEDULE), atol=1e-3
    )
    one = torch.tensor(0.5, dtype=torch.float64)
    for options, message in (
        (
            {"eps_mean_square": eps_mean_square},
            "the analytic variance draws noise at every step; give noise",
        ),
        (
            {"eps_mean_square": {900: 0.9}, "noise": draw},
            "eps_mean_square has no value for level 500; estimate it for all levels",
        ),
        (
            {"eps_mean_square": eps_mean_square, "noise": draw, "order": 2},
            "order 2 solves the deterministic flow, and the analytic variance draws noise",
        ),
        (
            {"eps_mean_square": eps_mean_square, "noise": draw, "eta": SIGMA_HAT},
            "the analytic variance is that of a number eta; got sigma-hat",
        ),
    ):
        with pytest.raises(DDIMError, match=message):
            sample(oracle.denoise, x, pairs, schedule=SCHEDULE, **options)
    with pytest.raises(DDIMError, match="no value where the SNR is 0; start at a lower level"):
        step_coefficients(0 * one, one, eps_mean_square=one)
    with pytest.raises(DDIMError, match="and for the analytic variance; got eta=0"):
        ddim_step(x, x, alpha_bar_t=one / 2, alpha_bar_s=one, eps_mean_square=one)
