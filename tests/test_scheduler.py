import diffusers
import pytest
import torch

from ddim.errors import DDIMError
from ddim.oracle import GaussianOracle
from ddim.schedule import NoiseSchedule, make_betas
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler, to_diffusers

CASES = [
    (kind, beta, spacing, eta, clip, one)
    for kind in ("epsilon", "sample", "v_prediction")
    for beta in ("linear", "scaled_linear", "squaredcos_cap_v2")
    for spacing in ("leading", "trailing")
    for eta in (0.0, 1.0)
    for clip in (False, True)
    for one in (True, False)
]


def close(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("kind", "beta", "spacing", "eta", "clip", "one"), CASES)
def test_steps_equal_diffusers_where_its_stride_is_the_neighbour(kind, beta, spacing, eta, clip, one):
    options = {"prediction_type": kind, "beta_schedule": beta, "timestep_spacing": spacing, "clip_sample": clip, "set_alpha_to_one": one}
    ours, theirs = DDIMScheduler(**options), diffusers.DDIMScheduler(**options)
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    generator = torch.Generator().manual_seed(0)
    x, m, z = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    for t in ours.timesteps:
        noise = {"variance_noise": z} if eta else {}
        a, b = (s.step(m, t, x, eta=eta, **noise) for s in (ours, theirs))
        # diffusers multiplies up 1000 levels in float32; on the cosine schedule's first levels 1 - alpha_bar keeps 4 digits of it.
        bound = 5e-4 if beta == "squaredcos_cap_v2" else 2e-5
        assert close(a.prev_sample, b.prev_sample) < bound
        assert close(a.pred_original_sample, b.pred_original_sample) < bound


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading", "quadratic"])
@pytest.mark.parametrize("count", [7, 61, 300, 600])
def test_every_spacing_reaches_the_data(spacing, count):
    scheduler = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(count)
    assert len(scheduler.timesteps.unique()) == count
    oracle = GaussianOracle(NoiseSchedule.from_betas(make_betas()), mean=0.5, std=0.25)
    x = oracle.draw((8000, 1), t=int(scheduler.timesteps[0]), generator=torch.Generator().manual_seed(1))
    network = oracle.network("epsilon")
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert float(x.mean()) == pytest.approx(0.5, abs=0.02)
    assert 0.2 < float(x.std()) < 0.27 or count == 7


def test_custom_timesteps_and_one_level_a_sample():
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(timesteps=[999, 500, 3])
    x, m = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    together = scheduler.step(m, torch.tensor([999, 500, 3]), x, return_dict=False)[0]
    for i, t in enumerate((999, 500, 3)):
        torch.testing.assert_close(together[i : i + 1], scheduler.step(m[i : i + 1], t, x[i : i + 1]).prev_sample)


def test_timesteps_that_are_replaced_by_hand_bring_their_own_neighbours():
    by_hand, asked = DDIMScheduler(), DDIMScheduler()
    by_hand.set_timesteps(10)
    by_hand.timesteps = torch.tensor([800, 123, 4])
    asked.set_timesteps(timesteps=[800, 123, 4])
    x, m = torch.randn(1, 4), torch.randn(1, 4)
    for t in (800, 123, 4):
        assert torch.equal(by_hand.step(m, t, x).prev_sample, asked.step(m, t, x).prev_sample)


@pytest.mark.parametrize("count", [6, 10, 20, 25])
def test_zero_snr_with_noise_stays_finite(count):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(count)
    x = torch.randn(2, 8)
    for t in scheduler.timesteps:
        x = scheduler.step(0.3 * x, t, x, eta=1.0, generator=torch.Generator().manual_seed(0)).prev_sample
    assert torch.isfinite(x).all()


