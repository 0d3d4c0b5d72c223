"""The engine for work that many processes share: each takes the next free shard of a folder.

There is no group and no barrier. A process opens the folder (it is locked for that moment), takes
shard after shard by leases, waits for those that others hold, and closes the folder with the record
of all that is there. A process that ends in whatever way loses only the shard that it was at; a
shard that is made twice has equal bytes.
"""

import contextlib
import importlib
import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddim.errors import DDIMError, OutputError
from ddim.files import remove_partial
from ddim.runs.engine import Control, Event, Job, Made, Outcome, Row, Stopped, all_files, record_of
from ddim.runs.leases import WORKER, Leases
from ddim.runs.record import NAME, RunRecord, claim, read_run
from ddim.runs.shards import (
    FOLDER,
    Shard,
    ShardRecord,
    digest,
    launched,
    read_records,
    write_record,
)

__all__ = ["Opened", "SharedJob", "close_run", "make_shards", "open_run", "share"]

_POLL = 0.2
"""Seconds between two looks at shards that others hold."""

_PATIENCE = 2.0
"""Seconds in which a run that opens or closes the folder is done, unless it is present in it."""

_SHARE = 0.01
"""Most of a run's time that goes into records of what is there so far."""


class SharedJob(Job):
    """A job whose work is divided into shards. :meth:`make` is called for each, with what is left
    of it.

    The constructor of a subclass also sets:

    Attributes:
        shards: The work, in the order in which it is taken.
    """

    shards: Sequence[Shard]
    has_started = False
    """Whether :meth:`start` was called."""
    batches_drawn = 0
    """Batches that were drawn, by all processes of the run."""

    def __init__(self, request: Any, control: Control) -> None:
        super().__init__(request, control)
        self._known: dict[str, ShardRecord] = {}
        self._leases: Leases | None = None

    def left(self, shard: Shard) -> Sequence[Any]:
        """What :meth:`make` is to be given of a shard; empty where it is done. It is asked again
        after each part that was made."""
        raise NotImplementedError

    def done(self, shard: Shard) -> int:
        """How many items of a shard are there."""
        return len(shard.items) - len(self.left(shard))

    def start(self) -> None:
        """Prepares for :meth:`make`, once and before the first shard."""

    def part(self, shard: Shard, items: Sequence[Any]) -> tuple[str, list[str]]:
        """The name of the record of a part of a shard, and the files that are written for it."""
        raise NotImplementedError

    def beside(self, results: list[Row]) -> int:
        """Items of other requests in the folder, whose results are these."""
        return 0

    def is_made(self) -> bool:
        """Whether the folder holds a result, of whatever request."""
        return any(record.is_whole(self.folder) for record in self.records())

    def is_told(self, before: RunRecord) -> bool:
        """Whether a record tells of all that is there."""
        return before.results == self.results([])

    def run(self) -> Outcome:
        """Makes what is free, by the engine that the request says; engines are loaded when they
        are asked for."""
        if self.request.engine == "ray":
            engine: Any = importlib.import_module("ddim.runs.ray_engine")
        elif self.request.workers > 1:
            engine = importlib.import_module("ddim.runs.workers")
        else:
            return share(self)
        outcome: Outcome = engine.share_among(self)
        return outcome

    def request_of_one(self) -> Any:
        """The request of each process that an engine starts: the same folder and threads, and no
        processes of its own."""
        given = {"out": str(self.folder.absolute()), "threads": self.protocol.get("threads")}
        alone = {"workers": 1, "overwrite": False, "engine": "processes", "ray_address": None}
        return replace(self.request, **given, **alone)

    def records(self) -> list[ShardRecord]:
        """The records of the shards that are done, of this request and of others."""
        return read_records(self.folder, self._known)

    def leases(self) -> Leases:
        """The leases of the folder."""
        if self._leases is None:
            seconds = float(self.request.lease)
            self._leases = Leases(self.folder / FOLDER, seconds=seconds)
        return self._leases

    def is_empty(self, record: RunRecord) -> bool:
        return not self.is_made() and not self.leases().others()

    def seconds(self, drawn: float, before: RunRecord | None) -> float:
        if records := self.records():
            return sum(record.seconds for record in records)
        return 0.0 if before is None else before.seconds

    def agree_on_threads(self, *, is_divided: bool) -> None:
        """Puts the number of threads into the protocol: what was asked, else what the folder says,
        else 1 where work is divided, since sums in another order give other bytes."""
        threads = self.request.threads
        if threads is None and (before := read_run(self.folder)) is not None:
            threads = before.protocol.get("threads")
        elif threads is None and (
            is_divided or self.request.workers > 1 or self.request.engine == "ray" or launched()
        ):
            threads = 1
        self.protocol["threads"] = threads


