"""Routes: the coefficients of a walk, resolved before it."""

import pytest
import torch

from ddim import DDIMError, DDIMScheduler, NoiseSchedule, UnconditionalPipeline, make_betas
from ddim.core.denoiser import Clip
from ddim.core.route import make_route
from ddim.core.sampler import trajectory, walk
from ddim.core.step import ddim_step, step_coefficients
from ddim.core.timesteps import reverse_pairs, select_timesteps, step_pairs

SCHEDULE = NoiseSchedule.from_betas(make_betas("linear"))
PAIRS = step_pairs(select_timesteps(1000, 5))


def denoise(x_t, t):
    return 0.5 * x_t, 0.1 * x_t + 0.001 * t


def last(states):
    return list(states)[-1].x_s


@pytest.mark.parametrize(("eta", "order"), [(0.0, 1), (0.0, 2), (0.7, 1), ("sigma-hat", 1)])
def test_a_route_is_walked_as_its_options_are(eta, order):
    x_t, noise = torch.linspace(-1, 1, 8).view(2, 4), lambda: torch.ones(2, 4)
    route = make_route(SCHEDULE, PAIRS, eta=eta, order=order)
    options = {"schedule": SCHEDULE, "eta": eta, "order": order, "noise": noise}
    expected = last(trajectory(denoise, x_t, PAIRS, **options))
    assert torch.equal(last(walk(denoise, x_t, route, noise=noise)), expected)
    state, x = None, x_t
    for number in range(len(route)):  # step by step
        (state,) = walk(denoise, x, route[number : number + 1], noise=noise, previous=state)
        x = state.x_s
    assert torch.equal(x, expected)
    assert state.number == len(route) - 1


def test_other_rows_are_another_solver_for_the_same_walk():
    from dataclasses import replace

    route = make_route(SCHEDULE, PAIRS)
    halved = replace(route, weights=route.weights._replace(eps=route.weights.eps / 2))
    x_t = torch.ones(1, 3)
    (first,) = walk(denoise, x_t, halved[:1])
    x0, eps = denoise(x_t, 999)
    assert torch.allclose(first.x_s, x0 * route.weights.x0[0] + eps * route.weights.eps[0] / 2)


def test_the_analytic_variance_is_measured_after_the_route_is_resolved():
    open_route = make_route(SCHEDULE, PAIRS, analytic=True)
    assert open_route.is_random
    with pytest.raises(DDIMError, match="was not measured"):
        next(walk(denoise, torch.ones(1, 3), open_route, noise=lambda: torch.ones(1, 3)))
    values = {t: 0.25 for t in open_route.timesteps}
    measured = open_route.measured(values)
    alpha_bar = [SCHEDULE.alpha_bar(torch.tensor(levels)) for levels in zip(*PAIRS, strict=True)]
    expected = step_coefficients(
        *alpha_bar, eps_mean_square=torch.full((5,), 0.25, dtype=torch.float64)
    )
    assert all(map(torch.equal, measured.weights, expected))
    with pytest.raises(DDIMError, match="no value for level 999"):
        open_route.measured({})


def test_a_pipeline_resolves_a_route_once_and_draws_along_it(tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    route = pipe.route(4, eta=0.5, clip="static")
    assert route.timesteps == pipe.select_timesteps(4)
    assert (route.eta, route.order, route.clip.kind, route.sampler) == (0.5, 1, "static", "ddim")
    show = {"seeds": [3, 4], "output_type": "pt", "progress": False}
    expected = pipe(num_inference_steps=4, eta=0.5, clip="static", **show).images
    assert torch.equal(pipe.draw(route, **show).images, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": -1.0}, "eta must be at least 0"),
        ({"order": 3}, "the order of the solver must be 1"),
        ({"order": 2, "eta": 0.5}, "draws no noise"),
        ({"timesteps": [5, 9]}, "must fall"),
        ({"timesteps": [9, 5], "timestep_spacing": "linspace"}, "leave out"),
        ({"sampler": "o-belm", "eta": 0.5}, "needs eta 0"),
        ({"sampler": "bdia", "clip": Clip("static")}, "through clipping"),
        ({"sampler": "edict", "clip": "none", "order": 2}, "a solver of its own"),
        ({"sampler": "o-belm", "analytic": True}, "the analytic variance draws noise"),
        ({"strength": 0.0}, "strength must lie"),
        ({"eta": "sigma-hat", "analytic": True}, "got sigma-hat"),
    ],
)
def test_a_route_that_comes_to_no_image_is_refused_before_the_network_is_called(
    tiny, options, message
):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(DDIMError, match=message):
        pipe.route(**options)


def test_encoders_and_image_to_image_have_routes_too(tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    assert pipe.route(4, timestep_spacing="trailing").timesteps == [999, 749, 499, 249]
    route = pipe.route(4, timestep_spacing="trailing", encodable=True, clip="none")
    assert route.timesteps == [998, 749, 499, 249]
    half = pipe.route(4, timestep_spacing="trailing", strength=0.5)
    assert half.timesteps == [499, 249]


def test_noise_is_drawn_only_on_the_way_down():
    schedule = NoiseSchedule.from_betas(make_betas())
    up = reverse_pairs(step_pairs([900, 500, 100]))
    assert len(make_route(schedule, up)) == 3
    for eta in (0.5, "sigma-hat"):
        with pytest.raises(DDIMError, match="a step to a noisier level draws no noise"):
            make_route(schedule, up, eta=eta)
        levels = {"alpha_bar_t": schedule.alpha_bar(100), "alpha_bar_s": schedule.alpha_bar(500)}
        x = torch.zeros(1, 2)
        with pytest.raises(DDIMError, match="a step to a noisier level draws no noise"):
            ddim_step(x, x, **levels, eta=eta, noise=x)
    with pytest.raises(DDIMError, match="these pairs go up"):
        make_route(schedule, up, analytic=True)
