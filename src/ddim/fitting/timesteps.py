"""Fits timesteps to a model: levels at which few evaluations come nearest to the flow of many.

The **ODE error** of an image is the mean squared error per dimension, pixels in [0, 1], between the
finished image and the one that the same x_T becomes in many steps. It is what few steps cost, and
no metric of quality is needed to lower it:

1. a teacher of many steps is recorded for a small batch;
2. ``ddim.fitting.search`` begins with the best of levels between trailing and quadratic ones and
   of the path along the teacher that a dynamic programme finds, and moves all levels as long as the
   geometric mean of the true error at the end falls in both halves of the batch;
3. on noise that the search has not seen, the fitted steps are compared with the spacings, and the
   best of all is returned.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ddim.core.checks import (
    check_function,
    check_kind,
    check_number,
    check_one_shape,
    check_samples,
    check_whole,
    wrong_argument,
)
from ddim.core.denoiser import Denoiser, checked
from ddim.core.noise import seeded_randn
from ddim.core.sampler import sample
from ddim.core.schedule import NoiseSchedule, add_noise, check_schedule
from ddim.core.timesteps import SPACINGS, Spacing, as_levels, select_timesteps, step_pairs
from ddim.errors import DDIMError
from ddim.fitting.search import (
    LEAST_ERROR,
    SamplingProblem,
    scaled_difference,
    search_timesteps,
    teach,
)

__all__ = [
    "SamplingProblem",
    "Fit",
    "Interval",
    "estimate_eps_mean_square",
    "fit_timesteps",
    "geometric_mean",
    "ode_error",
    "ode_errors",
]

FITTED = "fitted"
MANY = "ddim-50"


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
        errors: The held-out ODE error of each image [B], by name; and of DDIM's 50 trailing steps
            as ``ddim-50``.
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
    """The mean squared error per dimension of finished samples x [B, ...] from those of many steps
    of the same x_T, both clamped to +-bound (None for latents) and scaled to a range of 1; shape
    [B], float64, at least 1e-14 (float32's rounding). A DDIMError refuses samples that are no
    tensors of one shape, and a bound that is not above 0."""
    check_one_shape(x=x, exact=exact)
    if bound is not None:
        check_number("bound", bound, above=0)
    return scaled_difference(x, exact, bound=bound).square().sum(1).clamp(min=LEAST_ERROR)


def geometric_mean(values: Tensor) -> Interval:
    """The geometric mean of positive values [B] with its 95 % interval, normal in the logarithm;
    nan bounds for a single value. A DDIMError refuses what are no such values."""
    check_samples(values=values)
    if values.ndim != 1 or len(values) == 0:
        raise wrong_argument("values", "be positive numbers, shape [B]", values)
    logarithms = values.double().log()
    mean, margin = logarithms.mean(), torch.tensor(torch.nan)
    if len(values) > 1:
        margin = 1.96 * logarithms.std() / len(values) ** 0.5
    return Interval(float(mean.exp()), float((mean - margin).exp()), float((mean + margin).exp()))


@torch.no_grad()
def fit_timesteps(
    problem: SamplingProblem,
    held_out: Iterable[SamplingProblem],
    *,
    schedule: NoiseSchedule,
    steps: int,
    order: int = 1,
    evaluations: int = 300,
    bound: float | None = 1.0,
    finish: Callable[[SamplingProblem], Tensor] | None = None,
) -> Fit:
    """Fits the levels of a number of steps to a model, and compares them with every spacing on
    held-out noise.

    Args:
        problem: What the search looks at; 32 images are enough.
        held_out: What the result is judged by, and is no worse on than any spacing.
        schedule: The levels.
        steps: N, how many levels to choose.
        order: The order of the solver that will visit them.
        evaluations: About how many calls of the network the search may make.
        bound: As in :func:`ode_error`.
        finish: Makes the images of many steps that held-out errors are measured against. Default:
            100 quadratic steps of order 2.

    Raises:
        DDIMError: If there is nothing held out, or an argument is invalid.
    """
    check_schedule(schedule)
    _check_problem("problem", problem)
    evaluations = check_whole("evaluations", evaluations, least=0)
    if bound is not None:
        check_number("bound", bound, above=0)
    if finish is not None:
        check_function("finish", finish, "a function of a SamplingProblem")
    if not hasattr(held_out, "__iter__"):
        raise wrong_argument("held_out", "be a list of SamplingProblems", held_out)
    total = len(schedule)
    paths = {name: select_timesteps(total, steps, cast(Spacing, name)) for name in SPACINGS}
    found = search_timesteps(
        problem, schedule=schedule, steps=steps, order=order, evaluations=evaluations, bound=bound
    )
    paths = {FITTED: found, **paths}
    many, parts = select_timesteps(total, min(50, total), "trailing"), []
    for part in held_out:
        _check_problem("each of held_out", part)
        exact = finish(part) if finish else teach(part, schedule=schedule, steps=100)[-1].x_s
        errors = ode_errors(part, exact, paths, schedule=schedule, order=order, bound=bound)
        parts.append(errors | ode_errors(part, exact, {MANY: many}, schedule=schedule, bound=bound))
    if not parts:
        what = "fitted timesteps are judged on noise that the search has not seen"
        raise DDIMError(f"{what}; give at least one held-out batch.")
    errors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    name = min(paths, key=lambda n: geometric_mean(errors[n]).mean)
    return Fit(paths[name], name, paths, errors)


def _check_problem(name: str, problem: SamplingProblem) -> None:
    check_kind(name, problem, SamplingProblem, "a SamplingProblem, a denoiser and its x_t")
    check_samples(**{f"x_t of {name}": problem.x_t})


@torch.no_grad()
def ode_errors(
    problem: SamplingProblem,
    exact: Tensor,
    paths: Mapping[str, Sequence[int]],
    *,
    schedule: NoiseSchedule,
    order: int = 1,
    bound: float | None = 1.0,
) -> dict[str, Tensor]:
    """The :func:`ode_error` [B] of a batch by the name of each list of levels; ``exact`` [B, ...]
    is where many steps end."""
    errors = {}
    for name, levels in paths.items():
        x = sample(*problem, step_pairs(levels), schedule=schedule, order=order)
        errors[name] = ode_error(x, exact, bound=bound).cpu()
    return errors


@torch.no_grad()
def estimate_eps_mean_square(
    data: Iterable[tuple[Denoiser, Tensor]],
    timesteps: Iterable[int],
    *,
    schedule: NoiseSchedule,
    seed: int = 0,
) -> dict[int, float]:
    r"""Measures what the analytic variance needs, in one pass over data.

    .. math:: \Gamma_t = E\,\|\hat\epsilon(x_t, t)\|^2 / d, \quad \text{clamped to } [0, 1]

    The drawn noise, whose mean square is 1, is measured on the same images: both vary together, so
    that the difference 1 - Gamma, which is what counts, is exact where they nearly agree.

    Args:
        data: Batches of clean images [B, ...], each with the denoiser of its labels and size.
        timesteps: The levels, in [0, T), at which the network is evaluated on every image.
        schedule: The levels.
        seed: The seed of the first image's noise; the next image has the next one.

    Raises:
        DDIMError: If there are no images, or an argument is of another kind.

    References:
        Bao, Li, Zhu, Zhang. Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance in
        Diffusion Probabilistic Models. 2022. Eq. 8. https://arxiv.org/abs/2201.06503
    """
    check_schedule(schedule)
    levels, seen, seed = as_levels(timesteps), 0, check_whole("seed", seed, least=0)
    if not hasattr(data, "__iter__"):
        raise wrong_argument("data", "be batches, each a denoiser and its images", data)
    missing = dict.fromkeys(levels, 0.0)  # sums over images of mean(eps^2 - predicted eps^2)
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise wrong_argument("each batch of data", "be a denoiser and its images", batch)
        given, x0 = batch
        check_samples(**{"the images of data": x0})
        denoise = checked(given)
        noise = seeded_randn(x0.shape[1:], range(seed + seen, seed + seen + len(x0))).to(x0.device)
        seen += len(x0)
        for t in levels:
            eps = denoise(add_noise(schedule, x0, noise, t), t).eps
            difference = noise.double().square() - eps.double().square()
            missing[t] += float(difference.flatten(1).mean(1).sum())
    if not seen:
        raise DDIMError("eps_mean_square is measured on images; got none.")
    return {t: min(max(1 - total / seen, 0.0), 1.0) for t, total in missing.items()}
