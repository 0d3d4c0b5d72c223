"""The engine for work that many processes share: each takes the next free shard of a folder.

There is no group and no barrier. A process opens the folder (it is locked for that moment), takes
shard after shard by leases, waits for those that others hold, and closes the folder with the record
of all that is there. A process that ends in whatever way loses only the shard that it was at; a
shard that is made twice has equal bytes.
"""

import contextlib
import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddim.errors import DDIMError, OutputError
from ddim.files import remove_partial
from ddim.runs.engine import Control, Event, Job, Made, Outcome, Stopped, all_files, record_of
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

__all__ = ["SharedJob", "share"]

_POLL = 0.2
"""Seconds between two looks at shards that others hold."""


class SharedJob(Job):
    """A job whose work is divided into shards. :meth:`make` is called for each, with what is left
    of it.

    The constructor of a subclass also sets:

    Attributes:
        shards: The work, in the order in which it is taken.
    """

    shards: Sequence[Shard]

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

    def beside(self) -> int:
        """Items of other requests in the folder."""
        return 0

    def run(self) -> Outcome:
        return share(self)

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
        is_made = any(record.is_whole(self.folder) for record in self.records())
        return not is_made and not self.leases().others()

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
        elif threads is None and (is_divided or self.request.workers > 1 or launched()):
            threads = 1
        self.protocol["threads"] = threads


def share(job: SharedJob) -> Outcome:
    """Makes the shards of a job that are free, until all are done.

    Raises:
        OutputError: If the folder is of another protocol, or disappears, or a lease cannot be read.
        DDIMError: What the job raises; shards that are made stay.
    """
    emit, leases = job.control.emit, job.leases()
    if job.request.overwrite and launched():
        raise DDIMError(
            "--overwrite is for one process, and several were launched; delete the folder first."
        )
    if any(job.left(shard) for shard in job.shards) or job.request.overwrite:
        job.prepare()
    was_there, finished, made, drawn = job.folder.exists(), True, 0, 0.0
    with ExitStack() as stack:
        if not was_there:  # a refusal leaves nothing
            stack.callback(_remove_if_empty, job.folder)
        stack.enter_context(_told_if_gone(job.folder))
        stack.enter_context(_threads(job.protocol.get("threads")))
        with _open(job, overwrite=job.request.overwrite) as before:
            stack.callback(_remove_if_empty, job.folder / FOLDER)
            stack.enter_context(leases.held(f"worker-{WORKER}-{secrets.token_hex(2)}"))
            is_first, job.files = before is None, all_files(job, before)
            if before is None:
                job.save(record_of(job, [], 0.0, before))
            elif before.files != job.files:  # before they are there, as a run may end at any moment
                job.save(replace(before, files=job.files))
        there, total = sum(map(job.done, job.shards)), sum(len(s.items) for s in job.shards)
        emit(Event("started", done=there, total=total))
        began = time.perf_counter()
        try:
            with contextlib.closing(_make_all(job, leases)) as making:
                for item, _, took, text, items in making:
                    made, drawn = made + items, drawn + took
                    rate = made / max(time.perf_counter() - began, 1e-9)
                    emit(Event("item", there + made, total, str(item), rate, text))
                    job.control.check()
        except Stopped:
            finished = False
        except DDIMError:
            if is_first and not made:
                _leave_nothing(job)
            raise
        if not job.folder.is_dir():
            raise FileNotFoundError
        with _open(job) as before:
            job.files = all_files(job, before)
            now = record_of(job, [], drawn, before)
            # Others who have told of all that is there have also made what is of all together.
            is_told = before is not None and before.results == now.results
            if finished and (there == total or not is_told):
                job.finish(now.results)
                now = replace(now, results=job.results([]))
            if before is not None and not made:  # the times are of the run that made the items
                now = replace(
                    now,
                    execution=before.execution,
                    seconds_total=before.seconds_total,
                    versions=before.versions,
                )
            if now != before:
                job.save(now)
            if not leases.others():
                leases.sweep()
                remove_partial(job.folder / FOLDER)
    emit(Event("finished" if finished else "stopped", there + made, total))
    return Outcome(job, now, made, there, job.beside(), finished, drawn)


def _make_all(job: SharedJob, leases: Leases) -> Generator[Made]:
    """Makes every shard that is free, and then those whose workers are gone, until none is left."""
    rest: Sequence[int] = range(len(job.shards))
    has_started = False
    while rest:
        held = []
        for number in rest:
            shard = job.shards[number]
            if not job.left(shard):
                continue
            with leases.held(shard.name) as lease:
                if lease is None:
                    held.append(number)
                    continue
                began = time.perf_counter()
                while items := job.left(shard):
                    if not has_started:
                        job.start()
                        has_started, began = True, time.perf_counter()
                    yield from _make_part(job, shard, items, began)
                    began = time.perf_counter()
        rest = held
        if rest:
            job.control.check()
            time.sleep(_POLL)


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
def _open(job: SharedJob, *, overwrite: bool = False) -> Iterator[RunRecord | None]:
    """Locks the folder, and gives the record of what is there."""
    leases = job.leases()

    def is_alone() -> bool:
        return not leases.others()

    described = (job.folder, job.protocol, job.is_empty)
    options: dict[str, Any] = {"waiting": job.control.check, "is_alone": is_alone}
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
