"""Shards: how the work of a run is divided, and what is known of each part.

Work items are numbered, and a shard is a fixed range of numbers. A shard is taken by a lease, is
written whole, and has a record beside it, whose being there means that the shard is done. The
records and the leases lie in the hidden folder ``.shards`` of the results. Nothing here draws or
loads anything.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, overload

from ddim.errors import OutputError
from ddim.files import load_json, named_range, range_name, whole_hash, write_json

__all__ = ["FOLDER", "Blocks", "Shard", "ShardRecord", "digest", "launched", "local_rank"]
__all__ += ["read_records", "write_record"]

FOLDER = ".shards"
"""The folder of records and leases, in the folder of the results."""


class Shard(NamedTuple):
    """A part of the work that one worker does."""

    name: str
    """The name of its lease."""
    items: Sequence[Any]


@dataclass(frozen=True)
class Blocks(Sequence[Shard]):
    """The shards of the numbers ``first`` to ``last`` - 1, made when they are asked for.

    Shard k holds the numbers from ``origin + k size`` up to the next shard; those at the ends hold
    what of that is asked for. Two requests with the same origin and size divide alike wherever they
    overlap.

    Attributes:
        first: The first number.
        last: The number after the last.
        size: Numbers of a shard, at least 1.
        origin: Where shards are counted from; at most ``first``.
    """

    first: int
    last: int
    size: int
    origin: int = 0

    def __len__(self) -> int:
        return max(0, -(-(self.last - self.origin) // self.size) - self._before)

    @property
    def _before(self) -> int:
        """Whole shards below the first number."""
        return (self.first - self.origin) // self.size

    @overload
    def __getitem__(self, index: int) -> Shard: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Shard]: ...

    def __getitem__(self, index: int | slice) -> Shard | Sequence[Shard]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin = self.origin + (self._before + index) * self.size
        whole = range(begin, begin + self.size)
        return Shard(range_name(whole), range(max(begin, self.first), min(whole.stop, self.last)))


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a shard that is done.

    Attributes:
        name: The shard's name; of numbered items, the first and the last of those that it holds.
        count: Its items.
        files: What was written for it, below the folder.
        bytes: The size of these files together.
        sha256: Of the bytes of these files, one after the other.
        seconds: Of the sampling loop.
        seconds_total: From the lease to the record.
        worker: Who made it.
        rows: Its rows of the results, where these are not derived from the files.
    """

    name: str
    count: int
    files: list[str]
    bytes: int
    sha256: str
    seconds: float
    seconds_total: float
    worker: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def numbers(self) -> range:
        """The numbers of its items; empty where the items are not numbered."""
        return named_range(self.name)

    def is_whole(self, folder: Path) -> bool:
        """Whether its files are there, and together of the recorded size."""
        try:
            return sum((folder / name).stat().st_size for name in self.files) == self.bytes
        except OSError:
            return False


def write_record(folder: Path, record: ShardRecord) -> None:
    """Writes the record of a shard, whole and on the disk."""
    (folder / FOLDER).mkdir(exist_ok=True)  # not its parents: a folder that is gone stays gone
    write_json(folder / FOLDER / f"{record.name}.json", asdict(record), sync=True)


def read_records(folder: Path, known: dict[str, ShardRecord] | None = None) -> list[ShardRecord]:
    """The records of a folder, in the order of their names.

    Args:
        folder: The folder of the results.
        known: Records by file name, which are not read again; those that are read are added.

    Raises:
        OutputError: If one is damaged.
    """
    known = {} if known is None else known
    try:
        with os.scandir(folder / FOLDER) as entries:
            names = sorted(e.name for e in entries if e.name.endswith(".json"))
    except FileNotFoundError:
        names = []
    for name in names:
        if name not in known:
            with contextlib.suppress(FileNotFoundError):
                known[name] = _read(folder / FOLDER / name)
    return [known[name] for name in names if name in known]


def _read(path: Path) -> ShardRecord:
    try:
        record = ShardRecord(**load_json(path))
        if not all(isinstance(name, str) for name in record.files):
            raise TypeError("its files are no list of names")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in record.files):
            raise ValueError("it names a file outside of its folder")
        return record
    except (ValueError, TypeError) as error:
        raise OutputError(
            f"{path} is not the record of a shard ({error}); delete it, and it is made again."
        ) from error


def digest(folder: Path, files: Iterable[str]) -> dict[str, Any]:
    """The ``files``, ``bytes`` and ``sha256`` of a record."""
    names = list(files)
    sha256, size = whole_hash(folder / name for name in names)
    return {"files": names, "bytes": size, "sha256": sha256}


_LAUNCHERS = ("WORLD_SIZE", "SLURM_NTASKS", "SLURM_ARRAY_TASK_COUNT", "JOB_COMPLETION_INDEX")
"""What torchrun and accelerate, Slurm, and an indexed job of Kubernetes set for each process."""


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    given = [os.environ.get(name, "") for name in _LAUNCHERS[:3]]
    is_one_of_many = any(value.isdigit() and int(value) > 1 for value in given)
    return is_one_of_many or _LAUNCHERS[3] in os.environ


def local_rank() -> int | None:
    """The place of this process among those of its machine, as its launcher says; else None."""
    given = (os.environ.get(name, "") for name in ("LOCAL_RANK", "SLURM_LOCALID"))
    return next((int(value) for value in given if value.isdigit()), None)
