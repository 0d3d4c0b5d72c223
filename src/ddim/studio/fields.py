"""From the fields of the page to requests: the same ones that the commands make of their words."""

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from ddim.errors import DDIMError, plural
from ddim.models.images import open_image
from ddim.options import check_request, words_of
from ddim.runs.requests import DoctorRequest, EditRequest, InterpolateRequest, SampleRequest

__all__ = ["AS_CONFIGURED", "Cells", "Subject", "command_line", "doctor_request"]
__all__ += [
    "check_picture",
    "check_seed",
    "edit_request",
    "interpolate_request",
    "read_list",
    "sample_request",
    "solver_cells",
    "step_cells",
]

AS_CONFIGURED = "default"
"""What the model's configuration says."""
MOST_PICTURES = 16
"""Pictures of one drawing."""
MOST_CELLS = 48
"""Pictures of one sheet."""
MOST_STEPS = 1000
MOST_PIXELS = 4096
"""Pixels of a side of a visitor's picture."""
MOST_WORDS = 2000
"""Characters of a prompt."""
SOLVERS: dict[str, dict[str, Any]] = {
    "DDIM": {"order": 1},
    "DDIM, order 2": {"order": 2},
    "DDPM": {"sampler": "ddpm"},
    "O-BELM": {"sampler": "o-belm"},
    "BDIA": {"sampler": "bdia"},
    "EDICT": {"sampler": "edict"},
}
"""The solvers that a sheet compares, and the options that choose them."""


@dataclass(frozen=True)
class Subject:
    """What every tab draws: a model, and what it is told. Empty fields are not given."""

    model: str
    prompt: str = ""
    class_: str = ""
    guidance: float | None = None
    device: str = "auto"

    def options(self) -> dict[str, Any]:
        """The options of a request that say this.

        Raises:
            DDIMError: If the prompt is too long, or would be read as a file.
        """
        prompt = check_prompt(self.prompt)
        class_: int | str | None = self.class_.strip() or None
        if class_ is not None and re.fullmatch(r"\d+", str(class_)):
            class_ = int(class_)
        given: dict[str, Any] = {"prompt": [prompt] if prompt else [], "class_": class_}
        scale = None if self.guidance is None else float(self.guidance)
        return {"model": self.model, "device": self.device, "guidance_scale": scale, **given}

    def shown(self, *, seed: int, count: int) -> dict[str, Any]:
        """The options with which the doctor draws this."""
        given = self.options()
        kept = {name: given[name] for name in ("device", "prompt", "guidance_scale")}
        return {**kept, "seed": seed, "count": count, "show": "doctor.png"}


def check_prompt(prompt: object) -> str:
    """A prompt without spaces at its ends; a command would read one that ends in .txt as a file."""
    words = str(prompt or "").strip()
    if words.endswith(".txt"):
        raise DDIMError("a prompt must not end in .txt, since a command reads a file then.")
    if len(words) > MOST_WORDS:
        raise DDIMError(f"a prompt has at most {MOST_WORDS} characters; got {len(words)}.")
    return words


