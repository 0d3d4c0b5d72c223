import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddim

from ddim.core.denoiser import Clip
from ddim.core.oracle import GaussianOracle
from ddim.core.schedule import (
    BETA_SCHEDULES,
    CLEAN,
    NoiseSchedule,
    add_noise,
    as_factor,
    make_betas,
    rescale_zero_terminal_snr,
    velocity,
)
from ddim.errors import DDIMError
from ddim.scheduler import DDIMScheduler

ALL = [(kind, rescaled) for kind in BETA_SCHEDULES for rescaled in (False, True)]


def build(kind="linear", rescaled=False, count=1000, **options):
    betas = make_betas(kind, count, **options)
    return NoiseSchedule.from_betas(rescale_zero_terminal_snr(betas) if rescaled else betas)


@pytest.mark.parametrize("kind", BETA_SCHEDULES)
def test_betas_equal_diffusers(kind):
    reference = diffusers.DDPMScheduler(beta_schedule=kind).betas.double()
    torch.testing.assert_close(
        make_betas(kind), reference, rtol=2e-5, atol=1e-9
    )  # theirs are float32


@pytest.mark.parametrize(("kind", "rescaled"), ALL)
def test_snr_falls_and_signal_and_noise_share_unit_variance(kind, rescaled):
    schedule = build(kind, rescaled)
    snr = schedule.snr(torch.arange(1000))
    assert (snr[1:] < snr[:-1]).all()
    assert (schedule.alphas_cumprod >= 0).all()
    assert (schedule.alphas_cumprod < 1).all()
    torch.testing.assert_close(
        schedule.log_snr(torch.arange(999)), snr[:-1].log(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("kind", BETA_SCHEDULES)
def test_rescaled_schedules_end_at_exactly_no_signal_and_keep_their_first_level(kind):
    plain, zero = build(kind), build(kind, rescaled=True)
    assert float(zero.alphas_cumprod[-1]) == 0.0
    assert float(zero.snr(999)) == 0.0
    assert float(zero.log_snr(999)) == -math.inf
    assert float(zero.alphas_cumprod[0]) == pytest.approx(float(plain.alphas_cumprod[0]), rel=1e-12)
    reference = scheduling_ddim.rescale_zero_terminal_snr(make_betas(kind).float())
    torch.testing.assert_close(
        rescale_zero_terminal_snr(make_betas(kind)), reference.double(), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize(
    ("kind", "options", "snr"),
    [
        ("linear", {}, 4.035993e-05),
        ("squaredcos_cap_v2", {}, 2.4287e-09),
        ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}, 0.004682),
    ],
)
def test_terminal_snr_is_the_papers(kind, options, snr):
    assert float(build(kind, **options).snr(999)) == pytest.approx(snr, rel=1e-3)


def test_clean_data_has_its_own_level():
    schedule = build()
    assert float(schedule.alpha_bar(CLEAN)) == 1.0
    assert float(schedule.snr(CLEAN)) == math.inf
    kept = NoiseSchedule.from_betas(make_betas(), set_alpha_to_one=False)
    assert float(kept.alpha_bar(CLEAN)) == float(kept.alphas_cumprod[0])
    assert schedule.alpha_bar(torch.tensor([[-1, 0], [5, 999]])).shape == (2, 2)


def test_noising_is_linear_and_reaches_both_ends():
    schedule = build(rescaled=True)
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.equal(add_noise(schedule, x0, noise, CLEAN), x0)
    assert torch.equal(add_noise(schedule, x0, noise, 999), noise)
    together = add_noise(schedule, x0, noise, torch.tensor([0, 500, 999]))
    for i, t in enumerate((0, 500, 999)):
        torch.testing.assert_close(
            together[i], add_noise(schedule, x0[i : i + 1], noise[i : i + 1], t)[0]
        )


def test_velocity_rotates_the_pair():
    schedule, t = build(), torch.tensor([3, 600])
    x0, noise = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    x_t, v = add_noise(schedule, x0, noise, t), velocity(schedule, x0, noise, t)
    torch.testing.assert_close(x_t**2 + v**2, x0**2 + noise**2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_low_noise_levels(dtype):
    schedule = build()
    zeros, ones = torch.zeros(1000, 1, dtype=dtype), torch.ones(1000, 1, dtype=dtype)
    sigma = add_noise(schedule, zeros, ones, torch.arange(1000))[:, 0].double()
    exact = (1 - schedule.alphas_cumprod).sqrt()
    assert ((sigma - exact).abs() / exact).max() < torch.finfo(dtype).eps
    theirs = diffusers.DDIMScheduler().add_noise(zeros, ones, torch.arange(1000))[:, 0].double()
    assert (theirs == 0).sum() >= 2  # what casting alpha_bar first does


def test_betas_are_fractions_and_one_ends_in_noise_alone():
    assert NoiseSchedule.from_betas([0.0, 0.5, 1.0]).alphas_cumprod.tolist() == [1.0, 0.5, 0.0]
    for wrong, told in (
        ([0.1, 2.0], "2"),
        ([-0.1, 0.2], "-0.1"),
        ([0.1, math.nan], "nan"),
        ([1.0, math.inf], "inf"),
    ):
        with pytest.raises(
            DDIMError,
            match=rf"betas are variances in \[0, 1\]; got {told}\. A table of alpha_bar goes into",
        ):
            NoiseSchedule.from_betas(torch.tensor(wrong))


def test_errors_say_what_was_received():
    schedule = build()
    with pytest.raises(DDIMError, match=r"beta_schedule must be one of linear, .*; got 'cubic'"):
        make_betas("cubic")
    with pytest.raises(
        DDIMError, match="num_train_timesteps must be a whole number from 1 to 1000000; got 0"
    ):
        make_betas("linear", 0)
    with pytest.raises(
        DDIMError, match=r"timesteps must lie in \[-1, 1000\), where -1 is clean data; got 1000"
    ):
        schedule.alpha_bar(1000)
    with pytest.raises(DDIMError, match=r"timesteps must lie in \[-1, 1000\).* got -2"):
        schedule.alpha_bar(-2)
    with pytest.raises(
        DDIMError, match="timesteps must be integers; got a tensor of torch.float32"
    ):
        schedule.alpha_bar(torch.tensor(3.0))
    with pytest.raises(DDIMError, match="at least 2 levels of betas; got 1"):
        rescale_zero_terminal_snr(torch.tensor([0.1]))
    with pytest.raises(DDIMError, match="must be finite"):
        NoiseSchedule(torch.tensor([0.5, float("nan")]))
    with pytest.raises(DDIMError, match=r"must have shape \[T\]; got a tensor of .*\[2, 2\]"):
        NoiseSchedule(torch.ones(2, 2))
    with pytest.raises(
        DDIMError, match=r"one level, or one for each of the 3 samples; got shape \[2\]"
    ):
        as_factor(torch.ones(2), torch.ones(3, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_coefficient_stays_on_the_cpu_since_sending_it_would_wait_for_the_device(dtype):
    x, levels = (
        torch.empty(3, 2, device="meta", dtype=dtype),
        torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    )
    one, many = as_factor(levels[0], x), as_factor(levels, x)
    assert (one.device.type, one.dtype, one.shape) == ("cpu", dtype, ())
    assert (many.device.type, many.dtype, many.shape) == ("meta", dtype, (3, 1))
    assert (one * x).device.type == (many * x).device.type == "meta"
    assert (one * x).dtype == dtype


@pytest.mark.parametrize("level", [3.7, True, float("nan"), None, np.array([1.5])])
def test_a_level_that_is_no_whole_number_is_refused(level):
    with pytest.raises(DDIMError, match="whole number|must be integers"):
        NoiseSchedule.from_betas(make_betas()).alpha_bar(level)


def test_a_level_may_be_a_whole_number_of_any_type():
    schedule = NoiseSchedule.from_betas(make_betas())
    expected = float(schedule.alpha_bar(3))
    for level in (3.0, np.int64(3), np.float32(3), torch.tensor(3, dtype=torch.uint8)):
        assert float(schedule.alpha_bar(level)) == expected
    assert torch.equal(schedule.alpha_bar([3, -1]), schedule.alpha_bar(torch.tensor([3, -1])))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0.2, 0.5, 0.9], "must fall from level to level; it rises at level 1"),
        ([0.9, 0.5, 0.6], "must fall from level to level; it rises at level 2"),
        ([5.0, 2.0], r"must lie in \[0, 1\]; got 5"),
        ([0.5, -0.1], r"must lie in \[0, 1\]; got -0.1"),
    ],
)
def test_a_table_that_is_no_schedule_is_refused_but_a_scheduler_takes_it(table, message):
    with pytest.raises(DDIMError, match=message):
        NoiseSchedule(torch.tensor(table))
    scheduler = DDIMScheduler(len(table))
    scheduler.alphas_cumprod = torch.tensor(table)  # as diffusers does
    assert scheduler.noise_schedule.alphas_cumprod.tolist() == pytest.approx(table)


