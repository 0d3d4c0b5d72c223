"""The command line: one file a command; each composes and prints, and computes nothing itself.

A command's module holds ``Request``, the dataclass whose field docstrings are its help;
``run(request)``, which may return an exit code; and, where there are presets,
``defaults(arguments)``, the request that a preset stands for. Only the module of the command that
was asked for is loaded."""

import difflib
import importlib
import re
import sys
import warnings
from typing import Any

from ddim.cli.streams import may_close
from ddim.errors import CheckpointError, DDIMError, printable

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "sample": "draw images from a model",
    "train": "train a model on your own images",
    "encode": "turn images into codes of a model's latent space",
    "decode": "turn codes back into images",
    "interpolate": "draw the path between two images or seeds",
    "edit": "edit a picture by words, through its code",
    "reconstruct": "measure how images come back from their codes, as the paper's Table 2",
    "consistency": "compare what one code becomes under other steps and samplers",
    "evaluate": "measure images, or a model's, against real ones",
    "table": "measure a model at every eta and number of steps, as the paper's Table 1",
    "status": "tell how far a run is that processes share",
    "fit-steps": "fit the timesteps of a few steps to a model",
    "doctor": "tell what is wrong with a model's noise schedule and sampler",
    "studio": "open a page in the browser to draw, compare and look",
    "convert": "turn a checkpoint from elsewhere into a model in diffusers format",
}

_RESUMED = ("sample", "train", "reconstruct", "table", "evaluate")
"""The commands that keep what an interrupted run has finished."""

_INSIDES = {
    r"\[Errno \d+\] ([^:()]+): '[^']*'": r"\1",
    r"\.model\.\w+\.partial/": "",
    r"\.([^/\s]+?)(\.\d+)?\.partial\b": r"\1",
    r" ?<[\w.]+ object at 0x[0-9a-f]+>": "",
}
"""Patterns of what errors tell of a program's inside, such as names of temporary files, and what
stands in their place."""

_OPTIONS = {
    "num_inference_steps": "--steps",
    "timestep_spacing": "--spacing",
    "guidance_rescale": "--guidance-rescale",
}
"""The options that Python calls otherwise than the command line."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 where the doctor finds an error; 2 on bad input, or where a file cannot be read or
        written; 130 where the user interrupts. One sentence on standard error says what happened.
        Anything else is a bug, and shows its traceback.
    """
    try:
        with may_close():
            return _run(sys.argv[1:] if arguments is None else list(arguments))
    except OSError as error:
        where = f"cannot read or write {error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}; nothing is left half-written.")


def _run(given: list[str]) -> int:
    """Runs one command; a file that cannot be read or written is an OSError."""
    if not given or given[0] in ("-h", "--help"):
        print("usage: ddim COMMAND [OPTIONS]\n")
        print("\n".join(f"  {name:11s} {what}" for name, what in COMMANDS.items()))
        print("\nddim COMMAND --help tells a command's options.")
        print("ddim --completion SHELL prints what lets bash, zsh or fish complete them.")
        return 0
    if given[0] == "--version":
        from ddim import __version__

        print(f"ddim {__version__}")
        return 0
    module: Any = None
    try:
        if given[0] == "--completion":
            from ddim.cli.arguments import completion

            requests = {name: _command(name).Request for name in COMMANDS}
            print(completion(requests, shell="".join(given[1:])))
            return 0
        if given[0] not in COMMANDS:
            near, names = difflib.get_close_matches(given[0], COMMANDS, 1), ", ".join(COMMANDS)
            hint = f"did you mean {near[0]}?" if near else f"the commands are {names}."
            raise DDIMError(f"there is no command {given[0]!r}; {hint}")
        module = _command(given[0])
        with warnings.catch_warnings():
            _print_warnings()
            code: int | None = module.run(_parse(module, given[0], given[1:]))
    except DDIMError as error:
        is_of_options = module is not None and not isinstance(error, CheckpointError)
        return _fail(_as_options(str(error), module, given[1:]) if is_of_options else str(error))
    except KeyboardInterrupt:
        then = "goes on from what is there" if given[0] in _RESUMED else "begins anew"
        _fail(f"interrupted; the same command {then}.")
        return 130
    return code or 0


def _command(name: str) -> Any:
    return importlib.import_module(f"ddim.cli.{name.replace('-', '_')}")


def _print_warnings() -> None:
    """Prints this package's warnings in one line, without their place in the code."""
    otherwise = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **rest: Any) -> None:
        if category.__module__.split(".")[0] == "ddim":
            print(f"ddim: warning: {printable(message)}", file=sys.stderr)
        else:
            otherwise(message, category, *place, **rest)

    warnings.showwarning = show


def _parse(module: Any, name: str, arguments: list[str]) -> object:
    from ddim.cli.arguments import parse

    default = module.defaults(arguments) if hasattr(module, "defaults") else None
    return parse(module.Request, name=name, arguments=arguments, default=default)


def _as_options(message: str, module: Any, arguments: list[str]) -> str:
    """Names options in a message as the command line does, if they were given, or if the message
    names ``num_inference_steps``, which no file of a model holds."""
    from ddim.cli.arguments import option_of
    from ddim.options import declarations

    given = set(map(option_of, arguments))
    named = set(_OPTIONS.values()) if "num_inference_steps" in message else given
    known = {name: field.option for name, field in declarations(module.Request).items()}
    meant = named & set(known.values())
    spelled = {name: option for name, option in known.items() if "_" in name.strip("_")}
    for name, option in (spelled | _OPTIONS).items():
        if option in meant:
            message = re.sub(rf"(?<![\w-]){name}(?![\w=])", option, message)
    return message


def _fail(message: str) -> int:
    for pattern, instead in _INSIDES.items():
        message = re.sub(pattern, instead, message)
    print(f"ddim: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2
