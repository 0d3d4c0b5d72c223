"""The sides of a comparison, and the rows of a table of them.

Each side has a process of its own, as those who use it have: memory that one frees serves no other.
They take turns, so that what the machine does besides falls on all alike."""

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

__all__ = ["Call", "Maker", "Side", "Taken", "in_turn", "row", "started", "table"]

Call = Callable[..., "Taken | None"]
Maker = Callable[[], Call]
"""Prepares a side in its own process, and returns what is measured there."""

HEAD = ("measured", "ours", "diffusers (or as said)", "ratio", "wanted")


class Taken(NamedTuple):
    """What a call measured itself; otherwise its seconds are taken."""

    seconds: float
    facts: dict[str, Any] = {}  # noqa: RUF012 - never changed


class Side:
    """A side that is ready: call it to have it work, and learn what that took."""

    def __init__(self, ask: Callable[[dict[str, Any]], Taken], preparing: float) -> None:
        self.ask, self.preparing = ask, preparing

    def __call__(self, **options: Any) -> Taken:
        return self.ask(options)


def _measured(call: Call, options: dict[str, Any]) -> Taken:
    began = time.perf_counter()
    found = call(**options)
    return Taken(time.perf_counter() - began) if found is None else found


def _serve(make: Maker, asked: Connection) -> None:
    try:
        # What an earlier run left is no compiling.
        with tempfile.TemporaryDirectory() as empty:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
            began = time.perf_counter()
            call = make()
            asked.send(time.perf_counter() - began)
            while (options := asked.recv()) is not None:
                asked.send(_measured(call, options))
    except Exception:
        asked.send(traceback.format_exc())


def _received(pipe: Connection) -> Any:
    found = pipe.recv()
    if isinstance(found, str):
        raise RuntimeError(f"a side failed:\n{found}")
    return found


@contextmanager
def started(makers: Mapping[str, Maker], *, apart: bool = True) -> Iterator[dict[str, Side]]:
    """The sides, prepared at the same time; in this process if not ``apart``."""
    if not apart:
        calls = {name: make() for name, make in makers.items()}
        yield {n: Side(lambda o, call=call: _measured(call, o), 0.0) for n, call in calls.items()}
        return
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    with ExitStack() as ending:
        for name, make in makers.items():
            ask, asked = context.Pipe()
            process = context.Process(target=_serve, args=(make, asked), daemon=True)
            process.start()
            asked.close()  # so that a process that ended is no longer waited for
            ending.callback(process.join)
            ending.callback(_end, ask)
            pipes[name] = ask

        def asking(pipe: Connection) -> Callable[[dict[str, Any]], Taken]:
            def ask(options: dict[str, Any]) -> Taken:
                pipe.send(options)
                taken: Taken = _received(pipe)
                return taken

            return ask

        yield {name: Side(asking(pipe), _received(pipe)) for name, pipe in pipes.items()}


def _end(pipe: Connection) -> None:
    with contextlib.suppress(OSError):
        pipe.send(None)


def in_turn(
    sides: Mapping[str, Side], *, rounds: int, warm_up: int = 1, **options: Any
) -> dict[str, list[Taken]]:
    """What each side took in each round; ``options`` are those of its call."""
    for _ in range(warm_up):
        for side in sides.values():
            side(**options)
    taken: dict[str, list[Taken]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            taken[name].append(side(**options))
    return taken


def median(taken: list[Taken]) -> float:
    """Median seconds of the rounds."""
    return statistics.median(each.seconds for each in taken)


def better(taken: Mapping[str, float], *names: str) -> str:
    """The quicker of some sides."""
    return min(names, key=lambda name: taken[name])


def row(
    name: str,
    ours: float,
    theirs: float | None = None,
    *,
    unit: str = "s",
    least: float | None = None,
    most: float | None = None,
    wanted: str = "",
) -> list[str]:
    """A row of the table: both figures, and their ratio. ``least`` asks how many times faster ours
    is, in seconds or in images/s; ``most`` for its share of theirs. What is missed says so."""
    scale, digits = {"us": (1e6, 1), "ms": (1e3, 0), "images/s": (1.0, 1)}.get(unit, (1.0, 2))
    told = [f"{each * scale:.{digits}f} {unit}" for each in (ours, theirs) if each is not None]
    if theirs is None:
        quotient, met, ratio = ours, True, ""
    elif most is not None:
        quotient = ours / theirs
        met, ratio = quotient <= most, f"{quotient:.2f}"
        wanted = wanted or f"at most {most:.2f}"
    else:
        quotient = ours / theirs if unit == "images/s" else theirs / ours
        met, ratio = least is None or quotient >= least, f"{quotient:.2f}x"
        wanted = wanted or ("" if least is None else f"at least {least:.2f}x")
    return [name, *told, *[""] * (2 - len(told)), ratio, wanted if met else f"{wanted}: missed"]


def table(rows: list[list[str]]) -> str:
    """The rows as a table of Markdown."""
    whole = [list(HEAD), ["---"] * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(each) + " |" for each in whole)
