"""``multistep_order=2``: the drop-in agrees with the sampler, keeps one step of state, and refuses
what that state cannot serve."""

import copy
import json
import pickle
import threading

import diffusers
import pytest
import torch

from ddim.core.denoiser import Clip, ModelDenoiser
from ddim.core.oracle import GaussianOracle
from ddim.core.sampler import sample
from ddim.core.schedule import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from ddim.core.timesteps import select_timesteps, step_pairs
from ddim.errors import DDIMError
from ddim.models.export import to_diffusers
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler

OPTIONS = {"timestep_spacing": "trailing", "clip_sample": False}


def scheduler(count=10, **options):
    made = DDIMScheduler(**{"multistep_order": 2, **OPTIONS, **options})
    made.set_timesteps(count)
    return made


def curved(x, t):
    """A network of any parametrisation that is neither linear nor bounded."""
    return torch.sin(2 * x) + 0.5 * x * (t.reshape(-1, *[1] * (x.ndim - 1)).to(x) / 1000)


def walk(scheduler, x, timesteps=None, network=curved, **options):
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(network(x, torch.as_tensor(t)), t, x, **options).prev_sample
    return x


def x_t(*shape, dtype=torch.float32):
    return torch.randn(
        *(shape or (2, 3, 4, 4)), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_it_is_the_sampler(kind, zero, clip, count):
    if kind == "epsilon" and zero:
        pytest.skip("epsilon cannot be solved at zero SNR")
    betas = rescale_zero_terminal_snr(make_betas()) if zero else make_betas()
    schedule = NoiseSchedule.from_betas(betas)
    x = x_t(dtype=torch.float64)
    denoise = ModelDenoiser(curved, schedule, kind, Clip("static" if clip else "none"))
    expected = sample(
        denoise, x, step_pairs(select_timesteps(1000, count)), schedule=schedule, order=2
    )
    ours = scheduler(count, prediction_type=kind, rescale_betas_zero_snr=zero, clip_sample=clip)
    torch.testing.assert_close(
        walk(ours, x, use_clipped_model_output=clip), expected, rtol=1e-9, atol=1e-9
    )
    ours.set_timesteps(count)
    torch.testing.assert_close(
        walk(ours, x, ours.timesteps.tolist(), use_clipped_model_output=clip),
        expected,
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_keeps_the_samples_dtype(dtype):
    got, exact = walk(scheduler(), x_t(dtype=dtype)), walk(scheduler(), x_t(dtype=torch.float64))
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}[dtype]
    assert float((got.double() - exact).norm() / exact.norm()) < tolerance


def test_order_one_is_ddim_to_the_bit_and_keeps_nothing():
    default, one = DDIMScheduler(**OPTIONS), scheduler(multistep_order=1)
    default.set_timesteps(10)
    assert torch.equal(walk(default, x_t()), walk(one, x_t()))
    assert one._before is None
    assert not torch.allclose(walk(one, x_t()), walk(scheduler(), x_t()), atol=1e-3)


def test_a_guided_network_is_a_network():
    def guided(x, t):
        with_prompt, without = curved(x, t), curved(x + 0.3, t)
        mixed = without + 3 * (with_prompt - without)
        return 0.7 * mixed * (with_prompt.std() / mixed.std()) + 0.3 * mixed

    schedule = NoiseSchedule.from_betas(make_betas())
    expected = sample(
        ModelDenoiser(guided, schedule, "v_prediction"),
        x_t(),
        step_pairs(select_timesteps(1000, 10)),
        schedule=schedule,
        order=2,
    )
    torch.testing.assert_close(
        walk(scheduler(prediction_type="v_prediction"), x_t(), network=guided),
        expected,
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_second_image_is_the_first_with_and_without_new_timesteps():
    ours = scheduler()
    first = walk(ours, x_t())
    assert torch.equal(walk(ours, x_t()), first)  # a step at a higher level begins anew
    ours.set_timesteps(10)
    assert torch.equal(walk(ours, x_t()), first)
    walk(ours, x_t(), ours.timesteps[:3])
    assert torch.equal(
        walk(ours, x_t(5, 3, 4, 4))[:0], first[:0]
    )  # another batch has no step before
    ours.timesteps = ours.timesteps[4:]  # image-to-image
    oracle = GaussianOracle(NoiseSchedule.from_betas(make_betas()), mean=0.1, std=0.5)
    shorter = sample(
        oracle.denoise,
        x_t(),
        step_pairs(ours.timesteps.tolist()),
        schedule=oracle.schedule,
        order=2,
    )
    torch.testing.assert_close(
        walk(ours, x_t(), network=oracle.network()), shorter, rtol=1e-5, atol=1e-5
    )


def test_a_timestep_a_sample_takes_each_samples_own_step_before():
    ours = scheduler()
    grid = ours.timesteps
    both = x_t(2, 3, 4, 4)
    ahead = walk(ours, both[1:], grid[:2])  # the second sample is two steps ahead of the first
    ours.set_timesteps(10)
    x = torch.cat([both[:1], ahead])
    for now in range(8):
        t = torch.stack([grid[now], grid[now + 2]])
        x = ours.step(curved(x, t), t, x).prev_sample
    ours.set_timesteps(10)
    expected = walk(ours, both[:1], grid[:8])
    torch.testing.assert_close(x[:1], expected, rtol=1e-5, atol=1e-5)
    ours.set_timesteps(10)
    torch.testing.assert_close(x[1:], walk(ours, ahead, grid[2:]), rtol=1e-5, atol=1e-5)


def test_a_sample_that_skips_a_timestep_takes_ddims_step():
    ours, one, x = scheduler(), scheduler(multistep_order=1), x_t()
    first = ours.step(curved(x, torch.tensor(899)), torch.tensor([899, 899]), x).prev_sample
    t = torch.tensor([699, 799])
    second = ours.step(curved(first, t), t, first).prev_sample
    plain = one.step(curved(first, t), t, first).prev_sample
    assert torch.equal(second[0], plain[0])
    assert not torch.allclose(second[1], plain[1], atol=1e-3)


def test_what_the_state_cannot_serve_is_refused_in_a_sentence():
    ours, x = scheduler(), x_t()
    walk(ours, x, [999, 899])
    for t in (899, 699, torch.tensor(99), torch.tensor([598])):
        with pytest.raises(
            DDIMError,
            match=(
                rf"t={int(t)} does not follow t=899 in the list of timesteps; call set_timesteps "
                r"before each image"
            ),
        ):
            ours.step(x, t, x)
    ours.step(x, 799, x)  # a refusal changes nothing
    for eta in (0.5, "sigma-hat"):
        with pytest.raises(
            DDIMError, match="order 2 solves the deterministic flow and draws no noise"
        ):
            ours.step(x, 699, x, eta=eta)
    with pytest.raises(
        DDIMError, match="parallel samples have no step before them; use multistep_order=1"
    ):
        ours.batch_step_no_noise(x, [699, 699], x)
    with pytest.raises(DDIMError, match="multistep_order must be 1 or 2; got 3"):
        scheduler(multistep_order=3)
    ours.register_to_config(multistep_order=1)
    ours.step(x, 299, x, eta=1.0, generator=torch.Generator().manual_seed(0))
    ours.register_to_config(multistep_order=2)
    ours.set_timesteps(5)  # the tables that were in use for noise are no reason to refuse


def test_one_step_can_be_repeated():
    ours = scheduler(1)
    assert torch.equal(walk(ours, x_t()), walk(ours, x_t()))


def test_it_compiles_without_a_graph_break():
    ours, eager = scheduler(), scheduler()
    expected = walk(eager, x_t())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(output, t, x):
        return ours.step(output, t, x, return_dict=False)[0]

    x = x_t()
    for t in ours.timesteps:
        x = step(curved(x, t), t, x)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_goes_through_both_steps():
    x = x_t(1, 1, 2, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: walk(copy.deepcopy(scheduler(4)), x), (x,))


def test_the_order_is_kept_by_files_and_not_taken_from_other_multisteps(tmp_path):
    scheduler().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["multistep_order"] == 2
    assert DDIMScheduler.from_pretrained(tmp_path).config.multistep_order == 2
    stock = to_diffusers(scheduler(timestep_spacing="leading"))
    assert type(stock) is diffusers.DDIMScheduler
    assert DDIMScheduler.from_config(stock.config).config.multistep_order == 2
    assert "multistep_order" not in to_diffusers(scheduler(multistep_order=1)).config
    multistep = diffusers.DPMSolverMultistepScheduler(solver_order=3)
    multistep.save_pretrained(tmp_path)
    for config in (multistep.config, tmp_path):
        load = DDIMScheduler.from_pretrained if config is tmp_path else DDIMScheduler.from_config
        assert load(config).config.multistep_order == 1
        assert load(config, multistep_order=2).config.multistep_order == 2
    DDIMScheduler.from_config(multistep.config, multistep_order=2).save_pretrained(tmp_path)
    assert DDIMScheduler.from_pretrained(tmp_path).config.multistep_order == 2


def test_fitted_timesteps_are_visited_at_their_own_step_count(tmp_path, said):
    fitted = [[900, 40], [950, 600, 20]]
    scheduler(fitted_timesteps=fitted).save_pretrained(tmp_path)
    ours = DDIMScheduler.from_pretrained(tmp_path)
    for count, expected in ((2, fitted[0]), (3, fitted[1]), (4, [999, 749, 499, 249])):
        ours.set_timesteps(count)
        assert ours.timesteps.tolist() == expected
    ours.set_timesteps(timesteps=[7, 3])
    assert ours.timesteps.tolist() == [7, 3]
    stock = to_diffusers(DDIMScheduler.from_pretrained(tmp_path))
    assert stock.config["fitted_timesteps"] == fitted
    stock.save_pretrained(tmp_path / "stock")
    assert DDIMScheduler.from_pretrained(tmp_path / "stock").config.fitted_timesteps == fitted
    assert "fitted_timesteps" not in to_diffusers(scheduler()).config
    inverse = DDIMInverseScheduler.from_config(ours.config)
    inverse.set_timesteps(3)
    assert inverse.timesteps.tolist() == fitted[1][::-1]
    named = DDIMInverseScheduler(fitted_timesteps=fitted)
    assert not any("fitted_timesteps" in line for line in said)
    named.set_timesteps(2)
    assert named.timesteps.tolist() == fitted[0][::-1]


def test_fitted_timesteps_that_are_none_are_refused():
    with pytest.raises(
        DDIMError, match=r"fitted_timesteps must be a list of lists of levels, .* got \[999, 3\]"
    ):
        scheduler(fitted_timesteps=[999, 3])
    with pytest.raises(DDIMError, match="timesteps must fall from noise to data; got 9 after 3"):
        scheduler(2, fitted_timesteps=[[3, 9]])


def test_the_order_is_ours_alone(tmp_path):
    """Other multisteps keep their own order, on the way here and on the way back."""
    scheduler().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    saved = json.loads(path.read_text())
    assert "solver_order" not in saved
    family = (
        diffusers.DPMSolverMultistepScheduler,
        diffusers.DPMSolverSinglestepScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.DEISMultistepScheduler,
    )
    for kind in family:
        own = kind().config.solver_order
        assert kind.from_pretrained(tmp_path).config.solver_order == own
        assert kind.from_config(scheduler().config).config.solver_order == own
        there = DDIMScheduler.from_config(kind(solver_order=own + 1).config, solver_order=2)
        assert there.config.multistep_order == 1
        assert kind.from_config(there.config).config.solver_order == own + 1

    before = {name: value for name, value in saved.items() if name != "multistep_order"}
    path.write_text(json.dumps({**before, "solver_order": 2}))  # as ours used to be written
    old = DDIMScheduler.from_pretrained(tmp_path)
    assert old.config.multistep_order == 2
    assert "solver_order" not in old.config
    # diffusers' own class, which was put in DPM-Solver's place
    path.write_text(json.dumps({**before, "solver_order": 2, "solver_type": "midpoint"}))
    assert DDIMScheduler.from_pretrained(tmp_path).config.multistep_order == 1


@pytest.mark.parametrize(
    "change",
    [
        copy.copy,
        copy.deepcopy,
        lambda ours: pickle.loads(pickle.dumps(ours)),
        lambda ours: setattr(ours, "alphas_cumprod", ours.alphas_cumprod.clone()),
        lambda ours: setattr(ours, "final_alpha_cumprod", ours.final_alpha_cumprod.clone()),
        lambda ours: ours.alphas_cumprod.mul_(1),
        lambda ours: ours.register_to_config(trained_betas=make_betas().tolist()),
        lambda ours: ours.register_to_config(beta_start=1e-4),
    ],
)
def test_what_changes_nothing_in_the_middle_of_a_walk_keeps_the_step_before(change):
    expected = walk(scheduler(), x_t())
    ours = scheduler()
    x = walk(ours, x_t(), ours.timesteps[:4])
    changed = change(ours)
    ours = changed if isinstance(changed, DDIMScheduler) else ours
    torch.testing.assert_close(walk(ours, x, ours.timesteps[4:]), expected, rtol=1e-6, atol=1e-6)


def in_a_thread(action):
    caught = []

    def run():
        try:
            action()
        except DDIMError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]


def test_two_threads_that_walk_at_once_are_refused():
    ours, message = scheduler(), "another thread has taken a step or set the timesteps"
    grid = ours.timesteps
    walk(ours, x_t(), grid[:2])
    with pytest.raises(DDIMError, match=message):
        in_a_thread(lambda: walk(ours, x_t(), grid[2:3]))  # as if this thread's walk were its own
    in_a_thread(lambda: walk(ours, x_t(), grid[:2]))  # a new image, which may begin
    with pytest.raises(DDIMError, match=message):
        walk(ours, x_t(), grid[2:3])
    ours.set_timesteps(10)
    walk(ours, x_t(), grid[:2])
    in_a_thread(lambda: ours.set_timesteps(10))
    with pytest.raises(DDIMError, match=message):
        walk(ours, x_t(), grid[2:3])
    walk(ours, x_t(), grid)  # a new image may begin


def test_threads_one_after_the_other_may_use_one_scheduler():
    ours = scheduler()
    expected, found = walk(ours, x_t()), []
    in_a_thread(lambda: (ours.set_timesteps(10), found.append(walk(ours, x_t()))))
    ours.set_timesteps(10)
    in_a_thread(lambda: found.append(walk(ours, x_t())))
    ours.set_timesteps(10)
    found.append(walk(ours, x_t()))
    assert all(torch.equal(each, expected) for each in found)
