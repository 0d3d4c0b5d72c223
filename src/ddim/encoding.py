r"""Codes: images as latents, and back, by one interface over all encoders.

=============== ==================== ================= ==========================================================
method          states of a code     evaluations       the way back
=============== ==================== ================= ==========================================================
``o-belm``      :math:`x_N, x_{N-1}` N                 exact to rounding; the most accurate of the exact ones
``bdia``        :math:`x_N, x_{N-1}` N                 exact to rounding
``edict``       two copies of x_N    2N                exact to rounding where it does not diverge: many steps
``fixed-point`` :math:`x_N`          3N to 6N          to the tolerance
``ddim``        :math:`x_N`          N                 at a distance of first order in 1/N: the paper's Table 2
=============== ==================== ================= ==========================================================

A code of one state may be decoded with any steps. A pair of states belongs to its steps, its method and its network, and is
refused with others.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ddim.denoiser import Denoiser
from ddim.errors import DDIMError, DivergenceError
from ddim.inversion import encodable_timesteps, encode_explicit, encode_implicit
from ddim.reversible import ReversibleSampler, StatePair, decode_pair, encode_pair
from ddim.sampler import State, trajectory
from ddim.schedule import NoiseSchedule
from ddim.timesteps import step_pairs

__all__ = ["ENCODERS", "Code", "EncodingMethod", "decode", "decode_trajectory", "encode", "fingerprint", "reconstruction_error"]

EncodingMethod = Literal["o-belm", "bdia", "edict", "fixed-point", "ddim"]
ENCODERS: tuple[str, ...] = get_args(EncodingMethod)


@dataclass(frozen=True, eq=False)
class Code:
    """Images in latent space.

    Attributes:
        states: x_N, shape [1, B, ...]; or a pair of states, shape [2, B, ...] (:class:`ddim.reversible.StatePair`).
        method: How it was encoded.
        timesteps: The levels, falling; ``states[0]`` lies at the first.
        evaluations: Network calls an image that encoding took.
        gamma: Of ``bdia``.
        mixing: Of ``edict``.
        residual: Of ``fixed-point``: how far the worst step is from its solution, shape [B]; None for the others.
        labels: Classes of the images, shape [B], int64; None without.
        origin: Fingerprints by name (``network``, ``schedule``, ``dtype``), which a decoder must share; empty: anything goes.
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
            raise DDIMError(f"a code of {self.method} holds {held} state(s), shape [{held}, B, ...]; got {list(self.states.shape)}.")
        if not self.timesteps:
            raise DDIMError("a code must say its timesteps; got none.")

    def __len__(self) -> int:
        return self.states.shape[1]

    def __getitem__(self, chosen: slice) -> "Code":
        """The code of some of the images."""
        residual, labels = (None if value is None else value[chosen] for value in (self.residual, self.labels))
        return replace(self, states=self.states[:, chosen], residual=residual, labels=labels)

    def to(self, device: torch.device | str) -> "Code":
        """The code with its states and labels on a device."""
        return replace(self, states=self.states.to(device), labels=None if self.labels is None else self.labels.to(device))

    @classmethod
    def join(cls, parts: Sequence["Code"]) -> "Code":
        """Codes of one origin and one list of timesteps as one, on the CPU; its ``evaluations`` are the largest of theirs.

        Raises:
            DDIMError: If there are none, or they cannot go together.
        """
        if not parts or any(part._settings() != parts[0]._settings() for part in parts):
            raise DDIMError("codes can be joined if there are some, and all are of one method, one list of timesteps and one model.")
        held = {name: torch.cat([part.tensors()[name] for part in parts], int(name == "states")) for name in parts[0].tensors()}
        most = max(part.evaluations for part in parts)
        return replace(parts[0], states=held["states"], residual=held.get("residual"), labels=held.get("labels"), evaluations=most)

    def _settings(self) -> tuple[object, ...]:
        return (self.method, self.timesteps, self.gamma, self.mixing, dict(self.origin), sorted(self.tensors()))

    @property
    def is_exact(self) -> bool:
        """Whether the method can be run backwards exactly, so that the code is a pair of states."""
        return self.method in ("o-belm", "bdia", "edict")

    @property
    def x_T(self) -> Tensor:
        """The latent at the first level, shape [B, ...]."""
        return self.states[0]

    def rms(self) -> Tensor:
        """Root mean square of each latent's elements, shape [B]: 1 for noise; more where few steps leave structure in it."""
        return self.x_T.flatten(1).double().square().mean(1).sqrt()

    def metadata(self) -> dict[str, str]:
        """What is not a tensor, as safetensors' metadata; :meth:`from_tensors` reads it."""
        plain = {name: getattr(self, name) for name in ("method", "timesteps", "evaluations", "gamma", "mixing")}
        return {"format": "ddim-code", "version": "1", "code": json.dumps(plain | {"origin": dict(self.origin)})}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, on the CPU."""
        held = {"states": self.states, "residual": self.residual, "labels": self.labels}
        return {name: value.detach().cpu().contiguous() for name, value in held.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> "Code":
        """Rebuilds a code.

        Raises:
            DDIMError: If these are not what :meth:`tensors` and :meth:`metadata` gave.
        """
        if not metadata or metadata.get("format") != "ddim-code" or metadata.get("version") != "1" or "states" not in tensors:
            raise DDIMError("the file is no code that `ddim encode` or save_code wrote.")
        try:
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
    """Finds the latents of data.

    Args:
        denoise: (x_t, t) -> (x0, eps), without clipping.
        x0: Data in [-1, 1], shape [B, ...]; the state is float64.
        timesteps: The levels that sampling visits, falling. One without any signal is moved to the level below
            (:func:`ddim.inversion.encodable_timesteps`); ``Code.timesteps`` says which were used.
        schedule: The levels.
        method: See the module's table.
        gamma: Of ``bdia``.
        mixing: Of ``edict``.
        tolerance: Of ``fixed-point``: :func:`ddim.inversion.encode_implicit`.
        max_evaluations: Of ``fixed-point``, for one step.
        labels: To be kept in the code.
        origin: To be kept in the code.

    Returns:
        The code.

    Raises:
        DDIMError: If the method is unknown.
        DivergenceError: If what it found is not finite.
    """
    if method not in ENCODERS:
        raise DDIMError(f"method must be one of {', '.join(ENCODERS)}; got {method!r}.")
    levels, x0, residual = encodable_timesteps(schedule, timesteps), x0.double(), None
    if method == "ddim" or method == "fixed-point":
        found = (
            encode_explicit(denoise, x0, levels, schedule=schedule)
            if method == "ddim"
            else encode_implicit(denoise, x0, levels, schedule=schedule, tolerance=tolerance, max_evaluations=max_evaluations)
        )
        states, evaluations, residual = found.x_T.unsqueeze(0), found.evaluations, found.residual
    else:
        sampler = ReversibleSampler(method, gamma, mixing)
        states = torch.stack(encode_pair(denoise, x0, levels, schedule=schedule, sampler=sampler))
        evaluations = sampler.evaluations_per_step * len(levels)
    if not bool(torch.isfinite(states).all()):
        raise DivergenceError(
            f"the code became NaN or infinite: {method} diverged at {len(levels)} steps; use more steps, or method o-belm."
        )
    return Code(states, method, tuple(levels), evaluations, gamma, mixing, residual, labels, origin or {})


def decode_trajectory(
    denoise: Denoiser,
    code: Code,
    *,
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | None = None,
    origin: Mapping[str, str] | None = None,
) -> Iterator[State]:
    """Samples from a code, yielding the state after every step; the state is float64.

    Args:
        denoise: (x_t, t) -> (x0, eps), without clipping.
        code: From :func:`encode`.
        schedule: The levels.
        timesteps: Other levels than the code's, for a code of one state: from its first level, or as near to it as may be.
        origin: Fingerprints of this decoder; they must be the code's.

    Returns:
        An iterator of states; the last one's ``x_s`` is the data.

    Raises:
        DDIMError: If a pair of states is to be decoded with other steps, or another network or schedule than made it.
    """
    for name, value in (origin or {}).items():
        if code.origin.get(name, value) != value:
            raise DDIMError(
                f"the code was made with another {name} ({code.origin[name]} there, {value} here); "
                "decode it with the model that encoded it."
            )
    levels = code.timesteps if timesteps is None else tuple(encodable_timesteps(schedule, timesteps))
    if not code.is_exact:
        return trajectory(denoise, code.x_T.double(), step_pairs(levels), schedule=schedule)
    if levels != code.timesteps:
        raise DDIMError(
            f"a code of {code.method} is a pair of states of its own {len(code.timesteps)} steps, and cannot be decoded with "
            f"{len(levels)} others; leave the steps out, or encode with method fixed-point or ddim."
        )
    pair = StatePair(code.states[0].double(), code.states[1].double())
    return decode_pair(denoise, pair, levels, schedule=schedule, sampler=ReversibleSampler(code.method, code.gamma, code.mixing))  # type: ignore[arg-type]


def decode(
    denoise: Denoiser,
    code: Code,
    *,
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | None = None,
    origin: Mapping[str, str] | None = None,
) -> Tensor:
    """Runs :func:`decode_trajectory` to its end: the data, [B, ...], float64, not clamped. Arguments and errors as there."""
    x = code.states[-1].double()  # what the two-step methods' pair of a single step holds already
    for state in decode_trajectory(denoise, code, schedule=schedule, timesteps=timesteps, origin=origin):
        x = state.x_s
    return x


def reconstruction_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error per dimension of each image, pixels in [0, 1]: the measure of the paper's Table 2.

    Args:
        images: In [-1, 1], shape [B, ...]; clamped to it.
        reconstructions: The same.

    Returns:
        Shape [B], float64.

    Raises:
        DDIMError: If the shapes differ.
    """
    if images.shape != reconstructions.shape:
        raise DDIMError(f"images and reconstructions must have one shape; got {list(images.shape)} and {list(reconstructions.shape)}.")
    difference = images.double().clamp(-1, 1) - reconstructions.double().clamp(-1, 1)
    return (difference / 2).flatten(1).square().mean(1)


def fingerprint(value: nn.Module | Tensor) -> str:
    """First 16 hex digits of the SHA-256 over the bytes of a module's parameters and their names, or of one tensor."""
    digest = hashlib.sha256()
    for name, tensor in value.state_dict().items() if isinstance(value, nn.Module) else (("", value),):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
