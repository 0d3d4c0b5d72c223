"""The drop-in: parity where diffusers is right, and each place where it is not, shown there and
mended here."""

import copy
import json
import pickle
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given, settings, strategies as st

import ddim.scheduler
import ddim.scheduling
from ddim.core.noise import make_generators
from ddim.core.oracle import GaussianOracle
from ddim.core.prediction import from_x0_eps, to_x0_eps
from ddim.core.schedule import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from ddim.core.step import ddim_step
from ddim.core.timesteps import check_timesteps, select_timesteps
from ddim.errors import DDIMError
from ddim.models.export import to_diffusers
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def distance(ours, theirs):
    """The relative error in the norm; equal infinities and NaNs do not occur here."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def exact(**options):
    """What the options mean, in float64, from the core alone."""
    recipe = {k: options[k] for k in ("beta_start", "beta_end") if k in options}
    betas = make_betas(
        options.get("beta_schedule", "linear"), options.get("num_train_timesteps", 1000), **recipe
    )
    betas = rescale_zero_terminal_snr(betas) if options.get("rescale_betas_zero_snr") else betas
    return NoiseSchedule.from_betas(betas, set_alpha_to_one=options.get("set_alpha_to_one", True))


def stock(exactly=False, cls=diffusers.DDIMScheduler, **options):
    """diffusers' scheduler; ``exactly`` gives it float64 levels, so that only its formulae
    remain."""
    scheduler = cls(**options)
    if exactly:
        scheduler.alphas_cumprod = exact(**options).alphas_cumprod
        clean = torch.tensor(exact(**options).final_alpha_cumprod, dtype=torch.float64)
        setattr(
            scheduler,
            "initial_alpha_cumprod"
            if cls is diffusers.DDIMInverseScheduler
            else "final_alpha_cumprod",
            clean,
        )
    return scheduler


def pair(count, exactly=False, **options):
    schedulers = DDIMScheduler(**options), stock(exactly, **options)
    for scheduler in schedulers:
        scheduler.set_timesteps(count)
    return schedulers


def finish(scheduler, network, x, **kwargs):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **kwargs).prev_sample
    return x


def gaussian(count=2000, mean=0.0, std=1.0):
    """Quantiles of a normal distribution, with exactly its mean and standard deviation; an affine
    sampler keeps the shape."""
    z = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return (mean + std * z / z.std(correction=0))[:, None]


def finished(scheduler, oracle):
    """Mean and standard deviation of what the sampler makes of the exact marginal at its first
    level, with the exact model."""
    t = int(scheduler.timesteps[0])
    start = gaussian(
        mean=float(oracle.schedule.alpha_bar(t).sqrt() * oracle.mean),
        std=float(oracle.variance(t).sqrt()),
    )
    network = oracle.network(scheduler.config.prediction_type)
    x = finish(
        scheduler, lambda x, t: network(x, t % len(oracle.schedule)), start
    )  # -1, the last step too many, reads the last level
    return float(x.mean()), float(x.std(correction=0))


@pytest.fixture
def said(monkeypatch):
    """The lines that the module logs, each at its first occurrence."""
    lines = []
    monkeypatch.setattr(ddim.scheduling, "_logged", set())
    monkeypatch.setattr(ddim.scheduling._logger, "warning", lines.append)
    return lines


# Parity: timesteps


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


# Parity: steps

FORMULAE = [
    {"prediction_type": kind, **beta, **clip, "set_alpha_to_one": one}
    for kind in PREDICTIONS
    for beta in (
        {},
        LATENT,
        {"beta_schedule": "squaredcos_cap_v2"},
        LATENT | {"rescale_betas_zero_snr": True},
    )
    for clip in (
        {"clip_sample": False},
        {"clip_sample_range": 0.7},
        {"thresholding": True, "sample_max_value": 1.5},
    )
    for one in (True, False)
]


@pytest.mark.parametrize("options", FORMULAE, ids=str)
def test_in_float64_on_the_same_levels_a_step_is_diffusers_step(options):
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
            for eta in (0.0, 1.0):
                a, b = (
                    s.step(m, t, x, eta, variance_noise=z if eta else None) for s in (ours, theirs)
                )
                assert distance(a.prev_sample, b.prev_sample) < 2e-6
                assert distance(a.pred_original_sample, b.pred_original_sample) < 2e-6


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


# The defects, shown in diffusers and mended here


def test_linspace_steps_to_the_next_timestep():
    oracle = GaussianOracle(exact(**LATENT), mean=0.9, std=0.05)
    for count in (5, 10, 20):
        ours, theirs = pair(
            count, exactly=True, timestep_spacing="linspace", clip_sample=False, **LATENT
        )
        mean, std = finished(theirs, oracle)
        assert abs(mean - 0.9) > 0.003
        assert std > 0.052
        mean, std = finished(ours, oracle)
        assert mean == pytest.approx(0.9, abs=1e-9)
        assert std < 0.05


@pytest.mark.parametrize(("count", "least"), [(150, 0.27), (300, 0.28), (501, 0.49), (600, 0.43)])
def test_trailing_steps_to_the_next_timestep_where_n_does_not_divide_t(count, least):
    oracle = GaussianOracle(exact(), mean=0.5, std=0.25)
    ours, theirs = pair(count, exactly=True, timestep_spacing="trailing", clip_sample=False)
    assert finished(theirs, oracle)[1] > least
    mean, std = finished(ours, oracle)
    assert mean == pytest.approx(0.5, abs=1e-9)
    assert 0.24 < std < 0.25


@pytest.mark.parametrize("count", [61, 103, 121])
def test_trailing_makes_no_step_too_many(count):
    oracle = GaussianOracle(exact(), std=0.5)
    ours, theirs = pair(count, exactly=True, timestep_spacing="trailing", clip_sample=False)
    assert theirs.timesteps.tolist()[-1] == -1
    assert len(theirs.timesteps) == count + 1
    assert finished(theirs, oracle)[1] < 0.01
    assert len(ours.timesteps) == count
    assert 0.47 < finished(ours, oracle)[1] < 0.5


def test_leading_starts_below_the_noise_as_in_diffusers_and_trailing_does_not():
    for count in (1, 50, 60, 501):
        ours, theirs = pair(count)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        assert ours.timesteps[0] == (count - 1) * (1000 // count)
        ours.register_to_config(timestep_spacing="trailing")
        ours.set_timesteps(count)
        assert ours.timesteps[0] == 999


def test_epsilon_at_zero_snr_is_refused_when_the_timesteps_are_set():
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    theirs = diffusers.DDIMScheduler(**options)
    theirs.set_timesteps(10)
    assert torch.isnan(finish(theirs, lambda x, t: 0.5 * x, randn(1, 4))).all()
    ours = DDIMScheduler(**options)
    with pytest.raises(
        DDIMError,
        match=(
            "epsilon prediction cannot be used at t=999: the SNR is 0 there.*v_prediction.*start "
            "below 999"
        ),
    ):
        ours.set_timesteps(10)
    ours.set_timesteps(timesteps=[900, 500, 100])
    assert torch.isfinite(finish(ours, lambda x, t: 0.5 * x, randn(1, 4))).all()
    with pytest.raises(DDIMError, match="cannot be used at t=999"):
        ours.step(randn(1, 4), 999, randn(1, 4))
    ours.register_to_config(prediction_type="v_prediction")
    ours.set_timesteps(10)
    ours.register_to_config(prediction_type="epsilon")
    with pytest.raises(DDIMError, match="cannot be used at t=999"):
        ours.step(randn(1, 4), 99, randn(1, 4))


def test_eta_one_from_zero_snr_is_finite():
    options = LATENT | {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    network, x, broken = (
        GaussianOracle(exact(**options), std=0.5).network("v_prediction"),
        randn(1, 3, 4, 4),
        [],
    )
    for count in (6, 10, 13, 14, 19, 20, 23, 24, 25):
        ours, theirs = pair(count, clip_sample=False, **options)
        broken.append(
            bool(torch.isnan(theirs.step(x, 999, x, 1.0, variance_noise=x).prev_sample).any())
        )
        assert torch.isfinite(
            finish(ours, network, x, eta=1.0, generator=torch.Generator().manual_seed(0))
        ).all()
    assert any(broken)  # at which counts, depends on how the machine rounds


def zero_snr_is_finite(counts):
    for kind in ("sample", "v_prediction"):
        scheduler = DDIMScheduler(
            rescale_betas_zero_snr=True,
            prediction_type=kind,
            timestep_spacing="trailing",
            clip_sample=False,
        )
        assert scheduler.alphas_cumprod[-1] == 0
        x = randn(1, 4)
        for count in counts:
            scheduler.set_timesteps(count)
            for eta in (0.0, 1.0):
                moved = scheduler.step(
                    x.expand(count, 4),
                    scheduler.timesteps,
                    x.expand(count, 4),
                    eta,
                    variance_noise=x,
                )
                assert torch.isfinite(moved.prev_sample).all()
                assert torch.isfinite(moved.pred_original_sample).all()


def test_zero_snr_is_finite_at_many_counts():
    zero_snr_is_finite([*range(1, 60), 61, 103, 333, 600, 999, 1000])


@pytest.mark.slow
def test_zero_snr_is_finite_at_every_count():
    zero_snr_is_finite(range(1, 1001))


def test_an_eta_that_gives_nan_is_refused_with_the_largest_that_does_not():
    ours, theirs = pair(50, clip_sample=False)
    x = randn(1, 4)
    assert torch.isnan(theirs.step(x, 20, x, 1.5, variance_noise=x).prev_sample).all()
    with pytest.raises(
        DDIMError, match="eta=1.5 would draw more noise than the level can hold.*use at most 1"
    ) as refusal:
        ours.step(x, 980, x, 1.5, variance_noise=x)
    largest = float(str(refusal.value).split("use at most ")[1].split(" ")[0])
    for t in ours.timesteps.tolist():
        assert torch.isfinite(
            ours.step(x, t, x, largest * 0.999, variance_noise=x).prev_sample
        ).all()
    with pytest.raises(
        DDIMError, match="eta above 1 is for the listed timesteps only; got eta=1.001 at t=7"
    ):
        ours.step(x, 7, x, 1.001, variance_noise=x)
    with pytest.raises(DDIMError, match="eta must be at least 0 and finite; got -0.5"):
        ours.step(x, 980, x, -0.5)
    with pytest.raises(DDIMError, match="eta must be a number or 'sigma-hat'; got 'ddpm'"):
        ours.step(x, 980, x, "ddpm", variance_noise=x)


@pytest.mark.parametrize(("dtype", "lost"), [(torch.bfloat16, 10), (torch.float16, 2)])
def test_half_precision_training_sees_noise_at_every_level(dtype, lost):
    x0, noise, levels = (
        torch.zeros(1000, 1, dtype=dtype),
        torch.ones(1000, 1, dtype=dtype),
        torch.arange(1000),
    )
    ours, theirs = DDIMScheduler(), diffusers.DDIMScheduler()
    assert (theirs.add_noise(x0, noise, levels)[:lost] == 0).all()
    noisy, sigma = ours.add_noise(x0, noise, levels), (1 - exact().alphas_cumprod).sqrt()
    assert noisy.dtype == dtype
    assert ((noisy.double()[:, 0] / sigma - 1).abs() < torch.finfo(dtype).eps).all()
    v = ours.get_velocity(noise, x0, levels)
    assert ((v.double()[:, 0] / -sigma - 1).abs() < torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_half_precision_sampling_is_as_good_as_diffusers_and_a_float32_state_far_better(
    dtype, kind
):
    schedule = exact(**LATENT)
    network = GaussianOracle(schedule, std=0.5).network(kind)
    start = randn(4, 3, 8, 8, dtype=torch.float64)

    def half(x, t):
        return network(x.float(), t).to(dtype)

    for count in (20, 200, 1000):
        ours, theirs = pair(count, clip_sample=False, prediction_type=kind, **LATENT)
        truth = finish(ours, network, start)
        error = distance(finish(ours, half, start.to(dtype)), truth)
        # At 1000 steps of bfloat16 most updates lie below half an ulp: whatever the order of
        # operations, the result is poor.
        assert error < (
            0.5 if count == 1000 else 1.5 * distance(finish(theirs, half, start.to(dtype)), truth)
        )
        assert distance(finish(ours, half, start.float()), truth) < error / 3


# What a step accepts


@pytest.mark.parametrize(
    "options",
    [{"clip_sample": False}, {}, {"thresholding": True, "sample_max_value": 2.0}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_timestep_may_be_an_integer_a_tensor_or_one_a_sample(options, dtype):
    scheduler = DDIMScheduler(**options)
    scheduler.set_timesteps(50)
    x, m, z = (randn(3, 2, 4, 4, seed=s, dtype=dtype) for s in range(3))
    for eta in (0.0, 1.0):
        noise = {"variance_noise": z} if eta else {}
        expected = scheduler.step(m, 500, x, eta, **noise)
        for t in (
            torch.tensor(500),
            torch.tensor([500]),
            torch.tensor(500.0),
            torch.tensor(500, dtype=torch.int32),
            np.int64(500),
            500.0,
        ):
            got = scheduler.step(m, t, x, eta, **noise)
            assert torch.equal(got.prev_sample, expected.prev_sample)
            assert torch.equal(got.pred_original_sample, expected.pred_original_sample)
        levels = [980, 500, 0]
        together = scheduler.step(m, torch.tensor(levels), x, eta, **noise)
        for i, t in enumerate(levels):
            alone = scheduler.step(
                m[i : i + 1],
                t,
                x[i : i + 1],
                eta,
                **({"variance_noise": z[i : i + 1]} if eta else {}),
            )
            assert torch.equal(together.prev_sample[i : i + 1], alone.prev_sample)
            assert torch.equal(together.pred_original_sample[i : i + 1], alone.pred_original_sample)


def test_a_step_keeps_no_state():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    x = randn(1, 3, 4, 4)
    forwards = {t: scheduler.step(x, t, x).prev_sample for t in (980, 500, 49, 10, 1, 0)}
    for t in (0, 10, 980, 1, 500, 49):
        assert torch.equal(scheduler.step(x, t, x).prev_sample, forwards[t])


def test_a_timestep_off_the_list_steps_by_the_stride_and_is_mentioned_once(said):
    ours, theirs = pair(50, exactly=True, clip_sample=False)
    x, m = randn(1, 3, dtype=torch.float64), randn(1, 3, seed=1, dtype=torch.float64)
    for t in (1, 10, 49, 999):
        assert distance(ours.step(m, t, x).prev_sample, theirs.step(m, t, x).prev_sample) < 1e-12
    assert said == [
        "A timestep was asked for that is not in the list of set_timesteps; its step goes to t - T "
        "// N, as in diffusers."
    ]


@pytest.mark.parametrize("level", [torch.tensor(500.5), torch.tensor([3.0, 2.5])])
def test_a_fraction_of_a_timestep_is_refused_where_the_host_can_see_it(level):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    x = randn(2, 3)
    with pytest.raises(DDIMError, match=r"timesteps must be whole numbers; got .*\.5"):
        scheduler.step(x, level, x)
    x = x.to("meta")
    assert scheduler.step(x, level.to("meta"), x).prev_sample.device.type == "meta"


def test_a_result_is_the_one_that_diffusers_constructor_makes():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    x = randn(1, 3)
    made = scheduler.step(x, 500, x)
    built = ddim.scheduler.DDIMSchedulerOutput(
        prev_sample=made.prev_sample, pred_original_sample=made.pred_original_sample
    )
    assert type(made) is type(built)
    assert vars(made) == vars(built)
    assert list(made.items()) == list(built.items())
    assert made.to_tuple() == built.to_tuple() == (made[0], made["pred_original_sample"])
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is type(built)
    assert torch.equal(again.prev_sample, made.prev_sample)
    assert list(again) == list(built)


def test_eta_is_the_fourth_positional_argument_and_both_forms_of_result_agree():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    x, z = randn(1, 3), randn(1, 3, seed=1)
    named = scheduler.step(x, 500, x, eta=1.0, variance_noise=z)
    assert isinstance(named, ddim.scheduler.DDIMSchedulerOutput)
    sample, x0 = scheduler.step(x, 500, x, 1.0, False, None, z, False)
    assert torch.equal(sample, named.prev_sample)
    assert torch.equal(x0, named.pred_original_sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noise_is_drawn_as_diffusers_draws_it(dtype):
    ours, theirs = pair(50, clip_sample=False)
    x, m = randn(2, 3, 4, 4, dtype=dtype), randn(2, 3, 4, 4, seed=1, dtype=dtype)
    for generators in (
        lambda: torch.Generator().manual_seed(7),
        lambda: make_generators([3, 4]),
        lambda: None,
    ):
        torch.manual_seed(5)
        a = ours.step(m, 500, x, 1.0, generator=generators()).prev_sample
        torch.manual_seed(5)
        b = theirs.step(m, 500, x, 1.0, generator=generators()).prev_sample
        assert distance(a, b) < (1e-6 if dtype == torch.float32 else 2e-3)
    drawn = randn_tensor(x.shape, generator=make_generators([3, 4]), dtype=dtype)
    assert torch.equal(
        ours.step(m, 500, x, 1.0, variance_noise=drawn)[0],
        ours.step(m, 500, x, 1.0, generator=make_generators([3, 4]))[0],
    )


def test_eta_zero_draws_nothing():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    generator = torch.Generator().manual_seed(0)
    before, state = generator.get_state(), torch.get_rng_state()
    scheduler.step(randn(1, 3), 500, randn(1, 3), generator=generator)
    assert torch.equal(before, generator.get_state())
    assert torch.equal(state, torch.get_rng_state())


def test_an_image_of_a_list_of_generators_does_not_depend_on_its_batch():
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    network = GaussianOracle(exact(), std=0.5).network()
    x = randn(3, 2, 4)
    together = finish(scheduler, network, x, eta=1.0, generator=make_generators([5, 6, 7]))
    alone = finish(scheduler, network, x[1:2], eta=1.0, generator=make_generators([6]))
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("m_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_step_returns_the_samples_dtype(x_dtype, m_dtype):
    for options in (
        {"clip_sample": False},
        {},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction", "thresholding": True},
    ):
        scheduler = DDIMScheduler(**options)
        scheduler.set_timesteps(50)
        for t in (500, torch.tensor(500), torch.tensor([500, 40])):
            assert (
                scheduler.step(
                    randn(2, 3, 4, dtype=m_dtype), t, randn(2, 3, 4, dtype=x_dtype), 1.0
                ).prev_sample.dtype
                == x_dtype
            )


def test_arguments_are_never_written_to():
    for options in (
        {"clip_sample": False},
        {},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction"},
    ):
        scheduler = DDIMScheduler(**options)
        scheduler.set_timesteps(50)
        tensors = [randn(2, 3, seed=s) for s in range(3)]
        kept = [x.clone() for x in tensors]
        m, x, z = tensors
        scheduler.step(m, 500, x, 1.0, variance_noise=z)
        scheduler.step(m, torch.tensor(500), x, 1.0, True, variance_noise=z)
        scheduler.add_noise(x, z, 3)
        scheduler.get_velocity(x, z, torch.tensor([3, 4]))
        assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


def test_gradients_pass_also_through_tables_made_in_inference_mode():
    with torch.inference_mode():
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(50)
        scheduler.step(randn(1, 3), 500, randn(1, 3))
    x = randn(1, 3).requires_grad_()
    for t in (500, torch.tensor(500)):
        scheduler.step(2 * x, t, x, 1.0).prev_sample.sum().backward()
        scheduler.add_noise(x, x, 3).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_learned_variance_is_dropped_and_mentioned_once(said):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    x, m = randn(2, 3, 4, 4), randn(2, 6, 4, 4, seed=1)
    for _ in range(2):
        assert torch.equal(
            scheduler.step(m, 500, x).prev_sample, scheduler.step(m[:, :3], 500, x).prev_sample
        )
    assert said == [
        "The model's output has twice the channels of the sample: the second half, a learned "
        "variance, is not used."
    ]


def test_an_empty_batch_stays_empty():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(50)
    x = torch.empty(0, 3, 4, 4)
    for t in (500, torch.tensor(500), torch.empty(0, dtype=torch.int64)):
        assert scheduler.step(x, t, x, 1.0).prev_sample.shape == x.shape


def test_thresholding_has_no_limit_on_the_number_of_elements():
    scheduler = DDIMScheduler(thresholding=True, sample_max_value=3.0, prediction_type="sample")
    scheduler.set_timesteps(10)
    x = torch.linspace(-4, 4, 2**24 + 2).reshape(1, -1)
    assert scheduler.step(x, 500, x).pred_original_sample.abs().max() == 1


def test_the_batch_protocol_steps_each_sample_at_its_own_timestep():
    x, m = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    levels = torch.tensor([900, 500, 0])
    parallel = diffusers.DDIMParallelScheduler()
    ours = DDIMScheduler()
    for scheduler in (parallel, ours):
        scheduler.set_timesteps(10)
    for rederive in (False, True):
        a, b = (s.batch_step_no_noise(m, levels, x, 0.0, rederive) for s in (ours, parallel))
        assert distance(a, b) < 2e-6
    single = torch.cat(
        [ours.step(m[i : i + 1], int(t), x[i : i + 1]).prev_sample for i, t in enumerate(levels)]
    )
    assert torch.equal(ours.batch_step_no_noise(m, levels, x), single)
    assert torch.equal(ours.batch_step_no_noise(m, [900, 500, 0], x), single)
    assert ours.batch_step_no_noise(m.half(), levels, x.half()).dtype == torch.float16
    noise = randn(3, 2, 4, 4, seed=2)
    mean = ours.batch_step_no_noise(m, levels, x, 1.0)
    with_noise = ours.step(m, levels, x, 1.0, variance_noise=noise).prev_sample
    std = (
        torch.stack([ours._get_variance(int(t), int(t) - 100) for t in levels])
        .sqrt()
        .reshape(-1, 1, 1, 1)
    )
    torch.testing.assert_close(with_noise, mean + std * noise)


def test_the_batch_protocol_ends_at_the_first_level_where_that_is_asked_for():
    options = {"set_alpha_to_one": False, "beta_start": 0.01, "clip_sample": False}
    parallel, ours = diffusers.DDIMParallelScheduler(**options), DDIMScheduler(**options)
    for scheduler in (parallel, ours):
        scheduler.set_timesteps(10)
    x, m = randn(2, 4), randn(2, 4, seed=1)
    step = ours.step(m, 0, x).prev_sample
    assert torch.equal(ours.batch_step_no_noise(m, torch.tensor([0, 0]), x), step)
    assert (
        distance(
            parallel.batch_step_no_noise(m, torch.tensor([0, 0]), x),
            parallel.step(m, 0, x).prev_sample,
        )
        > 0.01
    )


def test_the_variance_of_a_step_is_diffusers():
    ours, theirs = DDIMScheduler(), stock(exactly=True)
    for t, s in ((0, 0), (420, 400), (980, 960), (487, 486), (999, 998), (20, -1), (3, -17)):
        assert float(ours._get_variance(t, s)) == pytest.approx(
            float(theirs._get_variance(t, s)), rel=1e-6, abs=1e-12
        )
    assert float(ours._get_variance(torch.tensor(420), torch.tensor(400))) == pytest.approx(
        0.14771, abs=1e-5
    )


# Refusals


def test_a_step_says_what_is_wrong():
    x = randn(2, 3, 4)
    scheduler = DDIMScheduler()
    with pytest.raises(
        ValueError,
        match=(
            "Number of inference steps is 'None', you need to run 'set_timesteps' after creating "
            "the scheduler"
        ),
    ):
        scheduler.step(x, 5, x)
    scheduler.set_timesteps(10)
    for t in (-3, -1, 1000):
        with pytest.raises(
            DDIMError,
            match=(
                rf"timestep must lie in \[0, 1000\), the levels the model was trained on; got {t}"
            ),
        ):
            scheduler.step(x, t, x)
    with pytest.raises((IndexError, RuntimeError)):
        scheduler.step(x, torch.tensor(1000), x)
    with pytest.raises((IndexError, RuntimeError)):
        scheduler.step(x, torch.tensor(-3), x)
    with pytest.raises(DDIMError, match="a timestep must be a whole number.* got 2.5"):
        scheduler.step(x, 2.5, x)
    for t in ([500, 500, 500], [[500, 500]]):
        with pytest.raises(
            DDIMError, match="one timestep, or one for each of the 2 samples; got shape"
        ):
            scheduler.step(x, torch.tensor(t), x)
    for shape in ((1, 3, 4), (2, 9, 4), (2, 3, 8), (2, 3)):
        with pytest.raises(DDIMError, match=r"must have the sample's shape \[2, 3, 4\].*got \["):
            scheduler.step(torch.zeros(shape), 900, x)
    for generators in ([1], [1, 2, 3]):
        with pytest.raises(
            DDIMError, match=f"one for each of the 2 samples; got {len(generators)}"
        ):
            scheduler.step(x, 900, x, 1.0, generator=make_generators(generators))
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        scheduler.step(x, 900, x, 1.0, generator=torch.Generator(), variance_noise=x)
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(
        DDIMError, match="prediction_type must be one of epsilon, sample, v_prediction; got 'flow'"
    ):
        scheduler.step(x, 900, x)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
def test_setting_timesteps_says_what_is_wrong(cls):
    scheduler = cls()
    for count in (0, -5, 2.5, "50", True):
        with pytest.raises(
            DDIMError, match="num_inference_steps must be a whole number from 1 to 1000.* got"
        ):
            scheduler.set_timesteps(count)
    with pytest.raises(ValueError, match="`num_inference_steps`: 1001 cannot be larger than 1000"):
        scheduler.set_timesteps(1001)
    with pytest.raises(DDIMError, match="either num_inference_steps or a list of timesteps"):
        scheduler.set_timesteps()
    with pytest.raises(DDIMError, match="either num_inference_steps or a list of timesteps"):
        scheduler.set_timesteps(2, timesteps=[5, 4])
    for levels, message in (
        ([], "empty list"),
        ([5, 5], "repeat"),
        ([5, 9, 1], "must fall"),
        ([1000, 1], r"lie in \[0, 1000\)"),
        ([5, -1], r"lie in"),
        ([5.5, 1], "whole"),
        ([float("nan")], "whole numbers; got nan"),
        (["a", "b"], "whole numbers; got 'a'"),
        ([None], "whole numbers; got None"),
        (5, "one list of levels"),
        (torch.tensor([[5, 3]]), "one list of levels"),
    ):
        with pytest.raises(DDIMError, match=message):
            scheduler.set_timesteps(timesteps=levels)
    with pytest.raises(
        DDIMError,
        match=(
            "timestep_spacing must be one of leading, linspace, trailing, quadratic; got 'karras'"
        ),
    ):
        cls(timestep_spacing="karras").set_timesteps(10)
    with pytest.raises(DDIMError, match="prediction_type must be one of .* got 'noise'"):
        cls(prediction_type="noise").set_timesteps(10)
    with pytest.raises(DDIMError, match="beta_schedule must be one of .* got 'cosine'"):
        cls(beta_schedule="cosine")
    with pytest.raises(DDIMError, match="num_train_timesteps must be at least 1"):
        cls(0)


def test_what_is_odd_but_accepted_by_diffusers_works_and_is_mentioned(said):
    x = randn(1, 3, 2, 2)
    short = DDIMScheduler(trained_betas=[0.1, 0.3])
    short.set_timesteps(50)
    assert torch.isfinite(short.step(x, 1, x).prev_sample).all()
    with pytest.raises(DDIMError, match=r"timestep must lie in \[0, 2\)"):
        short.step(x, 980, x)
    steep = DDIMScheduler(beta_end=2)
    steep.set_timesteps(50)
    assert torch.isfinite(steep.step(x, 0, x).prev_sample).all()
    low = DDIMScheduler(thresholding=True, sample_max_value=0.5)
    theirs = diffusers.DDIMScheduler(thresholding=True, sample_max_value=0.5)
    for scheduler in (low, theirs):
        scheduler.set_timesteps(50)
    assert (
        distance(
            low.step(x, 500, x).pred_original_sample, theirs.step(x, 500, x).pred_original_sample
        )
        < 2e-6
    )
    DDIMInverseScheduler(thresholding=True, sample_max_value=2.0, beta_strat=1)
    wanted = (
        "trained_betas has 2 levels",
        "Some betas lie outside",
        "sample_max_value=0.5",
        "ignores: beta_strat, sample_max_value, thre",
    )
    for words in wanted:
        assert sum(words in line for line in said) == 1, words


# Timesteps of one's own


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, tuple])
def test_custom_timesteps(kind):
    levels = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    scheduler = DDIMScheduler(clip_sample=False, **LATENT)
    scheduler.set_timesteps(timesteps=kind(levels))
    assert scheduler.timesteps.tolist() == levels
    assert scheduler.num_inference_steps == 10
    mean, std = finished(scheduler, GaussianOracle(exact(**LATENT), mean=0.5, std=0.25))
    assert mean == pytest.approx(0.5, abs=1e-9)
    assert 0.18 < std < 0.25


def test_quadratic_timesteps():
    scheduler = DDIMScheduler(timestep_spacing="quadratic", clip_sample=False)
    oracle = GaussianOracle(exact(), mean=0.5, std=0.25)
    for count, least in ((10, 0.2), (50, 0.235)):
        scheduler.set_timesteps(count)
        assert scheduler.timesteps.tolist() == select_timesteps(1000, count, "quadratic")
        mean, std = finished(scheduler, oracle)
        assert mean == pytest.approx(0.5, abs=1e-9)
        assert least < std < 0.25


def test_pipelines_find_timesteps_and_what_a_step_takes():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
        retrieve_timesteps,
    )

    scheduler = DDIMScheduler()
    timesteps, count = retrieve_timesteps(scheduler, device="cpu", timesteps=[900, 500, 100])
    assert (timesteps.tolist(), count) == ([900, 500, 100], 3)
    holder = type("Holder", (), {"scheduler": scheduler})()
    generator = torch.Generator()
    kwargs = StableDiffusionPipeline.prepare_extra_step_kwargs(holder, generator, 0.5)
    assert kwargs == {"eta": 0.5, "generator": generator}


def test_assigned_timesteps_bring_their_neighbours_and_slices_keep_them(said):
    x, m = randn(1, 3), randn(1, 3, seed=1)
    asked, assigned = DDIMScheduler(), DDIMScheduler()
    asked.set_timesteps(timesteps=[900, 333, 7])
    assigned.timesteps = [900, 333, 7]
    for t in (900, 333, 7):
        assert torch.equal(assigned.step(m, t, x).prev_sample, asked.step(m, t, x).prev_sample)
    assigned.set_timesteps(10)
    expected = [assigned.step(m, t, x).prev_sample for t in (500, 400, 300)]
    assigned.timesteps = assigned.timesteps[4:7]
    assert [
        torch.equal(assigned.step(m, t, x).prev_sample, e)
        for t, e in zip((500, 400, 300), expected, strict=True)
    ] == [True] * 3
    assert not said
    rising, theirs = DDIMScheduler(), diffusers.DDIMScheduler()
    for scheduler in (rising, theirs):
        scheduler.set_timesteps(10)
        scheduler.timesteps = scheduler.timesteps.flip(0)
    assert distance(rising.step(m, 500, x).prev_sample, theirs.step(m, 500, x).prev_sample) < 1e-6
    assert any("has no neighbours" in line for line in said)


# Options and levels change under the scheduler


def test_options_are_read_when_they_are_used():
    x, m = randn(1, 3), randn(1, 3, seed=1)
    changes = [
        {"prediction_type": "v_prediction"},
        {"clip_sample": False},
        {"clip_sample_range": 0.3},
        {"thresholding": True, "sample_max_value": 5.0},
        {"thresholding": True, "sample_max_value": 5.0, "dynamic_thresholding_ratio": 0.1},
        {"set_alpha_to_one": False},
        {"beta_end": 0.03},
        {"beta_schedule": "sigmoid"},
        {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
        {"trained_betas": [0.01] * 1000},
        {"num_train_timesteps": 900},
    ]
    for change in changes:
        fresh = DDIMScheduler(**change)
        fresh.set_timesteps(10)
        by_method, by_attribute, by_replacement = DDIMScheduler(), DDIMScheduler(), DDIMScheduler()
        for scheduler in (by_method, by_attribute, by_replacement):
            scheduler.set_timesteps(10)
            scheduler.step(m, 0, x)
        by_method.register_to_config(**change)
        assert torch.equal(by_method.alphas_cumprod, fresh.alphas_cumprod)
        for name, value in change.items():
            setattr(by_attribute.config, name, value)
        by_replacement._internal_dict = FrozenDict({**by_replacement.config, **change})
        for scheduler in (by_method, by_attribute, by_replacement):
            for t in (0, 100):
                assert torch.equal(
                    scheduler.step(m, 0, x).prev_sample, fresh.step(m, 0, x).prev_sample
                ), (change, t)
            assert torch.equal(scheduler.add_noise(x, m, 5), fresh.add_noise(x, m, 5))
            assert torch.equal(scheduler.final_alpha_cumprod, fresh.final_alpha_cumprod)
    scheduler = DDIMScheduler()
    scheduler.config.timestep_spacing, scheduler.config.steps_offset = "leading", 1
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist()[-1] == 1


def test_a_number_of_steps_that_is_assigned_is_the_stride_off_the_list_as_in_diffusers():
    ours, theirs = pair(10, exactly=True, clip_sample=False)
    x, m = randn(1, 3, dtype=torch.float64), randn(1, 3, seed=1, dtype=torch.float64)
    for count in (10, 50, 20):
        ours.num_inference_steps = theirs.num_inference_steps = count
        assert (
            distance(ours.step(m, 555, x).prev_sample, theirs.step(m, 555, x).prev_sample) < 1e-12
        )


def test_betas_may_be_an_array_that_is_replaced_by_another():
    x, m = randn(1, 3), randn(1, 3, seed=1)
    scheduler = DDIMScheduler(trained_betas=np.linspace(0.001, 0.02, 100), num_train_timesteps=100)
    scheduler.set_timesteps(10)
    scheduler.step(m, 50, x)
    for betas in (np.linspace(0.001, 0.03, 100), np.linspace(0.001, 0.01, 100)):
        scheduler.config.trained_betas = betas
        fresh = DDIMScheduler(trained_betas=betas, num_train_timesteps=100)
        fresh.set_timesteps(10)
        assert torch.equal(scheduler.step(m, 50, x).prev_sample, fresh.step(m, 50, x).prev_sample)


def test_an_attribute_of_the_configuration_is_what_is_read_and_an_item_what_is_saved(tmp_path):
    scheduler, theirs = DDIMScheduler(), diffusers.DDIMScheduler()
    x, m = 5 * randn(1, 3), torch.zeros(1, 3)
    for each in (scheduler, theirs):
        each.set_timesteps(10)
        each.config["clip_sample_range"] = 0.2
        assert float(each.step(m, 900, x).pred_original_sample.abs().max()) > 0.2
        each.config.clip_sample_range = 0.1
        assert float(each.step(m, 900, x).pred_original_sample.abs().max()) == pytest.approx(0.1)
        each.save_config(tmp_path)
        assert (
            json.loads((tmp_path / "scheduler_config.json").read_text())["clip_sample_range"] == 0.2
        )
    scheduler.config["timestep_spacing"] = "trailing"
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == 900
    scheduler.register_to_config(clip_sample_range=0.3, timestep_spacing="linspace")  # changes both
    assert (scheduler.config.clip_sample_range, scheduler.config["clip_sample_range"]) == (0.3, 0.3)
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == 999


@pytest.mark.parametrize("in_place", [False, True])
def test_levels_that_are_replaced_are_used(in_place):
    other = exact(beta_end=0.005)
    reference = DDIMScheduler(beta_end=0.005)
    scheduler = DDIMScheduler()
    for s in (scheduler, reference):
        s.set_timesteps(10)
    x, m = randn(1, 3), randn(1, 3, seed=1)
    before = scheduler.step(m, 500, x).prev_sample
    if in_place:
        scheduler.alphas_cumprod.copy_(other.alphas_cumprod)
    else:
        scheduler.alphas_cumprod = other.alphas_cumprod
    after = scheduler.step(m, 500, x).prev_sample
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, reference.step(m, 500, x).prev_sample)
    torch.testing.assert_close(scheduler.add_noise(x, m, 500), reference.add_noise(x, m, 500))
    scheduler.final_alpha_cumprod = torch.tensor(0.25)
    assert float(
        scheduler.step(m, 0, x)
        .prev_sample.sub(0.75**0.5 * m)
        .div(scheduler.step(m, 0, x).pred_original_sample)[0, 0]
    ) == (pytest.approx(0.5, abs=1e-5))


def test_levels_that_are_only_moved_or_rounded_stay_exact():
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, prediction_type="sample"
    )
    scheduler.set_timesteps(1000)
    x, m = randn(1, 3, dtype=torch.float64), randn(1, 3, seed=1, dtype=torch.float64)
    expected = scheduler.step(m, 1, x).prev_sample
    for table in (
        scheduler.alphas_cumprod.clone(),
        scheduler.alphas_cumprod.half(),
        scheduler.alphas_cumprod.bfloat16(),
    ):
        scheduler.alphas_cumprod = table
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.clone()
        assert torch.equal(scheduler.step(m, 1, x).prev_sample, expected)


def test_the_public_tables_stay_float32_on_the_cpu():
    scheduler = DDIMScheduler(set_alpha_to_one=False)
    theirs = diffusers.DDIMScheduler(set_alpha_to_one=False)
    scheduler.set_timesteps(10, device="meta")
    x = torch.empty(2, 3, device="meta")
    scheduler.add_noise(x, x, torch.zeros(2, dtype=torch.int64, device="meta"))
    scheduler.step(x, scheduler.timesteps[0], x)
    for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
        table, expected = getattr(scheduler, name), getattr(theirs, name)
        assert (table.dtype, table.device.type) == (torch.float32, "cpu")
        torch.testing.assert_close(table, expected, rtol=1e-5, atol=0)
    assert (scheduler.init_noise_sigma, scheduler.order, len(scheduler)) == (1.0, 1, 1000)
    assert scheduler.scale_model_input(x, 5) is x
    fresh = DDIMScheduler()
    assert torch.equal(fresh.timesteps, diffusers.DDIMScheduler().timesteps)
    assert fresh.num_inference_steps is None


@pytest.mark.parametrize("device", ["meta"])
def test_no_default_device_reaches_the_tables(device):
    torch.set_default_device(device)
    try:
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(10)
        x = torch.zeros(1, 3, device="cpu")
        assert scheduler.alphas_cumprod.device.type == scheduler.timesteps.device.type == "cpu"
        assert torch.isfinite(scheduler.step(x, 500, x, 1.0).prev_sample).all()
        assert torch.isfinite(scheduler.add_noise(x, x, [3])).all()
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
def test_a_ddpm_configuration_of_any_betas_is_accepted(schedule):
    theirs = diffusers.DDPMScheduler(
        beta_schedule=schedule, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    with pytest.raises(NotImplementedError):
        diffusers.DDIMScheduler.from_config(theirs.config)
    ours = DDIMScheduler.from_config(theirs.config)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert (ours.config.prediction_type, ours.config.timestep_spacing) == (
        "v_prediction",
        "trailing",
    )


# The forward process


@pytest.mark.parametrize("options", [{}, LATENT], ids=str)
def test_noise_is_added_as_in_diffusers(options):
    ours, theirs = DDIMScheduler(**options), diffusers.DDIMScheduler(**options)
    x, noise = randn(4, 3, 5), randn(4, 3, 5, seed=1)
    t = torch.tensor([0, 17, 500, 999])
    assert distance(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t)) < 2e-6
    assert distance(ours.get_velocity(x, noise, t), theirs.get_velocity(x, noise, t)) < 2e-6
    expected = ours.add_noise(x, noise, torch.tensor([17]))
    for level in (
        17,
        [17],
        torch.tensor(17),
        torch.Tensor([17]),
        torch.tensor([17] * 4),
        [17, 17, 17, 17],
    ):
        assert torch.equal(ours.add_noise(x, noise, level), expected)
    for wrong, message in (
        (-1, r"lie in \[0, 1000\).*got \[-1\]"),
        (1000, "got .1000."),
        (torch.Tensor([2.5]), "whole numbers; got .2.5."),
    ):
        with pytest.raises(DDIMError, match=message):
            ours.add_noise(x, noise, wrong)
    with pytest.raises(DDIMError, match="one for each of the 4 samples"):
        ours.add_noise(x, noise, [1, 2])
    for clean, drawn in ((x[:1], noise), (x, noise[:1]), (x[:1], noise[:1])):
        for method in ("add_noise", "get_velocity"):
            got, expected = (
                getattr(scheduler, method)(clean, drawn, t) for scheduler in (ours, theirs)
            )
            assert got.shape == expected.shape == x.shape
            assert distance(got, expected) < 2e-6
    assert ours.add_noise(x[:1], noise, 500).shape == x.shape


# Inversion


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


# Configuration and files


def test_it_is_diffusers_class_and_keeps_its_place():
    scheduler = DDIMScheduler()
    assert isinstance(scheduler, diffusers.DDIMScheduler)
    assert DDIMScheduler.__module__ == "ddim.scheduler"
    assert issubclass(DDIMScheduler, ddim.scheduler.SchedulerMixin)
    assert set(ddim.scheduler.__all__) >= {"SchedulerMixin", "DDIMSchedulerOutput"}
    assert DDIMScheduler._compatibles == diffusers.DDIMScheduler._compatibles
    assert diffusers.DDIMScheduler in scheduler.compatibles


def test_a_configuration_survives_files_and_foreign_classes(tmp_path):
    options = {
        "num_train_timesteps": 500,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "clip_sample": False,
    }
    scheduler = DDIMScheduler(**options, timestep_spacing="trailing")
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "DDIMScheduler"
    for cls in (DDIMScheduler, diffusers.DDIMScheduler):
        loaded = cls.from_pretrained(tmp_path)
        assert {k: v for k, v in loaded.config.items() if k in options} == options
        assert loaded.config.timestep_spacing == "trailing"
    for name in (
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
    ):
        foreign = getattr(diffusers, name).from_config(scheduler.config)
        back = DDIMScheduler.from_config(foreign.config)
        assert {k: v for k, v in back.config.items() if k in options} == options
        back.set_timesteps(10)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
def test_options_given_by_position_or_changed_later_are_taken_over(cls):
    by_position, changed = cls(500, 0.001), cls()
    changed.register_to_config(num_train_timesteps=500, beta_start=0.001)
    for scheduler in (by_position, changed):
        for other in (
            DDIMScheduler,
            DDIMInverseScheduler,
            diffusers.DDIMScheduler,
            diffusers.DDPMScheduler,
        ):
            taken = other.from_config(scheduler.config).config
            assert (taken.num_train_timesteps, taken.beta_start, taken.beta_end) == (
                500,
                0.001,
                0.02,
            )
    assert (
        DDIMScheduler.from_config(diffusers.DDIMScheduler().config).config.timestep_spacing
        == "leading"
    )


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
def test_a_mistyped_option_of_from_config_is_ignored_as_in_diffusers_but_with_a_warning(
    cls, tmp_path
):
    config = cls(timestep_spacing="linspace").config
    cls(timestep_spacing="linspace").save_pretrained(tmp_path)
    message = (
        rf"^{cls.__name__} has no option 'timestep_spaceing' and ignores it; did you mean "
        r"'timestep_spacing'\?$"
    )
    for load, source in ((cls.from_config, config), (cls.from_pretrained, tmp_path)):
        with pytest.warns(UserWarning, match=message):
            made = load(source, timestep_spaceing="trailing")
        assert made.config.timestep_spacing == "linspace"
    with pytest.warns(UserWarning, match=f"^{cls.__name__} has no option 'qqq' and ignores it.$"):
        cls.from_config(config, qqq=1)
    # What the family knows, what is returned, and what a file holds may stay.
    cls.from_config(config, algorithm_type="dpmsolver++", skip_prk_steps=True, beta_end=0.5)
    assert (
        cls.from_config(config, timestep_spaceing="trailing", return_unused_kwargs=True)[1][
            "timestep_spaceing"
        ]
        == "trailing"
    )
    cls.from_config({**config, "timestep_spaceing": "trailing"})


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_trained_betas_of_any_type_are_saved(kind, tmp_path):
    betas = [0.001, 0.01, 0.02]
    scheduler = DDIMScheduler(3, trained_betas=kind(betas))
    scheduler.save_pretrained(tmp_path)
    loaded = DDIMScheduler.from_pretrained(tmp_path)
    assert loaded.config.trained_betas == pytest.approx(betas)
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
def test_a_configuration_of_another_family_is_refused(cls, tmp_path):
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    for config in (flow.config, {**flow.config, "_class_name": "FlowMatchEulerDiscreteScheduler"}):
        with pytest.raises(
            DDIMError,
            match=(
                "DDIM cannot take over this configuration: it is a .* of a flow-matching model, "
                "which"
            ),
        ):
            cls.from_config(config)
    flow.save_pretrained(tmp_path)
    with pytest.raises(
        DDIMError, match="a FlowMatchEulerDiscreteScheduler of a flow-matching model"
    ):
        cls.from_pretrained(tmp_path)

    class Mine(cls):
        pass

    Mine(prediction_type="sample").save_pretrained(tmp_path)
    for reader in (Mine, cls):
        assert reader.from_pretrained(tmp_path).config.prediction_type == "sample"


def test_copies_and_pickles_step_alike():
    scheduler = DDIMScheduler(thresholding=True, sample_max_value=2.0)
    scheduler.set_timesteps(10)
    x = randn(1, 3)
    expected = scheduler.step(x, 500, x).prev_sample
    for other in (
        copy.copy(scheduler),
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
    ):
        assert torch.equal(other.step(x, 500, x).prev_sample, expected)
        other.set_timesteps(5)
    assert len(scheduler.timesteps) == 10


def tiny_unet():
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )


def test_a_pipeline_of_diffusers_with_our_scheduler_is_saved_and_loaded(tmp_path):
    pipeline = diffusers.DDPMPipeline(tiny_unet(), DDIMScheduler(timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "ddim.scheduler",
        "DDIMScheduler",
    ]
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DDIMScheduler
    assert loaded.scheduler.config.timestep_spacing == "trailing"
    images = pipeline(
        num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    assert np.isfinite(images).all()


def test_the_unconditional_pipeline_of_diffusers_replaces_the_scheduler_unless_it_is_put_back():
    pipeline = diffusers.DDIMPipeline(tiny_unet(), DDIMScheduler(timestep_spacing="trailing"))
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        num_inference_steps=61,
        eta=1.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert np.isfinite(images).all()
    assert len(pipeline.scheduler.timesteps) == 61


# Export


def test_an_exported_scheduler_is_diffusers_own_and_steps_alike():
    for options in (
        {"prediction_type": "v_prediction"},
        {"timestep_spacing": "trailing"},
        {"rescale_betas_zero_snr": True},
    ):
        scheduler = DDIMScheduler(**options)
        scheduler.set_timesteps(10) if "rescale_betas_zero_snr" not in options else None
        exported = to_diffusers(scheduler)
        assert type(exported) is diffusers.DDIMScheduler
        assert {k: v for k, v in exported.config.items() if k in options} == options
        assert type(to_diffusers(DDIMInverseScheduler(**options))) is diffusers.DDIMInverseScheduler
    for schedule in ("sigmoid", "laplace"):
        ours = DDIMScheduler(beta_schedule=schedule)
        torch.testing.assert_close(
            to_diffusers(ours).alphas_cumprod, ours.alphas_cumprod, rtol=1e-4, atol=1e-7
        )
    already = diffusers.DDPMScheduler()
    assert to_diffusers(already) is already


def test_an_export_says_what_is_lost():
    scheduler = DDIMScheduler(timestep_spacing="quadratic")
    with pytest.raises(
        DDIMError, match="diffusers has no 'quadratic' timesteps.*leading, linspace, trailing"
    ):
        to_diffusers(scheduler)
    with pytest.raises(DDIMError, match="diffusers has no 'linspace' timesteps for this scheduler"):
        to_diffusers(DDIMInverseScheduler(timestep_spacing="linspace"))
    with pytest.raises(
        DDIMError, match="only a scheduler or a pipeline can be converted to diffusers; got int"
    ):
        to_diffusers(3)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    with pytest.warns(
        UserWarning, match="timesteps that are set are not part of the configuration"
    ):
        to_diffusers(scheduler)
    scheduler = DDIMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    with pytest.warns(
        UserWarning,
        match=(
            "diffusers steps to t - 100 whatever the next timestep is, so at 10 steps with "
            "'linspace'"
        ),
    ):
        to_diffusers(scheduler)
    scheduler = DDIMScheduler()
    scheduler.alphas_cumprod = exact(beta_end=0.01).alphas_cumprod
    with pytest.warns(
        UserWarning, match="replaced alphas_cumprod is not part of the configuration"
    ):
        to_diffusers(scheduler)


def test_an_exported_pipeline_loads_without_this_package(tmp_path):
    pipeline = diffusers.DDPMPipeline(tiny_unet(), DDIMScheduler(timestep_spacing="trailing"))
    exported = to_diffusers(pipeline)
    assert type(exported) is diffusers.DDPMPipeline
    assert type(exported.scheduler) is diffusers.DDIMScheduler
    assert type(pipeline.scheduler) is DDIMScheduler
    assert exported.unet is pipeline.unet
    exported.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "diffusers",
        "DDIMScheduler",
    ]
    assert (
        json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())[
            "timestep_spacing"
        ]
        == "trailing"
    )


@pytest.mark.slow
def test_the_files_of_an_exported_pipeline_need_diffusers_only(tmp_path):
    to_diffusers(diffusers.DDPMPipeline(tiny_unet(), DDIMScheduler())).save_pretrained(tmp_path)
    code = (
        f"import sys, diffusers; diffusers.DDPMPipeline.from_pretrained({str(tmp_path)!r}); assert "
        "'ddim' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# Host, device, compiler

FAST = [
    {"clip_sample": False},
    {},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample", "clip_sample": False},
    {"thresholding": True, "sample_max_value": 2.0},
]


@pytest.mark.parametrize("options", FAST, ids=str)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("levels", [500, [500], [500, 40]], ids=str)
def test_a_tensor_timestep_is_never_read_by_the_host(options, eta, levels):
    scheduler, t = DDIMScheduler(**options), torch.tensor(levels)
    scheduler.set_timesteps(50)
    x, m, z = (randn(2, 3, 8, 8, seed=s) for s in range(3))
    scheduler.step(m, t, x, eta, variance_noise=z if eta else None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scheduler.step(m, t, x, eta, variance_noise=z if eta else None)
    names = {event.key for event in profile.key_averages()}
    assert "aten::index_select" in names
    assert not names & {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::is_nonzero",
        "aten::nonzero",
    }


@pytest.mark.parametrize("options", FAST, ids=str)
def test_everything_may_lie_on_a_device_that_cannot_be_read(options):
    x = torch.empty(2, 3, 8, 8, device="meta")
    for cls in (DDIMScheduler, DDIMInverseScheduler):
        scheduler = cls(**options)
        scheduler.set_timesteps(50, device="meta")
        assert scheduler.timesteps.device.type == "meta"
        for t in (scheduler.timesteps[3], scheduler.timesteps[:2], 500):
            moved = scheduler.step(x, t, x).prev_sample
            assert (moved.device.type, moved.shape) == ("meta", x.shape)
    forward = DDIMScheduler()
    assert (
        forward.add_noise(x, x, torch.empty(2, dtype=torch.int64, device="meta")).device.type
        == "meta"
    )


def test_a_table_is_moved_once():
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(50)
    x = randn(1, 3)
    scheduler.step(x, torch.tensor(500), x, 1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for t in scheduler.timesteps:
            scheduler.step(x, t, x, 1.0, variance_noise=x)
    assert not {event.key for event in profile.key_averages()} & {
        "aten::sqrt",
        "aten::_to_copy",
        "aten::copy_",
        "aten::stack",
    }


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    yield compiled, backend
    torch._dynamo.reset()


@pytest.mark.parametrize("options", FAST, ids=str)
@pytest.mark.parametrize(
    ("eta", "dtype"),
    [
        (0.0, torch.float32),
        (1.0, torch.float32),
        ("sigma-hat", torch.float32),
        (0.0, torch.bfloat16),
    ],
)
def test_a_loop_over_the_timesteps_compiles_once(options, eta, dtype, graphs):
    compiled, backend = graphs
    scheduler = DDIMScheduler(**options)
    scheduler.set_timesteps(50)

    @torch.compile(fullgraph=True, backend=backend)
    def step(m, t, x, z):
        return scheduler.step(m, t, x, eta, variance_noise=z if eta else None, return_dict=False)

    x, m, z = (randn(2, 3, 4, 4, seed=s, dtype=dtype) for s in range(3))
    moved = [step(m, t, x, z) for t in scheduler.timesteps]
    assert len(compiled) == 1
    for t, (sample, x0) in zip(scheduler.timesteps, moved, strict=True):
        plain = scheduler.step(m, t, x, eta, variance_noise=z if eta else None)
        torch.testing.assert_close(sample, plain.prev_sample)
        torch.testing.assert_close(x0, plain.pred_original_sample)


def test_other_timesteps_reuse_the_compiled_step(graphs):
    compiled, backend = graphs
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(50)
    step = torch.compile(
        lambda m, t, x: scheduler.step(m, t, x).prev_sample, fullgraph=True, backend=backend
    )
    x = randn(1, 3, 4, 4)
    for count in (50, 20, 7):
        scheduler.set_timesteps(count)
        for t in scheduler.timesteps:
            torch.testing.assert_close(step(x, t, x), scheduler.step(x, t, x).prev_sample)
    assert len(compiled) == 1
    for t in scheduler.timesteps.tolist():
        step(x, t, x)
    assert len(compiled) <= 3  # an integer is a constant at first, then a symbol


def test_a_whole_loop_and_the_inverse_and_training_compile(graphs):
    _, backend = graphs
    scheduler, inverse = DDIMScheduler(), DDIMInverseScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    inverse.set_timesteps(5)
    x = randn(2, 3)

    @torch.compile(fullgraph=True, backend=backend)
    def loop(x):
        for t in inverse.timesteps:
            x = inverse.step(0.1 * x, t, x, return_dict=False)[0]
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]
        return x

    network = lambda x, t: 0.1 * x  # noqa: E731
    torch.testing.assert_close(loop(x), finish(scheduler, network, finish(inverse, network, x)))

    @torch.compile(fullgraph=True, backend=backend)
    def train(x, noise, t):
        return scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)

    t = torch.tensor([3, 700])
    torch.testing.assert_close(
        train(x, x, t), (scheduler.add_noise(x, x, t), scheduler.get_velocity(x, x, t))
    )


def test_options_changed_between_compiled_steps_count_from_the_next_set_timesteps(graphs):
    _, backend = graphs
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    step = torch.compile(
        lambda m, t, x: scheduler.step(m, t, x).prev_sample, fullgraph=True, backend=backend
    )
    x, t = randn(1, 3), torch.tensor(500)
    step(x, t, x)
    scheduler.register_to_config(prediction_type="v_prediction")
    scheduler.set_timesteps(10)
    torch.testing.assert_close(step(x, t, x), scheduler.step(x, t, x).prev_sample)


def test_custom_lists_are_checked_by_the_core():
    with pytest.raises(DDIMError) as ours:
        DDIMScheduler().set_timesteps(timesteps=[3, 5])
    with pytest.raises(DDIMError) as core:
        check_timesteps([3, 5], 1000)
    assert str(ours.value) == str(core.value)
