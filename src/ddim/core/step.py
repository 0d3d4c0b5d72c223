r"""One transition of the DDIM family, from a level t to any other level s.

.. math::
    x_s = \sqrt{\bar\alpha_s}\,\hat x_0
        + \sqrt{1 - \bar\alpha_s - \mathrm{std}^2}\;\hat\epsilon + \mathrm{noise}\,z,
    \qquad \mathrm{std}(\eta) = \eta \sqrt{\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}}
        \sqrt{1 - \frac{\bar\alpha_t}{\bar\alpha_s}}

with noise = std for a number eta. The paper's ``sigma-hat`` keeps std(1) in the direction and draws
:math:`\hat\sigma = \sqrt{1 - \bar\alpha_t / \bar\alpha_s}` instead, but none in the step to clean
data, as DDPM.

:func:`step_coefficients` computes the weights, in float64, and :meth:`StepCoefficients.apply` takes
the step. Everything that steps uses both; the scheduler gathers the same weights from a table
(``ddim.core.plan``).
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddim.core.checks import check_alpha_bar, check_number, check_one_shape, wrong_argument
from ddim.core.prediction import PredictionType, Solution, check_prediction_type, solve
from ddim.core.schedule import as_factor
from ddim.errors import DDIMError

__all__ = [
    "ORDERS",
    "SIGMA_HAT",
    "Eta",
    "LinearStep",
    "StepCoefficients",
    "StepNumbers",
    "check_eta",
    "check_order",
    "ddim_step",
    "fold",
    "linear_step",
    "multistep_weight",
    "refuse_noise_upwards",
    "step_coefficients",
    "unchecked_coefficients",
    "unchecked_weight",
]

SIGMA_HAT: Literal["sigma-hat"] = "sigma-hat"
"""The eta that stands for the paper's larger noise, :math:`\\hat\\sigma`."""

Eta = float | Literal["sigma-hat"]
"""Scale of the standard deviation (0 DDIM, 1 the DDPM posterior), or ``"sigma-hat"``."""

ORDERS = (1, 2)
"""Orders of the solver: 1 is DDIM, 2 its second-order multistep (:func:`multistep_weight`)."""


class StepCoefficients(NamedTuple):
    """x_s = x0 * x0_hat + eps * eps_hat + noise * z; float64, shape of the levels."""

    x0: Tensor
    eps: Tensor
    noise: Tensor

    def apply(self, x0: Tensor, eps: Tensor, noise: Tensor | None = None) -> Tensor:
        """Takes the step: x_s [B, ...] in the dtype of x0 [B, ...]; no noise counts as 0."""
        x_s = as_factor(self.x0, x0) * x0 + as_factor(self.eps, x0) * eps
        return x_s if noise is None else x_s + as_factor(self.noise, x0) * noise

    def rows(self) -> "list[StepNumbers]":
        """The coefficients [N] of a whole walk as N steps of plain numbers."""
        columns = (column.tolist() for column in self)
        return [StepNumbers(*row) for row in zip(*columns, strict=True)]


class StepNumbers(NamedTuple):
    """One row of :class:`StepCoefficients` as numbers, so that a loop waits for no device."""

    x0: float
    eps: float
    noise: float

    def apply(self, x0: Tensor, eps: Tensor, noise: Tensor | None = None) -> Tensor:
        """:meth:`StepCoefficients.apply`, to rounding, without memory for its products
        (``test_the_step_of_numbers_is_the_step_of_tensors``)."""
        x_s = torch.mul(x0, self.x0).add_(eps, alpha=self.eps)
        return x_s if noise is None else x_s.add_(noise, alpha=self.noise)


class LinearStep(NamedTuple):
    """x_s = x * x_t + output * m + noise * z; float64, shape of the levels."""

    x: Tensor
    output: Tensor
    noise: Tensor


