r"""Codes: images as latents, and back, by one interface over all encoders.

=============== ==================== =================
========================================================== method          states of a code
evaluations       the way back =============== ==================== =================
========================================================== ``o-belm``      :math:`x_N, x_{N-1}` N
exact to rounding; the most accurate of the exact ones ``bdia``        :math:`x_N, x_{N-1}` N
exact to rounding ``edict``       two copies of x_N    2N                exact to rounding up to
about 200 steps, and diverges beyond ``fixed-point`` :math:`x_N`          3N to 6N          to the
tolerance ``ddim``        :math:`x_N`          N                 at a distance of first order in
1/N: the paper's Table 2 =============== ==================== =================
==========================================================

Every code belongs to the network that made it, in its dtype, and is refused by others. A code of
one state may be decoded with any steps, from its own first level; a pair of states belongs to its
own steps too."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from ddim.core.denoiser import Denoiser
from ddim.core.prediction import Denoised
from ddim.core.sampler import State, trajectory
from ddim.core.schedule import NoiseSchedule
from ddim.core.timesteps import check_timesteps, step_pairs
from ddim.errors import DDIMError, DivergenceError
from ddim.inversion.ddim import encodable_timesteps, encode_explicit, encode_implicit
from ddim.inversion.reversible import (
    Reversible,
    ReversibleSampler,
    StatePair,
    decode_pair,
    encode_pair,
)

__all__ = [
    "ENCODERS",
    "Code",
    "EncodingMethod",
    "check_code",
    "check_origin",
    "decode",
    "decode_trajectory",
    "decoding_timesteps",
    "encode",
    "fingerprint",
    "reconstruction_error",
]

EncodingMethod = Literal["o-belm", "bdia", "edict", "fixed-point", "ddim"]
ENCODERS: tuple[str, ...] = get_args(EncodingMethod)

_ROUNDING = 1e-6  # what the rounding of a code may do to the data, of a range of 2
_SOUND = "look whether network, schedule and data belong together"
_ADVICE: dict[str, str] = {
    "o-belm": _SOUND,
    "bdia": "use gamma 1, or method o-belm",
    "edict": "use fewer steps, a mixing nearer to 1, or method o-belm",
    "fixed-point": _SOUND,
    "ddim": _SOUND,
}


@dataclass(frozen=True, eq=False)
class Code:
    """Images in latent space.

    Attributes:
        states: x_N, shape [1, B, ...]; or a pair of states, shape [2, B, ...]
            (:class:`ddim.inversion.reversible.StatePair`).
        method: How it was encoded.
        timesteps: The levels, falling; ``states[0]`` lies at the first.
        evaluations: Network calls an image that encoding took, counted.
        gamma: Of ``bdia``.
        mixing: Of ``edict``.
        residual: Of ``fixed-point``: how far the worst step is from its solution, shape [B]; None
            for the others.
        labels: Classes of the images, shape [B], int64; None without.
        origin: Fingerprints by name (``dtype``, ``network``, ``schedule``), which a decoder must
            share; empty: anything goes.
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

    def __post_init__(self) -> None:
        if self.method not in ENCODERS:
            raise DDIMError(f"method must be one of {', '.join(ENCODERS)}; got {self.method!r}.")
        held = 2 if self.is_exact else 1
        if self.states.ndim < 2 or self.states.shape[0] != held:
            raise DDIMError(
                f"a code of {self.method} holds {held} state(s), shape [{held}, B, ...]; got "
                f"{list(self.states.shape)}."
            )
        if not self.timesteps:
            raise DDIMError("a code must say its timesteps; got none.")

    def __len__(self) -> int:
        return self.states.shape[1]

    def __getitem__(self, chosen: slice) -> "Code":
        """The code of some of the images."""
        residual, labels = (
            None if value is None else value[chosen] for value in (self.residual, self.labels)
        )
        return replace(self, states=self.states[:, chosen], residual=residual, labels=labels)

    def to(self, device: torch.device | str) -> "Code":
        """The code with its states and labels on a device."""
        return replace(
            self,
            states=self.states.to(device),
            labels=None if self.labels is None else self.labels.to(device),
        )

    @classmethod
    def join(cls, parts: Sequence["Code"]) -> "Code":
        """Codes of one origin and one list of timesteps as one, on the CPU; its ``evaluations`` are
        the largest of theirs.

        Raises:
            DDIMError: If there are none, or they cannot go together.
        """
        if not parts or any(part._settings() != parts[0]._settings() for part in parts):
            raise DDIMError(
                "codes can be joined if there are some, and all are of one method, one list of "
                "timesteps and one model."
            )
        held = {
            name: torch.cat([part.tensors()[name] for part in parts], int(name == "states"))
            for name in parts[0].tensors()
        }
        most = max(part.evaluations for part in parts)
        return replace(
            parts[0],
            states=held["states"],
            residual=held.get("residual"),
            labels=held.get("labels"),
            evaluations=most,
        )

    def _settings(self) -> tuple[object, ...]:
        return (
            self.method,
            self.timesteps,
            self.gamma,
            self.mixing,
            dict(self.origin),
            sorted(self.tensors()),
        )

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

    def metadata(self) -> dict[str, str]:
        """What is not a tensor, as safetensors' metadata; :meth:`from_tensors` reads it."""
        plain = {
            name: getattr(self, name)
            for name in ("method", "timesteps", "evaluations", "gamma", "mixing")
        }
        held = {name: fingerprint(value) for name, value in self.tensors().items()}
        return {
            "format": "ddim-code",
            "version": "1",
            "code": json.dumps(plain | {"origin": dict(self.origin)}),
            "tensors": json.dumps(held),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, on the CPU."""
        held = {"states": self.states, "residual": self.residual, "labels": self.labels}
        return {
            name: value.detach().cpu().contiguous()
            for name, value in held.items()
            if value is not None
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
    ) -> "Code":
        """Rebuilds a code.

        Raises:
            DDIMError: If these are not what :meth:`tensors` and :meth:`metadata` gave.
        """
        if (
            not metadata
            or metadata.get("format") != "ddim-code"
            or metadata.get("version") != "1"
            or "states" not in tensors
        ):
            raise DDIMError("the file is no code that `ddim encode` or save_code wrote.")
        try:
            for name, written in json.loads(metadata["tensors"]).items():
                if name not in tensors or fingerprint(tensors[name]) != written:
                    raise DDIMError(
                        f"the code is damaged: its {name} are not those that were written; encode "
                        "the images again."
                    )
            plain = json.loads(metadata["code"])
            plain["timesteps"] = tuple(int(t) for t in plain["timesteps"])
            residual, labels = tensors.get("residual"), tensors.get("labels")
            return cls(states=tensors["states"], residual=residual, labels=labels, **plain)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DDIMError):
                raise
            raise DDIMError(f"the code's metadata is damaged ({error}).") from error


def encode(
    denoise: Denoiser,
    x0: Tensor,
    timesteps: Sequence[int],
    *,
    schedule: NoiseSchedule,
    method: EncodingMethod = "o-belm",
    gamma: float = 1.0,
    mixing: float = 0.93,
    tolerance: float = 1e-5,
    max_evaluations: int = 60,
    labels: Tensor | None = None,
    origin: Mapping[str, str] | None = None,
) -> Code:
    r"""Finds the latents of data: walks the DDIM's ODE from data to noise,

    .. math:: \frac{d\bar x}{ds} = \epsilon(x, t), \qquad \bar x = x / \alpha_t, \quad s = \sigma_t / \alpha_t,

    by the method's own steps, which are written down in :mod:`ddim.inversion.ddim` and
    :mod:`ddim.inversion.reversible`. Autograd records it all, unless it is called under
    ``torch.no_grad()``.

    Args:
        denoise: (x_t, t) -> (x0, eps), without clipping.
        x0: Data in [-1, 1], shape [B, ...]; the state is float64.
        timesteps: The levels that sampling visits, falling. One without any signal is moved to the
            level below (:func:`ddim.inversion.ddim.encodable_timesteps`); ``Code.timesteps`` says
            which were used.
        schedule: The levels.
        method: See the module's table.
        gamma: Of ``bdia``.
        mixing: Of ``edict``.
        tolerance: Of ``fixed-point``: :func:`ddim.inversion.ddim.encode_implicit`.
        max_evaluations: Of ``fixed-point``, for one step.
        labels: To be kept in the code.
        origin: To be kept in the code.

    Returns:
        The code.

    Raises:
        DDIMError: If the method is unknown.
        DivergenceError: If what it found is not finite, or so large that float64 cannot bring the
            data back.
    """
    if method not in ENCODERS:
        raise DDIMError(f"method must be one of {', '.join(ENCODERS)}; got {method!r}.")
    levels, x0, residual = encodable_timesteps(schedule, timesteps), x0.double(), None
    evaluations = 0

    def counted(x_t: Tensor, t: int | Tensor) -> Denoised:
        nonlocal evaluations
        evaluations += 1
        return denoise(x_t, t)

    if method == "ddim" or method == "fixed-point":
        found = (
            encode_explicit(counted, x0, levels, schedule=schedule)
            if method == "ddim"
            else encode_implicit(
                counted,
                x0,
                levels,
                schedule=schedule,
                tolerance=tolerance,
                max_evaluations=max_evaluations,
            )
        )
        states, residual = found.x_T.unsqueeze(0), found.residual
    else:
        sampler = ReversibleSampler(method, gamma, mixing)
        states = torch.stack(encode_pair(counted, x0, levels, schedule=schedule, sampler=sampler))
    largest = float(states.detach().abs().max()) if states.numel() else 0.0
    if not largest * torch.finfo(torch.float64).eps < _ROUNDING:  # or NaN
        raise DivergenceError(
            f"the code grew to {largest:.1e}, where noise is of order 1: {method} diverged at "
            f"{len(levels)} steps; {_ADVICE[method]}."
        )
    return Code(
        states, method, tuple(levels), evaluations, gamma, mixing, residual, labels, origin or {}
    )


def decode_trajectory(
    denoise: Denoiser,
    code: Code,
    *,
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | None = None,
    origin: Mapping[str, str] | None = None,
) -> Iterator[State]:
    """Samples from a code, yielding the state after every step; the state is float64.

    Autograd records it all, unless it is looped over under ``torch.no_grad()``.

    Args:
        denoise: (x_t, t) -> (x0, eps), without clipping.
        code: From :func:`encode`.
        schedule: The levels.
        timesteps: Other levels than the code's, for a code of one state
            (:func:`decoding_timesteps`).
        origin: Fingerprints of this decoder; they must be the code's.

    Returns:
        An iterator of states; the last one's ``x_s`` is the data.

    Raises:
        DDIMError: As :func:`decoding_timesteps` and :func:`check_origin`, before anything is
            evaluated.
    """
    check_code(code)
    check_origin(code, origin or {})
    levels = decoding_timesteps(code, timesteps, schedule=schedule)
    if not code.is_exact:
        return trajectory(denoise, code.x_T.double(), step_pairs(levels), schedule=schedule)
    pair = StatePair(code.states[0].double(), code.states[1].double())
    return decode_pair(
        denoise,
        pair,
        levels,
        schedule=schedule,
        sampler=ReversibleSampler(cast(Reversible, code.method), code.gamma, code.mixing),
    )


def check_code(code: Any) -> None:
    """Refuses what is no code.

    Raises:
        DDIMError: With what it is.
    """
    if not isinstance(code, Code):
        raise DDIMError(
            "only a Code can be decoded, which encode or load_code gives; got a "
            f"{type(code).__name__}."
        )


def check_origin(code: Code, origin: Mapping[str, str]) -> None:
    """Refuses a decoder that is not the code's own.

    Args:
        code: To be decoded.
        origin: Fingerprints of the decoder; what the code or the decoder does not name may be
            anything.

    Raises:
        DDIMError: If they differ; the message says in what. The dtype goes first, since it changes
            the network's fingerprint too.
    """
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
    """The levels that a code is decoded over.

    A code lies at its own first level, and nowhere else. So that one takes the place of the first
    level that is asked for, and of any other that is not below it.

    Args:
        code: To be decoded.
        timesteps: Falling; None: the code's own.
        schedule: The levels.

    Returns:
        Falling levels from ``code.timesteps[0]``, as many as were asked for where all others are
        below it.

    Raises:
        DDIMError: If the timesteps are invalid, or a pair of states is to be decoded with other
            steps than its own.
    """
    if timesteps is None:
        return code.timesteps
    asked, first = check_timesteps(timesteps, len(schedule)), code.timesteps[0]
    if not code.is_exact:
        return (first, *(t for t in asked[1:] if t < first))
    if tuple(encodable_timesteps(schedule, asked)) != code.timesteps:
        raise DDIMError(
            f"a code of {code.method} is a pair of states of its own {len(code.timesteps)} steps, "
            "and cannot be decoded with "
            f"{len(asked)} others; leave the steps out, or encode with method fixed-point or ddim."
        )
    return code.timesteps


def decode(
    denoise: Denoiser,
    code: Code,
    *,
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | None = None,
    origin: Mapping[str, str] | None = None,
) -> Tensor:
    r"""Brings data back: walks the ODE of :func:`encode` from noise to data, :math:`s = \sigma_t /
    \alpha_t \to 0`.

    Runs :func:`decode_trajectory` to its end; arguments and errors as there.
    Autograd records it all, unless it is called under ``torch.no_grad()``.

    Returns:
        The data, [B, ...], float64, not clamped.
    """
    check_code(code)
    x = code.states[-1].double()  # what the two-step methods' pair of a single step holds already
    for state in decode_trajectory(
        denoise, code, schedule=schedule, timesteps=timesteps, origin=origin
    ):
        x = state.x_s
    return x


def reconstruction_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    r"""Mean squared error per dimension of each image, pixels in [0, 1]: the measure of the paper's
    Table 2.

    .. math:: \frac{1}{d} \Big\lVert \frac{x - y}{2} \Big\rVert^2

    Args:
        images: In [-1, 1], shape [B, ...]; clamped to it.
        reconstructions: The same.

    Returns:
        Shape [B], float64.

    Raises:
        DDIMError: If the shapes differ.
    """
    if images.shape != reconstructions.shape:
        raise DDIMError(
            f"images and reconstructions must have one shape; got {list(images.shape)} and "
            f"{list(reconstructions.shape)}."
        )
    difference = images.double().clamp(-1, 1) - reconstructions.double().clamp(-1, 1)
    return (difference / 2).flatten(1).square().mean(1)


def fingerprint(value: Mapping[str, Tensor] | Tensor) -> str:
    """First 16 hex digits of the SHA-256 over the bytes of tensors and their names, such as a
    ``state_dict()``; or of one tensor."""
    digest = hashlib.sha256()
    for name, tensor in (("", value),) if isinstance(value, Tensor) else value.items():
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]
