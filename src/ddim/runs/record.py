"""``run.json``: what was asked, what was made, and how long that took; and whose a folder is.

docs/run-json.md describes the keys.
"""

import contextlib
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ddim import __version__
from ddim.errors import DDIMError, OutputError
from ddim.files import load_json, locked, remove_partial, write_json
from ddim.runs.shards import FOLDER as SHARDS

__all__ = [
    "IDENTITY",
    "NAME",
    "RunRecord",
    "check_protocol",
    "claim",
    "identity",
    "protocol_hash",
    "read_run",
    "versions",
    "write_run",
]

NAME = "run.json"
"""The record's name in a folder of results."""

IDENTITY = tuple(
    "command weight_hash configuration_hash schedule sampler timesteps eta order variance clip "
    "prior prompt negative_prompt guidance_scale guidance_rescale image strength dtype picture "
    "class data interpolation samples reference metrics extractors count long_count repeats "
    "seed store shard_size batch_size threads".split()
)
"""The keys of a protocol in which two runs must agree to share a folder. An absent key is null."""

_LATER = ("configuration_hash", "threads")
"""Keys that a record may lack; its runs go on without them."""


@dataclass(frozen=True)
class RunRecord:
    """The contents of a ``run.json``."""

    protocol: dict[str, Any]
    """What was asked, resolved: the model with its weight hash, and every option that can change a
    result."""
    results: list[dict[str, Any]]
    """One flat record for each measured thing."""
    seconds: float
    """Seconds of the sampling loop alone, after one warm-up evaluation."""
    seconds_total: float
    """Seconds of the whole command."""
    evaluations: float
    """Network calls an image: a whole number, except where images were encoded in different
    numbers of calls."""
    execution: dict[str, Any]
    """What may differ between runs of one protocol: count, batch size, device, compile."""
    versions: dict[str, str]
    """The versions of this package and of those that compute."""
    files: list[str] | None = None
    """What runs write into the folder, beside the record; None if an older version wrote it."""


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    computing = {name: version(name) for name in ("torch", "diffusers", "numpy")}
    return {"python": platform.python_version(), "ddim": __version__, **computing}


