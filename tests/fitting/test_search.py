"""The search for levels: what it costs, what it moves, and that what it finds is where the error is
small."""

import math
from itertools import combinations

import pytest
import torch
from tests.fitting.test_timesteps import SCHEDULE, mixture, noise

from ddim.core.prediction import Denoised
from ddim.core.sampler import trajectory
from ddim.core.schedule import NoiseSchedule, make_betas
from ddim.core.step import ddim_step
from ddim.core.timesteps import check_timesteps, select_timesteps, step_pairs
from ddim.errors import DDIMError
from ddim.fitting import search
from ddim.fitting.search import (
    SamplingProblem,
    Walks,
    best_move,
    power_timesteps,
    scaled_difference,
    search_timesteps,
    shortest_path,
    teach,
)


class Counted:
    """A denoiser that notes the levels it was called at, and the samples."""

    def __init__(self, denoise):
        self.denoise, self.levels, self.samples = denoise, [], []

    def __call__(self, x_t, t):
        self.levels.append(t)
        self.samples.append(x_t.clone())
        return self.denoise(x_t, t)


def test_powers_lie_between_trailing_and_quadratic_levels():
    for steps in (1, 7, 10, 50, 333, 1000):
        assert power_timesteps(1000, steps, 1) == select_timesteps(1000, steps, "trailing")
    for steps in range(1, 60):
        levels = power_timesteps(1000, steps, 1.5)
        assert levels is None or len(check_timesteps(levels, 1000)) == steps
    assert power_timesteps(1000, 4, 2) == [999, 562 - 1, 249, 62 - 1]
    assert power_timesteps(1000, 900, 2) is None


@pytest.mark.parametrize("order", [1, 2])
def test_the_search_counts_its_evaluations_and_does_not_repeat_the_common_beginning(order):
    counted = Counted(mixture)

    def calls(evaluations):
        counted.levels.clear()
        search_timesteps(
            SamplingProblem(counted, noise(4, 0)),
            schedule=SCHEDULE,
            steps=8,
            order=order,
            evaluations=evaluations,
        )
        return len(counted.levels)

    before = 64 + 8 * 6  # the teacher, five powers and the shortest path
    assert calls(0) == before
    assert before + 60 < calls(100) < before + 100 + 8 * 9 // 2


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "path",
    [[999, 800, 640, 400, 200, 50], [999, 800, 600, 400, 210, 50], [990, 800, 600, 400, 200, 50]],
)
def test_a_common_beginning_gives_the_difference_of_the_whole_walk(order, path):
    counted, x = Counted(mixture), noise(4, 0)
    walks = Walks(
        SamplingProblem(counted, x), torch.zeros_like(x), schedule=SCHEDULE, order=order, bound=None
    )
    known = walks([999, 800, 600, 400, 200, 50])
    same = next(i for i, level in enumerate(path) if level != known.levels[i])
    counted.levels.clear()
    found, whole = walks(path, known), walks(path)
    assert counted.levels == [*path[same:], *path]
    assert torch.equal(found.difference, whole.difference)
    assert all(torch.equal(a.x_s, b.x_s) for a, b in zip(found.states, whole.states, strict=True))
    assert walks.calls == len(path) * 3 - same


def test_an_error_is_the_mean_square_in_a_range_of_one():
    x = noise(3, 0)
    walk = Walks(
        SamplingProblem(mixture, x), torch.zeros_like(x), schedule=SCHEDULE, order=1, bound=1.0
    )([999, 500])
    end = walk.states[-1].x_s.clamp(-1, 1) / 2
    torch.testing.assert_close(
        walk.errors, end.double().square().mean(1).log(), rtol=1e-5, atol=1e-5
    )
    assert walk.error == pytest.approx(float(walk.errors.mean()))
    assert scaled_difference(torch.zeros(0, 3), torch.zeros(0, 3), bound=None).shape == (0, 3)


def test_a_move_is_the_best_where_the_difference_is_linear():
    """No move nearby has a smaller objective; and without damping one image is brought to nothing
    where it can be."""
    generator = torch.Generator().manual_seed(0)
    r, j, damping = (
        torch.randn(5, 40, generator=generator),
        torch.randn(3, 5, 40, generator=generator),
        torch.full((3,), 0.01).double(),
    )

    def objective(move):
        squares = (r + torch.einsum("k,kbd->bd", move.float(), j)).double().square().sum(1)
        return float(squares.log().mean() + (damping * move.square()).sum())

    move = best_move(r, j, damping)
    for _ in range(50):
        assert (
            objective(move)
            <= objective(move + 0.01 * torch.randn(3, generator=generator).double()) + 1e-9
        )
    assert objective(move) < objective(torch.zeros(3).double())
    exact = torch.tensor([0.5, -2.0, 1.0]).double()
    torch.testing.assert_close(
        best_move(-torch.einsum("k,kbd->bd", exact.float(), j), j, torch.full((3,), 1e-9).double()),
        exact,
    )


