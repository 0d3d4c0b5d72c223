"""The command line: one file a command; each composes and prints, and computes nothing itself."""

import contextlib
import importlib
import io
import re
import sys

from ddim.errors import DDIMError

__all__ = ["main"]

COMMANDS = {"sample": "draw images from a model", "train": "train a model on your own images"}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 on bad input after one sentence on standard error."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print("usage: ddim COMMAND [OPTIONS]\n")
        print("\n".join(f"  {name:10s} {what}" for name, what in COMMANDS.items()))
        print("\nddim COMMAND --help tells a command's options.")
        return 0
    try:
        if given[0] not in COMMANDS:
            raise DDIMError(f"there is no command {given[0]!r}; the commands are {', '.join(COMMANDS)}.")
        module = importlib.import_module(f"ddim.cli.{given[0]}")
        module.run(_parse(module, given[0], given[1:]))
    except (DDIMError, OSError) as error:
        print(f"ddim: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(module: object, command: str, arguments: list[str]) -> object:
    """Lets tyro read the arguments into the command's dataclass; its boxed errors become one sentence."""
    import tyro

    errors = io.StringIO()
    try:
        default, rest = module.defaults(arguments)  # type: ignore[attr-defined]
        with contextlib.redirect_stderr(errors):
            options = {} if default is None else {"default": default}
            return tyro.cli(module.Command, prog=f"ddim {command}", args=rest, **options)  # type: ignore[attr-defined]
    except SystemExit as stop:
        if not stop.code:
            raise
        words = re.sub(r"[\u2500-\u257f]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", errors.getvalue()))
        raise DDIMError(re.sub(r"\s+", " ", words).strip()) from stop
