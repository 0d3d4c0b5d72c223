"""The sampling loop against the closed form: every sampler, spacing and parametrisation, with no
network."""

import math

import diffusers
import numpy as np
import pytest
import torch
from tests.conftest import thinned

from ddim.core.denoiser import Clip, ModelDenoiser
from ddim.core.noise import SeededNoise, seeded_randn
from ddim.core.oracle import GaussianOracle
from ddim.core.prediction import PREDICTION_TYPES
from ddim.core.sampler import sample, trajectory
from ddim.core.schedule import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from ddim.core.step import SIGMA_HAT
from ddim.core.timesteps import SPACINGS, reverse_pairs, select_timesteps, step_pairs
from ddim.errors import DDIMError, DivergenceError

BETAS = {
    "linear": make_betas(),
    "sd": make_betas("scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": make_betas("squaredcos_cap_v2"),
}
SCHEDULES = {name: NoiseSchedule.from_betas(betas) for name, betas in BETAS.items()}
SCHEDULES |= {
    f"{name}-zero": NoiseSchedule.from_betas(rescale_zero_terminal_snr(betas))
    for name, betas in BETAS.items()
}


def pairs_of(count, spacing="trailing", total=1000):
    return step_pairs(select_timesteps(total, count, spacing))


@pytest.mark.parametrize(
    ("name", "spacing", "kind"), thinned(SCHEDULES, SPACINGS, PREDICTION_TYPES, stride=5)
)
def test_many_steps_reach_the_exact_flow(name, spacing, kind):
    schedule = SCHEDULES[name]
    if kind == "epsilon" and name.endswith("zero"):
        pytest.skip("epsilon cannot be solved at zero SNR")
    oracle = GaussianOracle(schedule, mean=0.4, std=0.3)
    pairs = pairs_of(500, spacing)
    x_t = oracle.draw((64, 4), t=pairs[0][0], generator=torch.Generator().manual_seed(0))
    end = sample(ModelDenoiser(oracle.network(kind), schedule, kind), x_t, pairs, schedule=schedule)
    exact = oracle.flow(x_t, pairs[0][0], -1)
    error = float((end - exact).pow(2).mean().sqrt()) / oracle.std
    # At zero terminal SNR the flow's first step leaves a level with no signal at all, where the
    # schedule is steepest.
    assert error < (0.08 if "cosine" in name or name.endswith("zero") else 0.04)


def uniform_angle_schedule(count):
    """alpha_t = cos, sigma_t = sin of evenly spaced angles: the smooth grid on which orders are
    clean."""
    angles = (torch.arange(count, dtype=torch.float64) + 1) / count * (math.pi / 2 * 0.98)
    return NoiseSchedule(angles.cos() ** 2)


def test_ddim_converges_with_first_order():
    errors, counts = [], [20, 40, 80, 160, 320]
    for count in counts:
        schedule = uniform_angle_schedule(count)
        oracle = GaussianOracle(schedule, mean=0.5, std=0.25)
        pairs = step_pairs(list(range(count - 1, -1, -1)))
        x_t = oracle.draw((256,), t=count - 1, generator=torch.Generator().manual_seed(1)).reshape(
            256, 1
        )
        end = sample(oracle.denoise, x_t, pairs, schedule=schedule)
        errors.append(float((end - oracle.flow(x_t, count - 1, -1)).pow(2).mean().sqrt()))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1, abs=0.05)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.25), (0.0, 1.0)])
def test_the_error_falls_with_the_order_of_the_solver(order, mean, std):
    errors, counts = [], [20, 40, 80, 160, 320]
    for count in counts:
        schedule = NoiseSchedule(
            torch.linspace(6, -6, count, dtype=torch.float64).sigmoid()
        )  # even in log-SNR, the multistep's variable
        oracle = GaussianOracle(schedule, mean=mean, std=std)
        x_t = oracle.draw((256, 1), t=count - 1, generator=torch.Generator().manual_seed(1))
        end = sample(
            oracle.denoise,
            x_t,
            step_pairs(list(range(count - 1, 0, -1)), end=0),
            schedule=schedule,
            order=order,
        )
        errors.append(float((end - oracle.flow(x_t, count - 1, 0)).pow(2).mean().sqrt()))
    assert np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(-order, abs=0.06)