def identity(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a protocol in which two runs must agree to share a folder, as JSON keeps it."""
    kept = {key: protocol[key] for key in IDENTITY if protocol.get(key) is not None}
    result: dict[str, Any] = json.loads(json.dumps(kept))
    return result


def protocol_hash(protocol: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that tell the protocols of folders apart. The number of threads, of
    which a folder may say nothing, is not among what they are made of."""
    kept = {key: value for key, value in identity(protocol).items() if key != "threads"}
    text = json.dumps(kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_run(folder: Path) -> RunRecord | None:
    """The record in a folder, or None where there is none.

    Raises:
        OutputError: If it is damaged.
    """
    path = folder / NAME
    try:
        record = RunRecord(**load_json(path))
        if not isinstance(record.protocol, dict) or not isinstance(record.results, list):
            raise TypeError("its protocol is no object, or its results are no list")
        if not isinstance(record.execution, dict):
            raise TypeError("its execution is no object")
        if not all(isinstance(name, str) for name in record.files or ()):
            raise TypeError("its files are no list of names")
        return record
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise OutputError(
            f"{path} is not a record of this program ({error}); use another --out, or delete that "
            "folder."
        ) from error


def write_run(folder: Path, record: RunRecord, *, name: str = NAME) -> None:
    """Writes the record, whole or not at all."""
    write_json(folder / name, asdict(record))


@contextlib.contextmanager
def claim(
    folder: Path,
    protocol: Mapping[str, Any],
    is_empty: Callable[[RunRecord], bool],
    *,
    files: Collection[str] = (),
    overwrite: bool = False,
    waiting: Callable[[], bool] = lambda: False,
    is_alone: Callable[[], bool] = lambda: True,
) -> Iterator[RunRecord | None]:
    """Holds a folder for runs of one protocol, from the first look at it to the last write.

    What a killed run left half-written is removed, and with ``overwrite`` the files that the
    record of an earlier run lists.

    Args:
        folder: Where results are put; it is created if needed.
        protocol: What the run is asked, resolved.
        is_empty: Whether the folder of an earlier record holds no result. Such a record is
            forgotten if it is of the same command, so a run that was killed at its start does not
            keep the folder.
        files: What the run will write, from the folder.
        overwrite: Whether the results of an earlier run, of any protocol, give way to this one's.
        waiting: Whether to wait while another run holds it, as in :func:`ddim.files.locked`.
        is_alone: Whether nobody else works in the folder, who need not hold it for that.

    Yields:
        The record of an earlier run of the same protocol, or None.

    Raises:
        OutputError: If another run holds the folder; if it holds files without a record, or results
            of another protocol; or if a file that the run would write is not the program's own.
    """
    was_there = folder.exists()
    with contextlib.ExitStack() as stack:
        if not was_there:
            stack.callback(_remove_empty, folder)
        stack.enter_context(locked(folder, waiting=waiting))
        record = read_run(folder)
        there = [p for p in folder.iterdir() if p.name != NAME and not p.name.startswith(".")]
        if record is None and there:
            raise OutputError(
                f"{folder} holds files such as {there[0].name}, and no {NAME} that says how they "
                "were made; use another --out, or delete that folder."
            )
        if is_alone():
            remove_partial(folder)
        elif overwrite:
            raise OutputError(f"{folder} is being written by another run; wait for it.")
        listed = [] if record is None else record.files
        if record is not None and not overwrite:
            before = record.protocol
            if is_empty(record) and before.get("command") == protocol["command"]:
                shutil.rmtree(folder / SHARDS, ignore_errors=True)
                record = None
            else:
                advice = "give --overwrite, which deletes those results"
                check_protocol(folder, before, protocol, advice=advice)
        foreign = set() if listed is None and not overwrite else set(files) - set(listed or ())
        if kept := sorted(name for name in foreign if (folder / name).exists()):
            raise OutputError(
                f"{folder / kept[0]} would be written by this run, and the {NAME} beside it does "
                "not list it; use another --out, or move that file away."
            )
        if overwrite and record is not None:
            _remove_listed(folder, listed or ())
            record = None
        try:
            yield record
        except DDIMError:  # a refusal leaves nothing, if nothing was made before it
            names = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
            if record is None and names == [NAME]:
                (folder / NAME).unlink()
            raise


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not empty
        folder.rmdir()


def _remove_listed(folder: Path, files: Collection[str]) -> None:
    """Removes files that a record lists, and the record; nothing outside of the folder."""
    for path in (folder / name for name in files):
        if path.parent.resolve().is_relative_to(folder.resolve()) and not path.is_dir():
            path.unlink(missing_ok=True)
            if path.parent != folder and path.parent.is_dir():
                _remove_empty(path.parent)
    shutil.rmtree(folder / SHARDS, ignore_errors=True)
    (folder / NAME).unlink()


def check_protocol(
    folder: Path,
    before: Mapping[str, Any],
    protocol: Mapping[str, Any],
    *,
    advice: str = "delete that folder",
) -> None:
    """Checks that a folder's protocol is the one that is asked for, in the keys of ``IDENTITY``.

    Raises:
        OutputError: If it is another; the message says what differs.
    """
    asked = identity(protocol)
    compared = [key for key in IDENTITY if key not in _LATER or before.get(key) is not None]
    changed = [key for key in compared if before.get(key) != asked.get(key)]
    if changed:
        differences = "; ".join(
            f"{k} is {_brief(before.get(k))} there and {_brief(asked.get(k))} here" for k in changed
        )
        raise OutputError(
            f"{folder} holds results of another protocol: {differences}. Use another --out, or "
            f"{advice}."
        )


def _brief(value: object) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"[{value[0]}, {value[1]}, ... {value[-1]}] ({len(value)} levels)"
    return json.dumps(value)
