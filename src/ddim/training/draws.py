"""The batches and the random numbers of a run, both functions of its seed, the step and the
process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ddim.errors import DDIMError
from ddim.training.config import TrainConfig
from ddim.training.stopping import ignore_signals

__all__ = ["BatchOrder", "CropOrder", "Draws", "Loadable", "Place"]
__all__ += ["collate", "load_batches", "mix"]

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


@dataclass(frozen=True, eq=False)
class BatchOrder(Sampler[list[int]]):
    """The images of every batch from step ``start`` to before ``stop``: one permutation per epoch,
    of which each process takes its share."""

    images: Sequence[int]
    config: TrainConfig
    start: int
    stop: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[list[int]]:
        size, parts = self.config.batch_size, self.config.gradient_accumulation
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for batch in range(self.start * parts, self.stop * parts):
            chosen, first = [], (batch * self.world + self.rank) * size
            for place in range(first, first + size):
                now, offset = divmod(place, len(self.images))
                if now != epoch:
                    generator = torch.Generator().manual_seed(mix(self.config.seed, now, 1))
                    epoch, order = now, torch.randperm(len(self.images), generator=generator)
                chosen.append(self.images[int(order[offset])])
            yield chosen


@dataclass(frozen=True, eq=False)
class CropOrder(Sampler[list[tuple[int, int]]]):
    """The same batches, each image with the seed of the place where it is cut."""

    order: BatchOrder

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed, first = (
            self.order.config.seed,
            self.order.start * self.order.config.gradient_accumulation,
        )
        for number, batch in enumerate(self.order, first):
            places = (mix(seed, 10, self.order.rank, number, place) for place in range(len(batch)))
            yield list(zip(batch, places, strict=True))


class Loadable(Dataset[tuple[Tensor, int]]):
    """Examples by lists of indices, or of indices and the seeds of their crops. An error is
    returned as a value: if it were raised in a worker, its message would be a traceback."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(
        self, indices: list[int] | list[tuple[int, int]]
    ) -> list[tuple[Tensor, int]] | DDIMError:
        read = self.examples
        try:
            return [read.crop(*i) if isinstance(i, tuple) else read[i] for i in indices]
        except DDIMError as error:
            return error


def collate(items: list[tuple[Tensor, int]] | DDIMError) -> Any:
    """Makes a batch of examples, unless they are an error."""
    return items if isinstance(items, DDIMError) else default_collate(items)


def load_batches(
    examples: Any,
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    images: Sequence[int],
    start: int,
    stop: int,
) -> Iterator[Any]:
    """Loads the batches of this process for the steps from ``start`` to before ``stop``, out of the
    images with these indices. A batch that cannot be read is a :class:`DDIMError`."""
    rank, world = accelerator.process_index, accelerator.num_processes
    order = BatchOrder(images, config, start, stop, rank, world)
    loader: DataLoader[Any] = DataLoader(
        Loadable(examples),
        batch_sampler=CropOrder(order) if config.random_crop else order,
        num_workers=config.workers,
        worker_init_fn=ignore_signals,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",
    )
    return iter(loader)
