r"""What a network predicts, and how that becomes the pair (x0, eps).

Every parametrisation is a row :math:`m = p\,x_0 + q\,\epsilon` beside :math:`x_t = \alpha\,x_0 +
\sigma\,\epsilon`. Both together are a 2x2 system with determinant :math:`d = \alpha q - \sigma p`:

=================== ===== ===== ============ ========================================
prediction_type     p     q     determinant  cannot be solved where
=================== ===== ===== ============ ========================================
``epsilon``         0     1     alpha        alpha = 0 (zero terminal SNR)
``sample``          1     0     -sigma       sigma = 0 (clean data)
``v_prediction``    -s    a     1            nowhere: it is a rotation
=================== ===== ===== ============ ========================================
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ddim.core.checks import (
    brief,
    check_alpha_bar,
    check_choice,
    check_number,
    check_one_shape,
    check_samples,
)
from ddim.core.schedule import as_factor
from ddim.errors import DDIMError

__all__ = [
    "PREDICTION_TYPES",
    "Denoised",
    "PredictionType",
    "Solution",
    "check_prediction_type",
    "clip_static",
    "from_x0_eps",
    "implied_eps",
    "prediction_row",
    "read_output",
    "solve",
    "threshold",
    "threshold_dynamic",
    "to_eps",
    "to_x0_eps",
]

PredictionType = Literal["epsilon", "sample", "v_prediction"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


class Denoised(NamedTuple):
    """The clean data and the noise that a network sees in a noisy sample, both [B, ...]."""

    x0: Tensor
    eps: Tensor

    def __repr__(self) -> str:
        return f"Denoised(x0: {brief(self.x0)}; eps: {brief(self.eps)})"


class Solution(NamedTuple):
    """The inverse of the 2x2 system: x0 = x0_x x_t + x0_m m, eps = eps_x x_t + eps_m m; float64."""

    x0_x: Tensor
    x0_m: Tensor
    eps_x: Tensor
    eps_m: Tensor


def check_prediction_type(prediction_type: str) -> None:
    """Refuses an unknown type with a DDIMError."""
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)


def prediction_row(prediction_type: PredictionType, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (p, q) of m = p x0 + q eps, shape of alpha_bar; refuses an unknown type."""
    zero, one = torch.zeros_like(alpha_bar), torch.ones_like(alpha_bar)
    if prediction_type == "epsilon":
        return zero, one
    if prediction_type == "sample":
        return one, zero
    check_prediction_type(prediction_type)
    return -(1 - alpha_bar).sqrt(), alpha_bar.sqrt()


def solve(prediction_type: PredictionType, alpha_bar: Tensor) -> Solution:
    """Solves the 2x2 system at levels alpha_bar, float64; infinite where the determinant is 0."""
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    p, q = prediction_row(prediction_type, alpha_bar)
    # For v it is alpha^2 + sigma^2, which is 1; dividing by its rounding would only add error.
    is_rotation = prediction_type == "v_prediction"
    determinant = torch.ones_like(alpha) if is_rotation else alpha * q - sigma * p
    return Solution(q / determinant, -sigma / determinant, -p / determinant, alpha / determinant)


def to_x0_eps(
    output: Tensor, x_t: Tensor, *, alpha_bar_t: Tensor, prediction_type: PredictionType
) -> Denoised:
    r"""Converts a network's output at level t into (x0, eps).

    Args:
        output: What the network returned, shape [B, ...].
        x_t: The sample that it saw, shape [B, ...].
        alpha_bar_t: The level, shape [] or [B], float64, in [0, 1].
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.

    Raises:
        DDIMError: If the type is unknown, output and x_t are no floating-point tensors of one
            shape, alpha_bar_t is no level, or the system has no solution at that level.
    """
    check_prediction_type(prediction_type)
    check_one_shape(output=output, x_t=x_t)
    check_alpha_bar(alpha_bar_t=alpha_bar_t)
    return read_output(output, x_t, alpha_bar_t=alpha_bar_t, prediction_type=prediction_type)


