"""The search for levels at which few evaluations of a model come nearest to the flow of many.

At order 2 the difference r of finished images from the exact ones is nearly linear in the levels,
so few walks tell where the levels should be: the derivatives of r by each level are measured, and
damped Gauss-Newton steps move all of them at once. At order 1 the difference is large, and less of
a line: such steps move few places first, and levels that slide along a few smooth shapes are tried
beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from ddim.core.denoiser import Denoiser
from ddim.core.prediction import Denoised
from ddim.core.sampler import State, trajectory
from ddim.core.schedule import CLEAN, NoiseSchedule
from ddim.core.step import check_order, ddim_step
from ddim.core.timesteps import select_timesteps, step_pairs
from ddim.errors import DDIMError

__all__ = [
    "SamplingProblem",
    "best_move",
    "power_timesteps",
    "scaled_difference",
    "search_timesteps",
    "shortest_path",
    "teach",
]

POWERS = (1.0, 1.25, 1.5, 1.75, 2.0)
LEAST_ERROR = 1e-14
"""The smallest error of an image, float32's rounding, so that logarithms and ratios exist."""


class SamplingProblem(NamedTuple):
    """A denoiser (labels and guidance are inside it), and the x_T [B, ...] that it finishes."""

    denoise: Denoiser
    x_t: Tensor


class Walk(NamedTuple):
    """A walked path: its levels, its states, and its images less the exact ones, [B, D]."""

    levels: list[int]
    states: list[State]
    difference: Tensor

    @property
    def errors(self) -> Tensor:
        """The logarithm of the mean square error of each image [B]."""
        return self.difference.double().square().sum(1).clamp(min=LEAST_ERROR).log()

    @property
    def error(self) -> float:
        """Their mean: the logarithm of the geometric mean."""
        return float(self.errors.mean())


@dataclass
class Walks:
    """Walks from one noise, counted in calls of the network."""

    problem: SamplingProblem
    exact: Tensor
    schedule: NoiseSchedule
    order: int
    bound: float | None
    calls: int = 0

    def __call__(self, levels: list[int], known: Walk | None = None) -> Walk:
        """Walks a path; what it has in common with a known one is not evaluated again."""
        states = [] if known is None else known.states
        agree = (state.t == level for state, level in zip(states, levels, strict=False))
        same = sum(takewhile(bool, agree))
        head = states[: max(same - 1, 0)]  # the last level in common is left for another one

        def denoise(x_t: Tensor, t: int | Tensor) -> Denoised:
            if same and t == levels[same - 1]:
                return Denoised(states[same - 1].x0, states[same - 1].eps)
            return self.problem.denoise(x_t, t)

        pairs, last = step_pairs(levels)[len(head) :], head[-1] if head else None
        x = self.problem.x_t if last is None else last.x_s
        rest = trajectory(
            denoise, x, pairs, schedule=self.schedule, order=self.order, previous=last
        )
        walked = [*head, *rest]
        self.calls += len(levels) - same
        difference = scaled_difference(walked[-1].x_s, self.exact, bound=self.bound)
        return Walk(levels, walked, difference.float().cpu())


def scaled_difference(x: Tensor, exact: Tensor, *, bound: float | None) -> Tensor:
    """Finished samples less exact ones [B, D], float64, both clamped to +-bound and scaled so that
    the sum of squares of a row is an image's mean square in a range of 1; None for latents does
    neither."""
    difference = x - exact
    if bound is not None:
        difference = (x.clamp(-bound, bound) - exact.clamp(-bound, bound)) / (2 * bound)
    flat: Tensor = difference.double().flatten(1) / difference.shape[1:].numel() ** 0.5
    return flat


