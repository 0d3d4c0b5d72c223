"""Lists of timesteps of your own."""

import diffusers
import numpy as np
import pytest
import torch
from tests.scheduler.helpers import LATENT, distance, exact, finished, randn

from ddim.core.oracle import GaussianOracle
from ddim.core.timesteps import check_timesteps, select_timesteps
from ddim.errors import DDIMError
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler


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


@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_a_loop_that_leaves_out_levels_is_told_so_once(cls, as_tensors, said):
    x = torch.zeros(1, 1, 2, 2)

    def walk(scheduler, chosen):
        for t in (
            scheduler.timesteps[chosen] if as_tensors else scheduler.timesteps[chosen].tolist()
        ):
            scheduler.step(x, t, x)

    ours = cls()
    ours.set_timesteps(10)
    for chosen in (slice(None), slice(None), slice(0, 5)):
        walk(ours, chosen)
    ours.set_timesteps(10)
    walk(ours, slice(4, None))  # image to image
    ours.step(x, ours.timesteps[-1], x)  # a level visited again
    assert not said
    walk(ours, slice(None, None, 2))
    walk(ours, slice(None, None, 3))
    assert len(said) == 1
    assert "levels of the list of timesteps were left out" in said[0]
    numbers = (700, 800) if cls is DDIMScheduler else (100, 0)
    assert (
        f"A step leaves level {numbers[0]}, and the step before reached level {numbers[1]}"
        in said[0]
    )


def test_a_loop_over_timesteps_on_a_device_is_not_read(said):
    ours = DDIMScheduler()
    ours.set_timesteps(10, device="meta")
    x = torch.zeros(1, 1, 2, 2, device="meta")
    for t in ours.timesteps[::2]:
        ours.step(x, t, x)
    assert not said


def test_numbers_of_numpy_and_torch_are_taken_as_by_diffusers():
    ours, x = DDIMScheduler(), randn(1, 1, 2, 2)
    for count in (10.0, np.array(10), np.int64(10), np.float32(10), torch.tensor(10)):
        ours.set_timesteps(count)
        assert len(ours.timesteps) == 10
    expected = ours.step(x, 900, x).prev_sample
    for t in (900.0, np.array(900), np.array([900]), np.int64(900), torch.tensor([900])):
        assert torch.equal(ours.step(x, t, x).prev_sample, expected)