class Opened(NamedTuple):
    """A folder that is open for a run."""

    is_first: bool
    """Whether nothing was there."""
    there: int
    """Items of the request that were done."""
    total: int


def share(job: SharedJob) -> Outcome:
    """Makes the shards of a job that are free, until all are done.

    Raises:
        OutputError: If the folder is of another protocol, or disappears, or a lease cannot be read.
        DDIMError: What the job raises; shards that are made stay.
    """
    if job.request.overwrite or any(job.left(shard) for shard in job.shards):
        job.prepare()
    made, drawn, finished = 0, 0.0, True
    with ExitStack() as stack:
        stack.enter_context(_threads(job.protocol.get("threads")))
        opened = open_run(job, stack)
        began = told = time.perf_counter()
        telling = 0.1  # seconds of the last such record
        try:
            with contextlib.closing(make_shards(job)) as making:
                for item, _, took, text, items in making:
                    made, drawn, now = made + items, drawn + took, time.perf_counter()
                    rate, done = made / max(now - began, 1e-9), opened.there + made
                    job.control.emit(
                        Event("item", done, opened.total, str(item), rate, text, items)
                    )
                    if telling < _SHARE * (now - told):  # what a killed run leaves is known
                        _tell(job, drawn)
                        told = time.perf_counter()
                        telling = told - now
                    job.control.check()
        except Stopped:
            finished = False
        except BaseException as error:
            if made:
                close_run(job, opened, made, drawn, finished=False)
            elif opened.is_first and isinstance(error, DDIMError):
                _leave_nothing(job)
            raise
        return close_run(job, opened, made, drawn, finished=finished)


def open_run(job: SharedJob, stack: ExitStack) -> Opened:
    """Opens the folder for a run, which is present in it until the stack is closed.

    Raises:
        OutputError: If the folder is of another protocol.
        DDIMError: If it is to be overwritten by several processes.
    """
    overwrite = job.request.overwrite
    if overwrite and launched():
        raise DDIMError(
            "--overwrite is for one process, and several were launched; delete the folder first."
        )
    if not job.folder.exists():  # a refusal leaves nothing
        stack.callback(_remove_if_empty, job.folder)
    stack.enter_context(_told_if_gone(job.folder))
    numbers = {"items": sum(len(s.items) for s in job.shards), "shards": len(job.shards)}
    job.execution |= numbers
    with _locked(job, overwrite=overwrite) as before:
        stack.callback(_remove_if_empty, job.folder / FOLDER)
        presence = f"worker-{WORKER}-{secrets.token_hex(2)}"
        stack.enter_context(job.leases().held(presence))
        job.files = all_files(job, before)
        if before is None:
            job.save(record_of(job, [], 0.0, before))
        elif before.files != job.files:  # before they are there, as a run may end at any moment
            job.save(replace(before, files=job.files))
    job.records()
    opened = Opened(before is None, sum(map(job.done, job.shards)), numbers["items"])
    job.control.emit(Event("started", done=opened.there, total=opened.total))
    return opened


def close_run(
    job: SharedJob, opened: Opened, made: int, drawn: float, *, finished: bool
) -> Outcome:
    """Writes the record of what is there, and what is made of all items together.

    Args:
        job: The job.
        opened: The folder as it was.
        made: Items that this run made.
        drawn: Seconds of the sampling loop in this run.
        finished: Whether all items are there.
    """
    if not job.folder.is_dir():
        raise FileNotFoundError
    with _locked(job) as before:
        job.files = all_files(job, before)
        # Others who have told of all that is there have also made what is of all together.
        # A record that was written on the way may list all, and nothing was made of it yet.
        is_told = (
            before is not None
            and bool(before.execution.get("finished"))
            and opened.there < opened.total
            and job.is_told(before)
        )
        if finished and not is_told:
            job.finish(job.results([]))
        job.execution["finished"] = finished
        now = record_of(job, [], drawn, before)
        if before is not None and not made:  # the times are of the run that made the items
            same = ("execution", "seconds_total", "versions")
            now = replace(now, **{key: getattr(before, key) for key in same})
        if now != before:
            job.save(now)
        if not (leases := job.leases()).others():
            leases.sweep()
            remove_partial(job.folder / FOLDER)
    ended: Any = "finished" if finished else "stopped"
    job.control.emit(Event(ended, opened.there + made, opened.total))
    return Outcome(job, now, made, opened.there, job.beside(now.results), finished, drawn)


