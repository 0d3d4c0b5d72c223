"""What a step accepts and returns."""

import pickle

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from tests.scheduler.helpers import distance, exact, finish, pair, randn, stock

import ddim.scheduler
import ddim.scheduler_base
from ddim.core.noise import make_generators
from ddim.core.oracle import GaussianOracle
from ddim.errors import DDIMError
from ddim.scheduler import DDIMScheduler


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


def test_one_generator_in_a_list_draws_for_the_batch_as_in_diffusers():
    x, drawn = randn(2, 3, 4, 4), []
    for cls in (DDIMScheduler, diffusers.DDIMScheduler):
        scheduler = cls()
        scheduler.set_timesteps(10)
        generator = [torch.Generator().manual_seed(0)]
        drawn.append(scheduler.step(x, 900, x, 1.0, generator=generator).prev_sample)
    torch.testing.assert_close(*drawn)
