r"""A route: everything that a walk from noise to data needs, resolved once.

A step of a route is one row of coefficients,

.. math:: x_s = a\,\hat x_0 + b\,\hat\epsilon + c\,z + d\,(\hat x_0 - \hat x_0^{\mathrm{previous}}),

so that another solver is other rows, and is walked by the same loop
(:func:`ddim.core.sampler.walk`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddim.core.checks import check_kind
from ddim.core.denoiser import Clip
from ddim.core.schedule import CLEAN, NoiseSchedule, check_schedule
from ddim.core.step import (
    Eta,
    StepCoefficients,
    check_eta,
    check_order,
    multistep_weight,
    refuse_noise_upwards,
    step_coefficients,
)
from ddim.core.timesteps import Pair, as_pairs
from ddim.errors import DDIMError

__all__ = ["Route", "make_route"]

_UNCLIPPED = Clip()


@dataclass(frozen=True, eq=False)
class Route:
    """The steps of one walk, and how it treats each prediction.

    Attributes:
        schedule: The levels.
        pairs: The level that each step leaves, and the one that it reaches.
        weights: The coefficients (a, b, c) of each step, float64 [N] each.
        multistep: The coefficient d of each step, float64 [N]; 0 where the step is DDIM's.
        eta: 0 deterministic, 1 DDPM, ``"sigma-hat"`` the paper's larger noise.
        order: 1 DDIM, 2 its multistep.
        clip: How the predicted x0 is kept in range.
        sampler: ``ddim``, which walks the rows; or an exactly invertible sampler, which makes its
            own coefficients of the levels (:mod:`ddim.inversion.reversible`).
        analytic: Whether the variance is the analytic one.
        eps_mean_square: For the analytic variance: the value of each level that a step leaves; None
            if it is yet to be measured (:meth:`measured`).
    """

    schedule: NoiseSchedule
    pairs: tuple[Pair, ...]
    weights: StepCoefficients
    multistep: Tensor
    eta: Eta = 0.0
    order: int = 1
    clip: Clip = _UNCLIPPED
    sampler: str = "ddim"
    analytic: bool = False
    eps_mean_square: Mapping[int, float] | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        levels = f" from level {self.pairs[0][0]} to {self.pairs[-1][1]}" if self.pairs else ""
        how = f"eta {self.eta}, order {self.order}, clip {self.clip.kind}"
        more = ", analytic variance" * self.analytic
        return f"Route({self.sampler}, {len(self)} steps{levels}, {how}{more}, {self.schedule})"

    def __getitem__(self, chosen: slice) -> "Route":
        """The route of some of the steps."""
        weights = StepCoefficients(*(column[chosen] for column in self.weights))
        multistep = self.multistep[chosen]
        return replace(self, pairs=self.pairs[chosen], weights=weights, multistep=multistep)

    @property
    def timesteps(self) -> list[int]:
        """The levels that the steps leave, in the order of the walk."""
        return [t for t, _ in self.pairs]

    @property
    def is_random(self) -> bool:
        """Whether every step draws noise."""
        return self.eta != 0 or self.analytic

    def measured(self, eps_mean_square: Mapping[int, float]) -> "Route":
        """The same route with the analytic variance of measured values; see :func:`make_route`."""
        return make_route(
            self.schedule,
            self.pairs,
            eta=self.eta,
            order=self.order,
            clip=self.clip,
            sampler=self.sampler,
            eps_mean_square=eps_mean_square,
        )


def make_route(
    schedule: NoiseSchedule,
    pairs: Sequence[Pair],
    *,
    eta: Eta = 0.0,
    order: int = 1,
    clip: Clip = _UNCLIPPED,
    sampler: str = "ddim",
    analytic: bool = False,
    eps_mean_square: Mapping[int, float] | None = None,
    before: int | None = None,
) -> Route:
    """Computes the coefficients of a route, whose attributes the options are.

    ``pairs`` come from :func:`ddim.core.timesteps.step_pairs`, or reversed (eta = 0). At order 2
    the step to clean data is DDIM's, and so is the first, unless ``before`` gives the level of a
    step before it. ``eps_mean_square`` implies ``analytic``.

    Raises:
        DDIMError: If eta or order is invalid or does not fit these levels, if ``eps_mean_square``
            lacks a level, if ``pairs`` is not a walk of steps (t, s), or noise is to be drawn going
            up.
    """
    check_schedule(schedule)
    pairs, eta = as_pairs(pairs), check_eta(eta)
    if eps_mean_square is not None:
        wanted = "the value of each level, from estimate_eps_mean_square"
        check_kind("eps_mean_square", eps_mean_square, Mapping, wanted)
    analytic = analytic or eps_mean_square is not None
    goes_up = any(s > t for t, s in pairs)
    refuse_noise_upwards(eta, goes_up=goes_up)
    if analytic and goes_up:
        raise DDIMError("the analytic variance is of steps to less noise; these pairs go up.")
    check_order(order, eta=eta, analytic=analytic)
    alpha_bar_t, alpha_bar_s = (
        schedule.alpha_bar(torch.tensor([pair[i] for pair in pairs], dtype=torch.int64))
        for i in (0, 1)
    )
    values = _values_at([t for t, _ in pairs], eps_mean_square) if analytic else None
    weights = step_coefficients(alpha_bar_t, alpha_bar_s, eta=eta, eps_mean_square=values)
    multistep = torch.zeros_like(alpha_bar_t)
    if order == 2:
        first = alpha_bar_t[:1] if before is None else schedule.alpha_bar(torch.tensor([before]))
        previous = torch.cat([first, alpha_bar_t])[: len(pairs)]
        is_last = torch.tensor([s == CLEAN for _, s in pairs], dtype=torch.bool)
        multistep = multistep_weight(previous, alpha_bar_t, alpha_bar_s).masked_fill(is_last, 0.0)
    steps = (schedule, tuple(pairs), weights, multistep)
    return Route(*steps, eta, order, clip, sampler, analytic, eps_mean_square)


def _values_at(levels: Sequence[int], eps_mean_square: Mapping[int, float] | None) -> Tensor:
    """The value at each level; 1, which adds no variance, if it is yet to be measured."""
    if eps_mean_square is None:
        return torch.ones(len(levels), dtype=torch.float64)
    missing = [t for t in levels if t not in eps_mean_square]
    if missing:
        advice = "estimate it for all levels that are visited"
        raise DDIMError(f"eps_mean_square has no value for level {missing[0]}; {advice}.")
    return torch.tensor([eps_mean_square[t] for t in levels], dtype=torch.float64)
