"""Options and levels that change under the scheduler, and the forward process."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from tests.scheduler.helpers import LATENT, distance, exact, pair, randn

from ddim.errors import DDIMError
from ddim.scheduler import DDIMScheduler


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
