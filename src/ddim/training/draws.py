"""The batches and the random numbers of a run, both functions of its seed, the step and the
process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ddim.errors import DDIMError
from ddim.training.config import TrainConfig
from ddim.training.division import Division, Piece
from ddim.training.stopping import ignore_signals

__all__ = ["BatchOrder", "CropOrder", "Draws", "Loadable"]
__all__ += ["collate", "load_batches", "mix"]


def mix(*numbers: int) -> int:
    """Hashes several numbers to one seed (FNV-1a over their 64-bit values), so that neighbouring
    steps share no stream."""
    value = 0xCBF29CE484222325
    for number in numbers:
        for shift in range(0, 64, 8):
            value = ((value ^ ((number >> shift) & 0xFF)) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value & 0x7FFFFFFFFFFFFFFF


class Draws(NamedTuple):
    """The random streams of one forward pass, of which this is a piece."""

    seed: int
    place: tuple[int, int, int]
    """Optimiser step, forward pass within it, process."""
    piece: Piece
    generator: torch.Generator
    """On the device of the images; it draws which are mirrored, then the noise."""

    @classmethod
    def at(cls, seed: int, step: int, piece: Piece, device: torch.device) -> "Draws":
        """The streams of one forward pass, from their beginning."""
        place = (step, piece.part, piece.process)
        return cls(seed, place, piece, torch.Generator(device).manual_seed(mix(seed, 3, *place)))

    def own(self, count: int, draw: Callable[[int], Tensor]) -> Tensor:
        """Draws for all images of the pass, and gives what belongs to the ``count`` of this piece:
        an image has the same numbers, whoever takes it."""
        first = self.piece.number * count
        return draw(self.piece.pieces * count)[first : first + count]

    def stream(self, number: int) -> torch.Generator:
        """A separate stream on the CPU, which the draws of the others do not move. 5: timesteps, 6:
        latents, 7: captions, 8: offset noise."""
        return torch.Generator().manual_seed(mix(self.seed, number, *self.place))


@dataclass(frozen=True, eq=False)
class BatchOrder(Sampler[list[int]]):
    """The images of every batch from step ``start`` to before ``stop``: one permutation per epoch,
    of which each process takes its share."""

    images: Sequence[int]
    seed: int
    division: Division
    start: int
    stop: int
    rank: int

    def turns(self) -> Iterator[tuple[int, Piece]]:
        """The step and the piece of every batch."""
        for step in range(self.start, self.stop):
            for turn in range(self.division.each):
                yield step, self.division.piece(turn, self.rank)

    def __iter__(self) -> Iterator[list[int]]:
        passes, processes, size, pieces, _ = self.division
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for step, (part, process, number, _) in self.turns():
            of_all = (step * passes + part) * processes + process
            chosen, first = [], (of_all * pieces + number) * size
            for place in range(first, first + size):
                now, offset = divmod(place, len(self.images))
                if now != epoch:
                    generator = torch.Generator().manual_seed(mix(self.seed, now, 1))
                    epoch, order = now, torch.randperm(len(self.images), generator=generator)
                chosen.append(self.images[int(order[offset])])
            yield chosen


@dataclass(frozen=True, eq=False)
class CropOrder(Sampler[list[tuple[int, int]]]):
    """The same batches, each image with the seed of the place where it is cut."""

    order: BatchOrder

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed, passes = self.order.seed, self.order.division.passes
        turns = self.order.turns()
        for batch, (step, (part, process, piece, _)) in zip(self.order, turns, strict=True):
            first, number = piece * len(batch), step * passes + part
            places = range(first, first + len(batch))
            seeds = (mix(seed, 10, process, number, place) for place in places)
            yield list(zip(batch, seeds, strict=True))


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
    division: Division,
    images: Sequence[int],
    start: int,
    stop: int,
) -> Iterator[Any]:
    """Loads the batches of this process for the steps from ``start`` to before ``stop``, out of the
    images with these indices. A batch that cannot be read is a :class:`DDIMError`."""
    rank = accelerator.process_index
    order = BatchOrder(images, config.seed, division, start, stop, rank)
    loader: DataLoader[Any] = DataLoader(
        Loadable(examples),
        batch_sampler=CropOrder(order) if config.random_crop else order,
        num_workers=config.workers,
        worker_init_fn=ignore_signals,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",
    )
    return iter(loader)
