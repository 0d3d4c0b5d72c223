"""Files of codes: one of all images, or a folder with a part of them in each file."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open

from ddim.core.checks import check_kind
from ddim.errors import DataError, DDIMError, first_line
from ddim.files import named_range, parse_json, replacing
from ddim.inversion.codes import Code, fingerprint

__all__ = ["StoredCode", "load_code", "open_code", "save_code"]

_FORMAT = "ddim-code"


def save_code(code: Code, path: Path | str) -> None:
    """Writes a code, whole or not at all; a DDIMError refuses what is none."""
    check_kind("code", code, Code, "a Code, which encode or load_code gives")
    check_kind("path", path, (str, os.PathLike), "the path of a file")
    with replacing(path, sync=True) as partial:
        safetensors.torch.save_file(code.tensors(), partial, metadata=_metadata(code))


def load_code(path: Path | str) -> Code:
    """Reads a code: a file, or a folder of parts that ``ddim encode --shard-size`` wrote.

    Raises:
        DataError: If there is no such file, or it is damaged or no code; or a part is missing
            between others.
    """
    stored = open_code(path)
    return stored.load(0, len(stored))


@dataclass(frozen=True)
class StoredCode:
    """A code in files, of which the headers were read.

    Attributes:
        parts: The files, in the order of their images.
        counts: Images of each.
        fingerprint: Of all states; of a single file as :func:`ddim.inversion.codes.fingerprint`.
    """

    parts: tuple[Path, ...]
    counts: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        return sum(self.counts)

    def load(self, first: int, count: int) -> Code:
        """The code of some images, of the parts that hold them; a DataError as
        :func:`load_code`."""
        begin, chosen = 0, []
        for path, held in zip(self.parts, self.counts, strict=True):
            inside = range(max(first, begin), min(first + count, begin + held))
            if inside or len(self.parts) == 1:
                chosen.append(_load(path)[inside.start - begin : inside.stop - begin])
            begin += held
        return chosen[0] if len(chosen) == 1 else Code.join(chosen)


def open_code(path: Path | str) -> StoredCode:
    """Reads the headers of a code's files; a DataError as :func:`load_code`."""
    check_kind("path", path, (str, os.PathLike), "the path of a file")
    path = Path(path)
    if not path.is_dir():
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is no regular file, so no code.")
        count, states = _read_header(path)
        return StoredCode((path,), (count,), states)
    # A part is named by the numbers of its images.
    named = (p for p in path.glob("*.safetensors") if named_range(p.stem))
    parts = sorted(named, key=lambda p: named_range(p.stem).start)
    if not parts:
        raise DataError(f"{path} holds no code that `ddim encode` wrote.")
    held = [named_range(part.stem) for part in parts]
    for before, after in pairwise(held):
        if before.stop != after.start:
            raise DataError(
                f"{path} lacks the codes of the images {before.stop} to {after.start - 1}; run the "
                "command that encodes them again."
            )
    headers = [_read_header(part) for part in parts]
    states = hashlib.sha256("".join(print for _, print in headers).encode()).hexdigest()[:16]
    return StoredCode(tuple(parts), tuple(count for count, _ in headers), states)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """The file of a code; what is wrong with it becomes a DataError."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"there is no code at {path}.") from None
    except (SafetensorError, OSError) as error:
        first = first_line(error).rstrip(".: ")
        raise DataError(f"{path} is no code, or is damaged or cut off ({first}).") from error
    except DDIMError as error:
        raise DataError(f"{path}: {error}") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path}: the code's metadata is damaged ({error}).") from error


def _read_header(path: Path) -> tuple[int, str]:
    """How many images a file holds, and the fingerprint of their states."""
    with _reading(path) as file:
        states = str(_told(file)["tensors"]["states"])
        return int(file.get_slice("states").get_shape()[1]), states


def _load(path: Path) -> Code:
    with _reading(path) as file:
        told = _told(file)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, written in told["tensors"].items():
            if name not in tensors or fingerprint(tensors[name]) != written:
                raise DDIMError(
                    f"the code is damaged: its {name} are not those that were written; encode the "
                    "images again."
                )
        plain = {**told["code"], "timesteps": tuple(int(t) for t in told["code"]["timesteps"])}
        residual, labels = tensors.get("residual"), tensors.get("labels")
        return Code(states=tensors["states"], residual=residual, labels=labels, **plain)


def _metadata(code: Code) -> dict[str, str]:
    """What is not a tensor: the attributes of the code, and the fingerprints of its tensors. It is
    one text, since safetensors keeps several in no order, and equal codes have equal bytes."""
    names = ("method", "timesteps", "evaluations", "gamma", "mixing", "batch_size")
    plain = {name: getattr(code, name) for name in names if getattr(code, name) is not None}
    plain |= {"origin": dict(code.origin)}
    held = {name: fingerprint(value) for name, value in code.tensors().items()}
    return {_FORMAT: json.dumps({"version": 2, "code": plain, "tensors": held})}


def _told(file: Any) -> Any:
    """What :func:`_metadata` wrote into a file, or version 1, which had a text for each part; a
    DDIMError refuses a file that is no code."""
    metadata = file.metadata() or {}
    is_first = metadata.get("format") == _FORMAT and metadata.get("version") == "1"
    if not (is_first or _FORMAT in metadata) or "states" not in file.keys():  # noqa: SIM118
        raise DDIMError("the file is no code that `ddim encode` or save_code wrote.")
    if is_first:
        return {name: parse_json(metadata[name]) for name in ("code", "tensors")}
    return parse_json(metadata[_FORMAT])