@pytest.mark.parametrize(("steps", "places"), [(12, 12), (10, 4), (50, 7), (5, 2), (5, 1), (1, 1)])
def test_levels_between_two_places_follow_in_proportion(steps, places):
    hats = search._hats(steps, places)
    assert hats.shape == (places, steps)
    torch.testing.assert_close(
        hats.sum(0), torch.ones(steps).double()
    )  # all places together move all levels alike
    if places == steps:
        assert torch.equal(hats, torch.eye(steps).double())
    elif places > 1:
        assert all(int(torch.count_nonzero(hats[:, i])) <= 2 for i in range(steps))
        assert all(hats[k].max() == 1 for k in range(places))


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_move_that_helps_one_half_of_the_images_alone_is_not_made(order):
    """Half of the images are finished at once, wherever they are: what helps the others is no help
    to them."""

    def done(x_t, t):
        x0, eps = mixture(x_t, t)
        half = len(x_t) // 2
        return Denoised(
            torch.cat([torch.zeros_like(x0[:half]), x0[half:]]),
            torch.cat([torch.zeros_like(eps[:half]), eps[half:]]),
        )

    def found(denoise, evaluations):
        return search_timesteps(
            SamplingProblem(denoise, noise(4, 0)),
            schedule=SCHEDULE,
            steps=6,
            order=order,
            evaluations=evaluations,
        )

    assert found(mixture, 100) != found(mixture, 0)
    assert found(done, 100) == found(done, 0)


@pytest.mark.parametrize(
    ("order", "steps", "gain"),
    [
        (1, 5, 0.8),
        pytest.param(1, 10, 0.97, marks=pytest.mark.slow),
        (2, 6, 0.3),
        (2, 12, 0.02),
        pytest.param(2, 20, 0.05, marks=pytest.mark.slow),
    ],
)
def test_the_search_lowers_the_error_of_its_best_start(order, steps, gain):
    x = noise(32, 0)

    def error(levels):
        exact = teach(SamplingProblem(mixture, x), schedule=SCHEDULE, steps=200)[-1].x_s
        return Walks(SamplingProblem(mixture, x), exact, schedule=SCHEDULE, order=order, bound=1.0)(
            levels
        ).error

    start, end = (
        search_timesteps(
            SamplingProblem(mixture, x), schedule=SCHEDULE, steps=steps, order=order, evaluations=n
        )
        for n in (0, 200)
    )
    assert error(end) < error(start) + math.log(gain)
    assert len(check_timesteps(end, 1000)) == steps


def test_a_search_that_cannot_be_has_a_sentence():
    schedule = NoiseSchedule.from_betas(make_betas(num_train_timesteps=9, beta_end=0.5))
    batch = SamplingProblem(lambda x, t: mixture(x, t, schedule), noise(4, 0))
    for steps in range(1, 10):
        assert (
            len(
                check_timesteps(search_timesteps(batch, schedule=schedule, steps=steps, order=2), 9)
            )
            == steps
        )
    with pytest.raises(DDIMError, match="no path of 10 steps can be chosen among the teacher's 9"):
        search_timesteps(batch, schedule=schedule, steps=10)
    with pytest.raises(DDIMError, match="no path of 0 steps"):
        search_timesteps(batch, schedule=schedule, steps=0)


def test_the_shortest_path_is_the_best_of_all():
    schedule = NoiseSchedule.from_betas(make_betas(num_train_timesteps=9, beta_end=0.5))
    teacher = list(
        trajectory(
            lambda x, t: mixture(x, t, schedule),
            noise(8, 0),
            step_pairs(range(8, -1, -1)),
            schedule=schedule,
        )
    )
    starts = {state.t: state for state in teacher}
    ends = {state.s: state.x_s for state in teacher}

    def cost(levels):
        total = 0.0
        for t, s in step_pairs(levels):
            x = ddim_step(
                starts[t].x0,
                starts[t].eps,
                alpha_bar_t=schedule.alpha_bar(t),
                alpha_bar_s=schedule.alpha_bar(s),
            )
            total += float((x - ends[s]).pow(2).mean())
        return total

    for steps in range(1, 10):
        every = [[8, *sorted(rest, reverse=True)] for rest in combinations(range(8), steps - 1)]
        found = shortest_path(teacher, steps, schedule=schedule)
        assert len(found) == steps
        assert cost(found) == pytest.approx(min(map(cost, every)), rel=1e-5, abs=1e-12)
    with pytest.raises(DDIMError, match="no path of 10 steps can be chosen among the teacher's 9"):
        shortest_path(teacher, 10, schedule=schedule)