@pytest.mark.parametrize(
    ("name", "kind", "count"), thinned(SCHEDULES, PREDICTION_TYPES, [20, 50, 200], stride=5)
)
def test_order_two_is_nearer_to_the_flow_in_both_directions(name, kind, count):
    schedule = SCHEDULES[name]
    if kind == "epsilon" and name.endswith("zero"):
        pytest.skip("epsilon cannot be solved at zero SNR")
    oracle = GaussianOracle(schedule, mean=0.4, std=0.3)
    denoise, x = (
        ModelDenoiser(oracle.network(kind), schedule, kind),
        torch.randn(64, 4, dtype=torch.float64),
    )
    exact = oracle.flow(x, 999, -1)
    first, second = (
        float(
            (sample(denoise, x, pairs_of(count), schedule=schedule, order=o) - exact).pow(2).mean()
        )
        for o in (1, 2)
    )
    assert second < first, (first, second)
    if kind == "sample":
        return  # no eps at clean data
    exact, up = oracle.flow(x, -1, 799), reverse_pairs(step_pairs(select_timesteps(800, count)))
    first, second = (
        float((sample(denoise, x, up, schedule=schedule, order=o) - exact).pow(2).mean())
        for o in (1, 2)
    )
    assert second < first, (first, second)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers' own code
def test_the_multistep_is_dpm_solver_in_diffusers():
    timesteps = [999, 870, 700, 410, 230, 90, 20]
    stock = diffusers.DPMSolverMultistepScheduler(
        solver_order=2, lower_order_final=True, final_sigmas_type="zero"
    )
    stock.set_timesteps(timesteps=timesteps)
    oracle = GaussianOracle(SCHEDULES["linear"], mean=0.3, std=0.4)
    network, x = (
        oracle.network("epsilon"),
        torch.randn(16, 3, generator=torch.Generator().manual_seed(0)),
    )
    ours, theirs = (
        sample(oracle.denoise, x, step_pairs(timesteps), schedule=oracle.schedule, order=2),
        x,
    )
    for t in stock.timesteps:
        theirs = stock.step(network(theirs, t), t, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        sample(oracle.denoise, x, step_pairs(timesteps), schedule=oracle.schedule),
        theirs,
        atol=1e-2,
    )


@pytest.mark.parametrize("order", [1, 2])
def test_a_trajectory_goes_on_from_a_state(order):
    oracle = GaussianOracle(SCHEDULES["sd"], mean=0.2, std=0.4)
    x, pairs = torch.randn(3, 2), pairs_of(9)
    whole = list(trajectory(oracle.denoise, x, pairs, schedule=oracle.schedule, order=order))
    rest = list(
        trajectory(
            oracle.denoise,
            whole[3].x_s,
            pairs[4:],
            schedule=oracle.schedule,
            order=order,
            previous=whole[3],
        )
    )
    assert [s.number for s in rest] == [4, 5, 6, 7, 8]
    assert all(torch.equal(a.x_s, b.x_s) for a, b in zip(whole[4:], rest, strict=True))


