"""The inverse scheduler."""

import diffusers
import pytest
import torch
from tests.scheduler.helpers import (
    LATENT,
    PREDICTIONS,
    distance,
    exact,
    finish,
    gaussian,
    randn,
    stock,
)

from ddim.core.oracle import GaussianOracle
from ddim.core.prediction import from_x0_eps, to_x0_eps
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_in_float64_the_inverse_is_diffusers_inverse(kind, one, clip):
    options = {"prediction_type": kind, "set_alpha_to_one": one, "clip_sample": clip} | LATENT
    x, m = randn(2, 3, dtype=torch.float64), randn(2, 3, seed=1, dtype=torch.float64)
    for count, spacing, offset in ((10, "leading", 0), (50, "leading", 1), (20, "trailing", 0)):
        ours = DDIMInverseScheduler(timestep_spacing=spacing, steps_offset=offset, **options)
        theirs = stock(
            True,
            diffusers.DDIMInverseScheduler,
            timestep_spacing=spacing,
            steps_offset=offset,
            **options,
        )
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(count)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        for t in ours.timesteps.tolist():
            a, b = (s.step(m, t, x) for s in (ours, theirs))
            if kind == "sample" and one and t == ours.timesteps[0]:
                assert torch.isinf(b.prev_sample).any()
                assert torch.isfinite(a.prev_sample).all()
                continue
            assert distance(a.prev_sample, b.prev_sample) < 1e-11
            assert distance(a.pred_original_sample, b.pred_original_sample) < 1e-11


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "quadratic", None])
def test_the_inverse_mirrors_the_list_and_undoes_steps_with_a_frozen_prediction(spacing):
    count = {"num_inference_steps": 7} if spacing else {"timesteps": [980, 601, 422, 13, 2]}
    options = {"clip_sample": False, "timestep_spacing": spacing or "leading"}
    forward, inverse = DDIMScheduler(**options), DDIMInverseScheduler(**options)
    forward.set_timesteps(**count)
    inverse.set_timesteps(**count)
    assert inverse.timesteps.tolist() == forward.timesteps.tolist()[::-1]
    if not spacing:
        inverse.set_timesteps(timesteps=[2, 13, 422, 601, 980])
        assert inverse.timesteps.tolist() == forward.timesteps.tolist()[::-1]
    x, m = randn(2, 3, dtype=torch.float64), randn(2, 3, seed=1, dtype=torch.float64)
    for t in forward.timesteps.tolist():
        for level in (t, torch.tensor(t)):
            there = forward.step(m, t, x).prev_sample
            torch.testing.assert_close(
                inverse.step(m, level, there, return_dict=False)[0], x, rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("one", [True, False])
def test_the_inverse_finds_the_exact_code_as_steps_grow(kind, one):
    options = {
        "prediction_type": kind,
        "set_alpha_to_one": one,
        "clip_sample": False,
        "timestep_spacing": "trailing",
    } | LATENT
    oracle = GaussianOracle(exact(**options), std=0.5)
    data, errors = gaussian(50, std=0.5), []
    for count in (50, 200, 800):
        inverse = DDIMInverseScheduler(**options)
        inverse.set_timesteps(count)
        errors.append(
            distance(finish(inverse, oracle.network(kind), data), oracle.flow(data, -1, 999))
        )
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.02


def test_the_first_step_of_a_sample_prediction_is_that_of_the_same_network_expressed_as_epsilon():
    x, m = randn(2, 3, dtype=torch.float64), randn(2, 3, seed=1, dtype=torch.float64)
    by_sample, by_epsilon = (
        DDIMInverseScheduler(prediction_type=kind, clip_sample=False)
        for kind in ("sample", "epsilon")
    )
    for scheduler in (by_sample, by_epsilon):
        scheduler.set_timesteps(timesteps=[700, 80])
    alpha_bar = exact().alpha_bar(80)
    eps = to_x0_eps(m, x, alpha_bar_t=alpha_bar, prediction_type="sample").eps
    expected = by_epsilon.step(
        from_x0_eps(m, eps, alpha_bar_t=alpha_bar, prediction_type="epsilon"), 80, x
    ).prev_sample
    torch.testing.assert_close(by_sample.step(m, 80, x).prev_sample, expected)


def test_a_round_trip_there_and_back_closes_as_steps_grow():
    oracle, errors = GaussianOracle(exact(**LATENT), mean=0.3, std=0.5), []
    data = gaussian(50, 0.3, 0.5)
    for count in (10, 50, 250):
        forward, inverse = (
            cls(clip_sample=False, **LATENT) for cls in (DDIMScheduler, DDIMInverseScheduler)
        )
        forward.set_timesteps(count)
        inverse.set_timesteps(count)
        errors.append(
            distance(
                finish(forward, oracle.network(), finish(inverse, oracle.network(), data)), data
            )
        )
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_the_inverse_keeps_diffusers_words():
    x = randn(1, 3)
    with pytest.raises(ValueError, match="you need to run 'set_timesteps'"):
        DDIMInverseScheduler().step(x, 0, x)
    with pytest.warns(FutureWarning, match="set_alpha_to_zero"):
        scheduler = DDIMInverseScheduler(set_alpha_to_zero=False)
    assert scheduler.config.set_alpha_to_one is False
    assert scheduler.initial_alpha_cumprod == scheduler.alphas_cumprod[0]
    assert torch.equal(scheduler.timesteps, torch.arange(1000))
    with pytest.raises(TypeError):
        scheduler.step(x, 0, x, eta=1.0)
    assert isinstance(scheduler, diffusers.DDIMInverseScheduler)
    from_forward = DDIMInverseScheduler.from_config(
        DDIMScheduler(thresholding=True, timestep_spacing="linspace").config
    )
    from_forward.set_timesteps(5)
    assert from_forward.timesteps.tolist() == [0, 250, 500, 749, 999]
