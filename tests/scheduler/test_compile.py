"""No step reads a device, and steps compile to one graph."""

import pytest
import torch
from tests.scheduler.helpers import finish, randn

from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler

FAST = [
    {"clip_sample": False},
    {},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample", "clip_sample": False},
    {"thresholding": True, "sample_max_value": 2.0},
]


@pytest.mark.parametrize("options", FAST, ids=str)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("levels", [[500], [500, 40]], ids=str)
def test_a_vector_of_timesteps_is_never_read_by_the_host(options, eta, levels):
    """Nor is a scalar on a device; one on the CPU costs no wait, and is faster to look up."""
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
