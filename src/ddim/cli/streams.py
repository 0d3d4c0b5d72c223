"""Standard output and error, whose reader may go away before a run ends."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["may_close", "plain_where_asked"]


class _Stream:
    """A text stream whose words are lost, without an error, once nobody reads it any more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        # Of a file, an input-output error is one; of a terminal, it says that it was closed.
        self._closed = {errno.EPIPE, *([errno.EIO] if stream.isatty() else [])}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text; returns its length."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Writes what is kept back."""
        self._attempt(self._stream.flush)

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())  # Python flushes it at its end
            if error.errno not in self._closed:
                raise


class _Plain(_Stream):
    """A stream that no library colours, since it does not say that it is a terminal."""

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def plain_where_asked() -> Iterator[None]:
    """Has nothing be coloured on standard output if NO_COLOR is set (https://no-color.org)."""
    with contextlib.ExitStack() as stack:
        if os.environ.get("NO_COLOR"):
            plain: Any = _Plain(sys.stdout)
            stack.enter_context(contextlib.redirect_stdout(plain))
        yield


@contextlib.contextmanager
def may_close() -> Iterator[None]:
    """Keeps a run going where its output is closed, as in ``ddim sample | head -1``."""
    with contextlib.ExitStack() as stack:
        for stream, redirect in (
            (sys.stdout, contextlib.redirect_stdout),
            (sys.stderr, contextlib.redirect_stderr),
        ):
            # Python's word for a stream that was closed before it began is None.
            patient: Any = _Stream(stream or stack.enter_context(open(os.devnull, "w")))
            stack.enter_context(redirect(patient))
            stack.callback(patient.flush)
        yield
