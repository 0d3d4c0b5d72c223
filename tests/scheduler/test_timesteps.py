"""Lists of timesteps of your own."""

import diffusers
import numpy as np
import pytest
import torch
from tests.scheduler.helpers import LATENT, distance, exact, finished, randn

from ddim.core.oracle import GaussianOracle
from ddim.core.timesteps import check_timesteps, select_timesteps
from ddim.errors import DDIMError
from ddim.scheduler import DDIMScheduler


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


def test_custom_lists_are_checked_by_the_core():
    with pytest.raises(DDIMError) as ours:
        DDIMScheduler().set_timesteps(timesteps=[3, 5])
    with pytest.raises(DDIMError) as core:
        check_timesteps([3, 5], 1000)
    assert str(ours.value) == str(core.value)
