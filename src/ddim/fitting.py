r"""Timesteps fitted to a model: the levels at which few evaluations come nearest to the flow that many would follow.

The **ODE error** of an image is the mean squared error per dimension, pixels in [0, 1], between the finished image and the one that
the same x_T becomes in many steps. It is what few steps cost, and no metric of quality is needed to lower it:

1. a teacher of many steps is recorded for a small batch;
2. a dynamic programme over pairs of its levels finds the path whose single steps stay nearest to it;
3. from the best of that path and the known spacings, a search moves all levels together (their first, their last, a bend between), and then
   one at a time, as long as the geometric mean of the true error at the end falls in both halves of the batch: few images would
   otherwise find levels that suit them alone. The common beginning of two paths is evaluated once;
4. on noise that the search has not seen, the fitted steps are compared with the spacings, and the best of all is returned.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ddim.denoiser import Denoiser, checked
from ddim.errors import DDIMError
from ddim.noise import seeded_randn
from ddim.prediction import Denoised
from ddim.sampler import State, sample, trajectory
from ddim.schedule import CLEAN, NoiseSchedule, add_noise
from ddim.step import check_order, ddim_step
from ddim.timesteps import SPACINGS, Spacing, select_timesteps, step_pairs

__all__ = [
    "Batch",
    "Fit",
    "Interval",
    "estimate_gamma",
    "fit_timesteps",
    "geometric_mean",
    "ode_error",
    "ode_errors",
    "search_timesteps",
    "shortest_path",
]

FITTED = "fitted"
MANY = "ddim-50"


class Batch(NamedTuple):
    """Images to be: a denoiser (labels and guidance are inside it) and the x_T [B, ...] that it starts from."""

    denoise: Denoiser
    x_t: Tensor


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Fit:
    """Fitted timesteps, and what they were compared with on held-out noise.

    Attributes:
        timesteps: The best of all: levels, falling.
        name: ``fitted``, or the name of the spacing that nothing found was better than.
        paths: The levels of each name.
        errors: The held-out ODE error of each image [B], by name; and of DDIM's 50 trailing steps as ``ddim-50``.
    """

    timesteps: list[int]
    name: str
    paths: dict[str, list[int]]
    errors: dict[str, Tensor]

    @property
    def best_spacing(self) -> str:
        """The spacing with the smallest error on the held-out noise."""
        return min(SPACINGS, key=lambda name: geometric_mean(self.errors[name]).mean)

    def ratio(self, name: str) -> Interval:
        """The error of ``timesteps`` over that of another name: the geometric mean over images."""
        return geometric_mean(self.errors[self.name] / self.errors[name])


def ode_error(x: Tensor, exact: Tensor, *, bound: float | None = 1.0) -> Tensor:
    """The mean squared error of each image per dimension, both clamped to +-bound and scaled to a range of 1.

    Args:
        x: Finished samples, shape [B, ...].
        exact: Those of many steps from the same x_T, same shape.
        bound: Of the finished image; None for latents, which have none: nothing is clamped or scaled then.

    Returns:
        Shape [B], float64; at least 1e-14, which is float32's rounding, so that ratios and logarithms exist.
    """
    difference = x - exact if bound is None else (x.clamp(-bound, bound) - exact.clamp(-bound, bound)) / (2 * bound)
    return difference.double().square().flatten(1).mean(1).clamp(min=1e-14)


def geometric_mean(values: Tensor) -> Interval:
    """The geometric mean of positive values [B] with its 95 % interval, normal in the logarithm; nan bounds for a single value."""
    logarithms = values.double().log()
    mean, margin = logarithms.mean(), 1.96 * logarithms.std() / len(values) ** 0.5 if len(values) > 1 else torch.nan
    return Interval(float(mean.exp()), float((mean - margin).exp()), float((mean + margin).exp()))


@torch.no_grad()
def fit_timesteps(
    batch: Batch,
    held_out: Iterable[Batch],
    *,
    schedule: NoiseSchedule,
    steps: int,
    order: int = 1,
    evaluations: int = 400,
    bound: float | None = 1.0,
    finish: Callable[[Batch], Tensor] | None = None,
) -> Fit:
    """Fits the levels of a number of steps to a model, and compares them with every spacing on held-out noise.

    Args:
        batch: What the search looks at; 32 images do.
        held_out: What the result is judged by, batch by batch.
        schedule: The levels.
        steps: N, how many levels to choose.
        order: Of the solver that will visit them.
        evaluations: About how many calls of the network the search may make.
        bound: As in :func:`ode_error`.
        finish: The finished images of many steps that held-out errors are measured against; None: 100 steps of order 2, trailing.

    Returns:
        The result; on the held-out noise it is no worse than any spacing.

    Raises:
        DDIMError: If there is nothing held out, or N or the order is invalid.
    """
    names: list[Spacing] = [cast(Spacing, name) for name in SPACINGS]
    paths = {str(name): select_timesteps(len(schedule), steps, name) for name in names}
    found = search_timesteps(batch, schedule=schedule, starts=paths.values(), order=order, evaluations=evaluations, bound=bound)
    paths = {FITTED: found, **paths}
    many, parts = select_timesteps(len(schedule), min(50, len(schedule)), "trailing"), []
    for part in held_out:
        exact = _teach(part, schedule=schedule, steps=100)[-1].x_s if finish is None else finish(part)
        errors = ode_errors(part, exact, paths, schedule=schedule, order=order, bound=bound)
        parts.append(errors | ode_errors(part, exact, {MANY: many}, schedule=schedule, bound=bound))
    if not parts:
        raise DDIMError("fitted timesteps are judged on noise that the search has not seen; give at least one held-out batch.")
    errors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    name = min(paths, key=lambda n: geometric_mean(errors[n]).mean)
    return Fit(paths[name], name, paths, errors)


@torch.no_grad()
def ode_errors(
    batch: Batch, exact: Tensor, paths: Mapping[str, Sequence[int]], *, schedule: NoiseSchedule, order: int = 1, bound: float | None = 1.0
) -> dict[str, Tensor]:
    """The :func:`ode_error` [B] of a batch by the name of each list of levels; ``exact`` [B, ...] is where many steps end."""

    def finished(levels: Sequence[int]) -> Tensor:
        return sample(batch.denoise, batch.x_t, step_pairs(levels), schedule=schedule, order=order)

    return {name: ode_error(finished(levels), exact, bound=bound).cpu() for name, levels in paths.items()}


@torch.no_grad()
def search_timesteps(
    batch: Batch,
    *,
    schedule: NoiseSchedule,
    starts: Iterable[Sequence[int]],
    order: int = 1,
    evaluations: int = 400,
    bound: float | None = 1.0,
) -> list[int]:
    """Moves levels as long as the geometric mean of the ODE error falls in both halves of the batch.

    Begins with the best of ``starts``, lists of equal length, and of the :func:`shortest_path` of that length along a teacher. Moves go
    along :func:`_directions`; each has a stride, which is halved when neither way is better. All levels move together until those
    strides are small, then each by itself; the search ends when no stride is left, or after about ``evaluations`` calls of the network.

    Returns:
        The levels, falling; all in [0, T).
    """
    check_order(order)
    total, candidates = len(schedule), [list(start) for start in starts]
    steps, calls = len(candidates[0]), 0
    teacher = _teach(batch, schedule=schedule, steps=max(50, 4 * steps))
    exact = teacher[-1].x_s

    def walk(levels: list[int], known: list[State]) -> tuple[Tensor, list[State]]:
        """The errors at the end of a path, and its states; what it has in common with a known path is not evaluated again."""
        nonlocal calls
        same = next((i for i, (state, level) in enumerate(zip(known, levels, strict=False)) if state.t != level), len(known))
        head = known[: max(same - 1, 0)]  # the last level in common is left for another one

        def denoise(x_t: Tensor, t: int | Tensor) -> Denoised:
            return Denoised(known[same - 1].x0, known[same - 1].eps) if same and t == levels[same - 1] else batch.denoise(x_t, t)

        pairs, last = step_pairs(levels)[len(head) :], head[-1] if head else None
        x = batch.x_t if last is None else last.x_s
        states = head + list(trajectory(denoise, x, pairs, schedule=schedule, order=order, previous=last))
        calls += len(levels) - same
        return ode_error(states[-1].x_s, exact, bound=bound).log().cpu(), states

    candidates.append(shortest_path(teacher, steps, schedule=schedule))
    (error, known), levels = min(((walk(path, []), path) for path in candidates), key=lambda found: float(found[0][0].mean()))
    calls, place = 0, torch.tensor(levels, dtype=torch.float64)

    def push(move: Tensor) -> bool:
        """Goes on along a move for as long as both halves gain; whether there was a step."""
        nonlocal place, levels, error, known
        moved = False
        while calls < evaluations:
            further = (place + move).clamp(max=total - 1)
            path = further.round().int().tolist()
            if path[-1] < 0 or any(above <= below for above, below in pairwise(path)):
                break
            there, states = walk(path, known)
            if not all(float(half.mean()) < 0 for half in (there - error).chunk(2)):
                break
            place, levels, error, known, moved = further, path, there, states, True
        return moved

    for directions, smallest in _directions(levels, total):
        place, strides = torch.tensor(levels, dtype=torch.float64), [stride for stride, _ in directions]
        while any(strides) and calls < evaluations:
            for k, (_, direction) in enumerate(directions):
                if strides[k] and not (push(strides[k] * direction) or push(-strides[k] * direction)):
                    strides[k] = strides[k] // 2 if strides[k] >= 2 * smallest else 0
    return levels


def _directions(levels: Sequence[int], total: int) -> list[tuple[list[tuple[int, Tensor]], int]]:
    """Along what levels are moved, in two phases: the first stride and the share of each level, and the smallest stride of the phase."""
    steps = len(levels)
    u = torch.linspace(0, 1, steps, dtype=torch.float64)
    shapes = [1 - u, u, 4 * u * (1 - u), 10 * u * (1 - u) * (1 - 2 * u)]  # the first level, the last, a bend, a bend both ways
    together = [(max(1, total // 32), shape) for shape in shapes[: steps - 1]]
    gaps = [above - below for above, below in zip([total, *levels], [*levels[1:], CLEAN], strict=False)]
    alone = [(max(1, gaps[k] // 4), torch.eye(steps, dtype=torch.float64)[k]) for k in reversed(range(steps))]  # the last are cheap
    return [(together, max(1, total // 256)), (alone, 1)]


def shortest_path(teacher: Sequence[State], steps: int, *, schedule: NoiseSchedule) -> list[int]:
    r"""Chooses N of a teacher's levels, from its first to clean data, by dynamic programming.

    The cost of an edge from t to s is the mean squared distance between one DDIM step with the predictions recorded at t and the
    teacher's own sample at s; the path with exactly N edges and the smallest sum is found.

    Args:
        teacher: The states of a trajectory of M steps.
        steps: N, in 1..M.
        schedule: The levels.

    Returns:
        N falling levels.

    Raises:
        DDIMError: If N exceeds M.

    References:
        Watson et al. Learning to Efficiently Sample from Diffusion Probabilistic Models. 2021. https://arxiv.org/abs/2106.03802

        Chen et al. On the Trajectory Regularity of ODE-based Diffusion Sampling. 2024. Sec. 4. https://arxiv.org/abs/2405.11326
    """
    count = len(teacher)
    if not 1 <= steps <= count:
        raise DDIMError(f"a path of {steps} steps cannot be chosen among the {count} of the teacher; record more of them.")
    cost = torch.full((count, count + 1), torch.inf, dtype=torch.float64)  # [i, j]: from the i-th level to the j-th; the last is clean
    for i, state in enumerate(teacher):
        for j in range(i + 1, count + 1):
            reached = ddim_step(
                state.x0, state.eps, alpha_bar_t=schedule.alpha_bar(state.t), alpha_bar_s=schedule.alpha_bar(teacher[j - 1].s)
            )
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


def _teach(batch: Batch, *, schedule: NoiseSchedule, steps: int) -> list[State]:
    """A trajectory that stands for the flow: the multistep on many trailing levels."""
    pairs = step_pairs(select_timesteps(len(schedule), min(steps, len(schedule)), "trailing"))
    return list(trajectory(batch.denoise, batch.x_t, pairs, schedule=schedule, order=2))


@torch.no_grad()
def estimate_gamma(
    data: Iterable[tuple[Denoiser, Tensor]], timesteps: Iterable[int], *, schedule: NoiseSchedule, seed: int = 0
) -> dict[int, float]:
    r"""Measures what the analytic variance needs, :math:`\Gamma_t = E\,\|\hat\epsilon(x_t, t)\|^2 / d`, in one pass over data.

    The mean square of the noise that was drawn, which is 1, is taken from the same images: it varies with that of the prediction, so
    that the difference 1 - Gamma, which is what counts, is exact where both nearly agree.

    Args:
        data: Batches of clean images [B, ...], each with the denoiser that fits it (its labels, its size).
        timesteps: The levels, in [0, T), at which the network is evaluated on every image.
        schedule: The levels.
        seed: Of the first image's noise; the next image has the next seed.

    Returns:
        Gamma of each level, clamped to [0, 1].

    Raises:
        DDIMError: If there are no images.

    References:
        Bao, Li, Zhu, Zhang. Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance in Diffusion Probabilistic Models. 2022.
        Eq. 8. https://arxiv.org/abs/2201.06503
    """
    levels, seen = list(timesteps), 0
    explained = dict.fromkeys(levels, 0.0)  # the sums over images of |eps|^2 - |predicted eps|^2, a dimension
    for given, x0 in data:
        denoise = checked(given)
        noise = seeded_randn(x0.shape[1:], range(seed + seen, seed + seen + len(x0))).to(x0.device)
        seen += len(x0)
        for t in levels:
            eps = denoise(add_noise(schedule, x0, noise, t), t).eps
            explained[t] += float((noise.double().square() - eps.double().square()).flatten(1).mean(1).sum())
    if not seen:
        raise DDIMError("gamma is measured on images; got none.")
    return {t: min(max(1 - total / seen, 0.0), 1.0) for t, total in explained.items()}
