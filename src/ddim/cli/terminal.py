"""A run on a terminal: its notes and items as lines, its steps as a bar on standard error."""

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from ddim.errors import plural, printable
from ddim.runs.engine import Control, Event, Outcome, execute

__all__ = ["bar_size", "counted", "duration", "run_request", "say", "unsolved_note"]


def run_request(job: str, request: object, *, show_items: bool = False) -> Outcome:
    """Resolves a request to a job and runs it; with ``show_items`` each finished item is a line.

    ``job`` names a class below ``ddim.runs``, such as ``sample.SampleJob``. It is imported here,
    since the seconds of a record include the imports.

    Raises:
        DDIMError: As the job and :func:`ddim.runs.engine.execute`.
    """
    with _bar() as step:

        def show(event: Event) -> None:
            if event.state == "note":
                say(f"note: {event.text}")
            elif event.state == "item" and show_items:
                say(event.text)
            elif event.state == "step":
                step(event)

        control = Control(emit=show)
        module, name = job.split(".")
        kind = getattr(importlib.import_module(f"ddim.runs.{module}"), name)
        return execute(kind(request, control))


def counted(made: int, there: int, what: str, done: str) -> str:
    """How many of what a run made, and how many it found, as '1 image drawn, 5 were there'."""
    found = f", {there} {'was' if there == 1 else 'were'} there" if there else ""
    return f"{plural(made, what)} {done}{found}"


def say(
    text: object, *, end: str = "\n", to_error: bool = False, paint: Callable[[str], str] = str
) -> None:
    """Prints for a person, at once and above a bar where there is one. All that a command says goes
    through here, since names, cards and configurations may hold what controls a terminal; ``paint``
    adds colours of ours."""
    stream = sys.stderr if to_error else sys.stdout
    tqdm.write(paint(printable(text)), file=stream, end=end)
    stream.flush()


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Event], None]]:
    """A bar that the first step opens; nothing where standard error is no terminal."""
    bar: tqdm[Any] | None = None
    is_terminal = sys.stderr.isatty()

    def step(event: Event) -> None:
        nonlocal bar
        if not is_terminal:
            return
        if bar is None:
            bar = tqdm(total=event.total, initial=event.done - 1, **bar_size())
        bar.update()

    try:
        yield step
    finally:
        if bar is not None:
            bar.close()


def bar_size() -> dict[str, Any]:
    """The usual size where a terminal says that it has none, as below `script`; else tqdm finds
    it."""
    with contextlib.suppress(OSError):
        if os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            return {"ncols": 80, "nrows": 24}
    return {}


def duration(seconds: float) -> str:
    """A time as people read it: hours, minutes and seconds, from a day on days."""
    if seconds >= 86400:
        return f"{seconds / 86400:.1f} days"
    return time.strftime("%H:%M:%S", time.gmtime(seconds))


def unsolved_note(steps: int) -> str:
    """A sentence about steps that were not solved; empty for none."""
    if not steps:
        return ""
    count = "1 step was" if steps == 1 else f"{steps} steps were"
    return f" {count} not solved to the tolerance; use more steps, or method o-belm."
