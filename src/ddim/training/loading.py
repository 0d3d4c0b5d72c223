"""The batches of a run: which images each step takes, and how worker processes load them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ddim.errors import DDIMError
from ddim.training.config import TrainConfig
from ddim.training.draws import mix

__all__ = ["BatchOrder", "load_batches"]


class BatchOrder(Sampler[list[int]]):
    """The images of every batch from step ``start`` on: one permutation per epoch, of which each
    process takes its share."""

    def __init__(
        self,
        images: Sequence[int],
        config: TrainConfig,
        *,
        start: int,
        stop: int,
        rank: int,
        world: int,
    ) -> None:
        self.images, self.config = images, config
        self.start, self.stop = start, stop
        self.rank, self.world = rank, world
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[list[int]]:
        size, parts = self.config.batch_size, self.config.gradient_accumulation
        for batch in range(self.start * parts, self.stop * parts):
            first = (batch * self.world + self.rank) * size
            yield [self._index(first + i) for i in range(size)]

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.images))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(mix(self.config.seed, epoch, 1))
            self._epoch = epoch
            self._order = torch.randperm(len(self.images), generator=generator)
        return self.images[int(self._order[offset])]


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


def load_batches(
    examples: Any,
    images: Sequence[int],
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    start: int,
    stop: int,
) -> Iterator[Any]:
    """Loads the batches of this process from step ``start`` to step ``stop``.

    Args:
        examples: The examples by index.
        images: The indices to train on.
        config: The run.
        accelerator: The processes that share the images.
        start: The first step, from 0.
        stop: The step after the last.

    Returns:
        An iterator over collated batches; a batch that cannot be read is a :class:`DDIMError`.
    """
    order = BatchOrder(
        images,
        config,
        start=start,
        stop=stop,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    return iter(
        DataLoader(
            _Loadable(examples),
            batch_sampler=order,
            num_workers=config.workers,
            collate_fn=_collate,
            pin_memory=accelerator.device.type == "cuda",
        )
    )
