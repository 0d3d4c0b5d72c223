"""The engine: makes the work items of a job that are missing, tells what happens, and keeps the
record true.

A :class:`Job` is a request resolved against a model. :func:`execute` claims its folder, finds what
is there, has the job make the rest, and writes the record. What a job makes is written whole or not
at all, so a run may end at any moment, and the same request continues it. Nothing here is global:
two jobs run side by side in one process, each with its own :class:`Control`.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ddim.errors import OutputError
from ddim.files import locked_file
from ddim.options import check_request
from ddim.runs.record import NAME, RunRecord, claim, versions, write_run

__all__ = ["Control", "Event", "FileJob", "Job", "Made", "Outcome", "Row", "Stopped", "all_files"]
__all__ += ["execute", "record_of"]

Row = dict[str, Any]
"""A flat record of the results."""


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        state: ``started`` once the folder is claimed; ``step`` after each step of a walk; ``item``
            when an item is written; ``note`` for a sentence to a person; the last two at the end.
        done: Items that are done, those of earlier runs included; for ``step``, steps.
        total: Items of the request; for ``step``, steps, or None where nobody knows.
        item: The item's name.
        rate: Items a second of this run so far.
        text: The sentence of a ``note``, or what an ``item`` shows.
        items: How many items an ``item`` stands for, such as the pictures of an archive.
        x0: The clean data that a ``step`` predicts, a tensor, for previews; None where the walk
            does not tell.
    """

    state: Literal["started", "step", "item", "note", "finished", "stopped"]
    done: int = 0
    total: int | None = None
    item: str | None = None
    rate: float | None = None
    text: str | None = None
    items: int = 1
    x0: Any = None


class Stopped(Exception):
    """Leaves a run between two steps; :func:`execute` turns it into an outcome."""


@dataclass
class Control:
    """What connects a run with whoever started it: events go out, and the wish to stop comes in.

    Attributes:
        emit: Called with every event, in the thread of the run.
        stopping: Asked between two steps. If it returns True, the run stops there, and what is
            written stays.
        steps: How many steps the run will walk, for ``step`` events; None where nobody knows.
        began: When the request was made, in seconds of :func:`time.perf_counter`.
        keep: Called with what tells a pipeline from others, and the function that opens it; gives
            the pipeline. Default: it is opened for this run alone.
    """

    emit: Callable[[Event], None] = lambda event: None
    stopping: Callable[[], bool] = lambda: False
    steps: int | None = None
    began: float = field(default_factory=time.perf_counter)
    keep: Callable[[Hashable, Callable[[], Any]], Any] = lambda key, opening: opening()
    _walked: int = field(default=0, init=False)

    def note(self, text: str) -> None:
        """Tells a person something in a sentence."""
        self.emit(Event("note", text=text))

    def step(self, state: object = None) -> None:
        """Counts a step of a walk, and leaves the run as :meth:`check` does. A pipeline takes this
        method as its ``callback``."""
        self._walked += 1
        x0 = getattr(state, "x0", None)
        self.emit(Event("step", done=self._walked, total=self.steps, x0=x0))
        self.check()

    def check(self) -> None:
        """Leaves the run if it is to stop; raises :class:`Stopped`."""
        if self.stopping():
            raise Stopped


class Made(NamedTuple):
    """An item that is made and written."""

    item: Any
    row: Row | None = None
    """Its row of the record; None where the job derives the rows from what is there."""
    seconds: float = 0.0
    """Seconds of the sampling loop that made it."""
    text: str | None = None
    """What it shows, for people."""
    items: int = 1
    """Items that it stands for, such as the pictures of an archive."""


class Job:
    """A request resolved against a model: what is to be made, and where. Subclasses say how.

    The constructor of a subclass checks and resolves the whole request, and sets:

    Attributes:
        folder: Where the results and the record lie.
        protocol: Every option that can change a result, resolved, with the weight hash.
        execution: What may differ between runs of one protocol.
        items: The work items of the request, in order; any hashable values.
        files: What the run writes into the folder, beside the record; later, also what earlier runs
            wrote there, or None if an older one did not list it.
    """

    folder: Path
    protocol: dict[str, Any]
    execution: dict[str, Any]
    items: Sequence[Any]
    files: Sequence[str] | None = ()
    calls = 0.0

    def __init__(self, request: Any, control: Control) -> None:
        """Checks the options as the request declares them; raises a DDIMError."""
        self.request, self.control = request, control
        check_request(request)

    def prepare(self) -> None:
        """Loads what is large, once all options are checked, and before anything is written."""

    def claim(self) -> AbstractContextManager[RunRecord | None]:
        """Holds the place of the results, and gives the record of an earlier run there."""
        overwrite = getattr(self.request, "overwrite", False)
        described = (self.folder, self.protocol, self.is_empty)
        return claim(*described, files=self.files or (), overwrite=overwrite)

    def is_empty(self, record: RunRecord) -> bool:
        """Whether the folder of an earlier record holds no result."""
        files = (p.name for p in self.folder.iterdir())
        return not record.results and all(name == NAME or name.startswith(".") for name in files)

    def there(self, record: RunRecord | None) -> set[Any]:
        """The items that are done, of this request and of others; default: all are made again."""
        return set()

    def make(self, missing: Sequence[Any]) -> Generator[Made]:
        """Makes the items and writes their files, each before it is yielded."""
        raise NotImplementedError

    def results(self, rows: list[Row]) -> list[Row]:
        """The results of the record, from the rows of earlier runs followed by those of this."""
        return rows

    def seconds(self, drawn: float, before: RunRecord | None) -> float:
        """Seconds of sampling for the record; ``drawn`` are those of this run."""
        return drawn

    def evaluations(self, rows: list[Row]) -> float:
        """Network calls an image, for the record; default: ``calls``, which :meth:`make` sets."""
        return self.calls

    def finish(self, rows: list[Row]) -> None:
        """Writes what is made of all items together: sheets, tables, plots."""

    def save(self, record: RunRecord) -> None:
        """Writes the record."""
        write_run(self.folder, record)

    def run(self) -> "Outcome":
        """Makes what is missing; a job of this kind holds its folder alone."""
        return _execute_alone(self)


