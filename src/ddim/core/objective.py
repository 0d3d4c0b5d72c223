r"""The training loss as a pure function, its weights, and how timesteps are drawn.

.. math::
    L = \mathrm{mean}\; w_t \,
        \| m_\theta(\alpha_t x_0 + \sigma_t \epsilon,\; t) - (p\,x_0 + q\,\epsilon) \|^2
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ddim.core.prediction import PredictionType, check_prediction_type, from_x0_eps
from ddim.core.schedule import NoiseSchedule, add_noise
from ddim.errors import DDIMError

__all__ = ["Weighting", "draw_timesteps", "loss_weights", "offset_noise", "training_loss"]

Weighting = Literal["uniform", "min-snr"]


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
        DDIMError: If weighting or prediction type is unknown, or gamma is not positive.

    References:
        Hang et al. Efficient Diffusion Training via Min-SNR Weighting Strategy. 2023.
        https://arxiv.org/abs/2303.09556
    """
    check_prediction_type(prediction_type)
    if weighting == "uniform":
        return torch.ones(t.shape, dtype=torch.float64)
    if weighting != "min-snr":
        raise DDIMError(f"weighting must be uniform or min-snr; got {weighting!r}.")
    if gamma <= 0:
        raise DDIMError(f"gamma of min-snr must be above 0; got {gamma}.")
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
    """Draws levels uniformly from 0..T-1, shape [B], int64 on the CPU."""
    return torch.randint(num_train_timesteps, (batch_size,), generator=generator)


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

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Theorem 1: the objective of
        DDPM trains DDIM as well. https://arxiv.org/abs/2010.02502
    """
    x_t = add_noise(schedule, x0, noise, t)
    alpha_bar_t = schedule.alpha_bar(t)
    target = from_x0_eps(x0, noise, alpha_bar_t=alpha_bar_t, prediction_type=prediction_type)
    error: Tensor = network(x_t, t.to(x_t.device)) - target
    losses = error.to(x0.dtype).square().flatten(1).mean(1)
    return losses if weights is None else losses * weights.to(losses.device, losses.dtype)
