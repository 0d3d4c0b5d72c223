"""From a network to a denoiser: (x_t, t) -> (x0, eps).

A sampler needs a :class:`Denoiser` and nothing else. :class:`ModelDenoiser` makes one of any
callable ``(x_t, t) -> prediction``: a diffusers UNet, a guided network, a closed-form oracle."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ddim.core.guidance import network_output
from ddim.core.prediction import (
    Denoised,
    PredictionType,
    check_prediction_type,
    clip_static,
    solve,
    threshold_dynamic,
    to_eps,
    to_x0_eps,
)
from ddim.core.schedule import CLEAN, NoiseSchedule, as_factor, whole
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
    """

    kind: Literal["none", "static", "dynamic"] = "none"
    bound: float = 1.0
    ratio: float = 0.995
    max_value: float = 1.0
    rederive_eps: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("none", "static", "dynamic"):
            raise DDIMError(f"clip must be none, static or dynamic; got {self.kind!r}.")
        if not self.bound > 0:
            raise DDIMError(f"the bound of clipping must be above 0; got {self.bound}.")

    def __call__(self, x0: Tensor) -> Tensor:
        """Returns x0 in range, shape [B, ...]."""
        if self.kind == "static":
            return clip_static(x0, self.bound)
        if self.kind == "dynamic":
            return threshold_dynamic(x0, ratio=self.ratio, max_value=self.max_value)
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
        DDIMError: If the schedule, the prediction type or the clipping is invalid.
    """

    network: Callable[[Tensor, Tensor], Any]
    schedule: NoiseSchedule
    prediction_type: PredictionType = "epsilon"
    clip: Clip = Clip()
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, NoiseSchedule):
            raise DDIMError(
                "schedule must be a NoiseSchedule, such as NoiseSchedule.from_betas(betas); got a "
                f"{_kind(self.schedule)}."
            )
        check_prediction_type(self.prediction_type)
        if not isinstance(self.clip, Clip):
            raise DDIMError(f"clip must be a Clip, such as Clip('static'); got {self.clip!r}.")

    def __call__(self, x_t: Tensor, t: int | Tensor) -> Denoised:
        """Evaluates the network once, at one level t or one a sample [B], and converts its output.

        Raises:
            DDIMError: If the output has another shape than x_t, or has no solution at this level.
        """
        if isinstance(t, Tensor):
            levels = t.to(x_t.device, torch.int64).expand(x_t.shape[0])
        else:
            t = t if type(t) is int else whole(t)
            levels = torch.full((x_t.shape[0],), t, dtype=torch.int64, device=x_t.device)
        dtype = self._dtype(x_t)  # asked for first: a cast that does nothing is a call too
        output = network_output(self.network(x_t if x_t.dtype == dtype else x_t.to(dtype), levels))
        if output.shape != x_t.shape:
            raise DDIMError(
                f"the network must return a prediction of its input's shape {list(x_t.shape)}; got "
                f"{list(output.shape)}. If it predicts a variance too, wrap it to return the mean."
            )
        output = output if output.dtype == x_t.dtype else output.to(x_t.dtype)
        kind, is_clipped = self.prediction_type, self.clip.kind != "none"
        known = None if isinstance(t, Tensor) or is_clipped else self._solutions.get(t)
        if known is not None and all(map(math.isfinite, known)):
            x0_x, x0_m, eps_x, eps_m = known
            x0 = eps = output
            if kind != "sample":
                x0 = torch.mul(x_t, x0_x).add_(output, alpha=x0_m)
            if kind != "epsilon":
                eps = torch.mul(x_t, eps_x).add_(output, alpha=eps_m)
            return Denoised(x0, eps)
        alpha_bar_t = self.schedule.alpha_bar(t)
        x0, eps = to_x0_eps(output, x_t, alpha_bar_t=alpha_bar_t, prediction_type=kind)
        if not is_clipped:
            return Denoised(x0, eps)
        x0 = self.clip(x0)
        eps = to_eps(x0, x_t, alpha_bar_t=alpha_bar_t) if self.clip.rederive_eps else eps
        return Denoised(x0, eps)

    @cached_property
    def _solutions(self) -> dict[int, tuple[float, ...]]:
        """The solution at every level as numbers, so that a step waits for no device."""
        solution = solve(self.prediction_type, self.schedule.alphas_cumprod)
        return dict(enumerate(zip(*(column.tolist() for column in solution), strict=True)))

    def _dtype(self, x_t: Tensor) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        if not isinstance(self.network, torch.nn.Module):
            return x_t.dtype
        return next((parameter.dtype for parameter in self.network.parameters()), x_t.dtype)


def checked(denoise: Denoiser) -> Denoiser:
    """The denoiser, checked to return a pair: a batch of two images would pass for one."""
    advice = "make one of a network by ModelDenoiser(network, schedule, prediction_type)"
    if not callable(denoise):
        raise DDIMError(f"denoise must be a function; got a {_kind(denoise)}: {advice}.")

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
            got = f"returned a {_kind(found)}"
            raise DDIMError(f"denoise must return (x0, eps), and {got}; {advice}.")
        return Denoised(*found)

    return paired


def _kind(value: object) -> str:
    return type(value).__name__


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
