"""Leases: who works on what, told by files in a folder that all workers share.

A lease is a file that its worker creates exclusively, and whose content it changes every few
seconds. A lease whose content stays the same for a stated time, by the clock of whoever looks at
it, is of a worker that is gone, and may be taken over: no clock of another machine is read, and no
process waits for a group. On one machine a gone worker is known at once, since the system gives up
a process's lock on the file with the process.

A taken-over lease is a file of the next generation (``NAME.lease``, ``NAME.lease.1``, ...), which
again only one process can create; so two that find the same lease stale do not both take it. A
worker that was only stopped, and wakes up, may finish what another has begun again: whoever uses
leases makes that harmless.
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ddim.errors import OutputError

try:
    import fcntl
except ImportError:  # not a Unix: leases are found stale by time alone
    fcntl = None  # type: ignore[assignment]

__all__ = ["STALE", "WORKER", "Lease", "Leases"]

STALE = 60.0
"""Seconds without a change after which a lease may be taken over."""

_BEATS = 6
"""Changes of a lease in that time."""

_LONGEST = 4096
"""Bytes of a lease that are read."""

WORKER = f"{platform.node()}-{os.getpid()}"
"""The name of this process in leases and records."""


class Lease:
    """A lease that this process holds.

    Attributes:
        name: What it is of.
        paths: Its file, and before it those of the workers that it was taken over from.
        stolen: Whether there are such.
    """

    def __init__(self, name: str, paths: list[Path], file: int) -> None:
        self.name, self.stolen = name, len(paths) > 1
        self.paths, self._file, self._beats = paths, file, 0
        self._token = secrets.token_hex(8)
        self.beat()

    def beat(self) -> None:
        """Changes the content, which shows others that the worker lives."""
        self._beats += 1
        content = {"worker": WORKER, "machine": _machine(), "token": self._token}
        line = json.dumps({**content, "beats": f"{self._beats:012d}"})
        os.pwrite(self._file, line.encode(), 0)

    def is_held(self) -> bool:
        """Whether nobody has taken it over."""
        with contextlib.suppress(OSError):
            mine, there = os.fstat(self._file), self.paths[-1].stat()
            is_there = (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
            return is_there and not _next(self.paths[0], len(self.paths)).exists()
        return False

    def release(self) -> None:
        """Gives it back; what is done by then, nobody takes again."""
        try:
            if self.is_held():
                for path in self.paths:
                    path.unlink(missing_ok=True)
        finally:
            os.close(self._file)


class Leases:
    """The leases of a folder, as this process sees them.

    Args:
        folder: Where the lease files lie; it is created with the first.
        seconds: The time after which a lease that does not change may be taken over.
    """

    def __init__(self, folder: Path, *, seconds: float = STALE) -> None:
        self.folder, self.seconds = folder, seconds
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._held: list[Lease] = []

    def take(self, name: str) -> Lease | None:
        """Takes the lease of that name, or returns None while another worker holds it.

        Raises:
            OutputError: If a lease file cannot be read.
            OSError: If none can be written.
        """
        paths = [self._first(name)]
        while (file := self._create(paths[-1])) is None:
            following = _next(paths[0], len(paths))
            if not following.exists() and not self.is_gone(paths[-1]):
                return None
            paths.append(following)
        for path in paths:
            self._seen.pop(path, None)
        try:
            return Lease(name, paths, file)
        except OSError:  # the disk is full: nobody would know whose the empty file is
            paths[-1].unlink(missing_ok=True)
            os.close(file)
            raise

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[Lease | None]:
        """Takes a lease, keeps it alive in a thread while the block runs, and gives it back; None
        while another worker holds it."""
        lease = self.take(name)
        if lease is None:
            yield None
            return
        ended = threading.Event()
        interval = self.seconds / _BEATS

        def beat() -> None:
            while not ended.wait(interval):
                with contextlib.suppress(OSError):  # then others take it; the work itself fails
                    lease.beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        self._held.append(lease)
        try:
            yield lease
        finally:
            ended.set()
            thread.join()
            self._held.remove(lease)
            lease.release()

    def present(self) -> list[Path]:
        """All lease files."""
        try:
            with os.scandir(self.folder) as entries:
                return sorted(Path(e.path) for e in entries if ".lease" in e.name)
        except FileNotFoundError:
            return []

    def others(self) -> list[Path]:
        """The lease files of others who are, for all that is known, at work."""
        return [path for path in self._foreign() if not self.is_gone(path)]

    def sweep(self) -> None:
        """Removes the lease files of workers that are gone. The caller keeps others from taking
        leases meanwhile, or knows that there are none."""
        for path in self._foreign():
            if self.is_gone(path):
                path.unlink(missing_ok=True)

    def _foreign(self) -> list[Path]:
        """All lease files but those that are held here."""
        mine = {path for lease in self._held for path in lease.paths}
        return [path for path in self.present() if path not in mine]

    def is_gone(self, path: Path) -> bool:
        """Whether the worker of a lease file is gone: its process on this machine has ended, or the
        file has not changed for the stated time since this process first looked at it.

        Raises:
            OutputError: If the file cannot be read.
        """
        try:
            content = _content(path)
        except FileNotFoundError:
            return False  # it was given back: the next look finds what is there then
        except OSError as error:
            raise OutputError(
                f"the lease {path} cannot be read ({error.strerror or error}); if no process works "
                "in that folder, delete it."
            ) from None
        now = time.monotonic()
        before, since = self._seen.setdefault(path, (content, now))
        if content != before:
            self._seen[path] = (content, now)
            since = now
        return now - since >= self.seconds or self._has_ended(path, content)

    def holder(self, path: Path) -> str:
        """The worker that a lease file names; a question mark where it names none."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return str(json.loads(_content(path))["worker"])
        return "?"

    def _first(self, name: str) -> Path:
        return self.folder / f"{name}.lease"

    def _create(self, path: Path) -> int | None:
        """Creates a lease file and locks it; None if it is there."""
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
        try:
            file = os.open(path, flags, 0o644)
        except FileExistsError:
            return None
        except FileNotFoundError:
            path.parent.mkdir(exist_ok=True)  # not its parents: a folder that is gone stays gone
            return self._create(path)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks: time alone tells
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file

    @staticmethod
    def _has_ended(path: Path, content: bytes) -> bool:
        """Whether the lock of a lease of this machine is free, which its worker's end alone does;
        the content is written once the lock is held."""
        if fcntl is None or json.dumps(_machine()).encode() not in content:
            return False
        try:
            file = os.open(path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False
        finally:
            os.close(file)


def _content(path: Path) -> bytes:
    """What a lease file says; a pipe, which would be read without end, is none."""
    if not path.is_file():
        path.stat()  # which says so where nothing is there
        raise OSError("it is no regular file")
    with path.open("rb") as file:
        return file.read(_LONGEST)


def _next(first: Path, generation: int) -> Path:
    return first.with_name(f"{first.name}.{generation}")


@cache
def _machine() -> str:
    """What tells the machine, and its run since it started, from all others."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()
