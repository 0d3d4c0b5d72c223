r"""The coefficients of a scheduler's steps over one list of timesteps, as tables that a tensor
timestep gathers from.

Where nothing is clipped a step is linear in the sample, the model's output and the noise. All
coefficients are rows of one table over the T levels,

.. math::
    \hat x_0 = a\,x_t + b\,m, \qquad x_s = c\,x_t + d\,m + e\,z + f\,\mathrm{clip}(\hat x_0),

so a step with a tensor timestep gathers a row and combines it: no host reads a device, and
``torch.compile`` sees one graph."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ddim.core.prediction import PredictionType, Solution, solve
from ddim.core.schedule import NoiseSchedule
from ddim.core.step import Eta, check_order, fold, step_coefficients
from ddim.errors import DDIMError

__all__ = ["Plan", "Table", "advance", "gather", "whole"]

_Mode = Literal["folded", "split", "rederived"]
"""How x_s is put together: from x_t and m; from x0 and eps; or from x0 and the eps that a clipped
x0 implies."""


@dataclass(frozen=True, eq=False)
class Table:
    """The coefficients (a, b, c, d, e, f) of all levels, [6, T] or without the last rows where
    those are 0 at every level; the plan's multistep; and the columns that integers have asked
    for."""

    mode: _Mode
    columns: Tensor
    multistep: Tensor | None = None
    at: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Plan:
    """What the steps over one list of timesteps need; a new one is made when the list, the levels
    or an option changes."""

    schedule: NoiseSchedule
    options: tuple[Any, ...]
    config: dict[str, Any]  # all that the configuration said
    num_inference_steps: int
    prediction_type: PredictionType
    inverse: bool
    clip: Callable[[Tensor], Tensor] | None
    listed: frozenset[int]
    source: Tensor  # alpha_bar of the level that each t steps from, [T] float64
    target: Tensor  # alpha_bar of the level that it steps to, [T] float64
    multistep: Tensor | None = (
        # order 2: the weight of x0 - x0_previous at each t, and the level before t; [2, T] float64
        None
    )
    tables: dict[tuple[Eta, bool, torch.dtype, torch.device], Table] = field(default_factory=dict)

    def table(self, eta: Eta, rederive: bool, dtype: torch.dtype, device: torch.device) -> Table:
        table = self.tables.get((eta, rederive, dtype, device))
        if table is None and is_compiling():
            return self._make_table(
                eta, rederive, dtype, device
            )  # not kept: a traced step must not change its own guards
        if table is None:
            with torch.inference_mode(
                False
            ):  # else it could not take part in a backward pass later
                table = self.tables[(eta, rederive, dtype, device)] = self._make_table(
                    eta, rederive, dtype, device
                )
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
        rows = (
            6 if mode != "folded" else 4 if eta == 0 else 5
        )  # a row that is not gathered is time saved at each step
        return Table(mode, _coefficients(self, eta, mode)[:rows].to(device, held), multistep)


def _solution(plan: Plan) -> Solution:
    """x0 and eps from (x, m) at the source level of each t."""
    found = solve(plan.prediction_type, plan.source)
    if not (plan.inverse and plan.prediction_type == "sample"):
        return found
    # Clean data determines x0 (itself) but no eps. The network was called at t, so its x0 is read
    # as eps there: the inversion
    # is then that of the same network expressed as an epsilon prediction.
    clean, at_t = plan.source == 1, solve("sample", plan.target)
    instead = Solution(
        torch.ones_like(plan.source), torch.zeros_like(plan.source), at_t.eps_x, at_t.eps_m
    )
    return Solution(
        *(torch.where(clean, there, usual) for there, usual in zip(instead, found, strict=True))
    )


def _coefficients(plan: Plan, eta: Eta, mode: _Mode) -> Tensor:
    """All columns (a, b, c, d, e, f) of the module's equation, [6, T], float64 on the CPU."""
    source, target = plan.source, plan.target
    if (
        isinstance(eta, float) and eta > 1
    ):  # a level that no step leaves may not admit it, and must not refuse it
        listed = torch.zeros(len(source), dtype=torch.bool).index_fill(
            0, torch.tensor(sorted(plan.listed)), True
        )
        target = torch.where(listed, target, source)
    weights, found, none = (
        step_coefficients(source, target, eta=eta),
        _solution(plan),
        torch.zeros_like(source),
    )
    if mode == "folded":
        (x, output, _), x0 = fold(weights, found), none
    elif mode == "split":
        x, output, x0 = weights.eps * found.eps_x, weights.eps * found.eps_m, weights.x0
    else:
        implied = solve("sample", source)
        x, output, x0 = weights.eps * implied.eps_x, none, weights.x0 + weights.eps * implied.eps_m
    return torch.stack([found.x0_x, found.x0_m, x, output, weights.noise, x0])


def _as_levels(t: Tensor) -> Tensor:
    """Whole numbers of any type as int64. A fraction is refused on the CPU; on a device that would
    wait for it, and it is cut off."""
    if (
        t.is_floating_point()
        and t.device.type == "cpu"
        and not is_compiling()
        and bool((t != t.round()).any())
    ):
        raise DDIMError(f"timesteps must be whole numbers; got {t.tolist()}.")
    return t.long()


def gather(columns: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The entries at t of each row of [k, T], shaped to multiply x [B, ...]; reads nothing back to
    the host."""
    if t.dtype != torch.int64:
        t = _as_levels(t)
    if t.device != x.device:
        t = t.to(x.device, non_blocking=True)
    if t.ndim == 0 or t.shape == (1,):
        return columns.index_select(1, t).unbind(0)
    if t.shape != x.shape[:1]:
        raise DDIMError(
            f"there must be one timestep, or one for each of the {x.shape[0]} samples; got shape "
            f"{list(t.shape)}."
        )
    return columns.index_select(1, t).reshape(columns.shape[0], -1, *[1] * (x.ndim - 1)).unbind(0)


def _times(coefficient: Tensor, x: Tensor) -> Tensor:
    product = x.mul(coefficient)
    return product if product.dtype == x.dtype else product.to(x.dtype)


def advance(
    plan: Plan, mode: _Mode, at: Sequence[Tensor], output: Tensor, x: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (x_s, x0): the module's equation, without the terms that are 0 at every level."""
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


def whole(t: object) -> int:
    """A timestep that is no tensor, as an int."""
    try:
        return int(t) if isinstance(t, float) and t.is_integer() else operator.index(t)  # type: ignore[arg-type]
    except TypeError:
        raise DDIMError(
            f"a timestep must be a whole number, or a tensor of them; got {t!r}."
        ) from None