def check_eta(eta: Eta) -> Eta:
    """Returns eta; a DDIMError refuses what is negative, not finite, or an unknown word."""
    if isinstance(eta, str) and eta != SIGMA_HAT:
        raise wrong_argument("eta", "be a number or 'sigma-hat'", eta)
    return eta if isinstance(eta, str) else check_number("eta", eta, least=0)


def check_order(order: int, *, eta: Eta = 0.0, analytic: bool = False) -> int:
    """Returns the order of the solver; a DDIMError refuses an unknown one, and noise at order 2."""
    if not isinstance(order, (int, np.integer)) or isinstance(order, bool) or order not in ORDERS:
        raise wrong_argument("the order of the solver", "be 1 (DDIM) or 2 (multistep)", order)
    flow = "order 2 solves the deterministic flow"
    if order == 2 and eta != 0:
        raise DDIMError(f"{flow} and draws no noise; got eta={eta}, so use eta=0, or order 1.")
    if order == 2 and analytic:
        advice = "use order 1, or leave out eps_mean_square"
        raise DDIMError(f"{flow}, and the analytic variance draws noise; {advice}.")
    return order


def refuse_noise_upwards(eta: Eta, *, goes_up: bool) -> None:
    """Refuses eta above 0 in a step to a noisier level, which has no variance, by a DDIMError."""
    if goes_up and eta != 0:
        raise DDIMError(f"a step to a noisier level draws no noise; got eta={eta}, so use eta=0.")


def step_coefficients(
    alpha_bar_t: Tensor,
    alpha_bar_s: Tensor,
    *,
    eta: Eta = 0.0,
    eps_mean_square: Tensor | None = None,
) -> StepCoefficients:
    r"""The weights of x0, eps and z in the step from t to s.

    Args:
        alpha_bar_t: Level of the prediction, any shape, float64, in [0, 1].
        alpha_bar_s: Level to reach, same shape; above alpha_bar_t unless eta is 0.
        eta: See :data:`Eta`.
        eps_mean_square: For the analytic variance: the mean square of the predicted eps at level t,
            same shape, in [0, 1] (:func:`ddim.fitting.timesteps.estimate_eps_mean_square`).

    Returns:
        Three float64 tensors. A step to clean data (alpha_bar_s = 1) draws no noise.

    Raises:
        DDIMError: If eta or a level is invalid, or eta so large that noise would exceed 1 -
            alpha_bar_s; if eps_mean_square is given with sigma-hat, or where alpha_bar_t is 0.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Eq. 12 and 16; Sec. 5
        (sigma-hat). https://arxiv.org/abs/2010.02502
        Ho, Jain, Abbeel. Denoising Diffusion Probabilistic Models. 2020. Algorithm 2 (the last
        step, which draws none). https://arxiv.org/abs/2006.11239
    """
    eta = check_eta(eta)
    _check_levels(alpha_bar_t, alpha_bar_s, eps_mean_square)
    return _coefficients(alpha_bar_t, alpha_bar_s, eta, eps_mean_square)


def _check_levels(alpha_bar_t: Tensor, alpha_bar_s: Tensor, eps_mean_square: Tensor | None) -> None:
    check_alpha_bar(alpha_bar_t=alpha_bar_t, alpha_bar_s=alpha_bar_s)
    if eps_mean_square is not None:
        check_alpha_bar(eps_mean_square=eps_mean_square)


def _coefficients(
    alpha_bar_t: Tensor, alpha_bar_s: Tensor, eta: Eta, eps_mean_square: Tensor | None
) -> StepCoefficients:
    plain = unchecked_coefficients(alpha_bar_t, alpha_bar_s, eta=eta)
    if eps_mean_square is None:
        return plain
    return _analytic(plain, alpha_bar_t, alpha_bar_s, eta, eps_mean_square)


