"""The queue of the studio: one thread computes, one model is in memory, and every visitor sees the
runs of their own."""

import contextlib
import itertools
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ddim.errors import DDIMError, first_line
from ddim.models.images import to_pil, to_uint8
from ddim.runs.engine import Control, Event, Stopped

__all__ = ["Desk", "Ticket", "Update", "preview"]

MOST_WAITING = 32
"""Runs that may wait, of all visitors."""
MOST_OF_ONE = 2
"""Runs of one visitor that may wait or go on."""


@dataclass(frozen=True)
class Update:
    """How far a run is.

    Attributes:
        state: ``waiting``, ``running``, or how it ended.
        before: Runs that are computed first, while it waits.
        done: Steps that are walked.
        total: Steps of the walk; None where nobody knows.
        left: Seconds that the other steps will take, about.
        previews: The pictures that the last step predicts.
        notes: Sentences of the run to a person.
        part: What the run has reported last.
        result: What the run returned, once it has finished.
        error: A sentence, if it failed.
    """

    state: Literal["waiting", "running", "finished", "stopped", "failed"] = "waiting"
    before: int = 0
    done: int = 0
    total: int | None = None
    left: float | None = None
    previews: tuple[Image.Image, ...] = ()
    notes: tuple[str, ...] = ()
    part: Any = None
    result: Any = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("finished", "stopped", "failed")


def preview(pipe: Any, x0: Any) -> tuple[Image.Image, ...]:
    """Pictures of predicted clean data [B, C, H, W]: of pixels, or of latents by the VAE."""
    if (vae := getattr(pipe, "vae", None)) is not None:
        x0 = vae.decode((x0 / vae.config.scaling_factor).to(vae.dtype)).sample
    return tuple(to_pil(to_uint8(x0)))


