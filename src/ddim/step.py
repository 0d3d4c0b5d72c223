r"""One transition of the DDIM family, from a level t to any other level s.

.. math::
    x_s = \sqrt{\bar\alpha_s}\,\hat x_0 + \sqrt{1 - \bar\alpha_s - \mathrm{std}^2}\;\hat\epsilon + \mathrm{noise}\,z,
    \qquad \mathrm{std}(\eta) = \eta \sqrt{\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}} \sqrt{1 - \frac{\bar\alpha_t}{\bar\alpha_s}}

with noise = std for a number eta. The paper's ``sigma-hat`` keeps std(1) in the direction and draws
:math:`\hat\sigma = \sqrt{1 - \bar\alpha_t / \bar\alpha_s}` instead.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ddim.errors import DDIMError
from ddim.prediction import PredictionType, Solution, solve
from ddim.schedule import match

__all__ = ["SIGMA_HAT", "Eta", "LinearStep", "StepCoefficients", "check_eta", "ddim_step", "fold", "linear_step", "step_coefficients"]

SIGMA_HAT: Literal["sigma-hat"] = "sigma-hat"

Eta = float | Literal["sigma-hat"]
"""A number (0 deterministic, 1 the DDPM posterior) that scales the standard deviation, or ``"sigma-hat"``."""


class StepCoefficients(NamedTuple):
    """x_s = x0 * x0_hat + eps * eps_hat + noise * z; float64, shape of the levels."""

    x0: Tensor
    eps: Tensor
    noise: Tensor


class LinearStep(NamedTuple):
    """x_s = x * x_t + output * m + noise * z; float64, shape of the levels."""

    x: Tensor
    output: Tensor
    noise: Tensor


def check_eta(eta: Eta) -> Eta:
    """Returns eta, or refuses what is negative, not finite, or an unknown word.

    Raises:
        DDIMError: With the value that was received.
    """
    if isinstance(eta, str):
        if eta != SIGMA_HAT:
            raise DDIMError(f"eta must be a number or 'sigma-hat'; got {eta!r}.")
    elif not (math.isfinite(eta) and eta >= 0):
        raise DDIMError(f"eta must be at least 0 and finite; got {eta}.")
    return eta


def step_coefficients(alpha_bar_t: Tensor, alpha_bar_s: Tensor, *, eta: Eta = 0.0) -> StepCoefficients:
    r"""The weights of x0, eps and z in the step from t to s.

    Args:
        alpha_bar_t: Level of the prediction, any shape, float64, in [0, 1].
        alpha_bar_s: Level to reach, same shape; above alpha_bar_t unless eta is 0.
        eta: See :data:`Eta`.

    Returns:
        Three float64 tensors. The noise weight of a step to clean data (alpha_bar_s = 1) is 0 for a number eta.

    Raises:
        DDIMError: If eta is invalid, or so large that noise would exceed 1 - alpha_bar_s: the direction term would be
            the root of a negative number.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Eq. 12 and 16; Sec. 5 (sigma-hat).
        https://arxiv.org/abs/2010.02502
    """
    check_eta(eta)
    if eta == 0:  # not a shortcut: at alpha_bar 0 or 1 the variance below is 0 * inf
        return StepCoefficients(alpha_bar_s.sqrt(), (1 - alpha_bar_s).sqrt(), torch.zeros_like(alpha_bar_s))
    scale = 1.0 if isinstance(eta, str) else float(eta)
    added = (1 - alpha_bar_t / alpha_bar_s).clamp(min=0)  # two levels that are equal round to -1 ulp
    variance = scale**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * added
    remainder = 1 - alpha_bar_s - variance
    # At eta = 1 from zero terminal SNR the remainder is 0. This order of operations keeps it so in float64 (in float32 it rounds
    # below); an eta that is 1 but for its own rounding goes just below too, and is no error; anything larger is.
    if scale > 1 and bool((excess := remainder < -1e-12).any()):
        largest = ((1 - alpha_bar_t) / added)[excess].min().sqrt()
        raise DDIMError(
            f"eta={eta} would draw more noise than the level can hold (the direction term becomes the root of a negative number, NaN); "
            f"use at most {float(largest):.4g} for these timesteps."
        )
    noise = added.sqrt() if eta == SIGMA_HAT else variance.sqrt()
    return StepCoefficients(alpha_bar_s.sqrt(), remainder.clamp(min=0).sqrt(), noise)


def ddim_step(x0: Tensor, eps: Tensor, *, alpha_bar_t: Tensor, alpha_bar_s: Tensor, eta: Eta = 0.0, noise: Tensor | None = None) -> Tensor:
    r"""Moves a sample from level t to level s; s below t denoises, s above t (eta = 0) inverts.

    Args:
        x0: Predicted clean sample, shape [B, ...].
        eps: Predicted noise, shape [B, ...].
        alpha_bar_t: Level of the prediction, shape [] or [B], float64, in [0, 1].
        alpha_bar_s: Level to reach, shape [] or [B]; 1 is clean. Above alpha_bar_t whenever eta > 0.
        eta: 0 is deterministic, 1 the DDPM posterior, ``"sigma-hat"`` the paper's larger noise.
        noise: Standard normal z, shape [B, ...]. Needed if and only if eta is not 0.

    Returns:
        The sample at level s, shape [B, ...], dtype of ``x0``.

    Raises:
        DDIMError: If eta is invalid, or noise is missing.
    """
    weights = step_coefficients(alpha_bar_t, alpha_bar_s, eta=eta)
    x_s = match(weights.x0, x0) * x0 + match(weights.eps, x0) * eps
    if eta == 0:
        return x_s
    if noise is None:
        raise DDIMError(f"noise is required when eta is not 0; got eta={eta} and no noise.")
    return x_s + match(weights.noise, x0) * noise


def linear_step(prediction_type: PredictionType, alpha_bar_t: Tensor, alpha_bar_s: Tensor, *, eta: Eta = 0.0) -> LinearStep:
    """Folds conversion and step into one linear map of (x_t, model output, z), valid where nothing is clipped.

    Shapes and errors as :func:`step_coefficients`; infinite or NaN where the parametrisation has no solution.
    """
    return fold(step_coefficients(alpha_bar_t, alpha_bar_s, eta=eta), solve(prediction_type, alpha_bar_t))


def fold(weights: StepCoefficients, solution: Solution) -> LinearStep:
    """Puts x0 and eps, as linear maps of (x_t, model output), into the step's weighted sum."""
    return LinearStep(
        weights.x0 * solution.x0_x + weights.eps * solution.eps_x,
        weights.x0 * solution.x0_m + weights.eps * solution.eps_m,
        weights.noise,
    )
