"""No step of a loop waits for the device: on the CPU, by a mode that refuses to read a tensor's
value; and on ``meta``, which has no values."""

import contextlib
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ddim import DDIMScheduler, ImageToImagePipeline, TextToImagePipeline, UnconditionalPipeline
from ddim.core import plan
from ddim.core.denoiser import Clip, ModelDenoiser
from ddim.core.guidance import guided
from ddim.core.sampler import trajectory
from ddim.core.schedule import NoiseSchedule
from ddim.core.timesteps import select_timesteps, step_pairs
from ddim.pipelines.foreign import foreign_states

QUIET = {"progress": False, "output_type": "pt"}
PROMPT = "a red square on a black background"
STEPS = 6


READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


class NoReads(TorchDispatchMode):
    """Refuses to read on the host what was computed of states and weights. They are in float32;
    tables are in float64, and lie on the CPU wherever a loop runs."""

    def __init__(self):
        super().__init__()
        self.computed = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_there = any(x.dtype in HALF_OR_SINGLE or x in self.computed for x in given)
        if func in READS and is_there:
            raise AssertionError(f"{func} waits for the device")
        found = func(*args, **(kwargs or {}))
        if is_there:
            made = (x for x in tree_leaves(found) if isinstance(x, torch.Tensor))
            self.computed.update((x, True) for x in made)
        return found


@contextlib.contextmanager
def between_the_first_step_and_the_last(steps=STEPS):
    """A callback, from whose first call to its last one nothing may be read."""
    seen, reading = [], contextlib.ExitStack()

    def callback(state):
        seen.append(state.number)
        if len(seen) == 1:
            reading.enter_context(NoReads())
        if len(seen) == steps:
            reading.close()

    with reading:
        yield callback
    assert seen == list(range(steps))


def test_a_read_is_seen():
    with NoReads(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(1).item()
    with NoReads(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.ones(2).all())


@pytest.mark.parametrize(
    "options",
    [{}, {"eta": 1.0}, {"order": 2}, {"clip": "static"}, {"clip": "dynamic"}, {"eta": "sigma-hat"}],
    ids=str,
)
def test_no_step_of_an_unconditional_pipeline_reads(options, tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    with between_the_first_step_and_the_last() as callback:
        pipe(seeds=[0, 1], num_inference_steps=STEPS, callback=callback, **options, **QUIET)


def test_no_step_of_a_sampler_that_is_inverted_reads_states(tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    with between_the_first_step_and_the_last() as callback:
        pipe(seeds=[0], num_inference_steps=STEPS, callback=callback, sampler="o-belm", **QUIET)


def test_the_loop_of_another_scheduler_reads_its_timesteps_once():
    scheduler = types.SimpleNamespace(
        init_noise_sigma=1.0,
        timesteps=torch.tensor([900, 500, 100]),
        alphas_cumprod=torch.linspace(0.99, 0.01, 1000),
        config=types.SimpleNamespace(prediction_type="epsilon"),
        scale_model_input=lambda x, t: x,
        step=lambda output, t, x, return_dict: (x - 0.1 * output,),
    )
    x = torch.randn(1, 1, 8, 8)
    states = foreign_states(scheduler, lambda x, t: x * (t + 1), x, torch.float32, {})
    found = [next(states)]
    with NoReads():
        found += states
    assert [(state.t, state.s) for state in found] == [(900, 500), (500, 100), (100, -1)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_batched": False},
        {"guidance_rescale": 0.7},
        {"guidance_scale": 1.0},
        {"eta": 1},
    ],
    ids=str,
)
def test_no_step_of_a_text_pipeline_reads(options, tiny_text):
    pipe = TextToImagePipeline.from_pretrained(tiny_text)
    options = {"seeds": [0], "num_inference_steps": STEPS, **QUIET, **options}
    with between_the_first_step_and_the_last() as callback:
        pictures = pipe(PROMPT, callback=callback, **options).images
    other = ImageToImagePipeline(**pipe.components)
    with between_the_first_step_and_the_last() as callback:
        other(PROMPT, pictures, strength=1.0, callback=callback, **options)


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"order": 2}], ids=str)
@pytest.mark.parametrize("clip", ["none", "static", "dynamic"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_loop_of_the_core_runs_on_tensors_without_values(options, clip, scale):
    schedule = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000))
    cond = torch.empty(2, 4, 8, 8, device="meta")
    network = guided(lambda x, t, c: x + c, cond, cond, scale=scale, rescale=0.7)
    denoise = ModelDenoiser(network, schedule, "v_prediction", Clip(clip))
    pairs = step_pairs(select_timesteps(1000, STEPS, "trailing"))
    noise = (lambda: torch.empty_like(cond)) if "eta" in options else None
    states = list(trajectory(denoise, cond, pairs, schedule=schedule, noise=noise, **options))
    assert [state.x_s.device.type for state in states] == ["meta"] * STEPS


def test_the_tables_of_a_list_of_timesteps_are_made_once(monkeypatch):
    made, true = [], plan.Plan._make_table
    monkeypatch.setattr(
        plan.Plan, "_make_table", lambda self, *key: made.append(key) or true(self, *key)
    )
    scheduler = DDIMScheduler(clip_sample=False)
    x = torch.randn(1, 3, 8, 8)
    for count in (10, 20, 10, 20, 10):
        scheduler.set_timesteps(count)
        for eta in (0.0, 1.0):
            scheduler.step(x, scheduler.timesteps[0], x, eta, variance_noise=x)
    assert len(made) == 4  # of two lists and two etas
    first = scheduler.step(x, 900, x).prev_sample
    scheduler.register_to_config(prediction_type="v_prediction")
    assert not torch.equal(scheduler.step(x, 900, x).prev_sample, first)
    scheduler.register_to_config(prediction_type="epsilon")
    assert torch.equal(scheduler.step(x, 900, x).prev_sample, first)
    scheduler.alphas_cumprod[:] = scheduler.alphas_cumprod**2
    scheduler.set_timesteps(10)
    assert not torch.equal(scheduler.step(x, 900, x).prev_sample, first)
    for count in range(1, 30):
        scheduler.set_timesteps(count)
    assert len(scheduler._plans) == 4


def test_the_solution_of_all_levels_is_computed_once_for_a_schedule(tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    assert pipe.denoiser(1)._solutions is pipe.denoiser(2)._solutions
