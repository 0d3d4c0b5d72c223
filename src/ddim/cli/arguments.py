"""Words on the command line to a request, through tyro: comma-separated lists, and errors of one
sentence."""

import contextlib
import dataclasses
import difflib
import functools
import io
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructTypeInfo,
)

from ddim.cli.streams import plain_where_asked
from ddim.errors import DDIMError
from ddim.options import check_request, declarations, option_names, primitive
from ddim.runs.values import read_number, split_list

__all__ = ["completion", "option_of", "parse"]

R = TypeVar("R")


def parse(kind: type[R], *, name: str, arguments: list[str], default: R | None = None) -> R:
    """Reads the arguments of ``ddim NAME`` into a request, and checks it.

    Raises:
        DDIMError: One sentence, if they are not right, or an option that was given has no effect.
        SystemExit: With code 0, after ``--help``.
    """
    errors = io.StringIO()
    asks_for_help = any(a in ("-h", "--help") for a in arguments)
    options: dict[str, Any] = {} if default is None else {"default": default}
    width = contextlib.nullcontext() if asks_for_help else _unwrapped()
    try:
        with contextlib.redirect_stderr(errors), plain_where_asked(), width:
            parsed: R = tyro.cli(kind, prog=f"ddim {name}", args=arguments, **options, **_reading())
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro mentions a missing argument first, although a mistyped option may have taken it.
        unknown = _unknown_option(kind, name, arguments)
        raise DDIMError(unknown or _one_sentence(errors.getvalue(), name)) from None
    given = [option_of(argument) for argument in arguments if argument.startswith("--")]
    declared = {field.option: name for name, field in declarations(kind).items()}
    for option in given:
        is_list = isinstance(getattr(parsed, declared[option]), list)
        if given.count(option) > 1 and not is_list:
            raise DDIMError(f"{option} is given {given.count(option)} times; give it once.")
    check_request(parsed, {declared[option] for option in given})
    return parsed


def option_of(argument: str) -> str:
    """The option that a word of the command line names, as it is declared."""
    return argument.partition("=")[0].replace("_", "-")


def completion(requests: Mapping[str, type], *, shell: str) -> str:
    """The script with which a shell completes the commands and their options.

    Raises:
        DDIMError: If there is none for that shell.
    """
    if shell not in (shells := ("bash", "zsh", "fish")):
        raise DDIMError(f"--completion must be one of {', '.join(shells)}; got {shell!r}.")
    named = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in requests.items()]
    commands: Any = functools.reduce(operator.or_, named)
    script, asked = io.StringIO(), ["--tyro-print-completion", shell]
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(commands, prog="ddim", args=asked, **_reading())
    return script.getvalue()


def _reading() -> dict[str, Any]:
    """How tyro reads requests."""
    return {"registry": _registry(), "config": (tyro.conf.FlagCreatePairsOff,)}


def _unknown_option(kind: type, name: str, arguments: Sequence[str]) -> str | None:
    """The sentence about the first option that the command does not have; None if it has all."""
    known = option_names(kind)
    for argument in arguments:
        option = option_of(argument)
        if option.startswith("--") and len(option) > 2 and option not in known:
            near = difflib.get_close_matches(option, known, 1, cutoff=0.75)
            hint = f"did you mean {near[0]}?" if near else _see(name)
            return f"there is no option {option}; {hint}"
    return None


def _see(name: str) -> str:
    return f"`ddim {name} --help` lists the options."


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Keeps tyro from breaking the lines of its messages, which would split the values in them."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "4096"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _one_sentence(box: str, name: str) -> str:
    """The message of one of tyro's boxes, as a sentence."""
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
        pattern = r"--[a-z][\w-]*|[A-Z][A-Z_]+(?=$| \()"
        needed = [match[0] for line in blocks[1] if (match := re.match(pattern, line))]
        return f"{' and '.join(needed)} must be given; {see}"
    if match := re.match(r"Missing value for argument '([^']*)'", words):
        return f"{match[1]} needs a value; {see}"
    pattern = r"invalid choice '(.*)' for argument '([^']*)'. Expected one of \((.*)\)"
    if match := re.match(pattern, words):
        choices = [c for c in re.findall(r"'([^']*)'", match[3]) if c != "None"]
        return f"{match[2]} must be one of {', '.join(choices)}; got {match[1]!r}."
    if match := re.match(r"Error parsing (\S+): (.*)", words):
        # A request that refuses its own fields names them itself, after tyro's name of its class.
        return f"{match[1]}: {match[2]}" if match[1].startswith("-") else match[2]
    return words or see


def _registry() -> ConstructorRegistry:
    registry, is_asking = ConstructorRegistry(), False
    untold: Any = tyro.conf.arg(help_behavior_hint="")

    @registry.struct_rule
    def helps(info: StructTypeInfo) -> Any:
        """Leaves the default out of an option's help where it is None, since the help then says in
        words what happens; and breaks lines where the terminal ends, not where the code does."""
        nonlocal is_asking
        if is_asking or not dataclasses.is_dataclass(info.type):
            return None
        is_asking = True  # tyro's own rule is asked; this one is among those that it tries
        spec: Any = ConstructorRegistry.get_struct_spec(info)
        is_asking = False

        def told(field: Any) -> Any:
            text = field.helptext() if callable(field.helptext) else field.helptext
            kind = Annotated[field.type, untold] if field.default is None else field.type
            return dataclasses.replace(field, type=kind, helptext=" ".join((text or "").split()))

        return dataclasses.replace(spec, fields=tuple(map(told, spec.fields)))

    convert: dict[Any, Callable[[str], Any]] = {
        int: lambda word: read_number(int, word),
        float: lambda word: read_number(float, word),
        str: str,
    }
    metavars = {int: "INT", float: "NUMBER", str: "NAME"}

    @registry.primitive_rule
    def numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kind: Any = info.type
        return primitive(convert[kind], metavar=metavars[kind]) if kind in (int, float) else None

    @registry.primitive_rule
    def comma_lists(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kinds = get_args(info.type)
        if get_origin(info.type) is not tuple or kinds[1:] != (...,) or kinds[0] not in convert:
            return None
        read, metavar = convert[kinds[0]], f"{metavars[kinds[0]]},..."
        return primitive(lambda word: tuple(map(read, split_list(word))), metavar=metavar)

    @registry.primitive_rule
    def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        """``X | None`` is read as X; leaving the option out is how to say None."""
        kinds = get_args(info.type)
        inner = [kind for kind in kinds if kind is not NoneType]
        if get_origin(info.type) not in (Union, UnionType) or len(inner) != 1 or len(kinds) != 2:
            return None
        made = PrimitiveTypeInfo.make(inner[0], info.markers)
        spec: Any = ConstructorRegistry.get_primitive_spec(made)
        if not isinstance(spec, PrimitiveConstructorSpec):
            return None
        return dataclasses.replace(
            spec,
            is_instance=lambda x: x is None or spec.is_instance(x),
            str_from_instance=lambda x: [] if x is None else spec.str_from_instance(x),
        )

    return registry
