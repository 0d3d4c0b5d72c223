"""How an option is declared, once: its type, default and help, its range, and what it needs.

A request is a frozen dataclass whose field docstrings are the help. A field's annotation may carry
what the option takes and needs: ``Annotated[float | None, Range(0, 1), Needs(option="image")]``.
:func:`check_request` holds a request against these declarations before anything is loaded or
written.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from tyro.constructors import PrimitiveConstructorSpec

from ddim.errors import DDIMError

__all__ = ["Blank", "Choices", "Declared", "ModelKind", "Needs", "Range"]
__all__ += ["check_request", "declarations", "given_options", "option_names", "primitive"]
__all__ += ["unmet", "words_of"]

ModelKind = Literal["text", "pixels", "classes"]


@dataclass(frozen=True)
class Range:
    """The finite numbers that an option takes; for a list, each entry.

    Attributes:
        low: The least, or, with ``above``, what all are above.
        high: The greatest, or, with ``below``, what all are below.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        is_above = self.low < value if self.above else self.low <= value
        return is_above and (value < self.high if self.below else value <= self.high)

    def refusal(self, value: float) -> str:
        """The end of a sentence that refuses a number."""
        got = str(value) if len(str(value)) <= 30 else f"a number of {len(str(value))} digits"
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a finite number; got {got}."
        low = f"{'above' if self.above else 'at least'} {_number(self.low)}"
        high = f"{'below' if self.below else 'at most'} {_number(self.high)}"
        if math.isfinite(self.low) and self.high <= 1000:
            ends = f"from {_number(self.low)} to {_number(self.high)}"
            bound = f"{low} and {high}" if self.above or self.below else ends
        else:
            bound = high if value > self.low else low
        return f"must be {bound}; got {got}."


def _number(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:g}"


