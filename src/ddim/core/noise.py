"""Noise that belongs to an image's seed, not to its place in a batch.

Each image has a generator of its own on the CPU. It gives x_T first, then one z a step, always in
float32: the image of a seed is the same for every batch size, device and dtype, and equals what
diffusers makes of a list of CPU generators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddim.bounds import LARGEST_SEED
from ddim.core.checks import check_kind, check_shape, wrong_argument
from ddim.errors import DDIMError

__all__ = ["SeededNoise", "check_seeds", "make_generators", "randn_each", "seeded_randn"]


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """Returns seeds as plain integers; a DDIMError refuses all but whole numbers in 0..2^32 - 1:
    a larger seed would give the image of another."""
    if not hasattr(seeds, "__iter__"):
        raise wrong_argument("seeds", "be a list of whole numbers, one an image", seeds)
    return [_check_seed(seed) for seed in seeds]


def _check_seed(seed: object) -> int:
    try:
        value = int(seed)  # type: ignore[call-overload]
        fits = not isinstance(seed, bool) and value == seed and 0 <= value <= LARGEST_SEED
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise wrong_argument("a seed", "be a whole number from 0 to 2^32 - 1", seed)
    return int(value)


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator an image, seeded with its seed."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in check_seeds(seeds)]


def randn_each(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draws standard normal noise of one image's ``shape`` from each generator, on its device:
    [B, *shape], float32 on the CPU."""
    draws = [
        torch.randn((1, *shape), generator=g, device=g.device, dtype=torch.float32).cpu()
        for g in generators
    ]
    return torch.cat(draws) if draws else torch.empty((0, *shape))


def seeded_randn(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """The x_T ``[B, *shape]`` of each seed, float32 on the CPU; ``shape`` is one image's."""
    return randn_each(check_shape("shape", shape), make_generators(seeds))


class SeededNoise:
    """A stream of noise for a batch: the first call gives x_T, each later call the z of a step.

    Args:
        seeds_or_generators: One an image.
        shape: One image's shape, such as (3, 32, 32).
        device: Where the noise is moved after it is drawn.
        dtype: What it is cast to after it is drawn.

    Raises:
        DDIMError: If these are no seeds or generators, or no shape.
    """

    def __init__(
        self,
        seeds_or_generators: Sequence[int] | Sequence[torch.Generator],
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        wanted = "be a list of seeds or of generators, one an image"
        if not hasattr(seeds_or_generators, "__iter__"):
            raise wrong_argument("seeds_or_generators", wanted, seeds_or_generators)
        check_kind("dtype", dtype, torch.dtype, "a dtype of torch")
        given: list[Any] = list(seeds_or_generators)
        held = [g for g in given if isinstance(g, torch.Generator)]
        if held and len(held) != len(given):
            raise DDIMError("seeds and generators cannot be mixed; give every image the same kind.")
        self.seeds = None if held else check_seeds(given)
        """Whose noise it is; None where generators were given."""
        self.generators = held or make_generators(given)
        self.shape = check_shape("shape", shape)
        self.device, self.dtype = torch.device(device), dtype

    def __repr__(self) -> str:
        count, dtype = len(self.generators), str(self.dtype).removeprefix("torch.")
        return f"SeededNoise({count} images, {dtype} {list(self.shape)} each, {self.device})"

    def __call__(self) -> Tensor:
        """The next noise of every image, [B, *shape]."""
        noise = randn_each(self.shape, self.generators).to(self.dtype)
        if self.device.type != "cuda":
            return noise.to(self.device)
        # Pinned memory lets the copy run beside the kernels already queued, without a wait.
        return noise.pin_memory().to(self.device, non_blocking=True)
