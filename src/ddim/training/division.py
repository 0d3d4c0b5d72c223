"""How the images of an optimiser step are divided among processes.

A run fixes the passes of a step: their images and their random numbers. Which process takes a pass,
whole or in pieces, may change whenever the run is resumed.
"""

from typing import NamedTuple

from ddim.errors import CheckpointError
from ddim.training.config import TrainConfig

__all__ = ["Division", "Piece", "divide"]


class Piece(NamedTuple):
    """A part of a forward pass, which one process takes."""

    part: int
    """The pass within the step, of ``process``."""
    process: int
    """The process of the run as it began."""
    number: int = 0
    """The place of the piece within the pass."""
    pieces: int = 1
    """Pieces of the pass, all of one size."""


class Division(NamedTuple):
    """The passes of a step, and who takes them."""

    passes: int
    """Forward passes of a step, of each process of the run as it began."""
    processes: int
    """Processes of the run as it began."""
    size: int
    """Images of a piece."""
    pieces: int
    """Pieces of a pass."""
    world: int
    """Processes that take them."""

    @property
    def images(self) -> int:
        """Images of a step, of all processes together."""
        return self.size * self.pieces * self.passes * self.processes

    @property
    def each(self) -> int:
        """Pieces that each process takes in a step."""
        return self.passes * self.processes * self.pieces // self.world

    def piece(self, turn: int, rank: int) -> Piece:
        """The piece that a process takes at its turn of a step, from 0."""
        place, number = divmod(turn * self.world + rank, self.pieces)
        return Piece(*divmod(place, self.processes), number, self.pieces)

    @property
    def sentence(self) -> str | None:
        """What a person should know, where the processes are not those of the beginning."""
        if self.world == self.processes:
            return None
        split = "" if self.pieces == 1 else ", and dropout draws other numbers in split batches"
        began = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return (
            f"the run began on {began} and goes on with {self.world}: {self.each} x {self.size} "
            f"images a process and step. Its images, noise and learning rates stay those of the "
            f"run; sums are rounded in another order{split}."
        )


def divide(config: TrainConfig, processes: int, world: int) -> Division:
    """Divides the steps of a run that began on ``processes`` among ``world`` processes, in pieces
    as large as possible.

    Raises:
        CheckpointError: If they cannot have equally many images.
    """
    passes, size = config.gradient_accumulation, config.batch_size
    for pieces in range(1, size + 1):
        if size % pieces == 0 and passes * processes * pieces % world == 0:
            return Division(passes, processes, size // pieces, pieces, world)
    raise CheckpointError(
        f"{config.out} holds a run of {size * passes * processes} images a step, which {world} "
        f"processes cannot share equally; use a number that divides "
        f"{size * passes * processes}."
    )
