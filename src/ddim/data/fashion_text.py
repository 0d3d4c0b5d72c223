r"""``fashion-text``: coloured garments of Fashion-MNIST on backgrounds of some brightness, with
captions that say so.

A garment is a grey picture g in [0, 1] of 28x28 pixels, with 0 where there is no garment. With the
colour c and the background's brightness b,

.. math:: x = (1 - m)\,b + m\,(a + (1 - a)\,g)\,c, \qquad m = \min(g / s, 1)

so that the garment fades out over its softest pixels and is shaded by its own brightness, on every
background alike. A frame of two pixels of background makes it 32x32.

The background has no colour, so the chroma of x (its largest channel less its smallest) is
m (a + (1 - a) g) times that of c. It rises with g: the grey garment can be read back, whatever the
background."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "FRAME",
    "GARMENTS",
    "Combination",
    "FashionText",
    "combine",
    "compose",
    "extract_garments",
    "hues",
]

COLOURS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {"red": (0.9, 0.1, 0.1), "yellow": (0.9, 0.9, 0.1), "green": (0.1, 0.9, 0.1)}
    | {"cyan": (0.1, 0.9, 0.9), "blue": (0.1, 0.1, 0.9), "magenta": (0.9, 0.1, 0.9)}
)
"""Six hues, 60 degrees apart. None is saturated, so that only black and white backgrounds are 0 or
255 in real images."""

BACKGROUNDS: Mapping[str, int] = MappingProxyType(
    {"black": 0, "dark gray": 64, "gray": 128, "light gray": 191, "white": 255}
)
"""Brightness from 0 to 255."""

GARMENTS = (
    *("t-shirt", "pair of trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
"""In the order of Fashion-MNIST's labels."""

FRAME = 2
"""Pixels of pure background on each side."""

_SOFT = 0.2  # s: a garment is opaque above this brightness
_AMBIENT = 0.4  # a: the fraction of the colour that is left where the garment is darkest
_CHROMA = 0.8  # chroma of each of the colours


@dataclass(frozen=True)
class Combination:
    """The three things that a caption names."""

    colour: str
    garment: str
    background: str

    @property
    def caption(self) -> str:
        """Such as ``a red sneaker on a black background``."""
        return f"a {self.colour} {self.garment} on a {self.background} background"

    @property
    def numbers(self) -> tuple[float, int, int]:
        """The brightness of the background in [0, 1], and the indices of colour and garment."""
        colour, garment = list(COLOURS).index(self.colour), GARMENTS.index(self.garment)
        return BACKGROUNDS[self.background] / 255, colour, garment


def combine(garment: int, rank: int) -> Combination:
    """Returns the combination of the ``rank``-th image of a class: all pairs of colour and
    background in turn."""
    colours, backgrounds = tuple(COLOURS), tuple(BACKGROUNDS)
    background, colour = divmod(rank % (len(colours) * len(backgrounds)), len(colours))
    return Combination(colours[colour], GARMENTS[garment], backgrounds[background])


def compose(garment: NDArray[np.uint8], combination: Combination) -> NDArray[np.uint8]:
    """Colours a grey garment [H, W] and puts it on a background: [H + 4, W + 4, 3]."""
    grey = np.pad(garment, FRAME)[..., None] / 255
    mask = np.minimum(grey / _SOFT, 1)
    colour = np.array(COLOURS[combination.colour]) * 255
    shaded = mask * (_AMBIENT + (1 - _AMBIENT) * grey) * colour
    pixels = (1 - mask) * BACKGROUNDS[combination.background] + shaded
    return np.asarray(np.rint(pixels), dtype=np.uint8)


def extract_garments(images: NDArray[np.floating]) -> NDArray[np.float64]:
    """Reads the grey garments back: [B, H, W, 3] -> [B, H - 4, W - 4], both in [0, 1]."""
    chroma = (images.max(-1) - images.min(-1))[:, FRAME:-FRAME, FRAME:-FRAME] / _CHROMA
    grey = np.linspace(0, 1, 1025)
    shaded = np.minimum(grey / _SOFT, 1) * (_AMBIENT + (1 - _AMBIENT) * grey)
    return np.asarray(np.interp(chroma, shaded, grey), dtype=np.float64)


def hues() -> dict[str, float]:
    """Returns the hue of each colour in degrees: red 0, green 120, blue 240."""
    import colorsys

    return {name: round(colorsys.rgb_to_hsv(*c)[0] * 360, 6) for name, c in COLOURS.items()}


@dataclass(frozen=True, eq=False)
class FashionText:
    """Every image of Fashion-MNIST once, composed on access as a pure function of the index."""

    garments: NDArray[np.uint8]
    combinations: tuple[Combination, ...]

    @classmethod
    def of_garments(cls, garments: NDArray[np.uint8], labels: NDArray[np.integer]) -> "FashionText":
        """Gives each class all combinations in turn, so that their counts differ by at most one."""
        seen = [0] * len(GARMENTS)
        combinations = []
        for label in labels.tolist():
            combinations.append(combine(label, seen[label]))
            seen[label] += 1
        return cls(garments, tuple(combinations))

    def __len__(self) -> int:
        return len(self.garments)

    def __getitem__(self, index: int, /) -> NDArray[np.uint8]:
        return compose(self.garments[index], self.combinations[index])

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(c.caption for c in self.combinations)
