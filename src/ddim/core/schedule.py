r"""Noise schedules: how much signal and how much noise each level holds.

Notation of this package: levels t = 0..T-1, and t = -1 (:data:`CLEAN`) for data. ``alpha_bar_t`` is
:math:`\bar\alpha_t = \prod_{i \le t}(1 - \beta_i)`, ``alpha_t`` :math:`= \sqrt{\bar\alpha_t}`, and
``sigma_t`` :math:`= \sqrt{1 - \bar\alpha_t}`, so that

.. math:: x_t = \alpha_t x_0 + \sigma_t \epsilon, \qquad \epsilon \sim N(0, I).

Tables are float64 on the CPU; coefficients are computed there and rounded once, when they meet a
sample."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ddim.bounds import MOST_LEVELS
from ddim.core.checks import (
    check_choice,
    check_kind,
    check_number,
    check_one_shape,
    check_whole,
    shown,
    wrong_argument,
)
from ddim.errors import DDIMError

__all__ = [
    "BETA_SCHEDULES",
    "CLEAN",
    "BetaSchedule",
    "NoiseSchedule",
    "add_noise",
    "make_betas",
    "as_factor",
    "as_table",
    "check_schedule",
    "rescale_zero_terminal_snr",
    "rescaled",
    "velocity",
    "whole",
]

CLEAN = -1
"""The level of clean data: alpha_bar is 1, or that of level 0 if ``set_alpha_to_one`` is off."""

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
BETA_SCHEDULES: tuple[str, ...] = get_args(BetaSchedule)
"""Names of the schedules that :func:`make_betas` knows."""


def make_betas(
    kind: BetaSchedule = "linear",
    num_train_timesteps: int = 1000,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> Tensor:
    r"""Returns the variances :math:`\beta_t` that a named schedule adds, shape [T], float64.

    ===================== =====================================================================
    ``linear``            evenly spaced from beta_start to beta_end
    ``scaled_linear``     evenly spaced in :math:`\sqrt\beta`, squared (latent diffusion)
    ``squaredcos_cap_v2`` :math:`\bar\alpha(u) = \cos^2\frac{(u + 0.008)\pi}{2 \cdot 1.008}`
    ``sigmoid``           a logistic curve over [-6, 6] from beta_start to beta_end (GeoDiff)
    ``laplace``           the log-SNR of a Laplace distribution
    ===================== =====================================================================

    The cosine and laplace schedules ignore beta_start and beta_end; their betas are at most 0.999.

    Raises:
        DDIMError: If the schedule is unknown, T is no whole number in 1..1000000, or a beta is no
            finite number.

    References:
        Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020.
        https://arxiv.org/abs/2006.11239 (linear)

        Nichol, Dhariwal. Improved Denoising Diffusion Probabilistic Models. 2021. Eq. 17.
        https://arxiv.org/abs/2102.09672 (cosine)
    """
    check_choice("beta_schedule", kind, BETA_SCHEDULES)
    count = check_whole("num_train_timesteps", num_train_timesteps, least=1, most=MOST_LEVELS)
    least = 0.0 if kind == "scaled_linear" else None  # which takes the roots
    beta_start = check_number("beta_start", beta_start, least=least)
    beta_end = check_number("beta_end", beta_end, least=least)
    if kind == "linear":
        return torch.linspace(beta_start, beta_end, count, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, count, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        return _betas_from(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, count)
    if kind == "sigmoid":
        curve = torch.sigmoid(torch.linspace(-6, 6, count, dtype=torch.float64))
        return curve * (beta_end - beta_start) + beta_start
    return _betas_from(_laplace_alpha_bar, count)


def _betas_from(alpha_bar: Callable[[float], float], count: int) -> Tensor:
    levels = [alpha_bar(i / count) for i in range(count + 1)]
    betas = [min(1 - below / above, 0.999) for above, below in itertools.pairwise(levels)]
    return torch.tensor(betas, dtype=torch.float64)


def _laplace_alpha_bar(u: float) -> float:
    # The square root is diffusers' reading of the schedule, which its checkpoints need.
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    r"""Shifts and scales :math:`\sqrt{\bar\alpha}` so that the last level holds no signal at all.

    .. math::
        \alpha_t \leftarrow (\alpha_t - \alpha_{T-1})\,\frac{\alpha_0}{\alpha_0 - \alpha_{T-1}}

    The first level keeps its value; the last becomes exactly 0 (its beta exactly 1). Betas are [T]
    in (0, 1), and returned in float64.

    Raises:
        DDIMError: If betas are no numbers in [0, 1], are fewer than two, or add no noise after the
            first.

    References:
        Lin, Liu, Li, Yang. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023.
        Algorithm 1. https://arxiv.org/abs/2305.08891
    """
    return rescaled(_as_betas(betas))


def rescaled(betas: Tensor) -> Tensor:
    """:func:`rescale_zero_terminal_snr` of betas that may be no schedule, as in diffusers."""
    if betas.numel() < 2:
        raise DDIMError(f"zero terminal SNR needs at least 2 levels of betas; got {betas.numel()}.")
    alpha = (1 - betas.double()).cumprod(0).sqrt()
    if bool(alpha[0] == alpha[-1]):
        raise DDIMError(
            "zero terminal SNR needs betas that add noise; got a schedule of one level."
        )
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    alpha_bar = alpha**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def as_table(name: str, values: Any) -> Tensor:
    """Numbers [T] as a table, float64 on the CPU."""
    try:
        given = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
        table = given.detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise wrong_argument(name, "be a list or a tensor of numbers", values) from None
    if table.ndim != 1 or table.numel() == 0:
        raise wrong_argument(name, "have shape [T]", values)
    return table


def _as_betas(betas: Any) -> Tensor:
    """Variances in [0, 1], [T] float64."""
    given = as_table("betas", betas)
    outside = given[~((given >= 0) & (given <= 1))]  # or NaN
    if outside.numel():
        raise DDIMError(
            f"betas are variances in [0, 1]; got {float(outside[0]):.4g}. A table of alpha_bar "
            "goes into NoiseSchedule(...)."
        )
    return given


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The table of alpha_bar over all levels, and the level of clean data below it.

    Attributes:
        alphas_cumprod: alpha_bar_t for t = 0..T-1, shape [T], float64 on the CPU, in [0, 1],
            falling.
        final_alpha_cumprod: alpha_bar at :data:`CLEAN`.
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float = 1.0

    def __post_init__(self) -> None:
        final = check_number("final_alpha_cumprod", self.final_alpha_cumprod, least=0, most=1)
        table = self._keep(self.alphas_cumprod, final)
        if bool(((table < 0) | (table > 1)).any()):
            outside = float(table[(table < 0) | (table > 1)][0])
            raise DDIMError(f"alphas_cumprod must lie in [0, 1]; got {outside:.4g}.")
        rises = (table.diff() > 1e-6).nonzero()  # float32 tables may rise by their rounding
        if rises.numel():
            t = int(rises[0]) + 1
            what = f"alphas_cumprod must fall from level to level; it rises at level {t}"
            raise DDIMError(f"{what}. Give the table from the least noise to the most.")

    def _keep(self, values: Tensor, final: float) -> Tensor:
        table = as_table("alphas_cumprod", values)
        if not bool(torch.isfinite(table).all()):
            raise DDIMError("alphas_cumprod must be finite; got NaN or infinity.")
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "final_alpha_cumprod", final)
        return table

    @classmethod
    def unchecked(cls, alphas_cumprod: Tensor, final_alpha_cumprod: float) -> "NoiseSchedule":
        """A finite table that may be no schedule, as diffusers' schedulers take it."""
        made = cls.__new__(cls)
        made._keep(alphas_cumprod, final_alpha_cumprod)
        return made

    @classmethod
    def from_betas(
        cls, betas: Tensor | Sequence[float], *, set_alpha_to_one: bool = True
    ) -> "NoiseSchedule":
        """Builds the table from betas [T] in [0, 1], of :func:`make_betas` or a trained list; a
        DDIMError refuses others."""
        alphas_cumprod = (1 - _as_betas(betas)).cumprod(0)
        return cls(alphas_cumprod, 1.0 if set_alpha_to_one else float(alphas_cumprod[0]))

    def __len__(self) -> int:
        return self.alphas_cumprod.numel()

    def __repr__(self) -> str:
        first, last = (float(self.alphas_cumprod[i]) for i in (0, -1))
        span = f"alpha_bar {first:.4g} to {last:.4g}"
        return f"NoiseSchedule({len(self)} levels, {span}, clean {self.final_alpha_cumprod:.4g})"

    def alpha_bar(self, t: int | Tensor) -> Tensor:
        """Looks up alpha_bar at integers t in [-1, T), where -1 is clean data; shape of t, float64
        on the CPU."""
        if not hasattr(t, "__len__"):  # neither a tensor, nor an array or a list of levels
            t = whole(t)
        try:
            levels = torch.as_tensor(t, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise wrong_argument("a timestep", "be a whole number or a tensor", t) from None
        if levels.dtype.is_floating_point or levels.dtype.is_complex or levels.dtype == torch.bool:
            raise DDIMError(f"timesteps must be integers; got a tensor of {levels.dtype}.")
        levels = levels.long()
        if levels.numel() and (int(levels.min()) < CLEAN or int(levels.max()) >= len(self)):
            allowed = f"[-1, {len(self)}), where -1 is clean data"
            raise DDIMError(f"timesteps must lie in {allowed}; got {shown(levels.tolist())}.")
        final = torch.tensor(self.final_alpha_cumprod, dtype=torch.float64)
        return torch.where(levels == CLEAN, final, self.alphas_cumprod[levels])

    def snr(self, t: int | Tensor) -> Tensor:
        r"""Signal-to-noise ratio :math:`\bar\alpha_t / (1 - \bar\alpha_t)`; inf at clean data."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar / (1 - alpha_bar)

    def log_snr(self, t: int | Tensor) -> Tensor:
        r"""Natural logarithm of the signal-to-noise ratio; -inf at zero terminal SNR."""
        alpha_bar = self.alpha_bar(t)
        return alpha_bar.log() - torch.log1p(-alpha_bar)


def whole(t: Any) -> int:
    """A level as an int, of a number or an array of one; a DDIMError refuses fractions, bool and
    what is no number."""
    if type(t) is int:  # as nearly all are; a walk asks for two a step
        return t
    return check_whole("a timestep", t, note=" or a tensor")


def check_schedule(schedule: Any) -> None:
    """Refuses what is no :class:`NoiseSchedule`."""
    wanted = "a NoiseSchedule, such as NoiseSchedule.from_betas(betas)"
    check_kind("schedule", schedule, NoiseSchedule, wanted)


def as_factor(coefficient: Tensor, x: Tensor) -> Tensor:
    """Rounds float64 coefficients, shape [] or [B], to the dtype of x [B, ...], in a shape and on a
    device where they can multiply it."""
    if coefficient.ndim > 1 or (coefficient.ndim == 1 and coefficient.shape[0] != x.shape[0]):
        wanted = f"one level, or one for each of the {x.shape[0]} samples"
        raise DDIMError(f"there must be {wanted}; got shape {list(coefficient.shape)}.")
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    if coefficient.ndim:
        return coefficient.to(x.device, dtype).reshape(-1, *[1] * (x.ndim - 1))
    # One number on the CPU multiplies tensors anywhere; to send it to a device would wait for it.
    is_on_cpu = coefficient.device.type == "cpu"
    return coefficient.to(dtype) if is_on_cpu else coefficient.to(x.device, dtype)


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
    r"""Draws from the forward process: :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`.

    The coefficients are computed in float64 and rounded once: computing 1 - alpha_bar in bfloat16
    would make sigma exactly 0 on the ten lowest levels of the linear schedule.

    Args:
        schedule: The levels.
        x0: Clean data, shape [B, ...].
        noise: Standard normal, shape [B, ...].
        t: One level, or one a sample, shape [B]; in [-1, T).

    Raises:
        DDIMError: If x0 and noise are no floating-point tensors of one shape, or t is no level.
    """
    check_schedule(schedule)
    check_one_shape(x0=x0, noise=noise)
    alpha_bar = schedule.alpha_bar(t)
    return as_factor(alpha_bar.sqrt(), x0) * x0 + as_factor((1 - alpha_bar).sqrt(), x0) * noise


def velocity(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
    r"""The target of v-prediction, :math:`v_t = \alpha_t \epsilon - \sigma_t x_0`; see
    :func:`add_noise`.

    References:
        Salimans, Ho. Progressive Distillation for Fast Sampling of Diffusion Models. 2022. App. D.
        https://arxiv.org/abs/2202.00512
    """
    check_schedule(schedule)
    check_one_shape(x0=x0, noise=noise)
    alpha_bar = schedule.alpha_bar(t)
    return as_factor(alpha_bar.sqrt(), x0) * noise - as_factor((1 - alpha_bar).sqrt(), x0) * x0