def unchecked_coefficients(
    alpha_bar_t: Tensor, alpha_bar_s: Tensor, *, eta: Eta
) -> StepCoefficients:
    """:func:`step_coefficients` of levels that may be no schedule's, as in diffusers."""
    check_eta(eta)
    if eta == 0:  # not a shortcut: at alpha_bar 0 or 1 the variance below is 0 * inf
        none = torch.zeros_like(alpha_bar_s)
        return StepCoefficients(alpha_bar_s.sqrt(), (1 - alpha_bar_s).sqrt(), none)
    scale = 1.0 if isinstance(eta, str) else float(eta)
    added = (1 - alpha_bar_t / alpha_bar_s).clamp(min=0)  # of equal levels it rounds to -1 ulp
    variance = scale**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * added
    remainder = 1 - alpha_bar_s - variance
    # The remainder is 0 at eta = 1 from zero terminal SNR, and this order of operations keeps it so
    # in float64. An eta that rounds to just above 1 brings it just below 0, which is no error.
    if scale > 1 and bool((excess := remainder < -1e-12).any()):
        largest = ((1 - alpha_bar_t) / added)[excess].min().sqrt()
        raise DDIMError(
            f"eta={eta} would draw more noise than the level can hold (its direction would be the "
            f"root of a negative number); use at most {float(largest):.4g} for these timesteps."
        )
    # A number eta comes to 0 at clean data by itself. Of sigma-hat the finished image is the mean.
    drawn = torch.where(alpha_bar_s < 1, added, 0.0) if eta == SIGMA_HAT else variance
    return StepCoefficients(alpha_bar_s.sqrt(), remainder.clamp(min=0).sqrt(), drawn.sqrt())


def _analytic(
    plain: StepCoefficients,
    alpha_bar_t: Tensor,
    alpha_bar_s: Tensor,
    eta: Eta,
    eps_mean_square: Tensor,
) -> StepCoefficients:
    r"""Adds the noise that the prediction leaves out; :math:`\Gamma_t` is ``eps_mean_square``.

    .. math:: \mathrm{noise}^2 \leftarrow \mathrm{noise}^2
        + \left(\sqrt{(1 - \bar\alpha_t)\,\bar\alpha_s / \bar\alpha_t} - \mathrm{eps}\right)^2
        (1 - \Gamma_t)

    References:
        Bao, Li, Zhu, Zhang. Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance in
        Diffusion Probabilistic Models. 2022. Theorem 1. https://arxiv.org/abs/2201.06503
    """
    if eta == SIGMA_HAT:
        raise DDIMError("the analytic variance is that of a number eta; got sigma-hat.")
    if bool((alpha_bar_t == 0).any()):
        advice = "start at a lower level, or use the variance of eta"
        raise DDIMError(f"the analytic variance has no value where the SNR is 0; {advice}.")
    missing = ((1 - alpha_bar_t) * alpha_bar_s / alpha_bar_t).sqrt() - plain.eps
    # The finished image is the mean: no noise in what is shown.
    added = torch.where(alpha_bar_s < 1, missing**2 * (1 - eps_mean_square), 0.0)
    return plain._replace(noise=(plain.noise**2 + added).sqrt())


