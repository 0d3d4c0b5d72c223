"""How an option is declared, once: its type, default and help, its range, and what it needs.

A request is a frozen dataclass whose field docstrings are the help. A field's annotation may carry
what the option takes and needs: ``Annotated[float | None, Range(0, 1), Needs(option="image")]``.

:func:`check_request` holds a request against these declarations before anything is loaded or
written. An option that was given and that nothing read is refused by :meth:`Options.refuse_unread`.
"""

import dataclasses
import math
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import tyro

from ddim.errors import DDIMError

__all__ = ["Choices", "ModelKind", "Needs", "Options", "Range"]
__all__ += ["check_request", "given_options", "option_names"]

ModelKind = Literal["text", "pixels", "classes"]
_KINDS: dict[ModelKind, str] = {
    "text": "text-to-image models",
    "pixels": "models without text",
    "classes": "class-conditional models",
}


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes, both ends included; for a list, each entry. Never NaN."""

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def refusal(self, value: float) -> str:
        """The end of a sentence that refuses a number."""
        low, high = f"{self.low:.0f}", f"{self.high:.0f}"
        if self.high <= 1000 and self.low > -math.inf:
            return f"must be from {low} to {high}; got {value}."
        bound = f"at most {high}" if value > self.high else f"at least {low}"
        return f"must be {bound}; got {value}."


@dataclass(frozen=True)
class Choices:
    """The names that a list takes."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Needs:
    """What an option acts on: another option, perhaps with one value, or a kind of model."""

    option: str | None = None
    value: object = None
    model: ModelKind | None = None


class Declared(NamedTuple):
    """A field of a request, as it is declared; a positional one is given without its name."""

    option: str
    range: Range
    choices: Choices | None
    needs: Needs
    is_positional: bool


@cache
def _declarations(kind: Any) -> dict[str, Declared]:
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        marks = list(_marks(hint))
        spelled = next((mark.name for mark in marks if getattr(mark, "name", None)), name)
        by_type = {type(mark): mark for mark in reversed(marks)}  # the outermost of a type holds
        found[name] = Declared(
            f"--{spelled.replace('_', '-')}",
            by_type.get(Range, Range()),
            by_type.get(Choices),
            by_type.get(Needs, Needs()),
            any(mark is tyro.conf.Positional for mark in marks),
        )
    return found


def _marks(hint: Any) -> Iterator[Any]:
    """What annotates a type, or a part of it such as the ``X`` of ``X | None``."""
    yield from getattr(hint, "__metadata__", ())
    for part in typing.get_args(hint):
        yield from _marks(part)


def option_names(kind: type) -> list[str]:
    """A request's options on the command line, such as ``--batch-size``; none for positional
    fields."""
    return [field.option for field in _declarations(kind).values() if not field.is_positional]


def given_options(request: Any) -> list[str]:
    """The fields of a request that differ from their defaults."""

    def default(field: dataclasses.Field[Any]) -> Any:
        made = field.default_factory
        return field.default if made is dataclasses.MISSING else made()

    fields = dataclasses.fields(request)
    return [field.name for field in fields if getattr(request, field.name) != default(field)]


def check_request(request: Any) -> None:
    """Checks the values of a request's options, and that each has the option that it needs.

    A list that has a default must not be empty.

    Raises:
        DDIMError: Which option, what it must be, and what it is.
    """
    kind: type = type(request)
    declared = _declarations(kind)
    for name, (option, allowed, choices, *_) in declared.items():
        value = getattr(request, name, None)
        for entry in value if isinstance(value, tuple) else (value,):
            is_bounded = allowed != Range() and isinstance(entry, (int, float))
            if is_bounded and entry not in allowed:
                raise DDIMError(f"{option} {allowed.refusal(entry)}")
            if choices is not None and entry not in choices.names:
                names = ", ".join(choices.names)
                raise DDIMError(f"{option} must name some of {names}; got {entry!r}.")
        if value == () and getattr(kind, name, None):
            raise DDIMError(f"{option} must name at least one value.")
    for name in given_options(request):
        option, _, _, needs, _ = declared[name]
        if needs.option is None:
            continue
        value = getattr(request, needs.option)
        if value != needs.value if needs.value is not None else value is None:
            other = declared[needs.option].option
            wanted = other if needs.value is None else f"{other} {needs.value}"
            raise DDIMError(f"{option} acts only with {wanted}; give both, or leave out {option}.")


class Options:
    """A request, read by attribute; what is read acts, and what was given and not read is refused.

    Resolve a request whole before any weight is loaded, then call :meth:`refuse_unread`.

    Args:
        request: A request.
        *always: Options that act whatever the request is about.
    """

    def __init__(self, request: Any, *always: str) -> None:
        self._request = request
        self._read = set(always)

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._request, name)

    def refuse_unread(self, subject: str, kinds: Collection[str] = ()) -> None:
        """Refuses options that were given although nothing read them.

        Args:
            subject: What the request is about, such as the model's name, for the message.
            kinds: The kinds of model that it is.

        Raises:
            DDIMError: Which option, and what it would need.
        """
        kind: type = type(self._request)
        for name in given_options(self._request):
            if name in self._read:
                continue
            option, _, _, needs, _ = _declarations(kind)[name]
            if needs.model is not None and needs.model not in kinds:
                what = _KINDS[needs.model]
                raise DDIMError(f"{option} is for {what}, and {subject} is not one; leave it out.")
            raise DDIMError(f"{option} has no effect on {subject}; leave it out.")