@torch.no_grad()
def search_timesteps(
    problem: SamplingProblem,
    *,
    schedule: NoiseSchedule,
    steps: int,
    order: int = 1,
    evaluations: int = 300,
    bound: float | None = 1.0,
) -> list[int]:
    """Finds levels, falling, at which the geometric mean of the ODE error is small in both halves
    of a batch.

    It begins with the best of :func:`power_timesteps` and of the :func:`shortest_path` along a
    teacher, moves levels as long as both halves gain, and goes on with the next best while
    evaluations are left.

    Args:
        problem: 32 images are enough. Few images find levels that suit them alone.
        schedule: The levels to choose from.
        steps: N, how many to choose.
        order: The order of the solver that will visit them.
        evaluations: About how many calls of the network may be made after the starts are known.
            Where they do not suffice to try the levels one by one, fewer places are moved, and the
            levels between two of them follow.
        bound: The largest magnitude of finished images; None for latents, which have none.

    Raises:
        DDIMError: If N or the order is invalid.

    References:
        Levenberg. A Method for the Solution of Certain Non-Linear Problems in Least Squares. 1944.
        https://doi.org/10.1090/qam/10666

        Broyden. A Class of Methods for Solving Nonlinear Simultaneous Equations. 1965.
        https://doi.org/10.1090/S0025-5718-1965-0198670-6
    """
    check_order(order)
    total = len(schedule)
    powers = (power_timesteps(total, steps, power) for power in POWERS)
    teacher = teach(problem, schedule=schedule, steps=max(64, 4 * steps))
    starts = [path for path in powers if path is not None]
    starts.append(shortest_path(teacher, steps, schedule=schedule))
    walks = Walks(problem, teacher[-1].x_s, schedule=schedule, order=order, bound=bound)
    begun = sorted((walks(path) for path in starts), key=lambda walk: walk.error)
    walks.calls, ends = 0, begun[:1]
    most = min(steps, max(1, evaluations // steps))
    # Few places first at order 1, where the difference is less of a line.
    stages = [most] if order == 2 and steps > 1 else [min(4, most), most]
    for start in begun:
        if len(stages) > 1:
            ends.append(_slide(walks, start, evaluations // 2))
        end = start
        for places in stages:
            if walks.calls + places * steps // 2 <= evaluations:
                end = _descend(walks, end, _hats(steps, places), evaluations)
        ends.append(end)
    return min(ends, key=lambda walk: walk.error).levels


def power_timesteps(num_train_timesteps: int, num_steps: int, power: float) -> list[int] | None:
    r"""Levels :math:`T (1 - i/N)^p - 1`: trailing at p = 1, near the quadratic ones at p = 2; None
    where two of them would coincide."""
    shares = [(1 - i / num_steps) ** power for i in range(num_steps)]
    levels = [max(round(num_train_timesteps * share) - 1, 0) for share in shares]
    return levels if _falling(levels) else None


def _slide(walks: Walks, best: Walk, evaluations: int) -> Walk:
    """Moves all levels along one shape after the other while that helps; strides that help neither
    way are halved."""
    total, steps = len(walks.schedule), len(best.levels)
    u = torch.linspace(0, 1, steps, dtype=torch.float64)
    place = torch.tensor(best.levels, dtype=torch.float64)
    # The first level, the last, a bend, a bend both ways.
    shapes = [1 - u, u, 4 * u * (1 - u), 10 * u * (1 - u) * (1 - 2 * u)]
    longest = max(1, total // (3 * steps))  # a third of a step
    strides, least = [longest] * min(len(shapes), max(1, steps - 1)), max(1, longest // 8)

    def push(move: Tensor) -> bool:
        """Goes on along a move; whether there was a step."""
        nonlocal place, best
        moved = False
        while walks.calls < evaluations:
            path = _moved(place.tolist(), move, total)
            if path is None or path == best.levels:
                break
            there = walks(path, best)
            if not _both_gain(best, there):
                break
            place, best, moved = (place + move).clamp(0, total - 1), there, True
        return moved

    while any(strides) and walks.calls < evaluations:
        for k, stride in enumerate(strides):
            if stride and not (push(stride * shapes[k]) or push(-stride * shapes[k])):
                strides[k] = stride // 2 if stride >= 2 * least else 0
    return best


def _descend(walks: Walks, best: Walk, hats: Tensor, evaluations: int) -> Walk:
    """Moves all levels by Gauss-Newton steps until two in a row do not help; after one of these the
    next is shorter (Levenberg), and each corrects the derivatives (Broyden)."""
    total = len(walks.schedule)
    reach = _reach(best.levels, total if walks.order == 2 else torch.inf) @ hats.T / hats.sum(1)
    slopes, rows = torch.zeros(len(hats), *best.difference.shape), torch.linalg.pinv(hats)
    for k, hat in enumerate(hats):
        stride = max(1, int(reach[k]) // 4)
        for move in (stride * hat, -stride * hat):
            path = _moved(best.levels, move, total)
            made = 0.0 if path is None else float((_between(best.levels, path) @ rows)[k])
            # Not where the first or the last possible level is in the way.
            if path is not None and abs(made) >= stride / 2:
                slopes[k] = (walks(path, best).difference - best.difference) / made
                break
    damping, refused = 0.1, 0
    while walks.calls < evaluations and refused < 2:
        move = best_move(best.difference, slopes, damping / reach.square()) @ hats
        path = _moved(best.levels, move, total)
        if path == best.levels:
            break
        if path is None:
            damping *= 4
            continue
        there, by = walks(path, best), _between(best.levels, path) @ rows
        missed = there.difference - best.difference - torch.einsum("k,kbd->bd", by.float(), slopes)
        weights = by / reach.square()
        weights = (weights / (by @ weights).clamp(min=1e-6)).float()
        slopes += torch.einsum("k,bd->kbd", weights, missed)
        if _both_gain(best, there):
            best, refused, damping = there, 0, damping / 4
        else:
            refused, damping = refused + 1, damping * 4
    return best


def _both_gain(before: Walk, after: Walk) -> bool:
    """Whether the error fell in both halves of the images, so that levels do not suit few alone."""
    return all(float(half.mean()) < 0 for half in (after.errors - before.errors).chunk(2))


def best_move(difference: Tensor, slopes: Tensor, damping: Tensor) -> Tensor:
    r"""Where the geometric mean of the errors would be smallest, were the difference linear in the
    move.

    .. math::
        \min_\delta \frac{1}{B} \sum_b \log \|r_b + \textstyle\sum_k \delta_k J_{kb}\|^2
            + \sum_k \lambda_k \delta_k^2

    by weighted least squares: the weight of an image is the inverse of its error, by the last
    solution.

    Args:
        difference: r, shape [B, D].
        slopes: J, shape [K, B, D].
        damping: lambda, shape [K], float64, as the result delta.
    """
    r, j = difference.double(), slopes.transpose(0, 1).double()
    squares, products, norms = j @ j.mT, (j @ r[..., None])[..., 0], r.square().sum(1)
    move = torch.zeros_like(damping)
    for _ in range(30):
        errors = (norms + 2 * products @ move + (squares @ move) @ move).clamp(min=LEAST_ERROR)
        weights = 1 / (errors * len(errors))
        curvature = torch.einsum("b,bkl->kl", weights, squares) + damping.diag()
        move = -torch.linalg.solve(curvature, weights @ products)
    return move


def _hats(steps: int, places: int) -> Tensor:
    """How far each level goes along with each place that is moved, [places, steps]: all the way
    there, and in proportion between two."""
    knots = torch.linspace(0, steps - 1, places, dtype=torch.float64).round()
    if places == 1:
        return torch.ones(1, steps, dtype=torch.float64)
    along = torch.arange(steps, dtype=torch.float64)
    right = torch.searchsorted(knots, along).clamp(1, places - 1)
    share = (along - knots[right - 1]) / (knots[right] - knots[right - 1])
    hats = torch.zeros(places, steps, dtype=torch.float64)
    hats[right - 1, along.long()] = 1 - share
    hats[right, along.long()] = share
    return hats


def _reach(levels: Sequence[int], above: float) -> Tensor:
    """The distance of each level to its nearer neighbour, of which the first has ``above``. With T
    there it hardly moves from T-1, as order 2 wants; DDIM's steps often better begin far below."""
    edged = torch.tensor([above, *levels, CLEAN], dtype=torch.float64)
    return torch.minimum(edged[:-2] - edged[1:-1], edged[1:-1] - edged[2:])


def _between(levels: Sequence[int], path: Sequence[int]) -> Tensor:
    return torch.tensor([b - a for a, b in zip(levels, path, strict=True)], dtype=torch.float64)


def _moved(levels: Sequence[float], move: Tensor, total: int) -> list[int] | None:
    """The levels after a move, inside [0, T); None if they would not fall any more."""
    reached = (round(level + by) for level, by in zip(levels, move.tolist(), strict=True))
    path = [min(max(level, 0), total - 1) for level in reached]
    return path if _falling(path) else None


def _falling(levels: Sequence[int]) -> bool:
    return all(above > below for above, below in pairwise(levels))


def shortest_path(teacher: Sequence[State], steps: int, *, schedule: NoiseSchedule) -> list[int]:
    r"""Chooses N of a teacher's levels, from its first to clean data, by dynamic programming.

    The cost of an edge from t to s is the mean squared distance between one DDIM step with the
    predictions recorded at t and the teacher's own sample at s; the path with exactly N edges and
    the smallest sum is found.

    Raises:
        DDIMError: If N exceeds the number of the teacher's steps.

    References:
        Watson et al. Learning to Efficiently Sample from Diffusion Probabilistic Models. 2021.
        https://arxiv.org/abs/2106.03802

        Chen et al. On the Trajectory Regularity of ODE-based Diffusion Sampling. 2024. Sec. 4.
        https://arxiv.org/abs/2405.11326
    """
    count = len(teacher)
    if not 1 <= steps <= count:
        raise DDIMError(f"no path of {steps} steps can be chosen among the teacher's {count}.")
    # [i, j]: from the i-th level to the j-th, of which the last is clean data.
    cost = torch.full((count, count + 1), torch.inf, dtype=torch.float64)
    for i, state in enumerate(teacher):
        for j in range(i + 1, count + 1):
            t, s = schedule.alpha_bar(state.t), schedule.alpha_bar(teacher[j - 1].s)
            reached = ddim_step(state.x0, state.eps, alpha_bar_t=t, alpha_bar_s=s)
            cost[i, j] = (reached - teacher[j - 1].x_s).square().mean()
    total, origins = torch.full((count + 1,), torch.inf, dtype=torch.float64), []
    total[0] = 0
    for _ in range(steps):
        total, origin = (total[:-1, None] + cost).min(0)
        origins.append(origin.tolist())
    place, levels = count, []
    for origin in reversed(origins):
        place = origin[place]
        levels.append(teacher[place].t)
    return levels[::-1]


def teach(problem: SamplingProblem, *, schedule: NoiseSchedule, steps: int) -> list[State]:
    """A trajectory that stands for the flow: the multistep on many quadratic levels, since trailing
    ones err twice as much on the embedded model, and fitted levels would inherit that."""
    pairs = step_pairs(select_timesteps(len(schedule), min(steps, len(schedule)), "quadratic"))
    return list(trajectory(problem.denoise, problem.x_t, pairs, schedule=schedule, order=2))
