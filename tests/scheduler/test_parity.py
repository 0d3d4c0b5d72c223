"""Timesteps and steps equal those of diffusers wherever it is right."""

import diffusers
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tests.conftest import thinned
from tests.scheduler.helpers import LATENT, PREDICTIONS, distance, exact, pair, randn

from ddim.core.prediction import to_x0_eps
from ddim.core.step import ddim_step
from ddim.core.timesteps import select_timesteps
from ddim.scheduler import DDIMScheduler


def sound(timesteps, count, total):
    return (
        len(timesteps) == count == len(set(timesteps))
        and min(timesteps) >= 0
        and max(timesteps) < total
    )


def compare_timesteps(total, counts):
    for spacing in ("leading", "linspace", "trailing"):
        theirs = diffusers.DDIMScheduler(total, timestep_spacing=spacing)
        for count in counts:
            theirs.set_timesteps(count)
            expected = theirs.timesteps.tolist()
            got = select_timesteps(total, count, spacing)
            assert got == (expected if sound(expected, count, total) else expected[:count]), (
                spacing,
                count,
            )


def test_timesteps_are_diffusers_wherever_its_list_is_valid():
    compare_timesteps(100, range(1, 101))
    for total in (1000, 999, 1024):
        compare_timesteps(total, [*range(1, 130), *range(130, total, 37), total])


@pytest.mark.slow
@pytest.mark.parametrize("total", [1000, 999, 1024])
def test_timesteps_are_diffusers_for_every_count(total):
    compare_timesteps(total, range(1, total + 1))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_scheduler_sets_those_timesteps(spacing, offset):
    for count in (1, 7, 10, 50, 61, 300, 999):
        ours, theirs = pair(count, timestep_spacing=spacing, steps_offset=offset)
        if sound(theirs.timesteps.tolist(), count, 1000):
            assert torch.equal(ours.timesteps, theirs.timesteps)
        assert sound(ours.timesteps.tolist(), count, 1000)
        assert ours.timesteps.dtype == torch.int64
        assert ours.num_inference_steps == count


BETAS = [
    {},
    LATENT,
    {"beta_schedule": "squaredcos_cap_v2"},
    LATENT | {"rescale_betas_zero_snr": True},
]
CLIPS = [
    {"clip_sample": False},
    {"clip_sample_range": 0.7},
    {"thresholding": True, "sample_max_value": 1.5},
]


