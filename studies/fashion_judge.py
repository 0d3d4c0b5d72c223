"""Whether an image of ``fashion-text`` shows what its caption says: the background's brightness,
the garment's hue and class.

Images are [B, 3, H, W] in [0, 1]. Brightness is the mean over pixels and channels. The palette and
the grey garments, which :mod:`ddim.data.fashion_text` reads out of coloured images, are passed
in."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "Asked",
    "Judged",
    "Summary",
    "frame_brightness",
    "frame_spread",
    "garment_hue",
    "hue_distance",
    "judge",
    "judge_classes",
    "nearest_hue",
    "saturated",
    "summarise",
]

_COLOURLESS = 0.005
"""An image whose mean chroma is below this has no hue; the palest real image has 0.036."""


def _frame(images: Tensor, width: int) -> Tensor:
    """The pixels of the frame, [B, 3, P]."""
    height, length = images.shape[-2:]
    if not 0 < 2 * width < min(height, length):
        raise ValueError(
            f"the frame's width must be at least 1 and leave an image within; got {width} for "
            f"images of {height}x{length}."
        )
    inside = torch.zeros(height, length, dtype=torch.bool, device=images.device)
    inside[width:-width, width:-width] = True
    return images[..., ~inside]


def frame_brightness(images: Tensor, *, width: int = 2) -> Tensor:
    """Mean of the outermost ``width`` pixels, where there is background alone: [B]."""
    return _frame(images, width).mean((1, 2))


def frame_spread(images: Tensor, *, width: int = 2) -> Tensor:
    """Standard deviation over the same pixels of an image, 0 where the background is plain: [B]."""
    return _frame(images, width).flatten(1).std(1, correction=0)


def garment_hue(images: Tensor) -> tuple[Tensor, Tensor]:
    r"""The mean hue, each pixel weighing as much as it has colour; a background of grey weighs
    nothing.

    The chroma plane is spanned by the angles of red, green and blue, 120 degrees apart; hue is the
    angle of the summed vector,

    .. math:: \tfrac{1}{HW}\sum (r\,e^{0} + g\,e^{2\pi i/3} + b\,e^{4\pi i/3})

    Returns:
        The hue in degrees in [0, 360), [B], and the length of the mean vector, [B]: 0 for an image
        without colour, whose hue means nothing.
    """
    angles = torch.arange(3, dtype=images.dtype, device=images.device) * (2 * math.pi / 3)
    mean = images.mean((2, 3))
    x, y = mean @ angles.cos(), mean @ angles.sin()
    return torch.rad2deg(torch.atan2(y, x)).remainder(360), torch.hypot(x, y)


def hue_distance(a: Tensor, b: Tensor | float) -> Tensor:
    """The distance of two hues on the circle, in degrees, at most 180."""
    return ((a - b + 180).remainder(360) - 180).abs()


def nearest_hue(hue: Tensor, palette: Sequence[float]) -> Tensor:
    """Which entry of the palette each hue is nearest to: [B]."""
    hues = torch.as_tensor(palette, dtype=hue.dtype, device=hue.device)
    return hue_distance(hue[:, None], hues).argmin(1)


@torch.no_grad()
def judge_classes(garments: Tensor, classifier: nn.Module) -> Tensor:
    """The class that the classifier sees in grey garments [B, 28, 28] in [0, 1]: [B]."""
    answers: Tensor = classifier(garments[:, None].float() * 2 - 1).argmax(1)
    return answers


def saturated(images: Tensor, *, tolerance: float = 0.5 / 255) -> Tensor:
    """The share of values that are 0 or 1: [B]. In a clamped image these were at the limit or
    beyond."""
    return ((images <= tolerance) | (images >= 1 - tolerance)).flatten(1).float().mean(1)


class Summary(NamedTuple):
    """Mean, spread and number of a set of values."""

    mean: float
    spread: float
    """Standard deviation over the values."""
    values: int


def summarise(values: Tensor) -> Summary:
    """Mean, standard deviation (of the population) and number of the values."""
    if values.numel() == 0:
        raise ValueError("there are no values to summarise.")
    values = values.double()
    return Summary(values.mean().item(), values.std(correction=0).item(), values.numel())


class Asked(NamedTuple):
    """What a caption asks for."""

    brightness: float
    """The background's brightness, in [0, 1]."""
    hue: int
    """The place of the garment's hue in the palette."""
    garment: int
    """The garment's class."""


class Judged(NamedTuple):
    """What images show; each field has one value an image, shape [B]."""

    brightness: Tensor
    """Brightness of the frame."""
    error: Tensor
    """Brightness less the one asked for."""
    hue_right: Tensor
    """Whether no hue of the palette is nearer than the one asked for."""
    class_right: Tensor
    """Whether the classifier sees the garment asked for."""


def judge(
    images: Tensor,
    garments: Tensor,
    asked: Sequence[Asked],
    *,
    palette: Sequence[float],
    classifier: nn.Module,
) -> Judged:
    """Compares images with what was asked of them.

    Args:
        images: Shape [B, 3, H, W], in [0, 1].
        garments: The grey garments that were read out of them, shape [B, 28, 28], in [0, 1].
        asked: What each image should show.
        palette: The hues, in degrees.
        classifier: [B, 1, 28, 28] in [-1, 1] -> logits.

    Raises:
        ValueError: If the numbers of images, garments and captions differ.
    """
    if not len(images) == len(garments) == len(asked):
        raise ValueError(
            f"there must be one garment and one caption an image; got {len(images)}, "
            f"{len(garments)} and {len(asked)}."
        )
    brightness = frame_brightness(images)
    wanted = torch.tensor([a.brightness for a in asked], dtype=brightness.dtype)
    hue, strength = garment_hue(images)
    right = (nearest_hue(hue, palette) == torch.tensor([a.hue for a in asked])) & (
        strength > _COLOURLESS
    )
    classes = judge_classes(garments, classifier)
    return Judged(
        brightness, brightness - wanted, right, classes == torch.tensor([a.garment for a in asked])
    )