def test_pixels_and_arrays_are_no_samples():
    schedule, x = NoiseSchedule.from_betas(make_betas()), torch.zeros(1, 2)
    for bad, message in (
        (np.zeros((1, 2)), "must be a tensor; got a NumPy array"),
        (x.to(torch.uint8), "must be a tensor of floating-point numbers; got a tensor of uint8"),
    ):
        for use in (add_noise, velocity):
            with pytest.raises(DDIMError, match=f"x0 {message}"):
                use(schedule, bad, x, 5)
            with pytest.raises(DDIMError, match=f"noise {message}"):
                use(schedule, x, bad, 5)


def test_numbers_that_make_no_schedule_are_refused():
    for use, message in (
        (lambda: make_betas(beta_start=math.nan), "beta_start must be a finite number; got nan"),
        (lambda: make_betas(beta_end=math.inf), "beta_end must be a finite number; got inf"),
        (lambda: rescale_zero_terminal_snr(torch.zeros(3)), "needs betas that add noise"),
        (lambda: Clip("static", -1), "bound must be above 0 and finite; got -1"),
        (
            lambda: GaussianOracle(NoiseSchedule(torch.ones(1)), std=-1),
            "std must be at least 0 and finite; got",
        ),
    ):
        with pytest.raises(DDIMError, match=message):
            use()
