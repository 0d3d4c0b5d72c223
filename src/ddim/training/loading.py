"""The batches of a run: which images each step takes, and how worker processes load them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ddim.errors import DDIMError
from ddim.training.config import TrainConfig
from ddim.training.draws import mix
from ddim.training.loop import Run

__all__ = ["BatchOrder", "load_batches"]


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
            chosen = []
            for place in range(size):
                now, offset = divmod(
                    (batch * self.world + self.rank) * size + place, len(self.images)
                )
                if now != epoch:
                    generator = torch.Generator().manual_seed(mix(self.config.seed, now, 1))
                    epoch, order = now, torch.randperm(len(self.images), generator=generator)
                chosen.append(self.images[int(order[offset])])
            yield chosen


class _Loadable(Dataset[tuple[Tensor, int]]):
    """Examples by lists of indices. An error is returned as a value: if it were raised in a worker,
    its message would be a traceback."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]] | DDIMError:
        try:
            return [self.examples[i] for i in indices]
        except DDIMError as error:
            return error


def _collate(items: list[tuple[Tensor, int]] | DDIMError) -> Any:
    return items if isinstance(items, DDIMError) else default_collate(items)


def load_batches(run: Run, images: Sequence[int], start: int) -> Iterator[Any]:
    """Loads the batches of this process from step ``start`` on, out of the images with these
    indices. A batch that cannot be read is a :class:`DDIMError`."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    loader: DataLoader[Any] = DataLoader(
        _Loadable(run.subject.examples),
        batch_sampler=BatchOrder(images, run.config, start, run.steps, rank, world),
        num_workers=run.config.workers,
        collate_fn=_collate,
        pin_memory=run.accelerator.device.type == "cuda",
    )
    return iter(loader)