def make_shards(job: SharedJob, numbers: Sequence[int] | None = None) -> Generator[Made]:
    """Makes every shard that is free, and then those whose workers are gone, until none is left; of
    all shards, or of those with these places in the list. The folder is open."""
    rest: Sequence[int] = range(len(job.shards)) if numbers is None else numbers
    has_waited = False
    while rest:
        held = []
        for number in rest:
            shard = job.shards[number]
            if not job.left(shard):
                continue
            with job.leases().held(shard.name) as lease:
                if lease is None:
                    held.append(number)
                    continue
                began = time.perf_counter()
                while items := job.left(shard):
                    if not job.has_started:
                        job.start()
                        job.has_started, began = True, time.perf_counter()
                    try:
                        yield from _make_part(job, shard, items, began)
                    except FileNotFoundError:
                        # This process was stopped for so long that another has taken the shard over
                        # and swept away what was half-written of it here.
                        if lease.is_held() or not job.folder.is_dir():
                            raise
                    began = time.perf_counter()
        rest = held
        if rest:
            if not has_waited:
                has_waited = True
                _note_waiting(job, len(rest))
            job.control.check()
            time.sleep(_POLL)


def _note_waiting(job: SharedJob, count: int) -> None:
    leases = job.leases()
    others = sorted({leases.holder(path) for path in leases.others() if "worker-" in path.name})
    what = "1 shard" if count == 1 else f"{count} shards"
    job.control.note(f"others work on the last {what} ({', '.join(others)}); waiting for them.")


def _tell(job: SharedJob, drawn: float) -> None:
    """Writes the record of what is there so far."""
    with _locked(job) as before:
        job.execution["finished"] = False
        job.save(record_of(job, [], drawn, before))


def _make_part(job: SharedJob, shard: Shard, items: Sequence[Any], began: float) -> Generator[Made]:
    """Makes what is left of a shard and then its record, which is there when the last item is
    yielded."""
    took, rows, last = 0.0, [], None
    for made in job.make(items):
        if last is not None:
            yield last
        took, last = took + made.seconds, made
        rows += [] if made.row is None else [made.row]
    name, files = job.part(shard, items)
    facts = {**digest(job.folder, files), "seconds": took, "worker": WORKER, "rows": rows}
    total = time.perf_counter() - began
    write_record(job.folder, ShardRecord(name, count=len(items), seconds_total=total, **facts))
    if last is not None:
        yield last


@contextlib.contextmanager
def _locked(job: SharedJob, *, overwrite: bool = False) -> Iterator[RunRecord | None]:
    """Locks the folder, and gives the record of what is there."""
    leases, began = job.leases(), time.monotonic()

    def is_alone() -> bool:
        return not leases.others()

    def waiting() -> bool:
        job.control.check()
        return time.monotonic() - began < _PATIENCE or not is_alone()

    described = (job.folder, job.protocol, job.is_empty)
    options: dict[str, Any] = {"waiting": waiting, "is_alone": is_alone}
    with claim(*described, files=job.files or (), overwrite=overwrite, **options) as before:
        yield before


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Has torch compute with so many threads while it is held."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _told_if_gone(folder: Path) -> Iterator[None]:
    """Says so where the folder disappears while it is worked in."""
    try:
        yield
    except FileNotFoundError:
        if folder.is_dir():
            raise
        raise OutputError(
            f"{folder} has disappeared while this run was writing there; what it held is lost to "
            "this run. Bring the folder back, or run again."
        ) from None


def _leave_nothing(job: SharedJob) -> None:
    """Removes the record of a run that was refused, unless others work in the folder."""
    names = [p.name for p in job.folder.iterdir() if not p.name.startswith(".")]
    if names == [NAME] and not job.records() and not job.leases().others():
        (job.folder / NAME).unlink()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not empty, or was never made
        folder.rmdir()
