r"""The coefficients of a scheduler's steps over one list of timesteps, as tables that a tensor
timestep gathers from.

Where nothing is clipped a step is linear in the sample, the model's output and the noise. All
coefficients are rows of one table over the T levels,

.. math::
    \hat x_0 = a\,x_t + b\,m, \qquad x_s = c\,x_t + d\,m + e\,z + f\,\mathrm{clip}(\hat x_0),

so a step with a tensor timestep gathers a row and combines it: no host reads a device, and
``torch.compile`` sees one graph."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ddim.core.prediction import PredictionType, Solution, check_prediction_type, solve
from ddim.core.schedule import CLEAN, NoiseSchedule
from ddim.core.step import Eta, check_order, fold, unchecked_coefficients, unchecked_weight
from ddim.core.tables import gather
from ddim.core.timesteps import step_pairs
from ddim.errors import DDIMError

__all__ = ["Before", "Plan", "Table", "advance", "correct", "make_plan"]

_Mode = Literal["folded", "split", "rederived"]
"""How x_s is put together: from x_t and m; from x0 and eps; or from x0 and the eps that a clipped
x0 implies."""


@dataclass(frozen=True, eq=False)
class Table:
    """The coefficients (a, b, c, d, e, f) of all levels, [6, T] without trailing rows of 0;
    the plan's multistep; and the columns that integers have asked for, with :attr:`Plan.ends`."""

    mode: _Mode
    columns: Tensor
    multistep: Tensor | None = None
    at: dict[int, tuple[tuple[Tensor, ...], int, int | None]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Plan:
    """What the steps over one list of timesteps need (:func:`make_plan`).

    Attributes:
        schedule: The levels.
        prediction_type: What the model predicts.
        inverse: Whether steps go up to t, from the level below it in the list.
        clip: What happens to x0.
        ends: For each timestep of the list, the level that its step leaves and the one it reaches.
        source: alpha_bar of the level that each t steps from, shape [T], float64.
        target: alpha_bar of the level that it steps to, same shape.
        multistep: For order 2, the weight of x0 - x0_previous at each t, and the level before t;
            shape [2, T], float64.
        refuses_zero_snr: Whether epsilon prediction is refused where the SNR is 0.
        tables: The coefficients by eta, rederive, dtype and device.
    """

    schedule: NoiseSchedule
    prediction_type: PredictionType
    inverse: bool
    clip: Callable[[Tensor], Tensor] | None
    ends: Mapping[int, tuple[int, int]]
    source: Tensor
    target: Tensor
    multistep: Tensor | None = None
    refuses_zero_snr: bool = True
    tables: dict[tuple[Eta, bool, torch.dtype, torch.device], Table] = field(default_factory=dict)

    def table(self, eta: Eta, rederive: bool, dtype: torch.dtype, device: torch.device) -> Table:
        """The coefficients of such steps, made at their first use."""
        key = (eta, rederive, dtype, device)
        table = self.tables.get(key)
        if table is None and is_compiling():
            # Not kept: a traced step must not change its own guards.
            return self._make_table(*key)
        if table is None:
            with torch.inference_mode(False):  # else it could take no part in a backward pass later
                table = self.tables[key] = self._make_table(*key)
        return table

    def _make_table(
        self, eta: Eta, rederive: bool, dtype: torch.dtype, device: torch.device
    ) -> Table:
        mode: _Mode
        check_order(1 if self.multistep is None else 2, eta=eta)
        if self.clip is not None and rederive:
            mode = "rederived"
        else:
            # In half precision many updates of the folded form are below half an ulp and vanish;
            # the form in x0 and eps keeps them.
            is_folded = self.clip is None and dtype in (torch.float32, torch.float64)
            mode = "folded" if is_folded else "split"
        held = torch.float64 if dtype == torch.float64 else torch.float32
        multistep = None if self.multistep is None else self.multistep.to(device, held)
        # A row that is not gathered is time saved at each step.
        rows = 6 if mode != "folded" else 4 if eta == 0 else 5
        return Table(mode, _coefficients(self, eta, mode)[:rows].to(device, held), multistep)

    def check_level(self, t: int, eta: Eta = 0.0) -> bool:
        """Whether t is in the list.

        Raises:
            DDIMError: If t lies outside [0, T); or it is not in the list, and has no solution, or
                eta is above 1.
        """
        if not 0 <= t < len(self.schedule):
            allowed = f"[0, {len(self.schedule)}), the levels the model was trained on"
            raise DDIMError(f"a timestep must lie in {allowed}; got {t}.")
        if t in self.ends:
            return True
        self._check_solvable(t)
        if isinstance(eta, float) and eta > 1:
            raise DDIMError(
                f"eta above 1 is for the listed timesteps only; got eta={eta} at t={t}."
            )
        return False

    def _check_solvable(self, t: int) -> None:
        if self.prediction_type == "epsilon" and self.source[t] == 0 and self.refuses_zero_snr:
            raise DDIMError(
                f"epsilon prediction cannot be used at t={t}: the SNR is 0 there, so x0 = (x_t - "
                "sigma eps) / alpha divides by 0. Use v_prediction or sample, or start below "
                f"{t} (set_timesteps(timesteps=[...]))."
            )


def make_plan(
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    *,
    stride: int,
    prediction_type: PredictionType = "epsilon",
    inverse: bool = False,
    clip: Callable[[Tensor], Tensor] | None = None,
    order: int = 1,
    refuses_zero_snr: bool = True,
) -> Plan:
    """Plans the steps over a list of timesteps; other options are attributes of :class:`Plan`.

    The timesteps fall in both directions, and those that the schedule does not have are left out.
    From a level that is not in the list a step goes ``stride`` levels. Order 2 is the multistep.

    Raises:
        DDIMError: If the prediction type or the order is unknown, or epsilon is predicted at a
            listed level whose SNR is 0.
    """
    check_prediction_type(prediction_type)
    total = len(schedule)
    below = (torch.arange(total) - stride).clamp(min=CLEAN)
    pairs = [(t, s) for t, s in (step_pairs(timesteps) if timesteps else ()) if t < total]
    grid, following = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    below[grid] = following
    lower, upper = schedule.alpha_bar(below), schedule.alphas_cumprod
    multistep = None
    if check_order(order) == 2:
        multistep = torch.stack([torch.zeros(total), torch.full((total,), CLEAN)]).double()
        multistep[1, grid[1:]] = grid[:-1].double()
        multistep[0, grid[1:-1]] = unchecked_weight(
            *(schedule.alpha_bar(levels) for levels in (grid[:-2], grid[1:-1], grid[2:]))
        )
    plan = Plan(
        schedule,
        prediction_type,
        inverse,
        clip,
        {t: (s, t) if inverse else (t, s) for t, s in pairs},
        source=lower if inverse else upper,
        target=upper if inverse else lower,
        multistep=multistep,
        refuses_zero_snr=refuses_zero_snr,
    )
    for t in (plan.source == 0).nonzero().flatten().tolist():
        if t in plan.ends:
            plan._check_solvable(t)
    return plan


def _solution(plan: Plan) -> Solution:
    """x0 and eps from (x, m) at the source level of each t."""
    found = solve(plan.prediction_type, plan.source)
    if not (plan.inverse and plan.prediction_type == "sample"):
        return found
    # Clean data determines x0 (itself) but no eps. The network was called at t, so its x0 is read
    # as eps there: this inverts the same network expressed as an epsilon prediction.
    clean, at_t = plan.source == 1, solve("sample", plan.target)
    one = torch.ones_like(plan.source)
    instead = Solution(one, torch.zeros_like(one), at_t.eps_x, at_t.eps_m)
    return Solution(*(torch.where(clean, *both) for both in zip(instead, found, strict=True)))


def _coefficients(plan: Plan, eta: Eta, mode: _Mode) -> Tensor:
    """All columns (a, b, c, d, e, f) of the module's equation, [6, T], float64 on the CPU."""
    source, target = plan.source, plan.target
    if isinstance(eta, float) and eta > 1:
        # A level that no step leaves may not admit this eta, and must not refuse it.
        listed = torch.tensor([t in plan.ends for t in range(len(source))])
        target = torch.where(listed, target, source)
    weights, found = unchecked_coefficients(source, target, eta=eta), _solution(plan)
    none = torch.zeros_like(source)
    if mode == "folded":
        (x, output, _), x0 = fold(weights, found), none
    elif mode == "split":
        x, output, x0 = weights.eps * found.eps_x, weights.eps * found.eps_m, weights.x0
    else:
        implied = solve("sample", source)
        x, output, x0 = weights.eps * implied.eps_x, none, weights.x0 + weights.eps * implied.eps_m
    return torch.stack([found.x0_x, found.x0_m, x, output, weights.noise, x0])


def _times(coefficient: Tensor, x: Tensor) -> Tensor:
    product = x.mul(coefficient)
    return product if product.dtype == x.dtype else product.to(x.dtype)


def advance(
    plan: Plan, mode: _Mode, at: Sequence[Tensor], output: Tensor, x: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (x_s, x0): the module's equation, without the terms that are 0 at every level.

    It is :meth:`ddim.core.step.StepCoefficients.apply` on gathered weights, without its casts
    (``test_a_step_is_the_cores_step_to_the_next_timestep``)."""
    a, b, c, d, *more = at
    is_x0 = plan.prediction_type == "sample" and not plan.inverse
    # In place, but only on products made here: an allocation costs a fifth of a step.
    if mode == "folded":  # nothing is clipped, and the coefficients have the sample's dtype
        x_s = x.mul(c).addcmul_(output, d)
        if noise is not None:
            x_s.addcmul_(noise, more[0])
        return x_s, output if is_x0 else x.mul(a).addcmul_(output, b)
    x0 = output if is_x0 else _times(a, x).addcmul_(output, b)
    if plan.clip is not None:
        x0 = plan.clip(x0)
    if mode == "rederived":
        x_s = _times(c, x).addcmul_(x0, more[1])
    elif plan.prediction_type == "epsilon":
        x_s = _times(more[1], x0).addcmul_(output, d)
    else:
        x_s = _times(c, x).addcmul_(output, d).addcmul_(x0, more[1])
    if noise is not None:
        x_s.addcmul_(noise, more[0])
    return (x_s if x_s.dtype == x.dtype else x_s.to(x.dtype)), x0


class Before(NamedTuple):
    """What order 2 keeps of a step: its timestep and x0, and the thread that took it, or None."""

    t: Tensor
    x0: Tensor
    thread: int | None

    def refuse_other_walk(self, t: Tensor, *, is_kept: bool) -> None:
        """Refuses, by a DDIMError, that two threads walk at once: this thread goes on at t from
        this step of another's (``is_kept``), or from its own that another's new walk replaced."""
        is_own, is_known = self.thread == threading.get_ident(), t.device.type == "cpu"
        if is_kept and not is_own and self.thread is not None:
            is_bad = not (is_known and int(t.min()) > int(self.t.max()))  # a new image is none
        else:
            is_bad = not is_kept and is_own and is_known and int(t.max()) < int(self.t.min())
        if is_bad:
            raise DDIMError(
                "multistep_order=2 goes on from the step before, and another thread has taken a "
                "step or set the timesteps of this scheduler since; take one scheduler for each "
                "thread, or use multistep_order=1."
            )


def correct(plan: Plan, table: Table, t: Tensor, x_s: Tensor, x0: Tensor, before: Before) -> None:
    """Makes DDIM's x_s second order, in place, if the step ``before`` was that of the neighbour
    above; a DDIMError refuses a t that neither follows it nor starts a new image."""
    last_t, last_x0, _ = before
    if last_x0.shape != x0.shape or plan.multistep is None or table.multistep is None:
        return
    if t.numel() == last_t.numel() == 1 and t.device.type == "cpu" and not is_compiling():
        now, last = int(t), int(last_t)
        if now <= last != int(plan.multistep[1, now]) and len(plan.ends) > 1:
            raise DDIMError(
                f"multistep_order=2 goes on from the step before, and t={now} does not follow "
                f"t={last} in the list of timesteps; call set_timesteps before each image, take "
                "one scheduler for each batch, or use multistep_order=1."
            )
    weight, above = gather(table.multistep, t, x0)
    last_t = last_t.to(x0.device, non_blocking=True).reshape(-1, *[1] * (x0.ndim - 1))
    x_s.add_(torch.where(above == last_t, weight, 0.0) * (x0 - last_x0))
