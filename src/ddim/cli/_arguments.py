"""Arguments into a command's dataclass, through tyro: comma-separated lists, and errors of one
sentence."""

import contextlib
import difflib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ddim.errors import DDIMError

__all__ = [
    "EtaOption",
    "EtasOption",
    "FittedLevels",
    "ModelArgument",
    "TimestepsOption",
    "option_names",
    "parse",
]

C = TypeVar("C")


def parse(command: type[C], *, name: str, arguments: list[str], default: C | None = None) -> C:
    """Reads the arguments of ``ddim NAME``.

    Raises:
        DDIMError: One sentence, if they are not right.
        SystemExit: With code 0, after ``--help``.
    """
    errors = io.StringIO()
    asks_for_help = any(a in ("-h", "--help") for a in arguments)
    try:
        with (
            contextlib.redirect_stderr(errors),
            contextlib.nullcontext() if asks_for_help else _unwrapped(),
        ):
            options: dict[str, Any] = {} if default is None else {"default": default}
            parsed: Any = tyro.cli(
                command,
                prog=f"ddim {name}",
                args=arguments,
                registry=_registry(),
                config=(tyro.conf.FlagCreatePairsOff,),
                **options,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro tells of a missing argument first, where a mistyped option may have taken it.
        raise DDIMError(
            _unknown_option(command, name, arguments) or _one_sentence(errors.getvalue(), name)
        ) from None
    result: C = parsed
    return result


def option_names(command: type) -> list[str]:
    """The options of a command's dataclass, as they are given."""
    names = []
    for field, hint in get_type_hints(command, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        if not any(mark is tyro.conf.Positional for mark in marks):
            told = next((mark.name for mark in marks if getattr(mark, "name", None)), None)
            names.append(f"--{told or field.replace('_', '-')}")
    return names


def _unknown_option(command: type, name: str, arguments: Sequence[str]) -> str | None:
    """The sentence about the first option that the command does not have; None where it has all."""
    known = option_names(command)
    for argument in arguments:
        option = argument.partition("=")[0].replace("_", "-")
        if option.startswith("--") and len(option) > 2 and option not in known:
            near = difflib.get_close_matches(option, known, 1, cutoff=0.75)
            return (
                f"there is no option {option}; {f'did you mean {near[0]}?' if near else _see(name)}"
            )
    return None


def _see(name: str) -> str:
    return f"`ddim {name} --help` lists the options."


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """While held, tyro breaks no line of its messages, which would split the values in them."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "4096"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _one_sentence(box: str, name: str) -> str:
    """What one of tyro's boxes says, in a sentence."""
    blocks: list[list[str]] = [[]]
    for drawn in box.splitlines():
        plain = re.sub(r"\x1b\[[0-9;]*m", "", drawn).strip()
        line = re.sub(r"[\u2500-\u257f]+", " ", plain).strip()
        if plain.startswith("\u256d"):  # the title stands in the upper edge of a drawn box
            blocks = [[line], []]
        elif re.fullmatch(r"[-\u2500-\u257f ]{3,}", plain):
            blocks.append([])
        elif line and not line.startswith("For full helptext"):
            blocks[-1].append(line)
    words = " ".join(blocks[1] if len(blocks) > 1 else blocks[0])
    see = _see(name)
    if match := re.match(r"Unrecognized options: (.*)", words):
        given = match[1].split(", ")
        if options := [g for g in given if g.startswith("-")]:
            return f"there is no option {options[0]}; {see}"
        return (
            f"there is an argument too many: {given[0]!r}; lists are separated by commas, and {see}"
        )
    if words.startswith("Missing from"):
        needed = [
            match[0]
            for line in blocks[1]
            if (match := re.match(r"--[a-z][\w-]*|[A-Z][A-Z_]+(?=$| \()", line))
        ]
        return f"{' and '.join(needed)} must be given; {see}"
    if match := re.match(r"Missing value for argument '([^']*)'", words):
        return f"{match[1]} needs a value; {see}"
    if match := re.match(
        r"invalid choice '(.*)' for argument '([^']*)'. Expected one of \((.*)\)", words
    ):
        choices = [c for c in re.findall(r"'([^']*)'", match[3]) if c != "None"]
        return f"{match[2]} must be one of {', '.join(choices)}; got {match[1]!r}."
    if match := re.match(r"Error parsing (\S+): (.*)", words):
        # A dataclass that refuses its own fields names them itself; tyro puts the class's name
        # before that.
        return f"{match[1]}: {match[2]}" if match[1].startswith("-") else match[2]
    return words or see


def _registry() -> ConstructorRegistry:
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type is int:
            return _spec(lambda text: _number(int, text), metavar="INT")
        return (
            _spec(lambda text: _number(float, text), metavar="NUMBER")
            if info.type is float
            else None
        )

    @registry.primitive_rule
    def comma_lists(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kinds = get_args(info.type)
        if (
            get_origin(info.type) is not tuple
            or kinds[1:] != (...,)
            or kinds[0] not in (int, float, str)
        ):
            return None
        convert = _CONVERT[kinds[0]]
        metavar = {int: "INT", float: "NUMBER", str: "NAME"}[kinds[0]]
        return _spec(
            lambda text: tuple(convert(part) for part in _split(text)), metavar=f"{metavar},..."
        )

    @registry.primitive_rule
    def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        """``X | None`` is read as X; leaving the option out is how to say None."""
        kinds = get_args(info.type)
        if (
            get_origin(info.type) not in (Union, UnionType)
            or NoneType not in kinds
            or len(kinds) != 2
        ):
            return None
        inner = next(k for k in kinds if k is not NoneType)
        spec: Any = ConstructorRegistry.get_primitive_spec(
            PrimitiveTypeInfo.make(inner, info.markers)
        )
        if not isinstance(spec, PrimitiveConstructorSpec):
            return None
        return PrimitiveConstructorSpec(
            nargs=spec.nargs,
            metavar=spec.metavar,
            instance_from_str=spec.instance_from_str,
            is_instance=lambda x: x is None or spec.is_instance(x),
            str_from_instance=lambda x: ["unset"] if x is None else spec.str_from_instance(x),
            choices=spec.choices,
        )

    return registry


def _spec(convert: Callable[[str], Any], *, metavar: str) -> PrimitiveConstructorSpec[Any]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: convert(texts[0]),
        is_instance=lambda x: True,
        str_from_instance=lambda x: [
            ",".join(map(str, x)) if isinstance(x, tuple) else "unset" if x is None else str(x)
        ],
    )


def _number(kind: type[int] | type[float], text: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(
            f"it must be a {'whole ' if kind is int else ''}number; got {text!r}."
        ) from None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


_CONVERT: dict[Any, Callable[[str], Any]] = {
    int: lambda t: _number(int, t),
    float: lambda t: _number(float, t),
    str: str,
}


def _eta(text: str) -> float | str:
    if text == "sigma-hat":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"it must be a number or sigma-hat; got {text!r}.") from None


class FittedLevels(tuple[int, ...]):
    """Levels out of a file of ``ddim fit-steps``, with the protocol that they were fitted under."""

    protocol: dict[str, Any]


def _timesteps(text: str) -> tuple[int, ...]:
    """``999,500,3``, or a JSON file that holds such a list under the key ``timesteps``."""
    if not text.endswith(".json"):
        return tuple(int(_number(int, part)) for part in _split(text))
    try:
        content = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{text} cannot be read as JSON ({error}).") from None
    if isinstance(content, dict) and "timesteps" not in content:
        content = content.get("protocol")  # a run.json of ours keeps the list one level down
    found = content.get("timesteps") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(type(t) is int for t in found):
        raise ValueError(f"{text} must hold a list of whole numbers under the key 'timesteps'.")
    levels = FittedLevels(found)
    protocol = content.get("protocol")
    levels.protocol = (
        protocol if isinstance(protocol, dict) and protocol.get("command") == "fit-steps" else {}
    )
    return levels


ModelArgument = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")]
EtaOption = Annotated[float | Literal["sigma-hat"] | None, _spec(_eta, metavar="NUMBER|sigma-hat")]
EtasOption = Annotated[
    tuple[float | Literal["sigma-hat"], ...],
    _spec(lambda text: tuple(map(_eta, _split(text))), metavar="NUMBER|sigma-hat,..."),
]
TimestepsOption = Annotated[tuple[int, ...] | None, _spec(_timesteps, metavar="INT,...|FILE.json")]
