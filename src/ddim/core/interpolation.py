r"""Paths between latents.

A latent of d dimensions drawn from :math:`N(0, I)` lies close to the sphere of radius :math:`\sqrt
d`. A straight line between two of them leaves that sphere (half way, two independent ones have 0.71
of the radius), and what is decoded there is washed out; a great circle stays on it."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ddim.bounds import MOST_IMAGES
from ddim.core.checks import check_choice, check_number, check_one_shape, check_samples, check_whole
from ddim.errors import DDIMError

__all__ = ["INTERPOLATIONS", "Interpolation", "interpolate", "interpolate_grid", "lerp", "slerp"]

Interpolation = Literal["spherical", "linear"]
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)


def lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    r"""The straight line :math:`(1 - \lambda) a + \lambda b`, [B, ...]; exact at both ends.
    A DDIMError refuses ends that are no tensors of one shape, and a weight that is no number."""
    check_one_shape(a=a, b=b)
    check_number("weight", weight)
    return a * (1 - weight) + b * weight


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    r"""The great circle from a to b, each sample by itself.

    .. math::
        \frac{\sin((1 - \lambda)\theta)}{\sin\theta}\,\hat a
            + \frac{\sin(\lambda\theta)}{\sin\theta}\,\hat b,
        \qquad \cos\theta = \langle \hat a, \hat b \rangle

    with the directions :math:`\hat a = a / |a|` of the flattened samples, times the length
    :math:`(1 - \lambda)|a| + \lambda|b|`. This is the paper's formula where both have one length;
    codes of images differ in length, and so it runs evenly from the one to the other. Directions
    that coincide leave a straight line; opposite ones have no shortest arc, and go by way of a
    fixed direction across.

    Args:
        a: Where the path begins, shape [B, ...]; its dtype is the result's.
        b: Where it ends, shape [B, ...].
        weight: lambda; 0 gives a, 1 gives b, to rounding. Outside [0, 1] the circle goes on.

    Raises:
        DDIMError: If a and b are no floating-point tensors of one shape, or weight is no number.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. App. D.5.
        https://arxiv.org/abs/2010.02502

        Shoemake. Animating Rotation with Quaternion Curves. 1985.
        https://doi.org/10.1145/325165.325242
    """
    check_one_shape(a=a, b=b)
    check_number("weight", weight)
    if a.numel() == 0:
        return a
    rows = (a.reshape(a.shape[0], -1).double(), b.reshape(b.shape[0], -1).double())
    lengths = [row.norm(dim=1, keepdim=True) for row in rows]
    tiny = torch.finfo(torch.float64).tiny
    first, second = (
        row / length.clamp(min=tiny) for row, length in zip(rows, lengths, strict=True)
    )
    cosine = (first * second).sum(1, keepdim=True)
    # The part of b across a: its length is the sine, without the cancellation of an arc cosine near
    # 0 and pi.
    across = second - cosine * first
    sine = across.norm(dim=1, keepdim=True)
    theta = torch.atan2(sine, cosine)
    opposite = (sine < 1e-9) & (cosine < 0)
    across = torch.where(opposite, _perpendicular(first), across / sine.clamp(min=tiny))
    turned = torch.cos(weight * theta) * first + torch.sin(weight * theta) * across
    on_circle = turned * ((1 - weight) * lengths[0] + weight * lengths[1])
    straight = (1 - weight) * rows[0] + weight * rows[1]
    collinear = ((sine < 1e-9) & (cosine > 0)) | (lengths[0] < tiny) | (lengths[1] < tiny)
    return torch.where(collinear, straight, on_circle).reshape(a.shape).to(a.dtype)


def interpolate(a: Tensor, b: Tensor, count: int, *, kind: Interpolation = "spherical") -> Tensor:
    """``count`` evenly spaced points [count, ...] of the path from a [...] to b [...], both ends
    among them; ``spherical`` by :func:`slerp`, ``linear`` by :func:`lerp`.

    Raises:
        DDIMError: If count is no whole number of at least 2, the kind is unknown, or the ends are
            no tensors of one shape.
    """
    check_one_shape(a=a, b=b)
    count = check_whole("count", count, least=2, most=MOST_IMAGES)
    check_choice("interpolation", kind, INTERPOLATIONS)
    between = slerp if kind == "spherical" else lerp
    middle = [between(a[None], b[None], i / (count - 1)) for i in range(1, count - 1)]
    return torch.cat([a[None], *middle, b[None]])  # the ends themselves, without rounding


def interpolate_grid(
    corners: Tensor, rows: int, columns: int, *, kind: Interpolation = "spherical"
) -> Tensor:
    """A grid between four latents: paths down its left and right edges, and across from the one to
    the other; [rows * columns, ...], row by row.

    The corners [4, ...] are top left, top right, bottom left, bottom right. A DDIMError refuses
    another number of them, and fewer than 2 rows or columns."""
    check_samples(corners=corners)
    if corners.ndim == 0 or corners.shape[0] != 4:
        raise DDIMError(f"a grid has four corners, shape [4, ...]; got {list(corners.shape)}.")
    rows = check_whole("rows", rows, least=2, most=MOST_IMAGES)
    columns = check_whole("columns", columns, least=2, most=MOST_IMAGES)
    left = interpolate(corners[0], corners[2], rows, kind=kind)
    right = interpolate(corners[1], corners[3], rows, kind=kind)
    ends = zip(left, right, strict=True)
    return torch.cat([interpolate(start, end, columns, kind=kind) for start, end in ends])


def _perpendicular(direction: Tensor) -> Tensor:
    """A unit vector across each row of [B, d]: the coordinate axis that the row has least of, made
    orthogonal; 0 for d = 1."""
    axis = torch.zeros_like(direction).scatter_(1, direction.abs().argmin(1, keepdim=True), 1.0)
    across = axis - (axis * direction).sum(1, keepdim=True) * direction
    length: Tensor = across.norm(dim=1, keepdim=True)
    return across / length.clamp(min=math.sqrt(torch.finfo(torch.float64).tiny))