def whole(name: str, value: object, low: int, high: int) -> int:
    """A whole number from a field; a DDIMError says what it must be."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan  # type: ignore[arg-type]
    if not number.is_integer():
        raise DDIMError(f"{name} must be a whole number; got {str(value)[:40]!r}.")
    if not low <= number <= high:
        raise DDIMError(f"{name} must be from {low} to {high}; got {str(value)[:40]}.")
    return int(number)


def read_list(name: str, words: object, kind: type[int] | type[float]) -> list[Any]:
    """The numbers of a field such as ``5, 10, 20``."""
    parts = [part.strip() for part in str(words or "").split(",") if part.strip()]
    try:
        return list(dict.fromkeys(kind(part) for part in parts[:MOST_CELLS]))
    except ValueError:
        whole_ = "whole " if kind is int else ""
        raise DDIMError(
            f"{name} must be {whole_}numbers, separated by commas; got {str(words)[:40]!r}."
        ) from None


def sample_request(
    subject: Subject,
    *,
    seed: object,
    count: object = 1,
    steps: object = None,
    eta: object = 0,
    order: object = AS_CONFIGURED,
    spacing: object = AS_CONFIGURED,
    **more: Any,
) -> SampleRequest:
    """The request of ``ddim sample`` that these fields make.

    Raises:
        DDIMError: If a field is wrong; the sentence names it.
    """
    number = eta if isinstance(eta, (int, float)) else math.nan
    given: dict[str, Any] = {
        "seed": check_seed(seed),
        "count": whole("the number of pictures", count, 1, MOST_PICTURES),
        "steps": None if steps is None else whole("the number of steps", steps, 1, MOST_STEPS),
        "eta": None if number == 0 else float(number),
        "order": None if order == AS_CONFIGURED else whole("the order", order, 1, 2),
        "spacing": None if spacing == AS_CONFIGURED else spacing,
    }
    request = SampleRequest(**subject.options(), **{**given, **more})
    check_request(request)
    if spacing not in (AS_CONFIGURED, "leading", "linspace", "trailing", "quadratic"):
        raise DDIMError(f"there is no spacing {str(spacing)[:40]!r}.")
    return request


def interpolate_request(
    subject: Subject,
    *,
    seeds: Sequence[object],
    images: Sequence[str | None] = (),
    count: object = 11,
    steps: object = None,
    grid: bool = False,
) -> InterpolateRequest:
    """The request of ``ddim interpolate`` that these fields make; pictures go before seeds.

    Raises:
        DDIMError: If a field is wrong, or only some of the pictures are given.
    """
    pictures = [path for path in images if path]
    needed = 4 if grid else 2
    if pictures and len(pictures) != needed:
        raise DDIMError(
            f"{len(pictures)} of {needed} pictures are given; give all, or none and the seeds."
        )
    options = subject.options()
    if options.pop("prompt"):
        raise DDIMError("a path leads through the latent space of a model without text.")
    options.pop("guidance_scale")
    ends: dict[str, Any] = {"images": tuple(pictures), "resize": True}
    if not pictures:
        ends = {"seeds": tuple(whole("a seed", seed, 0, 2**32 - 1) for seed in seeds[:needed])}
    request = InterpolateRequest(
        **options,
        **ends,
        count=whole("the number of pictures", count, 2, 9 if grid else 31),
        steps=None if steps is None else whole("the number of steps", steps, 1, MOST_STEPS),
        grid=grid,
    )
    check_request(request)
    return request


def edit_request(
    subject: Subject, *, to: object, seed: object, image: str | None, steps: object
) -> EditRequest:
    """The request of ``ddim edit`` that these fields make; a picture goes before the seed."""
    options = subject.options()
    prompt, becomes = options.pop("prompt"), check_prompt(to)
    options.pop("class_")
    if not prompt or not becomes:
        raise DDIMError(
            "an edit needs a text-to-image model, the prompt that describes the picture, and what "
            "it becomes."
        )
    start: dict[str, Any] = {"image": image, "resize": True}
    if image is None:
        start = {"seed": check_seed(seed)}
    asked = whole("the number of steps", steps, 1, MOST_STEPS)
    request = EditRequest(**options, **start, prompt=prompt[0], to=becomes, steps=asked)
    check_request(request)
    return request


def check_seed(seed: object) -> int:
    """A seed from a field."""
    return whole("the seed", seed, 0, 2**32 - 1)


def check_picture(path: str | None) -> None:
    """Refuses a picture that is too large to be read, by its header; a DDIMError says so."""
    if not path:
        return
    try:
        with open_image(path) as picture:
            width, height = picture.size
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise DDIMError("that file is no picture; give a PNG, JPEG or WebP file.") from None
    if max(width, height) > MOST_PIXELS:
        raise DDIMError(
            f"a picture has at most {MOST_PIXELS} pixels a side here; got {width}x{height}."
        )


def doctor_request(source: str, *, steps: object, **more: Any) -> DoctorRequest:
    """The request of ``ddim doctor`` that these fields make; a DDIMError names a wrong one."""
    asked = None if steps is None else whole("the number of steps", steps, 1, MOST_STEPS)
    request = DoctorRequest(source=source, steps=asked, **more)
    check_request(request)
    return request


@dataclass(frozen=True)
class Cells:
    """A sheet: its rows and columns, and the request of each cell."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    requests: dict[tuple[str, str], SampleRequest]


def _cells(title: str, rows: dict[str, Any], columns: dict[str, Any], make: Any) -> Cells:
    if not rows or not columns:
        raise DDIMError("a sheet needs at least one row and one column.")
    if len(rows) * len(columns) > MOST_CELLS:
        raise DDIMError(
            f"a sheet has at most {MOST_CELLS} pictures; these are {len(rows) * len(columns)}."
        )
    requests = {(r, c): make({**rows[r], **columns[c]}) for r in rows for c in columns}
    return Cells(title, tuple(rows), tuple(columns), requests)


def _columns(steps: object) -> dict[str, Any]:
    counts = read_list("the numbers of steps", steps, int)
    return {plural(n, "step"): {"steps": n} for n in counts}


def step_cells(subject: Subject, *, seed: object, steps: object, etas: object) -> Cells:
    """One seed at every eta (rows) and number of steps (columns)."""
    rows = {f"eta {eta:g}": {"eta": eta} for eta in read_list("the etas", etas, float)}
    make = lambda options: sample_request(subject, seed=seed, **options)  # noqa: E731
    return _cells(f"Seed {seed} over steps and eta", rows, _columns(steps), make)


def solver_cells(subject: Subject, *, seed: object, steps: object) -> Cells:
    """One seed by every solver (rows) and number of steps (columns)."""
    make = lambda options: sample_request(subject, seed=seed, **options)  # noqa: E731
    return _cells(f"Seed {seed} by solver", SOLVERS, _columns(steps), make)


def command_line(name: str, request: Any) -> str:
    """The command that makes what a request asks for. Where the studio keeps its own files is left
    out, so that the command takes its default folder."""
    plain = replace(request, out=None) if getattr(request, "out", None) else request
    return shlex.join(["ddim", name, *words_of(plain)])