def read_output(
    output: Tensor, x_t: Tensor, *, alpha_bar_t: Tensor, prediction_type: PredictionType
) -> Denoised:
    """:func:`to_x0_eps` of arguments that are known to be sound, but for the level."""
    if prediction_type == "epsilon" and bool((alpha_bar_t == 0).any()):
        raise DDIMError(
            "epsilon prediction cannot be used where the SNR is 0, since x0 = (x_t - sigma eps) / "
            "alpha divides by 0; use v_prediction or sample, or start at a lower level."
        )
    if prediction_type == "sample" and bool((alpha_bar_t == 1).any()):
        raise DDIMError(
            "sample prediction cannot be used at clean data, since eps = (x_t - alpha x0) / sigma "
            "divides by 0; start at level 0 or above."
        )
    x0_x, x0_m, eps_x, eps_m = solve(prediction_type, alpha_bar_t)
    x0 = eps = output
    if prediction_type != "sample":
        x0 = as_factor(x0_x, x_t) * x_t + as_factor(x0_m, x_t) * output
    if prediction_type != "epsilon":
        eps = as_factor(eps_x, x_t) * x_t + as_factor(eps_m, x_t) * output
    return Denoised(x0, eps)


def from_x0_eps(
    x0: Tensor, eps: Tensor, *, alpha_bar_t: Tensor, prediction_type: PredictionType
) -> Tensor:
    """The training target: what a perfect network of this type returns for (x0, eps), [B, ...]; a
    DDIMError refuses samples and levels that are none, or do not fit each other."""
    check_prediction_type(prediction_type)
    check_one_shape(x0=x0, eps=eps)
    check_alpha_bar(alpha_bar_t=alpha_bar_t)
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x0
    p, q = prediction_row(prediction_type, alpha_bar_t)
    return as_factor(p, x0) * x0 + as_factor(q, x0) * eps


def to_eps(x0: Tensor, x_t: Tensor, *, alpha_bar_t: Tensor) -> Tensor:
    r"""Derives the noise that belongs to a given x0, so that a clipped x0 still decomposes x_t:
    :math:`\epsilon = (x_t - \alpha_t x_0) / \sigma_t`. A DDIMError refuses samples and levels that
    are none, or do not fit each other."""
    check_one_shape(x0=x0, x_t=x_t)
    check_alpha_bar(alpha_bar_t=alpha_bar_t)
    return implied_eps(x0, x_t, alpha_bar_t=alpha_bar_t)


def implied_eps(x0: Tensor, x_t: Tensor, *, alpha_bar_t: Tensor) -> Tensor:
    """:func:`to_eps` of arguments that are known to be sound."""
    solution = solve("sample", alpha_bar_t)
    return as_factor(solution.eps_x, x_t) * x_t + as_factor(solution.eps_m, x_t) * x0


def clip_static(x0: Tensor, bound: float = 1.0) -> Tensor:
    """Clamps x0 to [-bound, bound]; a DDIMError refuses a bound that is no number above 0."""
    check_samples(x0=x0)
    check_number("bound", bound, above=0)
    return x0.clamp(-bound, bound)


def threshold_dynamic(x0: Tensor, *, ratio: float = 0.995, max_value: float = 1.0) -> Tensor:
    r"""Clamps each sample to a percentile s of its own magnitudes, and divides by it.

    .. math:: x_0 \leftarrow \mathrm{clamp}(x_0, -s, s) / s

    s is clamped to [1, max_value]; with ``max_value=1`` this is :func:`clip_static` with bound 1.
    The percentile, ``ratio`` in [0, 1], interpolates as ``torch.quantile``, but at any size.

    Raises:
        DDIMError: If ratio or max_value is out of range.

    References:
        Saharia et al. Photorealistic Text-to-Image Diffusion Models with Deep Language
        Understanding. 2022. Sec. 2.3. https://arxiv.org/abs/2205.11487
    """
    check_samples(x0=x0)
    check_number("ratio", ratio, least=0, most=1)
    check_number("max_value", max_value, least=1)
    return threshold(x0, ratio, max_value)


def threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """:func:`threshold_dynamic` of arguments that are known to be sound."""
    if x0.numel() == 0:
        return x0
    flat = x0.reshape(x0.shape[0], -1).abs()
    flat = flat if flat.dtype == torch.float64 else flat.float()
    rank = ratio * (flat.shape[1] - 1)
    below = min(int(rank), flat.shape[1] - 1)
    above = min(below + 1, flat.shape[1] - 1)
    low, high = (flat.kthvalue(k + 1, dim=1).values for k in (below, above))
    threshold = torch.lerp(low, high, rank - below).clamp(1.0, max_value)
    threshold = threshold.reshape(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
    return x0.clamp(-threshold, threshold) / threshold
