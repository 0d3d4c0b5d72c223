"""``run.json``: what a command was asked, what it made, and how long that took; docs/run-json.md
describes its keys."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ddim import __version__
from ddim.errors import OutputError
from ddim.files import write_text

__all__ = [
    "IDENTITY",
    "NAME",
    "RunRecord",
    "check_protocol",
    "read_run",
    "versions",
    "write_run",
]

NAME = "run.json"
"""The record's name in a folder of results."""

IDENTITY = (
    "command",
    "weight_hash",
    "schedule",
    "sampler",
    "timesteps",
    "eta",
    "order",
    "variance",
    "clip",
    "prior",
    "prompt",
    "negative_prompt",
    "guidance_scale",
    "guidance_rescale",
    "image",
    "strength",
    "dtype",
    "class",
    "data",
    "interpolation",
    "samples",
    "reference",
    "metrics",
    "extractors",
    "count",
    "long_count",
    "repeats",
    "seed",
)
"""The keys of a protocol in which two runs must agree to share a folder; one that is absent counts
as null."""


@dataclass(frozen=True)
class RunRecord:
    """The contents of a ``run.json``."""

    protocol: dict[str, Any]
    """What was asked, resolved: the model with its weight hash, and every option that can change a
    result."""
    results: list[dict[str, Any]]
    """One flat record a measured thing."""
    seconds: float
    """The sampling loop alone, after one warm-up evaluation."""
    seconds_total: float
    """The whole command."""
    evaluations: float
    """Network calls an image; a whole number, but where images were encoded in different numbers of
    them."""
    execution: dict[str, Any]
    """What may differ between runs of one protocol: count, batch size, device, compile."""
    versions: dict[str, str]
    """Of this package and those that compute."""


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    return {
        "python": platform.python_version(),
        "ddim": __version__,
        **{name: version(name) for name in ("torch", "diffusers", "numpy")},
    }


def read_run(folder: Path) -> RunRecord | None:
    """The record in a folder, or None where there is none.

    Raises:
        OutputError: If it is damaged.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        record = RunRecord(**content)
        if not isinstance(record.protocol, dict) or not isinstance(record.results, list):
            raise TypeError("its protocol is no object, or its results are no list")
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
    write_text(folder / name, json.dumps(asdict(record), indent=2, allow_nan=False) + "\n")


def check_protocol(
    folder: Path, protocol: Mapping[str, Any], *, empty: bool = False
) -> RunRecord | None:
    """The record of an earlier run of the same protocol in this folder, or None where there was
    none.

    Args:
        folder: Where results are to be put.
        protocol: Of the new run.
        empty: Whether the folder holds no results: then what an earlier run of the same command
            began is forgotten.

    Raises:
        OutputError: If the folder holds results of another protocol; the message says what differs.
    """
    record = read_run(folder)
    if record is None:
        return None
    asked = json.loads(json.dumps(protocol))
    if empty and record.protocol.get("command") == asked.get("command"):
        return None
    changed = [k for k in IDENTITY if record.protocol.get(k) != asked.get(k)]
    if changed:
        told = "; ".join(
            f"{k} is {_brief(record.protocol.get(k))} there and {_brief(asked.get(k))} here"
            for k in changed
        )
        raise OutputError(
            f"{folder} holds results of another protocol: {told}. Use another --out, or delete "
            "that folder."
        )
    return record


def _brief(value: object) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"[{value[0]}, {value[1]}, ... {value[-1]}] ({len(value)} levels)"
    return json.dumps(value)
