"""The errors that this library raises on purpose.

Each is a ``ValueError`` whose text is one sentence or two: what was wrong, what was received, what
to do. The commands print that text and exit with code 2."""

import re

__all__ = [
    "CheckpointError",
    "DDIMError",
    "DataError",
    "DivergenceError",
    "OutputError",
    "first_line",
    "needs_code",
    "shown_cause",
]

_NEEDS_CODE = re.compile("weights_only|Unsupported (global|class)|GLOBAL")


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


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or its name, to stand in brackets."""
    if needs_code(error):
        return "its weights are pickled with more than tensors, and reading that would run code"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def needs_code(error: BaseException | None) -> bool:
    """Whether torch refused a pickled file that would run code, here or down the causes."""
    while error is not None:
        if _NEEDS_CODE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def shown_cause(error: Exception) -> Exception | None:
    """What is shown as the cause of a refusal: the error, unless torch advises in it how to run the
    code of a file."""
    return None if needs_code(error) else error
