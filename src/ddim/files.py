"""Files and folders that are written whole or not at all, kept to one writer, and known by their
bytes."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ddim.errors import OutputError

__all__ = [
    "file_hash",
    "load_json",
    "locked",
    "locked_file",
    "named_range",
    "parse_json",
    "range_name",
    "remove_partial",
    "replacing",
    "replacing_folder",
    "whole_hash",
    "write_json",
    "write_text",
]

_WAIT = 0.05  # seconds between two questions whether to go on waiting for a lock

_LARGEST_JSON = 2**26  # bytes; the indices of sharded weights have some 10**5


def range_name(numbers: Sequence[int]) -> str:
    """The name of what holds consecutive numbers; names sort as the numbers do."""
    return f"{numbers[0]:010d}-{numbers[-1]:010d}"


def named_range(name: str) -> range:
    """The numbers that :func:`range_name` gave a name; empty where it is no such name."""
    found = re.fullmatch(r"(\d{10,})-(\d{10,})", name)
    return range(int(found[1]), int(found[2]) + 1) if found else range(0)


_TOKEN = f"{secrets.randbelow(10**9):09d}"
"""Tells this process from those of other machines that share a folder and have the same number."""


@contextlib.contextmanager
def replacing(path: Path | str, *, sync: bool = False) -> Iterator[Path]:
    """Gives a temporary path to write to; the file there replaces ``path`` at the end.

    If the block raises, the temporary file is removed, and ``path`` stays as it was. With ``sync``
    the file is on the disk before it has its name, and so is the name when the block ends.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{_TOKEN}.partial")
    try:
        yield partial
        if sync:
            _sync(partial)
        partial.replace(path)
        if sync:
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty temporary folder, which takes the name ``folder`` at the end; one that is
    there is replaced.

    If the block raises, the temporary folder is removed, and ``folder`` stays as it was.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path | str, content: str, *, sync: bool = False) -> None:
    """Writes a text file in UTF-8, whole or not at all; ``sync`` as in :func:`replacing`."""
    with replacing(path, sync=sync) as partial:
        partial.write_text(content, encoding="utf-8")


def write_json(
    path: Path | str, content: Any, *, sort_keys: bool = False, sync: bool = False
) -> None:
    """Writes a JSON file, whole or not at all; ``sync`` as in :func:`replacing`. NaN and infinity
    are refused with a ValueError."""
    text = json.dumps(content, indent=2, sort_keys=sort_keys, allow_nan=False)
    write_text(path, text + "\n", sync=sync)


def load_json(path: Path) -> Any:
    """The content of a JSON file; a ValueError or an OSError says what is wrong with it, also where
    it is no regular file, such as a pipe, or larger than any that is written in earnest."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is no regular file")
    if about.st_size > _LARGEST_JSON:
        raise ValueError(f"it has {about.st_size} bytes, and at most {_LARGEST_JSON} are read")
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """The content of a JSON text; a ValueError says what is wrong with it, also where it is nested
    too deeply, or holds a whole number of more than 40 digits."""
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _whole(digits: str) -> int:
    if len(digits) > 40:  # tokenizers have 10**30 for no bound
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def remove_partial(folder: Path) -> None:
    """Removes the temporary files that killed processes left in a folder.

    The caller knows that nobody else is writing there.
    """
    for path in folder.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, *, waiting: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Keeps a folder to one run at a time; it is created if needed.

    The system releases the lock when the process ends, however it ends.

    Args:
        folder: The folder.
        waiting: Asked again and again, while another run holds it, whether to wait; it may raise.

    Raises:
        OutputError: If another run holds the folder, and is not waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / ".lock", folder, waiting):
        yield


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Keeps the name of a file that is to be written to one run at a time.

    Raises:
        OutputError: If another run is about to write it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.with_name(f".{path.name}.lock"), path, lambda: False):
        yield


@contextlib.contextmanager
def _lock(lock_file: Path, what: Path, waiting: Callable[[], bool]) -> Iterator[None]:
    from filelock import FileLock, Timeout  # it loads asyncio, a tenth of a second

    lock = FileLock(lock_file, timeout=0)
    while not lock.is_locked:
        lock_file.touch()  # where that fails, an OSError says why; filelock would wait
        try:
            lock.acquire()
        except Timeout:
            if not waiting():
                raise OutputError(
                    f"{what} is being written by another run; wait for it, or use another --out."
                ) from None
            time.sleep(_WAIT)
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)  # while it is held; filelock refuses an unlinked file
        lock.release()


def file_hash(paths: Iterable[Path]) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of the files' bytes, one file after
    the other."""
    return whole_hash(paths)[0][:16]


def whole_hash(paths: Iterable[Path]) -> tuple[str, int]:
    """Returns the SHA-256 of the files' bytes, one file after the other, and how many they are."""
    digest, size = hashlib.sha256(), 0
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    return digest.hexdigest(), size
