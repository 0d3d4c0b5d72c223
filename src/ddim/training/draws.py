"""The random numbers of a step, as a function of the run's seed, the step, the forward pass and the
process."""

from typing import NamedTuple

import torch

__all__ = ["Draws", "Place", "mix"]

Place = tuple[int, int, int]
"""Optimiser step, forward pass within it, process."""


def mix(*numbers: int) -> int:
    """Hashes several numbers to one seed (FNV-1a over their 64-bit values), so that neighbouring
    steps share no stream."""
    value = 0xCBF29CE484222325
    for number in numbers:
        for shift in range(0, 64, 8):
            value = ((value ^ ((number >> shift) & 0xFF)) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value & 0x7FFFFFFFFFFFFFFF


class Draws(NamedTuple):
    """The random streams of one forward pass."""

    seed: int
    place: Place
    generator: torch.Generator
    """On the device of the images; it draws which are mirrored, then the noise."""

    @classmethod
    def at(cls, seed: int, place: Place, device: torch.device) -> "Draws":
        """The streams of one forward pass, from their beginning."""
        return cls(seed, place, torch.Generator(device).manual_seed(mix(seed, 3, *place)))

    def stream(self, number: int) -> torch.Generator:
        """A separate stream on the CPU, which the draws of the others do not move. 5: timesteps, 6:
        latents, 7: captions, 8: offset noise."""
        return torch.Generator().manual_seed(mix(self.seed, number, *self.place))
