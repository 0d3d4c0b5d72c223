"""The process of a run: where it computes, what ends it early, and what it logs."""

import contextlib
import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

from ddim.errors import DDIMError
from ddim.files import write_text
from ddim.training.config import TrainConfig

__all__ = ["RunLog", "StopSignals", "make_accelerator"]


class StopSignals:
    """While held, SIGINT and SIGTERM ask the loop to end after its step, with a checkpoint, instead
    of ending the process."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # only the main thread may hold signal handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Where a run computes: the CPU, one GPU, or the processes that were launched together.

    Raises:
        DDIMError: If its precision cannot be used there.
    """
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # else processes that are launched without a GPU would not find each other
            cpu=not torch.accelerator.is_available(),
            # A plugin, since accelerate launch sets the plain argument to its own default through
            # the environment.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation
            ),
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
        )
    except ValueError as error:
        raise DDIMError(
            f"--mixed-precision {config.mixed_precision} cannot be used here ({error}); use no."
        ) from error
    if (
        config.mixed_precision == "fp16" and accelerator.device.type == "cpu"
    ):  # accelerate would leave it out without a word
        raise DDIMError(
            "--mixed-precision fp16 needs a GPU, and this run is on the CPU; use bf16 or no."
        )
    return accelerator


class RunLog:
    """Scalars for tensorboard, and the same as lines of JSON that any tool reads."""

    def __init__(self, folder: Path, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.writer = SummaryWriter(str(folder), purge_step=start + 1)
        path = folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A run that was killed has logged steps that are taken again now, the last one perhaps in
        # part.
        write_text(
            path,
            "".join(
                line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start
            ),
        )
        self.lines = path.open("a")

    def add(self, step: int, **values: float | None) -> None:
        """Adds a line; values that are None are left out."""
        given = {k: v for k, v in values.items() if v is not None}
        for name, value in given.items():
            self.writer.add_scalar(name, value, step)
        self.lines.write(json.dumps({"step": step, **given}) + "\n")
        self.lines.flush()

    def close(self) -> None:
        """Closes both files."""
        self.writer.close()
        self.lines.close()
