r"""The training loss as a pure function, its weights, and how timesteps are drawn.

.. math::
    L = \mathrm{mean}\; w_t \,
        \| m_\theta(\alpha_t x_0 + \sigma_t \epsilon,\; t) - (p\,x_0 + q\,\epsilon) \|^2
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ddim.core.checks import (
    check_choice,
    check_function,
    check_kind,
    check_number,
    check_whole,
    wrong_argument,
)
from ddim.core.prediction import PredictionType, check_prediction_type, from_x0_eps
from ddim.core.schedule import NoiseSchedule, add_noise, check_schedule

__all__ = [
    "WEIGHTINGS",
    "Weighting",
    "draw_timesteps",
    "loss_weights",
    "offset_noise",
    "training_loss",
]

Weighting = Literal["uniform", "min-snr"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def loss_weights(
    schedule: NoiseSchedule,
    t: Tensor,
    *,
    prediction_type: PredictionType,
    weighting: Weighting = "uniform",
    gamma: float = 5.0,
    floor: float = 0.0,
) -> Tensor:
    r"""The weight of each sample's squared error.

    Min-SNR weights the error of x0 by min(SNR, gamma). In terms of what is predicted that is
    min(SNR, gamma) for ``sample``, min(gamma / SNR, 1) for ``epsilon`` and min(SNR, gamma) / (SNR +
    1) for ``v_prediction``. The last two are 0 at zero terminal SNR, where the first step of every
    image would then never be trained: ``floor`` is the weight there, and nowhere else.

    Args:
        schedule: The levels.
        t: Shape [B], int64.
        prediction_type: What the network predicts.
        weighting: ``uniform`` (all 1, as in both papers) or ``min-snr``.
        gamma: The SNR at which min-SNR saturates, above 0.
        floor: The smallest weight where the SNR is 0, at least 0.

    Returns:
        Shape [B], float64, finite.

    Raises:
        DDIMError: If weighting or prediction type is unknown, t are no levels, gamma is not above 0
            or floor below 0.

    References:
        Hang et al. Efficient Diffusion Training via Min-SNR Weighting Strategy. 2023.
        https://arxiv.org/abs/2303.09556
    """
    check_schedule(schedule)
    check_prediction_type(prediction_type)
    check_choice("weighting", weighting, WEIGHTINGS)
    check_number("gamma", gamma, above=0)
    check_number("floor", floor, least=0)
    if weighting == "uniform":
        return torch.ones(t.shape, dtype=torch.float64)
    snr = schedule.snr(t)
    saturated = snr.clamp(max=gamma)
    if prediction_type == "epsilon":  # min(SNR, gamma) / SNR is 0/0 at SNR 0
        weights = torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))
    else:
        weights = saturated if prediction_type == "sample" else saturated / (snr + 1)
    return torch.where(snr == 0, weights.clamp(min=floor), weights)


def draw_timesteps(
    batch_size: int, num_train_timesteps: int, *, generator: torch.Generator
) -> Tensor:
    """Draws levels uniformly from 0..T-1, shape [B], int64 on the CPU; a DDIMError refuses what are
    no whole numbers, and no generator."""
    batch_size = check_whole("batch_size", batch_size, least=0, most=2**31)
    total = check_whole("num_train_timesteps", num_train_timesteps, least=1, most=2**31)
    check_kind("generator", generator, torch.Generator, "a torch.Generator")
    return torch.randint(total, (batch_size,), generator=generator)


def offset_noise(noise: Tensor, strength: float, *, generator: torch.Generator) -> Tensor:
    r"""Adds to the noise one normal number an image and channel, for a variance of 1 + s^2.

    .. math:: \epsilon \leftarrow \epsilon + s\,\xi\,\mathbf 1

    It teaches brightness to a model whose schedule leaks it at the last level. No sampler draws
    such noise, so training and sampling then differ; with zero terminal SNR there is no leak to
    mend.

    Args:
        noise: Standard normal, shape [B, C, ...].
        strength: s, at least 0; 0 draws nothing.
        generator: On the CPU.

    References:
        Guttenberg. Diffusion with Offset Noise. 2023.
        https://www.crosslabs.org/blog/diffusion-with-offset-noise

        Lin et al. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023.
        https://arxiv.org/abs/2305.08891
    """
    if strength == 0:
        return noise
    shift = torch.randn(noise.shape[:2], generator=generator)
    shift = shift.reshape(*noise.shape[:2], *[1] * (noise.ndim - 2))
    return noise + strength * shift.to(noise.device, noise.dtype)


def training_loss(
    network: Callable[[Tensor, Tensor], Any],
    x0: Tensor,
    *,
    schedule: NoiseSchedule,
    t: Tensor,
    noise: Tensor,
    prediction_type: PredictionType = "epsilon",
    weights: Tensor | None = None,
) -> Tensor:
    """The loss of each sample [B]: weighted squared error, averaged over its elements.

    Noising and error are computed in x0's dtype, which should be float32 even if the network runs
    in half precision (under autocast, or by casting inside ``network``).

    Args:
        network: (x_t [B, ...], t [B] on x_t's device) -> prediction [B, ...].
        x0: Clean data, shape [B, ...].
        schedule: The levels.
        t: Shape [B], int64 on the CPU.
        noise: Standard normal, shape [B, ...].
        prediction_type: What the network predicts.
        weights: Shape [B], from :func:`loss_weights`. Default: all 1.

    Raises:
        DDIMError: If the network cannot be called, tensors are of another kind or shape, t are no
            levels, or the prediction type is unknown.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Theorem 1: the objective of
        DDPM trains DDIM as well. https://arxiv.org/abs/2010.02502
    """
    check_function("network", network, "a network, (x_t, t) -> prediction")
    check_kind("t", t, Tensor, "a tensor of timesteps, one a sample")
    x_t = add_noise(schedule, x0, noise, t)
    alpha_bar_t = schedule.alpha_bar(t)
    target = from_x0_eps(x0, noise, alpha_bar_t=alpha_bar_t, prediction_type=prediction_type)
    error: Tensor = network(x_t, t.to(x_t.device)) - target
    losses = error.to(x0.dtype).square().flatten(1).mean(1)
    if weights is None:
        return losses
    if not isinstance(weights, Tensor) or weights.shape != losses.shape:
        raise wrong_argument(
            "weights", f"be a tensor of shape {list(losses.shape)}, one a sample", weights
        )
    return losses * weights.to(losses.device, losses.dtype)
