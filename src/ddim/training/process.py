"""The processes of a run: where they compute, and the signals that end them early."""

import contextlib
import signal
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

from ddim.errors import DDIMError
from ddim.training.config import TrainConfig

__all__ = ["StopSignals", "make_accelerator"]


class StopSignals:
    """Inside this context, SIGINT and SIGTERM ask the loop to end after its step, with a
    checkpoint, instead of ending the process."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # only the main thread may hold signal handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def agreed(self, accelerator: Accelerator, *, meeting: bool) -> bool:
        """Whether the run is to stop now. Several processes must stop after the same step, so they
        agree where they meet anyway."""
        asked = self.received is not None
        if accelerator.num_processes == 1:
            return asked
        if not meeting:
            return False
        flag = torch.tensor(float(asked), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum") > 0)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Finds where a run computes: the CPU, one GPU, or the processes that were launched together.

    Raises:
        DDIMError: If the precision of the run cannot be used there.
    """
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # Otherwise, processes that are launched without a GPU would not find each other.
            cpu=not torch.accelerator.is_available(),
            # A plugin, since accelerate launch overrides the plain argument by its own default.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation
            ),
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
        )
    except ValueError as error:
        raise DDIMError(
            f"--mixed-precision {config.mixed_precision} cannot be used here ({error}); use no."
        ) from error
    # accelerate would silently compute in float32.
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise DDIMError(
            "--mixed-precision fp16 needs a GPU, and this run is on the CPU; use bf16 or no."
        )
    return accelerator
