"""The random numbers of a step: a function of the run's seed, the step, its part and the
process."""

from typing import NamedTuple

import torch

__all__ = ["Draws", "Place", "mix"]

Place = tuple[int, int, int]
"""Optimiser step, forward pass within it, process."""


def mix(*numbers: int) -> int:
    """One seed out of several numbers (FNV-1a over their 64-bit values), so that neighbouring steps
    share no stream."""
    value = 0xCBF29CE484222325
    for number in numbers:
        for shift in range(0, 64, 8):
            value = ((value ^ ((number >> shift) & 0xFF)) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value & 0x7FFFFFFFFFFFFFFF


class Draws(NamedTuple):
    """The streams of one forward pass."""

    seed: int
    place: Place
    generator: torch.Generator
    """On the device of the images: which are mirrored, then the noise."""

    @classmethod
    def at(cls, seed: int, place: Place, device: torch.device) -> "Draws":
        """The streams of one forward pass, from their beginning."""
        return cls(seed, place, torch.Generator(device).manual_seed(mix(seed, 3, *place)))

    def stream(self, number: int) -> torch.Generator:
        """A stream of its own on the CPU, which what others draw does not move: 5 timesteps, 6
        latents, 7 captions, 8 offset noise."""
        return torch.Generator().manual_seed(mix(self.seed, number, *self.place))