@pytest.mark.parametrize(
    ("kind", "beta", "clip", "one"), thinned(PREDICTIONS, BETAS, CLIPS, [True, False], stride=5)
)
def test_in_float64_on_the_same_levels_a_step_is_diffusers_step(kind, beta, clip, one):
    options = {"prediction_type": kind, **beta, **clip, "set_alpha_to_one": one}
    x, m, z = (randn(2, 3, 5, 5, seed=s, dtype=torch.float64) for s in range(3))
    for count, spacing in ((10, "leading"), (50, "leading"), (20, "trailing"), (1000, "linspace")):
        if (
            options["prediction_type"] == "epsilon"
            and options.get("rescale_betas_zero_snr")
            and spacing != "leading"
        ):
            continue  # refused
        ours, theirs = pair(count, exactly=True, timestep_spacing=spacing, **options)
        for t in ours.timesteps.tolist()[:: max(count // 10, 1)] + ours.timesteps.tolist()[-1:]:
            for eta in (0.0, 0.5, 1.0):
                for rederive in (False, True):
                    a, b = (
                        s.step(m, t, x, eta, rederive, None, z if eta else None)
                        for s in (ours, theirs)
                    )
                    # Either takes the root of a difference that cancels, from zero SNR to nothing:
                    # 1e-16 becomes 1e-8.
                    bound = 1e-11 if eta == 0 else 1e-7
                    assert distance(a.prev_sample, b.prev_sample) < bound, (count, t, eta, rederive)
                    assert distance(a.pred_original_sample, b.pred_original_sample) < 1e-11, (
                        count,
                        t,
                        eta,
                        rederive,
                    )


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize(
    "beta",
    [{}, LATENT, {"beta_schedule": "squaredcos_cap_v2"}, LATENT | {"rescale_betas_zero_snr": True}],
    ids=str,
)
def test_in_float32_on_diffusers_levels_a_step_is_diffusers_step(kind, beta):
    x, m, z = (randn(1, 3, 16, 16, seed=s) for s in range(3))
    for count in (10, 50):
        ours, theirs = pair(count, prediction_type=kind, clip_sample=False, **beta)
        ours.alphas_cumprod, ours.final_alpha_cumprod = (
            theirs.alphas_cumprod,
            theirs.final_alpha_cumprod,
        )
        for t in ours.timesteps.tolist():
            for eta in (0.0, 1.0):
                a, b = (
                    s.step(m, t, x, eta, variance_noise=z if eta else None) for s in (ours, theirs)
                )
                assert distance(a.prev_sample, b.prev_sample) < (
                    2e-6 if (kind, eta) != ("sample", 1.0) else 2e-5
                )
                assert distance(a.pred_original_sample, b.pred_original_sample) < 2e-6


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    "beta",
    [{}, LATENT, {"rescale_betas_zero_snr": True}, LATENT | {"rescale_betas_zero_snr": True}],
    ids=str,
)
def test_in_float32_out_of_the_box_a_step_is_diffusers_step(kind, clip, beta):
    x, m, z = (randn(1, 3, 16, 16, seed=s) for s in range(3))
    for count in (10, 50):
        ours, theirs = pair(count, prediction_type=kind, clip_sample=clip, **beta)
        for t in ours.timesteps:
            # Clean data are told to an ulp of x_t over alpha_t, also those inside of the clip.
            bound = max(2e-6, 2**-23 / float(ours.alphas_cumprod[t]) ** 0.5)
            for eta in (0.0, 1.0):
                a, b = (
                    s.step(m, t, x, eta, variance_noise=z if eta else None) for s in (ours, theirs)
                )
                assert distance(a.prev_sample, b.prev_sample) < 2e-6
                assert distance(a.pred_original_sample, b.pred_original_sample) < bound


@pytest.mark.parametrize("beta", [{}, {"beta_schedule": "squaredcos_cap_v2"}], ids=str)
def test_float32_levels_are_what_separates_the_two_near_data(beta):
    # diffusers multiplies 1000 factors near 1 in float32, so that 1 - alpha_bar of the lowest
    # levels keeps three or four digits.
    one, t = torch.ones(1000, 1, dtype=torch.float64), torch.arange(1000)
    sigma = (1 - exact(**beta).alphas_cumprod).sqrt()[:, None]
    ours, theirs = (
        s.add_noise(0 * one, one, t) / sigma - 1
        for s in (DDIMScheduler(**beta), diffusers.DDIMScheduler(**beta))
    )
    assert ours.abs().max() < 1e-15
    assert theirs.abs().max() > 5e-5
    assert torch.equal(DDIMScheduler(**beta).alphas_cumprod, exact(**beta).alphas_cumprod.float())


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 1000),
    spacing=st.sampled_from(["leading", "linspace", "trailing", "quadratic"]),
    kind=st.sampled_from(["sample", "v_prediction"]),
    eta=st.sampled_from([0.0, 0.3, 1.0, "sigma-hat"]),
    clip=st.booleans(),
    rederive=st.booleans(),
)
def test_a_step_is_the_cores_step_to_the_next_timestep(count, spacing, kind, eta, clip, rederive):
    options = LATENT | {"rescale_betas_zero_snr": True}
    scheduler = DDIMScheduler(
        timestep_spacing=spacing, prediction_type=kind, clip_sample=clip, **options
    )
    scheduler.set_timesteps(count)
    schedule, levels = exact(**options), [*scheduler.timesteps.tolist(), -1]
    x, m, z = (randn(2, 3, seed=s, dtype=torch.float64) for s in range(3))
    for i in {0, count // 2, count - 1}:
        alpha_bar_t, alpha_bar_s = schedule.alpha_bar(levels[i]), schedule.alpha_bar(levels[i + 1])
        x0, eps = to_x0_eps(m, x, alpha_bar_t=alpha_bar_t, prediction_type=kind)
        x0 = x0.clamp(-1, 1) if clip else x0
        eps = (x - alpha_bar_t.sqrt() * x0) / (1 - alpha_bar_t).sqrt() if rederive else eps
        expected = ddim_step(
            x0, eps, alpha_bar_t=alpha_bar_t, alpha_bar_s=alpha_bar_s, eta=eta, noise=z
        )
        got = scheduler.step(m, levels[i], x, eta, rederive, variance_noise=None if eta == 0 else z)
        torch.testing.assert_close(got.prev_sample, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.pred_original_sample, x0, rtol=1e-9, atol=1e-9)