def test_the_first_step_and_the_step_to_clean_data_are_ddims_at_order_two():
    schedule = NoiseSchedule.from_betas(
        BETAS["sd"], set_alpha_to_one=False
    )  # its clean level has a finite log-SNR
    oracle = GaussianOracle(schedule, mean=0.2, std=0.4)
    x, pairs = torch.randn(3, 2, dtype=torch.float64), pairs_of(4)
    states = list(trajectory(oracle.denoise, x, pairs, schedule=schedule, order=2))
    assert torch.equal(states[0].x_s, sample(oracle.denoise, x, pairs[:1], schedule=schedule))
    assert torch.equal(
        states[3].x_s, sample(oracle.denoise, states[2].x_s, pairs[3:], schedule=schedule)
    )
    assert not torch.equal(
        states[1].x_s, sample(oracle.denoise, states[0].x_s, pairs[1:2], schedule=schedule)
    )
    with pytest.raises(DDIMError, match="order 2 solves the deterministic flow"):
        sample(oracle.denoise, x, pairs, schedule=schedule, order=2, eta=1.0, noise=lambda: x)


@pytest.mark.parametrize("count", [150, 300, 600])
def test_neighbours_reach_the_datas_spread_where_strides_do_not(count):
    schedule = SCHEDULES["linear"]
    oracle = GaussianOracle(schedule, mean=0.5, std=0.25)
    x_t = oracle.draw((20_000, 1), t=999, generator=torch.Generator().manual_seed(2))
    network = oracle.network("epsilon")
    ours = sample(ModelDenoiser(network, schedule), x_t, pairs_of(count), schedule=schedule)
    assert 0.235 < float(ours.std()) < 0.252
    stock = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    stock.set_timesteps(count)
    theirs = x_t
    for t in stock.timesteps:
        theirs = stock.step(network(theirs, t), t, theirs).prev_sample
    assert float(theirs.std()) > 0.27


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, SIGMA_HAT])
@pytest.mark.parametrize("name", ["linear", "sd-zero"])
def test_every_eta_samples_the_data_distribution(eta, name):
    schedule = SCHEDULES[name]
    oracle = GaussianOracle(schedule, mean=-0.2, std=0.5)
    pairs = pairs_of(500)
    x_t = oracle.draw((4, 5000), t=999, generator=torch.Generator().manual_seed(3))
    noise = SeededNoise([0, 1, 2, 3], (5000,), dtype=torch.float64)
    end = sample(
        ModelDenoiser(oracle.network("v_prediction"), schedule, "v_prediction"),
        x_t,
        pairs,
        schedule=schedule,
        eta=eta,
        noise=noise,
    )
    assert float(end.mean()) == pytest.approx(-0.2, abs=0.02)
    assert float(end.std()) == pytest.approx(0.5, abs=0.03)


def test_nothing_is_nan_at_zero_snr_for_any_count():
    schedule = SCHEDULES["sd-zero"]
    oracle = GaussianOracle(schedule, mean=0.1, std=0.4)
    x_t = seeded_randn((4,), [0, 1])
    for count in [*range(1, 31), 100]:
        for eta in (0.0, 1.0):
            noise = SeededNoise([0, 1], (4,))
            end = sample(
                ModelDenoiser(oracle.network("v_prediction"), schedule, "v_prediction"),
                x_t,
                pairs_of(count),
                schedule=schedule,
                eta=eta,
                noise=noise,
            )
            assert torch.isfinite(end).all(), (count, eta)


def test_the_flow_there_and_back_is_the_identity():
    oracle = GaussianOracle(SCHEDULES["sd"], mean=0.3, std=0.2)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(oracle.flow(oracle.flow(x, 999, -1), -1, 999), x)
    encoded = sample(
        lambda x_s, s: oracle.denoise(x_s, s),
        x,
        reverse_pairs(pairs_of(1000)),
        schedule=oracle.schedule,
    )
    torch.testing.assert_close(encoded, oracle.flow(x, -1, 999), rtol=0.1, atol=0.1)


def test_a_trajectory_tells_every_step_and_can_be_left_early():
    schedule = SCHEDULES["linear"]
    oracle = GaussianOracle(schedule)
    states = list(trajectory(oracle.denoise, torch.randn(2, 3), pairs_of(7), schedule=schedule))
    assert [(s.t, s.s) for s in states] == pairs_of(7)
    assert [s.number for s in states] == list(range(7))
    assert all(s.x_s.shape == s.x0.shape == s.eps.shape == (2, 3) for s in states)
    calls = []
    stream = trajectory(
        lambda x, t: calls.append(t) or oracle.denoise(x, t),
        torch.randn(2, 3),
        pairs_of(7),
        schedule=schedule,
    )
    next(stream)
    stream.close()
    assert calls == [999]