@dataclass(frozen=True)
class Choices:
    """The names that a list takes."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Blank:
    """Marks a text that may be empty."""


@dataclass(frozen=True)
class Needs:
    """What an option acts on. A need of an option that a request has not is met.

    Attributes:
        option: Another option that must be given or on.
        alternative: One that does as well.
        value: The value that it must have, or a tuple of such values.
        unless: The value that it must not have.
        without: Another option that must not be given.
        model: The kind of model that it is for.
    """

    option: str | None = None
    alternative: str | None = None
    value: object = None
    unless: object = None
    without: str | None = None
    model: ModelKind | None = None

    def refusal(self, option: str, request: Any) -> str | None:
        """The sentence that refuses an option of this name; None where its need is met."""
        declared = declarations(type(request))
        if self.without in declared and getattr(request, self.without):
            other = declared[self.without].option
            return f"{option} has no effect with {other}; leave out one of the two."
        if self.option not in declared:
            return None
        value, other = getattr(request, self.option), declared[self.option].option
        if self.alternative is not None:
            value = value or getattr(request, self.alternative)
            other = f"{other} or {declared[self.alternative].option}"
        if self.unless is not None:
            text = f"{option} has no effect with {other} {self.unless}; leave out one of the two."
            return text if value == self.unless else None
        if self.value is None:
            wanted, is_met = other, bool(value)
        else:
            values = self.value if isinstance(self.value, tuple) else (self.value,)
            *most, last = [str(name) for name in values if name is not None]
            names = f"{', '.join(most)} or {last}" if most else last
            wanted, is_met = f"{other} {names}", value in values
        if is_met:
            return None
        return f"{option} acts only with {wanted}; give both, or leave out {option}."


class Declared(NamedTuple):
    """A field of a request, as it is declared."""

    option: str
    """Its name on the command line; for a positional one, what stands for it in the usage."""
    range: Range
    choices: Choices | None
    needs: tuple[Needs, ...]
    may_be_empty: bool
    is_positional: bool


def declarations(kind: type) -> dict[str, Declared]:
    """What each field of a request declares."""
    return _declarations(kind)


@cache
def _declarations(kind: Any) -> dict[str, Declared]:
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        marks = list(_marks(hint))
        spelled = next((mark.name for mark in marks if getattr(mark, "name", None)), name)
        shown = next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), name)
        # The mark of tyro.conf, whose type is private there.
        is_positional = any(str(mark) == "Positional" for mark in marks)
        by_type = {type(mark): mark for mark in reversed(marks)}  # the outermost of a type holds
        found[name] = Declared(
            shown.strip("[]") if is_positional else f"--{spelled.replace('_', '-')}",
            by_type.get(Range, Range()),
            by_type.get(Choices),
            tuple(mark for mark in marks if isinstance(mark, Needs)),
            Blank in by_type,
            is_positional,
        )
    return found


def _marks(hint: Any) -> Iterator[Any]:
    """What annotates a type, or a part of it such as the ``X`` of ``X | None``."""
    yield from getattr(hint, "__metadata__", ())
    for part in typing.get_args(hint):
        yield from _marks(part)


def primitive(convert: Callable[[str], Any], *, metavar: str) -> PrimitiveConstructorSpec[Any]:
    """How tyro reads one word."""

    def show(value: Any) -> list[str]:
        joined = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return [] if value is None else [joined]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: convert(words[0]),
        is_instance=lambda value: True,
        str_from_instance=show,
    )


def option_names(kind: type) -> list[str]:
    """A request's options on the command line, such as ``--batch-size``; none for positional
    fields."""
    return [field.option for field in declarations(kind).values() if not field.is_positional]


def given_options(request: Any) -> list[str]:
    """The fields of a request that differ from their defaults."""

    def default(field: dataclasses.Field[Any]) -> Any:
        made = field.default_factory
        return field.default if made is dataclasses.MISSING else made()

    fields = dataclasses.fields(request)
    return [field.name for field in fields if getattr(request, field.name) != default(field)]


def words_of(request: Any) -> list[str]:
    """The words that a command line asks for a request with: what is positional, and the options
    that differ from their defaults. Parsing them gives the request back."""
    declared, given = declarations(type(request)), given_options(request)
    words, options = list[str](), list[str]()
    for name, field in declared.items():
        value = getattr(request, name)
        if field.is_positional:
            words += [str(value)]
        elif name in given:
            entries = value if isinstance(value, list) else [value]
            for entry in entries:
                options += _words(field.option, entry)
    return words + options


def _words(option: str, value: Any) -> list[str]:
    if value is True:
        return [option]
    word = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return [f"{option}={word}"] if word.startswith("-") or not word else [option, word]


def unmet(request: Any, names: Collection[str]) -> dict[str, str]:
    """Of these fields those without effect, since another option is missing or in their way; each
    with the sentence that refuses it."""
    declared = declarations(type(request))
    found = {}
    for name in names:
        option, needs = declared[name].option, declared[name].needs
        refusals = (need.refusal(option, request) for need in needs)
        if message := next((text for text in refusals if text is not None), None):
            found[name] = message
    return found


def check_request(request: Any, given: Collection[str] | None = None) -> None:
    """Checks the values of a request's options, and that each has what it needs.

    Numbers are finite and in their range, texts and given lists are not empty.

    Args:
        request: A request.
        given: The fields that were given. Default: those that differ from their defaults.

    Raises:
        DDIMError: Which option, what it must be, and what it is.
    """
    given = given_options(request) if given is None else given
    for name, (option, allowed, choices, _, may_be_empty, _) in declarations(type(request)).items():
        value = getattr(request, name)
        for entry in value if isinstance(value, (tuple, list)) else (value,):
            is_number = isinstance(entry, (int, float)) and not isinstance(entry, bool)
            if is_number and entry not in allowed:
                raise DDIMError(f"{option} {allowed.refusal(entry)}")
            if choices is not None and entry not in choices.names:
                names = ", ".join(choices.names)
                raise DDIMError(f"{option} must name some of {names}; got {entry!r}.")
        if value == () and name in given:
            raise DDIMError(f"{option} must name at least one value.")
        if value == "" and not may_be_empty:
            raise DDIMError(f"{option} must not be empty.")
    for message in unmet(request, given).values():
        raise DDIMError(message)