def ddim_step(
    x0: Tensor,
    eps: Tensor,
    *,
    alpha_bar_t: Tensor,
    alpha_bar_s: Tensor,
    eta: Eta = 0.0,
    eps_mean_square: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    r"""Moves a sample from level t to level s; s below t denoises, s above t (eta = 0) inverts.

    Args:
        x0: Predicted clean sample, shape [B, ...]; its dtype is the result's.
        eps: Predicted noise, shape [B, ...].
        alpha_bar_t: Level of the prediction, shape [] or [B], float64, in [0, 1].
        alpha_bar_s: Level to reach, same shape; 1 is clean. Above alpha_bar_t unless eta is 0.
        eta: See :data:`Eta`.
        eps_mean_square: For the analytic variance, as in :func:`step_coefficients`.
        noise: Standard normal z, shape [B, ...]. Needed if eta is not 0 or the variance analytic.

    Raises:
        DDIMError: If eta or a level is invalid, eta is not 0 in a step up, or noise is missing; if
            samples are no floating-point tensors of one shape.
    """
    _check_levels(alpha_bar_t, alpha_bar_s, eps_mean_square)
    refuse_noise_upwards(check_eta(eta), goes_up=bool((alpha_bar_s < alpha_bar_t).any()))
    check_one_shape(x0=x0, eps=eps, **({} if noise is None else {"noise": noise}))
    weights = _coefficients(alpha_bar_t, alpha_bar_s, eta, eps_mean_square)
    if eta == 0 and eps_mean_square is None:
        return weights.apply(x0, eps)
    if noise is None:
        needed = "noise is required when eta is not 0, and for the analytic variance"
        raise DDIMError(f"{needed}; got eta={eta} and no noise.")
    return weights.apply(x0, eps, noise)


def linear_step(
    prediction_type: PredictionType, alpha_bar_t: Tensor, alpha_bar_s: Tensor, *, eta: Eta = 0.0
) -> LinearStep:
    """Folds conversion and step (:func:`step_coefficients`) into one linear map of (x_t, model
    output, z), valid where nothing is clipped; not finite where the conversion has no solution. A
    DDIMError refuses levels, types and an eta that are none."""
    check_prediction_type(prediction_type)
    check_alpha_bar(alpha_bar_t=alpha_bar_t, alpha_bar_s=alpha_bar_s)
    refuse_noise_upwards(check_eta(eta), goes_up=bool((alpha_bar_s < alpha_bar_t).any()))
    weights = unchecked_coefficients(alpha_bar_t, alpha_bar_s, eta=eta)
    return fold(weights, solve(prediction_type, alpha_bar_t))


def fold(weights: StepCoefficients, solution: Solution) -> LinearStep:
    """Puts x0 and eps, as linear maps of (x_t, model output), into the step's weighted sum."""
    return LinearStep(
        weights.x0 * solution.x0_x + weights.eps * solution.eps_x,
        weights.x0 * solution.x0_m + weights.eps * solution.eps_m,
        weights.noise,
    )


def multistep_weight(
    alpha_bar_previous: Tensor, alpha_bar_t: Tensor, alpha_bar_s: Tensor
) -> Tensor:
    r"""The weight w that makes DDIM's step from t to s second order, by the x0 of the step before.

    .. math::
        x_s = x_s^{\mathrm{DDIM}} + w\,(\hat x_0 - \hat x_0^{\mathrm{previous}}), \qquad
        w = \alpha_s (1 - e^{-h})\,\frac{h}{2\,(l_t - l_{\mathrm{previous}})},
        \qquad h = l_s - l_t, \quad l = \log(\alpha / \sigma)

    All levels are of one shape, float64, in [0, 1]; s lies on either side of t. The weight is 0,
    which is DDIM, where a log-SNR is infinite (clean data, zero terminal SNR).

    References:
        Lu et al. DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models.
        2022. Algorithm 2. https://arxiv.org/abs/2211.01095
    """
    check_alpha_bar(
        alpha_bar_previous=alpha_bar_previous, alpha_bar_t=alpha_bar_t, alpha_bar_s=alpha_bar_s
    )
    return unchecked_weight(alpha_bar_previous, alpha_bar_t, alpha_bar_s)


def unchecked_weight(
    alpha_bar_previous: Tensor, alpha_bar_t: Tensor, alpha_bar_s: Tensor
) -> Tensor:
    """:func:`multistep_weight` of levels that may be no schedule's, as in diffusers."""
    levels = (alpha_bar_previous, alpha_bar_t, alpha_bar_s)
    before, here, there = (alpha_bar.logit() for alpha_bar in levels)  # 2 l
    ratio = (alpha_bar_t / (1 - alpha_bar_t)).sqrt()
    change = alpha_bar_s.sqrt() - (1 - alpha_bar_s).sqrt() * ratio
    weight = change * (there - here) / (2 * (here - before))
    return torch.where(weight.isfinite(), weight, 0.0)
