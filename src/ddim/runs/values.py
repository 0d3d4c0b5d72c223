"""The values of options that are more than a number or a name: eta, and levels from a file."""

import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

from ddim.bounds import MOST_LEVELS
from ddim.files import load_json
from ddim.options import Range, primitive

__all__ = ["ClassName", "Eta", "Etas", "FittedLevels", "Levels"]
__all__ += ["read_number", "split_list"]


class FittedLevels(tuple[int, ...]):
    """Levels from a file of ``ddim fit-steps``, with the protocol that they were fitted under."""

    protocol: dict[str, Any]


def read_number(kind: type[int] | type[float], word: str) -> int | float:
    """A number of that kind.

    Raises:
        ValueError: If it is none.
    """
    try:
        return kind(word)
    except ValueError:
        whole = "whole " if kind is int else ""
        raise ValueError(f"it must be a {whole}number; got {reprlib.repr(word)}.") from None


def split_list(word: str) -> list[str]:
    """The parts of a list that commas separate."""
    return [part.strip() for part in word.split(",") if part.strip()]


def _read_eta(word: str) -> float | str:
    try:
        return word if word == "sigma-hat" else float(word)
    except ValueError:
        raise ValueError(f"it must be a number or sigma-hat; got {reprlib.repr(word)}.") from None


def _read_levels(word: str) -> tuple[int, ...]:
    """``999,500,3``, or a JSON file that holds such a list under the key ``timesteps``."""
    if not word.endswith(".json"):
        return tuple(int(read_number(int, part)) for part in split_list(word))
    try:
        content = load_json(Path(word))
    except (OSError, ValueError) as error:
        raise ValueError(f"{word} cannot be read as JSON ({error}).") from None
    if isinstance(content, dict) and "timesteps" not in content:
        content = content.get("protocol")  # a run.json of ours keeps the list one level down
    found = content.get("timesteps") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(type(t) is int for t in found):
        raise ValueError(f"{word} must hold a list of whole numbers under the key 'timesteps'.")
    levels = FittedLevels(found)
    protocol = content.get("protocol")
    is_fitted = isinstance(protocol, dict) and protocol.get("command") == "fit-steps"
    levels.protocol = protocol if is_fitted else {}
    return levels


def _read_etas(word: str) -> tuple[float | str, ...]:
    return tuple(map(_read_eta, split_list(word)))


def _read_class(word: str) -> int | str:
    return int(read_number(int, word)) if re.fullmatch(r"[+-]?\d+", word) else word


ClassName = Annotated[int | str | None, primitive(_read_class, metavar="NUMBER|NAME")]
Eta = Annotated[
    float | Literal["sigma-hat"] | None,
    Range(0, 100),
    primitive(_read_eta, metavar="NUMBER|sigma-hat"),
]
Etas = Annotated[
    tuple[float | Literal["sigma-hat"], ...],
    Range(0, 100),
    primitive(_read_etas, metavar="NUMBER|sigma-hat,..."),
]
Levels = Annotated[
    tuple[int, ...] | None,
    Range(0, MOST_LEVELS - 1),
    primitive(_read_levels, metavar="INT,...|FILE.json"),
]
