"""How far a run is that any number of processes share, read from its folder alone.

Nothing here takes a lease, loads a model, or writes.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from ddim.errors import OutputError
from ddim.runs.leases import Leases
from ddim.runs.record import NAME, read_run
from ddim.runs.shards import FOLDER, ShardRecord, read_records

__all__ = ["Status", "Watch", "WorkerStatus"]


@dataclass(frozen=True)
class WorkerStatus:
    """A process that has worked or works in the folder.

    Attributes:
        name: Its machine and number.
        is_present: Whether, for all that is known, it is at work.
        in_hand: The shards that it holds.
        shards: Shards that it has made.
        items: Items of these.
        rate: Items a second while it made them; None before the first.
    """

    name: str
    is_present: bool
    in_hand: tuple[str, ...]
    shards: int
    items: int
    rate: float | None


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        command: The command of the folder.
        items: Items that are done, such as images or cells.
        total: Items of the last request; None where an older version wrote the folder.
        shards: Shards that are done.
        in_hand: Shards that somebody works on.
        rate: Items a second of all who are present; None where that is not known.
        seconds_left: At this rate; None where that is not known.
        workers: All who have worked there.
    """

    command: str
    items: int
    total: int | None
    shards: int
    in_hand: int
    rate: float | None
    seconds_left: float | None
    workers: tuple[WorkerStatus, ...]

    @property
    def is_done(self) -> bool:
        """Whether all is there that was asked for last."""
        return self.total is not None and self.items >= self.total


@dataclass
class Watch:
    """Looks at a folder again and again: what was read once is kept, and a worker that no longer
    changes its leases is known to be gone after the stated time.

    Attributes:
        folder: The folder of the results.
        seconds: The time after which a lease that does not change is of nobody.
    """

    folder: Path
    seconds: float = 60.0
    _known: dict[str, ShardRecord] = field(default_factory=dict, init=False)
    _leases: Leases | None = field(default=None, init=False)

    def look(self) -> Status:
        """The state of the folder now.

        Raises:
            OutputError: If it holds no run, or its record is damaged.
        """
        run = read_run(self.folder)
        if run is None:
            raise OutputError(
                f"{self.folder} holds no {NAME}, so no run of this program; check the path."
            )
        if self._leases is None:
            self._leases = Leases(self.folder / FOLDER, seconds=self.seconds)
        records = read_records(self.folder, self._known)
        present, in_hand = set[str](), defaultdict[str, list[str]](list)
        for path in self._leases.others():
            worker = self._leases.holder(path)
            if path.name.startswith("worker-"):
                present.add(worker)
            else:
                in_hand[worker].append(path.name.partition(".lease")[0])
        made = defaultdict[str, list[ShardRecord]](list)
        for record in records:
            made[record.worker].append(record)
        names = sorted({*made, *present, *in_hand} - {"?"})
        workers = tuple(
            _worker(name, made[name], tuple(in_hand[name]), is_present=name in present)
            for name in names
        )
        items = sum(record.count for record in records)
        total = run.execution.get("items")
        rates = [worker.rate for worker in workers if worker.is_present]
        known = [rate for rate in rates if rate is not None]
        # Those who have finished no shard yet are taken to be as fast as the others.
        rate = sum(known) / len(known) * len(rates) if known else None
        left = None if rate is None or total is None else max(0, total - items) / rate
        return Status(
            command=str(run.protocol.get("command")),
            items=items,
            total=total,
            shards=len(records),
            in_hand=sum(map(len, in_hand.values())),
            rate=rate,
            seconds_left=left,
            workers=workers,
        )


def _worker(
    name: str, made: list[ShardRecord], in_hand: tuple[str, ...], *, is_present: bool
) -> WorkerStatus:
    items, seconds = sum(r.count for r in made), sum(r.seconds_total for r in made)
    rate = items / seconds if seconds > 0 else None
    return WorkerStatus(name, is_present, in_hand, len(made), items, rate)
