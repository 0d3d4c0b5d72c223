"""Codes: latents of images, with what is needed to decode them; their checks, and their files.

A code belongs to the network that made it, in its dtype, and is refused by others. A code of one
state may be decoded with any steps, from its own first level; a pair of states belongs to its own
steps too."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ddim.core.checks import (
    brief,
    check_choice,
    check_kind,
    check_number,
    check_samples,
    check_whole,
    shown,
    wrong_argument,
)
from ddim.core.schedule import NoiseSchedule, check_schedule
from ddim.core.timesteps import as_levels, check_timesteps
from ddim.errors import DDIMError
from ddim.inversion.ddim import encodable_timesteps

__all__ = [
    "ENCODERS",
    "Code",
    "CodeWarning",
    "EncodingMethod",
    "advice_on_rms",
    "check_code",
    "check_method",
    "check_origin",
    "default_method",
    "decoding_timesteps",
    "fingerprint",
    "warn_of_other_batches",
    "warn_of_rms",
]

EncodingMethod = Literal["o-belm", "bdia", "edict", "fixed-point", "ddim"]
ENCODERS: tuple[str, ...] = get_args(EncodingMethod)


_NEAR = (0.25, 3.0)
"""An RMS outside is far from that of noise; a few steps of a sound model stay inside."""


class CodeWarning(UserWarning):
    """A code is no noise, for its root mean square is far from 1; or it is decoded in other batches
    than it was encoded in."""


def default_method(schedule: NoiseSchedule) -> EncodingMethod:
    """The encoder for a schedule where none is named: ``o-belm``; at zero terminal SNR, where its
    last step extrapolates over a gap and its codes are no noise, ``bdia``, also exact."""
    return "bdia" if float(schedule.alphas_cumprod[-1]) == 0 else "o-belm"


def check_method(method: str) -> None:
    """Refuses a word that names no encoder, with a DDIMError that lists those that do."""
    check_choice("method", method, ENCODERS)


@dataclass(frozen=True, eq=False)
class Code:
    """Images in latent space.

    Attributes:
        states: x_N, shape [1, B, ...]; or a pair of states, shape [2, B, ...]
            (:class:`ddim.inversion.reversible.StatePair`).
        method: How it was encoded.
        timesteps: The levels, falling; ``states[0]`` lies at the first.
        evaluations: Network calls an image that encoding took, counted.
        gamma: For ``bdia``.
        mixing: For ``edict``.
        residual: For ``fixed-point``: how far the worst step is from its solution, shape [B]; None
            for the others.
        labels: Classes of the images, shape [B], int64; None without.
        origin: Fingerprints by name (``dtype``, ``network``, ``schedule``, and of a pipeline also
            its other parts), which a decoder must share; empty: anything goes.
        batch_size: How many images a pipeline encoded together; None if it did not. A network may
            round otherwise in other batches, and ``edict`` enlarges that.

    Raises:
        DDIMError: If an attribute is of another kind, or ``states`` of another shape.
    """

    states: Tensor
    method: EncodingMethod
    timesteps: tuple[int, ...]
    evaluations: int
    gamma: float = 1.0
    mixing: float = 0.93
    residual: Tensor | None = None
    labels: Tensor | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_method(self.method)
        check_samples(states=self.states)
        held = 2 if self.is_exact else 1
        if self.states.ndim < 2 or self.states.shape[0] != held:
            raise DDIMError(
                f"a code of {self.method} holds {held} state(s), shape [{held}, B, ...]; got "
                f"{list(self.states.shape)}."
            )
        if not (levels := tuple(as_levels(self.timesteps))):
            raise DDIMError("a code must say its timesteps; got none.")
        object.__setattr__(self, "timesteps", levels)
        check_whole("evaluations", self.evaluations, least=0)
        check_number("gamma", self.gamma)
        check_number("mixing", self.mixing)
        if self.batch_size is not None:
            check_whole("batch_size", self.batch_size, least=1)
        for name in ("residual", "labels"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Tensor) or len(value) != len(self)):
                raise wrong_argument(name, f"be a tensor of {len(self)} numbers, or None", value)
        check_kind("origin", self.origin, Mapping, "fingerprints by name (a dict)")

    def __repr__(self) -> str:
        images = f"{len(self)} image{'s' * (len(self) != 1)}"
        levels = f"{len(self.timesteps)} steps from level {self.timesteps[0]}"
        return f"Code({self.method}, {images}, {levels}, {brief(self.states)})"

    def __len__(self) -> int:
        return self.states.shape[1]

    def __getitem__(self, chosen: int | slice | Sequence[int] | Tensor) -> "Code":
        """The code of some of the images; of one, it keeps the axis of images."""
        if isinstance(chosen, (int, np.integer)) and not isinstance(chosen, bool):
            if not -len(self) <= chosen < len(self):  # IndexError, by which a loop over it ends
                raise IndexError(f"the code holds {len(self)} images; there is no code[{chosen}].")
            chosen = slice(int(chosen) % len(self), int(chosen) % len(self) + 1)
        if not isinstance(chosen, slice):
            chosen = _places(chosen, len(self))
        residual = None if self.residual is None else self.residual[chosen]
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, states=self.states[:, chosen], residual=residual, labels=labels)

    def to(self, device: torch.device | str) -> "Code":
        """The code with its states and labels on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, states=self.states.to(device), labels=labels)

    @classmethod
    def join(cls, parts: Sequence["Code"]) -> "Code":
        """Codes of one origin and one list of timesteps as one, on the CPU; its ``evaluations`` are
        the largest of theirs. A DDIMError if there are none, or they cannot go together."""
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, Code) for p in parts):
            raise wrong_argument("parts", "be a list of Codes", parts)
        if not parts or any(part._settings() != parts[0]._settings() for part in parts):
            raise DDIMError(
                "codes can be joined if there are some, and all are of one method, one list of "
                "timesteps and one model."
            )
        tensors = [part.tensors() for part in parts]
        held: dict[str, Any] = {
            name: torch.cat([part[name] for part in tensors], int(name == "states"))
            for name in tensors[0]
        }
        first: Code = parts[0]
        return replace(first, **held, evaluations=max(part.evaluations for part in parts))

    def _settings(self) -> tuple[object, ...]:
        how = (self.method, self.timesteps, self.gamma, self.mixing, dict(self.origin))
        return *how, self.residual is None, self.labels is None

    @property
    def is_exact(self) -> bool:
        """Whether the method can be run backwards exactly, so that the code is a pair of states."""
        return self.method in ("o-belm", "bdia", "edict")

    @property
    def x_T(self) -> Tensor:
        """The latent at the first level, shape [B, ...]."""
        return self.states[0]

    def rms(self) -> Tensor:
        """Root mean square of each latent's elements, shape [B]: 1 for noise; more where few steps
        leave structure in it."""
        return self.x_T.flatten(1).double().square().mean(1).sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, on the CPU."""
        held = {"states": self.states, "residual": self.residual, "labels": self.labels}
        given = {name: value for name, value in held.items() if value is not None}
        return {name: value.detach().cpu().contiguous() for name, value in given.items()}


def _places(chosen: Any, count: int) -> list[int]:
    """Places of images, of a list or tensor of them, or of one truth value an image."""
    wanted = f"be a place, a slice, or a list of places of {count} images"
    try:
        listed = chosen.tolist() if hasattr(chosen, "tolist") else list(chosen)
        if len(listed) == count and all(isinstance(value, bool) for value in listed):
            return [place for place, is_chosen in enumerate(listed) if is_chosen]
        return [check_whole("chosen", place, least=-count, most=count - 1) for place in listed]
    except (TypeError, DDIMError):
        raise wrong_argument("chosen", wanted, chosen) from None


def advice_on_rms(method: str, low: float, high: float) -> str | None:
    """A sentence for codes whose RMS, from ``low`` to ``high``, is far from 1; None near it."""
    if low >= _NEAR[0] and high <= _NEAR[1]:
        return None
    other = "bdia" if method == "o-belm" else "fixed-point"
    advice = "more steps" if method == other else f"method {other}, or more steps"
    return (
        f"the codes of {method} have a root mean square from {low:.3g} to {high:.3g}, and noise "
        "has 1: they come back as they were made, but paths between them and edits leave what the "
        f"model knows; use {advice}."
    )


def warn_of_rms(code: Code) -> None:
    """Warns, once for all images of a code, if the RMS of one is far from 1."""
    if len(code) == 0:
        return
    rms = code.rms()
    if advice := advice_on_rms(code.method, float(rms.min()), float(rms.max())):
        warnings.warn(advice, CodeWarning, stacklevel=3)


def warn_of_other_batches(code: Code, batch_size: int) -> None:
    """Warns that a code of ``edict`` is decoded in other batches than it was encoded in."""
    if code.method == "edict" and code.batch_size not in (None, batch_size):
        warnings.warn(
            f"the code was encoded in batches of {code.batch_size} and is decoded in batches of "
            f"{batch_size}, in which the network may round otherwise; edict enlarges that, so that "
            "images of few steps may come back some grey levels off. Give the same batch_size and "
            "images, or encode by o-belm.",
            CodeWarning,
            stacklevel=4,
        )


def check_code(code: Any) -> None:
    """Refuses what is no code, with a DDIMError."""
    if not isinstance(code, Code):
        raise DDIMError(
            f"only a Code can be decoded, which encode or load_code gives; got {shown(code)}."
        )


def check_origin(code: Code, origin: Mapping[str, str]) -> None:
    """Refuses a decoder whose fingerprints are not the code's, with a DDIMError; what one of both
    does not name may be anything. The dtype goes first, since it changes the network's too."""
    check_kind("origin", origin, Mapping, "fingerprints by name (a dict)")
    shared = [name for name in origin if name in code.origin]
    for name in sorted(shared, key=lambda name: name != "dtype"):
        there, here = code.origin[name], origin[name]
        if there != here and name == "dtype":
            raise DDIMError(
                f"the code was made by a network in {there}, and this one is in {here}; decode it "
                f"in {there}."
            )
        if there != here:
            raise DDIMError(
                f"the code was made with another {name} ({there} there, {here} here); decode it "
                "with the model that encoded it."
            )