@dataclass(eq=False)
class Ticket:
    """One run of a visitor, in the queue or on the desk.

    Attributes:
        visitor: Whose it is.
        work: Called with the ticket, in the thread of the desk; what it returns is the result.
        folder: A folder of its own for files, which :meth:`close` removes.
    """

    visitor: str
    work: Callable[["Ticket"], Any]
    folder: Path
    desk: "Desk"
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _update: Update = Update()
    _version: int = 0
    _is_stopping: bool = False
    _spent: float = 0.0
    """Seconds that previews of this run took."""
    _began: float | None = None

    def control(self) -> Control:
        """Connects a run with this ticket."""
        self._began = None
        stopping = lambda: self._is_stopping or self.desk.is_closed  # noqa: E731
        return Control(emit=self._listen, stopping=stopping, keep=self.desk.keep)

    def report(self, part: Any) -> None:
        """Shows a part of the result before the rest is there."""
        self.update(part=part)

    def stop(self) -> None:
        """Ends the run between two steps, or takes it out of the queue."""
        self._is_stopping = True
        self.desk.forget(self)

    def close(self) -> None:
        """Ends the run, and removes its files."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def update(self, **changes: Any) -> None:
        """Changes what visitors see."""
        with self._changed:
            self._update = replace(self._update, **changes)
            self._version += 1
            self._changed.notify_all()

    def updates(self, *, every: float = 0.1) -> Iterator[Update]:
        """Yields how far the run is, whenever that has changed, up to its end; at most once in
        ``every`` seconds."""
        seen = -1

        def is_new() -> bool:
            return self._version != seen

        while True:
            with self._changed:
                self._changed.wait_for(is_new, timeout=0.5)
                seen, update = self._version, self._update
            if update.state == "waiting":
                update = replace(update, before=self.desk.before(self))
            if self.desk.is_closed and not update.is_last:
                update = replace(update, state="stopped")
            yield update
            if update.is_last:
                return
            time.sleep(every)

    def run(self) -> None:
        """Does the work; never raises."""
        self.update(state="running")
        try:
            result = self.work(self)
        except Stopped:
            self.update(state="stopped")
        except DDIMError as error:
            self.update(state="failed", error=str(error))
        except Exception as error:  # a bug, or the machine's end: the page tells it in a sentence
            traceback.print_exc(file=sys.stderr)
            what = f"{type(error).__name__}: {first_line(error)}"
            self.update(
                state="failed", error=f"the studio failed ({what}); its terminal says more."
            )
        else:
            self.update(state="stopped" if self._is_stopping else "finished", result=result)

    def _listen(self, event: Event) -> None:
        if event.state == "note" and event.text:
            self.update(notes=(*self._update.notes, event.text))
        if event.state != "step":
            return
        now = time.perf_counter()
        if self._began is None:  # the first step is over; what it took is not known
            self._began, self._spent, first = now, 0.0, event.done
            self._first = first
        walked, left = event.done - self._first, None
        if walked > 0 and event.total is not None:
            left = (now - self._began) / walked * (event.total - event.done)
        changes: dict[str, Any] = {"done": event.done, "total": event.total, "left": left}
        # A VAE may take longer than a step: previews get a third of the time at most.
        if event.x0 is not None and (not walked or self._spent < (now - self._began) / 3):
            changes["previews"] = preview(self.desk.pipe, event.x0)
            self._spent += time.perf_counter() - now
        self.update(**changes)

    _first: int = 0


class Desk:
    """The thread that computes, and the queue before it.

    Attributes:
        folder: Where runs write; it goes with the desk.
        pipe: The pipeline in memory; None before the first run.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ddim-studio-"))
        self.pipe: Any = None
        self._closing = threading.Event()
        self._key: Hashable = None
        self._scheduler: Any = None
        self._waiting: deque[Ticket] = deque()
        self._current: Ticket | None = None
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._serve, name="ddim studio", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Whether the studio is at its end."""
        return self._closing.is_set()

    def submit(self, visitor: str, work: Callable[[Ticket], Any]) -> Ticket:
        """Takes a run of a visitor into the queue.

        Raises:
            DDIMError: If the queue is full, or the visitor has enough runs in it.
        """
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                raise DDIMError(f"{MOST_WAITING} runs are waiting; try again in a while.")
            if sum(ticket.visitor == visitor for ticket in self._tickets()) >= MOST_OF_ONE:
                raise DDIMError(
                    f"you have {MOST_OF_ONE} runs here already; wait for them, or stop them."
                )
            folder = self.folder / f"{next(self._numbers):06d}"
            ticket = Ticket(visitor, work, folder, self)
            folder.mkdir()
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def stop(self, visitor: str) -> None:
        """Stops all runs of a visitor, ``session/tab``; of all tabs of a ``session``."""
        with self._changed:
            all_, mine = self._tickets(), (visitor, f"{visitor}/")
            tickets = [t for t in all_ if t.visitor == visitor or t.visitor.startswith(mine[1])]
        for ticket in tickets:
            ticket.stop()

    def before(self, ticket: Ticket) -> int:
        """How many runs are computed before this one."""
        with self._changed:
            tickets = self._tickets()
            return tickets.index(ticket) if ticket in tickets else 0

    def forget(self, ticket: Ticket) -> None:
        """Takes a waiting run out of the queue."""
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                ticket.update(state="stopped")

    def keep(self, key: Hashable, opening: Callable[[], Any]) -> Any:
        """The pipeline of that key: the one in memory, or one that is opened in its place; with the
        scheduler that it was opened with."""
        if self.pipe is None or key != self._key:
            self.pipe = self._scheduler = None  # its memory is free before the next one is loaded
            self.pipe = opening()
            self._key, self._scheduler = key, getattr(self.pipe, "scheduler", None)
        if self._scheduler is not None:
            self.pipe.scheduler = self._scheduler
        return self.pipe

    def close(self, *, patience: float = 1.0) -> bool:
        """Ends all runs between two steps, and removes their files. Returns False if a step takes
        longer than ``patience`` seconds."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(patience)
        shutil.rmtree(self.folder, ignore_errors=True)
        return not self._thread.is_alive()

    def _tickets(self) -> list[Ticket]:
        return [*([self._current] if self._current else []), *self._waiting]

    def _serve(self) -> None:
        while not self.is_closed:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self.is_closed)
                if not self._waiting:
                    return
                self._current = ticket = self._waiting.popleft()
            with contextlib.suppress(Exception):
                ticket.run()
            with self._changed:
                self._current = None