def test_configuration_goes_there_and_back_and_is_read_when_it_is_used(tmp_path):
    scheduler = DDIMScheduler.from_config(diffusers.DDPMScheduler(beta_schedule="scaled_linear").config, timestep_spacing="trailing")
    scheduler.save_pretrained(tmp_path)
    assert DDIMScheduler.from_pretrained(tmp_path).config.timestep_spacing == "trailing"
    scheduler.register_to_config(timestep_spacing="linspace")
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [999, 749, 500, 250, 0]


def test_low_noise_levels_survive_bfloat16():
    scheduler = DDIMScheduler()
    noisy = scheduler.add_noise(torch.zeros(10, 1).bfloat16(), torch.ones(10, 1).bfloat16(), torch.arange(10))
    assert (noisy > 0).all()
    assert scheduler.add_noise(torch.zeros(1, 1), torch.ones(1, 1), torch.Tensor([500])).shape == (1, 1)


def test_refusals():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="you need to run 'set_timesteps'"):
        DDIMScheduler().step(x, 5, x)
    with pytest.raises(DDIMError, match="whole number from 1 to 1000.* got 0"):
        DDIMScheduler().set_timesteps(0)
    with pytest.raises(DDIMError, match="timestep_spacing must be one of"):
        DDIMScheduler(timestep_spacing="karras").set_timesteps(5)
    zero = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(DDIMError, match="epsilon prediction cannot be used at t=999: the SNR is 0 there.*start below 999"):
        zero.set_timesteps(10)
    zero.set_timesteps(timesteps=[900, 100])
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(DDIMError, match=r"timestep must lie in \[0, 1000\).* got 1000"):
        scheduler.step(x, 1000, x)
    with pytest.raises(DDIMError, match=r"\[1, 3\]"):
        scheduler.step(torch.zeros(1, 3), 900, x)
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        scheduler.step(x, 900, x, eta=1.0, generator=torch.Generator(), variance_noise=x)
    with pytest.raises(DDIMError, match="would draw more noise"):
        scheduler.step(x, 900, x, eta=50.0, variance_noise=x)


def count_compilations():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    return graphs, backend


def test_a_loop_over_tensor_timesteps_compiles_once_into_one_graph():
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(50)
    graphs, backend = count_compilations()
    step = torch.compile(lambda m, t, x: scheduler.step(m, t, x, return_dict=False)[0], fullgraph=True, backend=backend)
    x = torch.randn(1, 2, 4, 4)
    plain = x
    for t in scheduler.timesteps:
        x, plain = step(0.1 * x, t, x), scheduler.step(0.1 * plain, t, plain, return_dict=False)[0]
    torch.testing.assert_close(x, plain)
    assert len(graphs) == 1


@pytest.mark.parametrize("clip", [False, True])
def test_a_step_with_a_tensor_timestep_reads_nothing_back_to_the_host(clip):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=clip)
    scheduler.set_timesteps(50)
    x, m = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    scheduler.step(m, scheduler.timesteps[3], x)
    names: list[str] = []
    with Names():
        scheduler.step(m, scheduler.timesteps[4], x)
    assert names
    assert not [n for n in names if "_local_scalar_dense" in n or "item" in n]


def test_the_inverse_undoes_a_step_whose_prediction_is_frozen():
    options = {"timestep_spacing": "linspace", "clip_sample": False}
    forward, inverse = DDIMScheduler(**options), DDIMInverseScheduler(**options)
    forward.set_timesteps(7)
    inverse.set_timesteps(7)
    assert inverse.timesteps.tolist() == forward.timesteps.tolist()[::-1]
    x, m = torch.randn(1, 4), torch.randn(1, 4)
    for t in forward.timesteps.tolist():
        there = forward.step(m, t, x).prev_sample
        torch.testing.assert_close(inverse.step(m, t, there).prev_sample, x, rtol=1e-4, atol=1e-4)


def test_export_gives_the_stock_class():
    stock = to_diffusers(DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction"))
    assert type(stock) is diffusers.DDIMScheduler
    assert stock.config.prediction_type == "v_prediction"