def decoding_timesteps(
    code: Code, timesteps: Sequence[int] | None, *, schedule: NoiseSchedule
) -> tuple[int, ...]:
    """The levels that a code is decoded over: its own first level, where alone it lies, takes the
    place of the first that is asked for, and of any other that is not below it.

    Args:
        code: To be decoded.
        timesteps: Falling. Default: the code's own.
        schedule: The levels.

    Raises:
        DDIMError: If the timesteps are invalid, or not those of a code that is a pair of states.
    """
    check_schedule(schedule)
    if timesteps is None:
        return code.timesteps
    asked, first = check_timesteps(timesteps, len(schedule)), code.timesteps[0]
    if not code.is_exact:
        return (first, *(t for t in asked[1:] if t < first))
    if tuple(encodable_timesteps(schedule, asked)) != code.timesteps:
        raise DDIMError(
            f"a code of {code.method} is a pair of states of its own {len(code.timesteps)} steps, "
            f"and cannot be decoded with {len(asked)} others; leave the steps out, or encode with "
            "method fixed-point or ddim."
        )
    return code.timesteps


def fingerprint(value: Mapping[str, Tensor] | Tensor) -> str:
    """First 16 hex digits of the SHA-256 over the bytes of tensors and their names, such as a
    ``state_dict()``; or of one tensor."""
    digest = hashlib.sha256()
    for name, tensor in (("", value),) if isinstance(value, Tensor) else value.items():
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(name.encode())
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
