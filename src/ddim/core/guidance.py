r"""Classifier-free guidance: two predictions of a network combined into one.

With c the prediction under a condition, u the one without (or under another, negative one), w the
scale and :math:`\phi` the rescale,

.. math::
    g = u + w\,(c - u), \qquad m = \phi\,\frac{\mathrm{std}(c)}{\mathrm{std}(g)}\,g + (1 - \phi)\,g

on the network's raw outputs, before they are converted or clipped: the rescale is not linear, so on
x0 or eps it gives other images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddim.core.checks import check_function, check_kind, check_number, check_one_shape, shown
from ddim.errors import DDIMError

__all__ = [
    "SMALLEST_STD",
    "check_rescale",
    "check_scale",
    "guide",
    "guided",
    "is_guided",
    "network_output",
]

SMALLEST_STD = 1e-5
"""Its square is added to variances in the rescale, since that of a constant prediction is 0."""


def guide(
    conditional: Tensor, unconditional: Tensor, *, scale: float, rescale: float = 0.0
) -> Tensor:
    r"""Combines two raw predictions: the module's equation.

    Args:
        conditional: c, shape [B, ...].
        unconditional: u, same shape.
        scale: w; 1 is the conditional prediction itself.
        rescale: :math:`\phi` in [0, 1]: how far the standard deviation of each sample is brought
            back to the conditional one's. 0 is off; 0.5 to 0.75 help where a large scale
            overexposes images.

    Returns:
        m, same shape; float32 for half-precision predictions. Where both predictions are constant,
        m = g.

    Raises:
        DDIMError: If the predictions are no floating-point tensors of one shape, scale is no finite
            number, or rescale lies outside [0, 1].

    References:
        Ho, Salimans. Classifier-Free Diffusion Guidance. 2022. Eq. 6 (its w is this scale minus 1).
        https://arxiv.org/abs/2207.12598

        Lin et al. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023. Algorithm 2.
        https://arxiv.org/abs/2305.08891
    """
    check_one_shape(conditional=conditional, unconditional=unconditional)
    check_scale(scale)
    check_rescale(rescale)
    return _combine(conditional, unconditional, scale, rescale)


def _combine(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float) -> Tensor:
    if conditional.dtype in (torch.float16, torch.bfloat16):
        # A large scale overflows float16, and leaves bfloat16 two digits.
        conditional, unconditional = conditional.float(), unconditional.float()
    combined = torch.lerp(unconditional, conditional, scale)
    if rescale == 0 or combined.ndim == 1 or combined.numel() == 0:
        return combined
    inverse = _inverse_std(conditional)
    factor = torch.lerp(inverse, _inverse_std(combined), rescale) / inverse  # [B, 1]
    if factor.shape[0] > 1:  # one sample's goes for all of it as it is
        factor = factor.reshape(-1, *[1] * (combined.ndim - 1))
    # In place, since memory that is not in the cache costs a fifth of a step.
    return combined * factor if combined.requires_grad else combined.mul_(factor)


def _inverse_std(x: Tensor) -> Tensor:
    """1 over the standard deviation of each sample, [B, 1]; see :data:`SMALLEST_STD`."""
    if x.requires_grad:
        centred = x.flatten(1)
        for _ in range(2):  # the mean of equal numbers is off by rounding, and equal again
            centred = centred - centred.mean(1, keepdim=True)
        return (centred.square().mean(1, keepdim=True) + SMALLEST_STD**2).rsqrt()
    # A group norm of one group returns it too, in a third of the time; but without a gradient.
    size = x.shape[0]  # which len() takes ten times as long to say
    inverse: Tensor = torch.native_group_norm(
        x.contiguous(), None, None, size, 1, x.numel() // size, 1, SMALLEST_STD**2
    )[2]
    return inverse


def guided(
    network: Callable[[Tensor, Tensor, Tensor], Any],
    cond: Tensor,
    uncond: Tensor | None = None,
    *,
    scale: float,
    rescale: float = 0.0,
    batched: bool = True,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Makes a network of a conditional one: (x_t [B, ...], t [B]) -> the guided raw prediction.

    Args:
        network: ``(x_t, t, condition) -> prediction``, such as diffusers' UNet2DConditionModel;
            :func:`network_output` says what it may return.
        cond: The condition of each sample, shape [B, ...]: embeddings of its prompt, or its class.
        uncond: What it is guided away from, same shape. Needed if guidance is on.
        scale: As in :func:`guide`. 1 or less is off: one evaluation a step, under ``cond``.
        rescale: As in :func:`guide`.
        batched: Whether both predictions are evaluated as one batch of 2B; otherwise one after the
            other, in half of the memory.

    Raises:
        DDIMError: If the network cannot be called, ``uncond`` is missing or of another shape, the
            scale is not finite, or rescale lies outside [0, 1].
    """
    check_function("network", network, "a network, (x_t, t, condition) -> prediction")
    check_kind("cond", cond, Tensor, "a tensor, one row a sample")
    check_rescale(rescale)
    if not is_guided(scale):
        return lambda x_t, t: network_output(network(x_t, t, cond))
    if not isinstance(uncond, Tensor) or uncond.shape != cond.shape:
        raise DDIMError(
            f"guidance needs an uncond of the shape of cond, {list(cond.shape)}; got "
            f"{shown(uncond)}."
        )
    if not batched:

        def one_by_one(x_t: Tensor, t: Tensor) -> Tensor:
            without = network_output(network(x_t, t, uncond))
            under = network_output(network(x_t, t, cond))
            return _combine(under, without, scale, rescale)

        return one_by_one
    both = torch.cat([uncond, cond])

    def as_one_batch(x_t: Tensor, t: Tensor) -> Tensor:
        output = network_output(network(torch.cat([x_t, x_t]), torch.cat([t, t]), both))
        count = x_t.shape[0]
        return _combine(output[count:], output[:count], scale, rescale)

    return as_one_batch


def is_guided(scale: float) -> bool:
    """Whether guidance of this scale is on: above 1; :func:`check_scale` checks it."""
    check_scale(scale)
    return scale > 1


def network_output(output: Any) -> Tensor:
    """The prediction in what a network returned: a tensor, a tuple or list that starts with one, or
    an object with ``.sample``; a DDIMError refuses anything else."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "sample", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise DDIMError(
        "the network must return a tensor, a tuple that starts with one, or an object with "
        f".sample; got {type(output).__name__}."
    )


def check_scale(scale: float) -> None:
    """Refuses a scale that is no finite number, with a :class:`~ddim.errors.DDIMError`."""
    check_number("guidance_scale", scale, note=", of which 1 or less is off")


def check_rescale(rescale: float) -> None:
    """Refuses a rescale outside [0, 1], with a :class:`~ddim.errors.DDIMError`."""
    check_number("guidance_rescale", rescale, least=0, most=1, note=", where 0 is off")
