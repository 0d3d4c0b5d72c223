"""The errors that this library raises on purpose.

Each is a ``ValueError`` whose text is one sentence or two: what was wrong, what was received, what
to do. The commands print that text and exit with code 2."""

__all__ = [
    "CheckpointError",
    "DDIMError",
    "DataError",
    "DivergenceError",
    "OutputError",
    "first_line",
]


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
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
