"""The errors that this library raises on purpose.

Each is a ``ValueError`` whose text is one sentence or two: what was wrong, what was received, what
to do. The commands print that text and exit with code 2."""

import re
import unicodedata
from collections.abc import Iterator

__all__ = [
    "CheckpointError",
    "DDIMError",
    "DataError",
    "DivergenceError",
    "OutputError",
    "first_line",
    "needs_code",
    "plain_words",
    "plural",
    "printable",
    "shown_cause",
]

_TURNS = "LRE RLE LRO RLO PDF LRI RLI FSI PDI".split()
_NEEDS_CODE = re.compile("Unsupported (global|class)|GLOBAL")
_ADVICE = "weights_only"  # torch says of any pickle that it cannot read how to run its code


class DDIMError(ValueError):
    """What was asked cannot be done; the message says why, and what to do instead."""


class CheckpointError(DDIMError):
    """A model, scheduler or training checkpoint that is missing, damaged or of another kind."""


class DataError(DDIMError):
    """Training or reference data that is missing, damaged or of another shape."""


class OutputError(DDIMError):
    """A result that cannot be written, or that would mix with results of another protocol."""


class DivergenceError(DDIMError):
    """A prediction, a sample or a code became NaN or infinite."""


def plural(count: int, noun: str) -> str:
    """As '1 step' or '2 steps'."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or its name, to stand in brackets."""
    if needs_code(error):
        return "its weights are pickled with more than tensors, and reading that would run code"
    if _ADVICE in str(error):
        return "it is damaged or no file of weights"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def printable(text: object, *, keep: str = "\n\t") -> str:
    """A text as a terminal may be given it, since a name of a file may hold anything: what controls
    a terminal or turns the direction of writing, and what is no character, is shown by number."""
    return "".join(c if c in keep or not _is_control(c) else _number(c) for c in str(text))


def plain_words(name: str) -> str:
    """A name that stands for itself in Markdown, on one line, whatever it holds."""
    return printable(re.sub(r"([\\`*\[\]<>|#!])", r"\\\1", name), keep="")


def _is_control(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _TURNS


def _number(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def needs_code(error: BaseException) -> bool:
    """Whether torch refused a pickled file that would run code, here or down the causes."""
    return any(_NEEDS_CODE.search(text) for text in _texts(error))


def _texts(error: BaseException | None) -> Iterator[str]:
    """The texts of an error and of its causes."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def shown_cause(error: Exception) -> Exception | None:
    """What is shown as the cause of a refusal: the error, unless torch advises in it how to run the
    code of a file."""
    advises = needs_code(error) or any(_ADVICE in text for text in _texts(error))
    return None if advises else error
