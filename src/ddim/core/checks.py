"""The checks at the doors of public functions: what a value must be, and what is said otherwise.

Numbers, and tables on the CPU, must be finite and in range. Of samples, and of all tensors on a
device, only type, dtype and shape are looked at, since to look at values would wait for the device.
Loops check what they are given once, and their steps check nothing."""

import contextlib
import itertools
import operator
import reprlib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor
from torch.compiler import is_compiling

from ddim.errors import DDIMError

__all__ = [
    "brief",
    "check_alpha_bar",
    "check_choice",
    "check_function",
    "check_kind",
    "check_number",
    "check_one_shape",
    "check_samples",
    "check_shape",
    "check_whole",
    "wrong_argument",
    "shown",
]

_PLAIN = (int, float, complex, str, bytes, np.generic, type(None))
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60
_LARGEST = {float: sys.float_info.max, int: 2**63 - 1}  # what torch's scalars hold


def shown(value: object) -> str:
    """What was received, in a few words: a plain value itself, else what it is."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        kind = "a tensor" if isinstance(value, Tensor) else "a NumPy array"
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{kind} of {dtype}, shape {list(value.shape)}"
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a whole number of more than 60 digits"
    if isinstance(value, (*_PLAIN, Tensor, np.ndarray)) or _is_plain_list(value):
        return _SHORT.repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def brief(x: Tensor) -> str:
    """A tensor in a line: its dtype and shape, the range of its values, and where it lies."""
    span = f", {float(x.min()):.4g} to {float(x.max()):.4g}" if x.numel() else ""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}{span}, {x.device}"


def _is_plain_list(value: object) -> bool:
    if not isinstance(value, (list, tuple, set)):
        return isinstance(value, dict) and not value
    return all(isinstance(v, _PLAIN) or _is_plain_list(v) for v in itertools.islice(value, 10))


def wrong_argument(name: str, wanted: str, value: object, advice: str = "") -> DDIMError:
    """The error of an argument: its name, what it must, what was received, and what to do."""
    return DDIMError(f"{name} must {wanted}; got {shown(value)}{advice and f'. {advice}'}.")


def _plain(value: Any) -> Any:
    """The number in an array, or a tensor, of one; anything else as it is."""
    if isinstance(value, (np.generic, np.ndarray, Tensor)) and np.prod(value.shape) == 1:
        return value.item()
    return value


def _wanted(
    kind: str,
    *,
    least: float | None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> str:
    """What a number within bounds must: "lie in (0, 1]", "be at least 0 and finite"."""
    low, high = above if least is None else least, below if most is None else most
    if low is not None and high is not None:
        left, right = "(["[least is not None], ")]"[most is not None]
        return f"lie in {left}{low}, {high}{right}"
    if low is None:
        return f"be {kind}"
    return f"be {'at least' if above is None else 'above'} {low} and finite"


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    note: str = "",
) -> float:
    """Returns a finite number within bounds, of a number or an array of one; no bool."""
    number = _plain(value)
    if (
        type(number) not in _LARGEST
        or not -_LARGEST[type(number)] <= number <= _LARGEST[type(number)]  # NaN does not
        or not (least is None or number >= least)
        or not (above is None or number > above)
        or not (most is None or number <= most)
        or not (below is None or number < below)
    ):
        wanted = _wanted("a finite number", least=least, above=above, most=most, below=below)
        raise wrong_argument(name, wanted + note, value)
    return number  # type: ignore[no-any-return]


def check_whole(
    name: str,
    value: Any,
    *,
    least: int | None = None,
    most: int | None = None,
    note: str = "",
    advice: str = "",
) -> int:
    """Returns a whole number within bounds as an int, of a number or an array of one; no bool."""
    plain, number = _plain(value), None
    if isinstance(plain, float) and plain.is_integer():
        plain = int(plain)
    if not isinstance(plain, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(plain)
    if (
        number is None
        or not (least is None or number >= least)
        or not (most is None or number <= most)
    ):
        told = "" if least is None else f" of at least {least}"
        told = told if most is None else f" from {least} to {most}"
        raise wrong_argument(name, f"be a whole number{told}{note}", value, advice)
    return number


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuses what is none of a few words."""
    if not isinstance(value, str) or value not in known:
        raise wrong_argument(name, f"be one of {', '.join(known)}", value)


def check_kind(
    name: str, value: Any, kind: type | tuple[type, ...], wanted: str, advice: str = ""
) -> None:
    """Refuses what is no instance of a class."""
    if not isinstance(value, kind):
        raise wrong_argument(name, f"be {wanted}", value, advice)


def check_function(name: str, value: Any, wanted: str, advice: str = "") -> None:
    """Refuses what cannot be called."""
    if not callable(value):
        raise wrong_argument(name, f"be {wanted}", value, advice)


def check_shape(name: str, value: Any) -> tuple[int, ...]:
    """Returns the shape of one image as whole numbers."""
    try:
        sides = tuple(value)
    except TypeError:
        raise wrong_argument(
            name, "be a list of whole numbers, such as (3, 32, 32)", value
        ) from None
    return tuple(check_whole(f"each number of {name}", side, least=0) for side in sides)


def check_samples(**given: Any) -> None:
    """Refuses samples and noise that are no tensors of floating-point numbers."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            advice = "torch.as_tensor(...) makes one of an array"
            raise wrong_argument(name, "be a tensor", value, advice)
        if not value.is_floating_point():
            advice = "Pixels are to be scaled to [-1, 1], and noise is standard normal"
            raise wrong_argument(name, "be a tensor of floating-point numbers", value, advice)


def check_one_shape(**given: Any) -> None:
    """Refuses samples that are no tensors of floating-point numbers of one shape."""
    check_samples(**given)
    shapes = [list(value.shape) for value in given.values()]
    if any(shape != shapes[0] for shape in shapes):
        names = " and ".join(given)
        raise DDIMError(f"{names} must have one shape; got {' and '.join(map(str, shapes))}.")


def check_alpha_bar(**given: Any) -> None:
    """Refuses levels that are no tensors of numbers in [0, 1]; on a device, no tensors of them."""
    for name, value in given.items():
        wanted = "be a floating-point tensor of levels in [0, 1], such as schedule.alpha_bar(t)"
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise wrong_argument(name, wanted, value)
        if value.device.type != "cpu" or is_compiling():
            continue
        outside = value[~((value >= 0) & (value <= 1))]  # or NaN
        if outside.numel():
            raise wrong_argument(name, wanted, float(outside.flatten()[0]))
