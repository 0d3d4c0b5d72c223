"""From a network to a denoiser: (x_t, t) -> (x0, eps).

A sampler needs a :class:`Denoiser` and nothing else. :class:`ModelDenoiser` makes one of any
callable ``(x_t, t) -> prediction``: a diffusers UNet, a guided network, a closed-form oracle."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ddim.core.checks import (
    check_function,
    check_kind,
    check_number,
    check_samples,
    shown,
    wrong_argument,
)
from ddim.core.guidance import network_output
from ddim.core.prediction import (
    Denoised,
    PredictionType,
    check_prediction_type,
    implied_eps,
    read_output,
    solve,
    threshold,
)
from ddim.core.schedule import CLEAN, NoiseSchedule, as_factor, check_schedule, whole
from ddim.errors import DDIMError, first_line

__all__ = ["Clip", "Denoiser", "ModelDenoiser", "at_clean", "checked"]


class Denoiser(Protocol):
    """Anything that predicts the clean data and the noise in a noisy sample."""

    def __call__(self, x_t: Tensor, t: int | Tensor) -> Denoised:
        """Denoises x_t [B, ...] at level t (one, or one a sample)."""
        ...


@dataclass(frozen=True)
class Clip:
    """How a predicted x0 is kept in range.

    Attributes:
        kind: ``none``, ``static`` (clamp to +-bound) or ``dynamic``
            (:func:`~ddim.core.prediction.threshold_dynamic` with ratio and max_value).
        bound: The largest magnitude, for ``static``.
        ratio: The percentile, for ``dynamic``.
        max_value: The largest threshold, for ``dynamic``.
        rederive_eps: Whether eps is derived again from the clipped x0, to decompose x_t with it.

    Raises:
        DDIMError: If the kind is unknown, bound is not above 0, ratio not in [0, 1], or max_value
            below 1.
    """

    kind: Literal["none", "static", "dynamic"] = "none"
    bound: float = 1.0
    ratio: float = 0.995
    max_value: float = 1.0
    rederive_eps: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in ("none", "static", "dynamic"):
            raise wrong_argument("clip", "be none, static or dynamic", self.kind)
        check_number("bound", self.bound, above=0)
        check_number("ratio", self.ratio, least=0, most=1)
        check_number("max_value", self.max_value, least=1)

    def __call__(self, x0: Tensor) -> Tensor:
        """Returns x0 in range, shape [B, ...]."""
        if not hasattr(x0, "clamp"):
            check_samples(x0=x0)
        if self.kind == "static":
            return x0.clamp(-self.bound, self.bound)
        if self.kind == "dynamic":
            return threshold(x0, self.ratio, self.max_value)
        return x0


@dataclass(frozen=True, eq=False)
class ModelDenoiser:
    """A network, its schedule and its parametrisation, as a :class:`Denoiser`.

    Attributes:
        network: ``(x_t, t) -> prediction`` with t an int64 tensor [B] on x_t's device. It may
            return a tensor, a tuple whose first element is one, or an object with ``.sample``
            (diffusers' UNets).
        schedule: The levels the network was trained on.
        prediction_type: What it predicts.
        clip: What happens to x0.
        dtype: What the network is fed. Default: its parameters' dtype, or x_t's for a function. The
            pair comes back in x_t's dtype, so a half-precision network keeps a float32 state.

    Raises:
        DDIMError: If the network cannot be called, or another attribute is invalid.
    """

    network: Callable[[Tensor, Tensor], Any]
    schedule: NoiseSchedule
    prediction_type: PredictionType = "epsilon"
    clip: Clip = Clip()
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_function("network", self.network, "a network, (x_t, t) -> prediction")
        check_schedule(self.schedule)
        check_prediction_type(self.prediction_type)
        check_kind("clip", self.clip, Clip, "a Clip, such as Clip('static')")
        if self.dtype is not None:
            check_kind("dtype", self.dtype, torch.dtype, "a dtype of torch, or None")

    def __repr__(self) -> str:
        network = getattr(self.network, "__qualname__", type(self.network).__name__)
        clip = "" if self.clip.kind == "none" else f", clip {self.clip.kind}"
        dtype = "" if self.dtype is None else f", {str(self.dtype).removeprefix('torch.')}"
        return f"ModelDenoiser({network}, {self.prediction_type}{clip}{dtype}, {self.schedule})"

    def __call__(self, x_t: Tensor, t: int | Tensor) -> Denoised:
        """Evaluates the network once, at one level t or one a sample [B], and converts its output.

        Raises:
            DDIMError: If x_t or t is none, the output has another shape than x_t, or it has no
                solution at this level.
        """
        if not (isinstance(x_t, Tensor) and x_t.is_floating_point()):
            check_samples(x_t=x_t)
        kind, is_clipped, known = self.prediction_type, self.clip.kind != "none", None
        if isinstance(t, Tensor):
            if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(x_t))):
                raise wrong_argument(
                    "t", f"be one timestep, or one for each of {len(x_t)} samples", t
                )
            levels = t.to(x_t.device, torch.int64).expand(x_t.shape[0])
        else:
            t = t if type(t) is int else whole(t)
            if t not in self._solutions:
                self.schedule.alpha_bar(t)  # refuses what is no level
            known = None if is_clipped else self._solutions.get(t)
            levels = torch.full((x_t.shape[0],), t, dtype=torch.int64, device=x_t.device)
        dtype = self._dtype(x_t)  # asked for first: a cast that does nothing is a call too
        output = network_output(self.network(x_t if x_t.dtype == dtype else x_t.to(dtype), levels))
        if output.shape != x_t.shape:
            raise DDIMError(
                f"the network must return a prediction of its input's shape {list(x_t.shape)}; got "
                f"{list(output.shape)}. If it predicts a variance too, wrap it to return the mean."
            )
        output = output if output.dtype == x_t.dtype else output.to(x_t.dtype)
        if known is not None:
            x0_x, x0_m, eps_x, eps_m = known
            x0 = eps = output
            if kind != "sample":
                x0 = torch.mul(x_t, x0_x).add_(output, alpha=x0_m)
            if kind != "epsilon":
                eps = torch.mul(x_t, eps_x).add_(output, alpha=eps_m)
            return Denoised(x0, eps)
        alpha_bar_t = self.schedule.alpha_bar(t)
        x0, eps = read_output(output, x_t, alpha_bar_t=alpha_bar_t, prediction_type=kind)
        if not is_clipped:
            return Denoised(x0, eps)
        x0 = self.clip(x0)
        eps = implied_eps(x0, x_t, alpha_bar_t=alpha_bar_t) if self.clip.rederive_eps else eps
        return Denoised(x0, eps)

    @cached_property
    def _solutions(self) -> dict[int, tuple[float, ...] | None]:
        return _solutions(self.schedule, self.prediction_type)

    def _dtype(self, x_t: Tensor) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        if not isinstance(self.network, torch.nn.Module):
            return x_t.dtype
        return next((parameter.dtype for parameter in self.network.parameters()), x_t.dtype)


@lru_cache(maxsize=8)
def _solutions(
    schedule: NoiseSchedule, kind: PredictionType
) -> dict[int, tuple[float, ...] | None]:
    """The solution at every level as numbers, so that a step waits for no device; None where there
    is none."""
    rows = zip(*(column.tolist() for column in solve(kind, schedule.alphas_cumprod)), strict=True)
    return {t: row if all(map(math.isfinite, row)) else None for t, row in enumerate(rows)}


def checked(denoise: Denoiser) -> Denoiser:
    """The denoiser, checked to return a pair: a batch of two images would pass for one."""
    advice = "make one of a network by ModelDenoiser(network, schedule, prediction_type)"
    check_function("denoise", denoise, "a function, (x_t, t) -> (x0, eps)", f"M{advice[1:]}")

    def paired(x_t: Tensor, t: int | Tensor) -> Denoised:
        try:
            found: Any = denoise(x_t, t)
        except (AttributeError, TypeError) as error:  # of a level that is no tensor
            if not isinstance(denoise, torch.nn.Module):
                raise
            got = f"failed as one ({first_line(error)})"
            raise DDIMError(
                f"denoise must return (x0, eps), and a network {got}; {advice}."
            ) from error
        if not isinstance(found, tuple) or len(found) != 2:
            got = f"returned {shown(found)}"
            raise DDIMError(f"denoise must return (x0, eps), and {got}; {advice}.")
        return found if type(found) is Denoised else Denoised(*found)

    return paired


def at_clean(denoise: Denoiser, schedule: NoiseSchedule) -> Denoiser:
    """Extends a denoiser to :data:`~ddim.core.schedule.CLEAN`, where eps is that of level 0."""
    denoise = checked(denoise)

    def extended(x_t: Tensor, t: int | Tensor) -> Denoised:
        if isinstance(t, Tensor) or t != CLEAN:
            return denoise(x_t, t)
        eps = denoise(x_t, 0).eps
        alpha_bar = schedule.alpha_bar(CLEAN)
        alpha, sigma = (as_factor(a.sqrt(), x_t) for a in (alpha_bar, 1 - alpha_bar))
        return Denoised((x_t - sigma * eps) / alpha, eps)

    return extended
