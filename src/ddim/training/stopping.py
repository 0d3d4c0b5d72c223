"""Signals that stop a run before its end, after the same step in all of its processes."""

import contextlib
import signal
from types import FrameType
from typing import Any

import torch
from torch import distributed

__all__ = ["StopSignals", "Stopped", "ignore_signals"]

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""An interrupt, an end that was asked for, and a terminal that was closed."""


class Stopped(Exception):
    """A signal asked for the end while something was computed that takes long."""


def ignore_signals(worker: int) -> None:
    """Begins a worker of a loader, which ends when its run does: a signal to all processes of a
    terminal or a service must not end it under the run's feet."""
    for name in _SIGNALS:
        if (number := getattr(signal, name, None)) is not None:
            signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Inside this context, SIGINT, SIGTERM and SIGHUP end the loop after its step, not the process.
    A signal that is ignored already, as SIGHUP under ``nohup``, stays ignored."""

    def __init__(self, processes: int) -> None:
        self.is_asked = False
        self._processes = processes

    def __enter__(self) -> "StopSignals":
        self._before: dict[int, Any] = {}
        # A group on the CPU: to ask on a GPU would wait for its work at every step.
        self._group = distributed.new_group(backend="gloo") if self._processes > 1 else None
        with contextlib.suppress(ValueError):  # only the main thread may hold signal handlers
            for name in _SIGNALS:
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def check(self) -> None:
        """Raises :class:`Stopped` if this process received a signal."""
        if self.is_asked:
            raise Stopped

    def agreed(self) -> bool:
        """Whether the run is to stop now. All processes ask after every step, and get the same
        answer, whichever of them received a signal."""
        if self._group is None:
            return self.is_asked
        flag = torch.tensor(int(self.is_asked))
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._group is not None:
            distributed.destroy_process_group(self._group)