class FileJob(Job):
    """A job that makes one new file; ``folder`` is its path, and ``files`` are others beside it."""

    def __init__(self, request: Any, control: Control) -> None:
        """Refuses to overwrite a file, before anything is loaded."""
        super().__init__(request, control)
        self.folder = Path(request.out)
        self.items = [self.folder]
        self.refuse_existing()

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Holds the name of the file."""
        with locked_file(self.folder):
            self.refuse_existing()
            yield None

    def save(self, record: RunRecord) -> None:
        """Writes the file with its record, once it is made."""

    def refuse_existing(self) -> None:
        """Refuses to overwrite a file, also one that was written by others since the run began."""
        for path in (self.folder, *(self.folder.parent / name for name in self.files or ())):
            if path.exists():
                message = f"{path} is there already; use another --out, or delete that file."
                raise OutputError(message)


class Outcome(NamedTuple):
    """How a run ended."""

    job: Any
    record: RunRecord
    made: int
    """Items that this run made."""
    there: int
    """Items of the request that earlier runs had made."""
    beside: int
    """Items of other requests in the folder."""
    finished: bool
    """False where the run was stopped."""
    seconds: float = 0.0
    """Seconds of the sampling loop in this run."""


def execute(job: Job) -> Outcome:
    """Makes the items of a job that are missing, as the job's :meth:`Job.run` does."""
    return job.run()


def _execute_alone(job: Job) -> Outcome:
    """Makes the items of a job that are missing.

    The folder is held from the first look to the last write. The record is written before the first
    item, so that what a killed run leaves is known; after each item that has a row; and at the end.

    Raises:
        OutputError: If another run holds the folder, or it holds results of another protocol.
        DDIMError: What the job raises; items that are made stay.
    """
    emit = job.control.emit
    job.prepare()
    with job.claim() as before:
        job.files = files = all_files(job, before)
        there = job.there(before)
        missing = [item for item in job.items if item not in there]
        rows = [] if before is None else list(before.results)
        done, made, drawn, finished = len(job.items) - len(missing), 0, 0.0, True

        def record() -> RunRecord:
            return record_of(job, rows, drawn, before)

        if before is None:
            job.save(record())
        elif before.files != files:  # before they are there, as a run may end at any moment
            before = replace(before, files=files)
            job.save(before)
        emit(Event("started", done=done, total=len(job.items)))
        started = time.perf_counter()
        try:
            with contextlib.closing(job.make(missing)) as making:
                for item, row, took, text, items in making:
                    made, drawn = made + items, drawn + took
                    if row is not None:
                        rows.append(row)
                        job.save(record())
                    rate = made / max(time.perf_counter() - started, 1e-9)
                    emit(Event("item", done + made, len(job.items), str(item), rate, text, items))
                    job.control.check()
        except Stopped:
            finished = False
        now = record()
        if made == 0 and before is not None:  # the times are those of the run that made the items
            changed: dict[str, Any] = {"results": now.results, "seconds": now.seconds}
            now = replace(before, **changed, evaluations=now.evaluations)
        if now != before:
            job.save(now)
        if finished:
            job.finish(now.results)
    emit(Event("finished" if finished else "stopped", done + made, len(job.items)))
    return Outcome(job, now, made, done, len(there - set(job.items)), finished, drawn)


def record_of(job: Job, rows: list[Row], drawn: float, before: RunRecord | None) -> RunRecord:
    """The record of a job as it stands: the rows of earlier runs and this, and this run's seconds
    of sampling."""
    results = job.results(rows)
    return RunRecord(
        protocol=job.protocol,
        results=results,
        seconds=job.seconds(drawn, before),
        seconds_total=time.perf_counter() - job.control.began,
        evaluations=job.evaluations(results),
        execution=job.execution,
        versions=versions(),
        files=None if job.files is None else list(job.files),
    )


def all_files(job: Job, before: RunRecord | None) -> list[str] | None:
    """The files of this run and of earlier ones; None where an older record did not list them."""
    if before is not None and before.files is None:
        return None
    earlier = () if before is None else before.files or ()
    return sorted({*earlier, *(job.files or ())})