def test_eta_zero_draws_nothing_and_eta_needs_noise():
    schedule, oracle = SCHEDULES["linear"], GaussianOracle(SCHEDULES["linear"])
    x = torch.randn(1, 2)

    def forbidden():
        raise AssertionError("noise was drawn")

    sample(oracle.denoise, x, pairs_of(3), schedule=schedule, noise=forbidden)
    with pytest.raises(DDIMError, match="eta=1.0 draws noise at every step; give noise="):
        sample(oracle.denoise, x, pairs_of(3), schedule=schedule, eta=1.0)
    assert torch.equal(sample(oracle.denoise, x, [], schedule=schedule), x)


def test_images_of_a_seed_do_not_depend_on_the_batch():
    schedule, oracle = SCHEDULES["linear"], GaussianOracle(SCHEDULES["linear"], std=0.5)

    def run(seeds):
        stream = SeededNoise(seeds, (3, 4, 4))
        return sample(
            oracle.denoise, stream(), pairs_of(10), schedule=schedule, eta=1.0, noise=stream
        )

    together = run([4, 5, 6])
    for i, seed in enumerate((4, 5, 6)):
        torch.testing.assert_close(together[i : i + 1], run([seed]), rtol=0, atol=1e-6)


class Half(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        self.output = output

    def forward(self, x, t):
        assert x.dtype == torch.bfloat16
        assert t.dtype == torch.int64
        assert t.shape == (x.shape[0],)
        return self.output(x)


class Wrapped:
    def __init__(self, sample):
        self.sample = sample


@pytest.mark.parametrize("output", [lambda x: x, lambda x: (x, 1), Wrapped])
def test_any_network_becomes_a_denoiser_and_the_state_stays_float32(output):
    schedule = SCHEDULES["linear"]
    found = ModelDenoiser(Half(output), schedule)(torch.randn(2, 3), 500)
    assert found.x0.dtype == found.eps.dtype == torch.float32
    assert (
        sample(
            ModelDenoiser(Half(output), schedule), torch.randn(2, 3), pairs_of(5), schedule=schedule
        ).dtype
        == torch.float32
    )


def test_clipping_keeps_the_pair_whole_only_when_eps_is_derived_again():
    schedule, x = SCHEDULES["linear"], torch.randn(4, 6, dtype=torch.float64) * 2
    a = schedule.alpha_bar(400)
    for rederive, whole in ((True, True), (False, False)):
        x0, eps = ModelDenoiser(
            lambda x, t: torch.zeros_like(x), schedule, clip=Clip("static", rederive_eps=rederive)
        )(x, 400)
        assert float(x0.abs().max()) <= 1
        assert torch.allclose(a.sqrt() * x0 + (1 - a).sqrt() * eps, x) is whole


def test_clipped_sampling_stays_on_the_marginal():
    schedule = SCHEDULES["linear"]
    x = torch.randn(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def network(x, t):
        return 0.9 * x  # an imperfect prediction, whose x0 leaves [-1, 1] at high noise

    kept, lost = (
        float(
            sample(
                ModelDenoiser(network, schedule, clip=Clip("static", rederive_eps=r)),
                x,
                [(900, 800)],
                schedule=schedule,
            ).std()
        )
        for r in (True, False)
    )
    assert abs(kept - 1) < 0.02
    assert abs(lost - 1) > 0.05


def test_network_outputs_that_do_not_fit_are_refused():
    schedule = SCHEDULES["linear"]
    with pytest.raises(
        DDIMError, match=r"of its input's shape \[1, 3, 4\]; got \[1, 6, 4\].*variance"
    ):
        ModelDenoiser(lambda x, t: x.repeat(1, 2, 1), schedule)(torch.zeros(1, 3, 4), 5)
    with pytest.raises(
        DDIMError,
        match=(
            "must return a tensor, a tuple that starts with one, or an object with .sample; got str"
        ),
    ):
        ModelDenoiser(lambda x, t: "x", schedule)(torch.zeros(1, 3), 5)
    with pytest.raises(DDIMError, match="clip must be none, static or dynamic; got 'hard'"):
        Clip("hard")


def test_what_is_no_schedule_type_or_clipping_is_refused_at_once():
    schedule, network = SCHEDULES["linear"], GaussianOracle(SCHEDULES["linear"]).network("epsilon")
    with pytest.raises(
        DDIMError,
        match=(
            r"schedule must be a NoiseSchedule, such as NoiseSchedule.from_betas\(betas\); got a "
            r"tensor of float64, shape \[1000\]"
        ),
    ):
        ModelDenoiser(network, BETAS["linear"])
    with pytest.raises(
        DDIMError, match="prediction_type must be one of epsilon, sample, v_prediction; got 'eps'"
    ):
        ModelDenoiser(network, schedule, "eps")
    with pytest.raises(
        DDIMError, match=r"clip must be a Clip, such as Clip\('static'\); got 'static'"
    ):
        ModelDenoiser(network, schedule, clip="static")


def test_a_list_of_levels_in_place_of_steps_is_refused():
    oracle = GaussianOracle(SCHEDULES["linear"])
    with pytest.raises(DDIMError, match=r"pairs must be steps \(t, s\) .*; got \[999, 500, 0\]"):
        sample(oracle.denoise, torch.randn(1, 2), [999, 500, 0], schedule=oracle.schedule)


def walk_of(denoise, x=None, noise=None, eta=0.0):
    x = torch.zeros(1, 2) if x is None else x
    pairs = step_pairs([900, 500])
    return sample(denoise, x, pairs, schedule=SCHEDULE, eta=eta, noise=noise)


class Network(torch.nn.Module):
    def forward(self, x, t):
        return x * t.to(x.dtype).reshape(-1, 1)


SCHEDULE = NoiseSchedule.from_betas(make_betas())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": np.zeros((1, 2))}, r"x_t must be a tensor; got a NumPy array of .* torch.as_tensor"),
        (
            {"x": torch.zeros(1, 2).int()},
            "x_t must be a tensor of floating-point numbers; got a tensor of int32",
        ),
        ({"noise": torch.zeros(1, 2)}, "noise must be a function that draws z .* got a tensor"),
        (
            {"noise": lambda: np.zeros((1, 2)), "eta": 1.0},
            "noise must be a tensor; got a NumPy array",
        ),
        ({"denoise": Network()}, "a network failed as one .* make one of a network by ModelDen"),
        ({"denoise": 5}, "denoise must be a function, .*; got 5. Make one"),
        (
            {"denoise": ModelDenoiser(Network(), NoiseSchedule.from_betas(make_betas("sigmoid")))},
            r"the denoiser has another noise schedule \(1000 levels, .*\) than the walk \(1000 lev",
        ),
    ],
)
def test_what_is_no_walk_is_refused_at_its_beginning(given, message):
    with pytest.raises(DDIMError, match=message):
        walk_of(**{"denoise": ModelDenoiser(lambda x, t: x, SCHEDULE), **given})


def test_an_equal_schedule_is_no_other():
    same = NoiseSchedule.from_betas(make_betas())
    assert walk_of(ModelDenoiser(lambda x, t: x, same)).isfinite().all()


def test_nan_is_told_at_the_end_of_a_walk():
    calls = []

    def network(x, t):
        calls.append(t)
        return x / 0

    with pytest.raises(DivergenceError, match="the walk ended in NaN or infinity"):
        walk_of(ModelDenoiser(network, SCHEDULE))
    assert len(calls) == 2  # it is looked for once, since that waits for a device
