r"""Images to codes and back, by one interface over all encoders.

=============== ==================== ========= =================================================
method          states of a code     calls     the way back
=============== ==================== ========= =================================================
``o-belm``      :math:`x_N, x_{N-1}` N         exact to rounding; the most accurate exact method,
                                               but no noise at zero terminal SNR (RMS of 5 to 100)
``bdia``        :math:`x_N, x_{N-1}` N         exact to rounding, at zero terminal SNR too
``edict``       two copies of x_N    2N        exact in the same batches, up to about 200 steps, and
                                               diverges beyond
``fixed-point`` :math:`x_N`          3N to 6N  exact to the tolerance
``ddim``        :math:`x_N`          N         an error of first order in 1/N: the paper's Table 2
=============== ==================== ========= =================================================

A code whose root mean square is far from 1 is no noise, and a pipeline's ``encode`` says so by one
:class:`ddim.inversion.codes.CodeWarning`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ddim.core.checks import check_number, check_one_shape, check_samples, check_whole
from ddim.core.denoiser import Denoiser, checked
from ddim.core.prediction import Denoised
from ddim.core.sampler import State, trajectory
from ddim.core.schedule import NoiseSchedule, check_schedule
from ddim.core.timesteps import step_pairs
from ddim.errors import DivergenceError
from ddim.inversion.codes import (
    Code,
    EncodingMethod,
    check_code,
    check_method,
    check_origin,
    decoding_timesteps,
    default_method,
)
from ddim.inversion.ddim import encodable_timesteps, encode_explicit, encode_implicit
from ddim.inversion.reversible import (
    Reversible,
    ReversibleSampler,
    StatePair,
    decode_pair,
    encode_pair,
)

__all__ = ["Encoder", "decode", "decode_trajectory", "encode", "reconstruction_error"]

_ROUNDING = 1e-6  # what the rounding of a code may do to the data, of a range of 2
_ADVICE = {
    "bdia": "use gamma 1, or method o-belm",
    "edict": "use fewer steps, a mixing nearer to 1, or method o-belm",
}
_SOUND = "look whether network, schedule and data belong together"  # the advice of the others


@dataclass(frozen=True)
class Encoder:
    """A method of the module's table, and its options.

    Attributes:
        method: Its name.
        gamma: For ``bdia`` (:class:`ddim.inversion.reversible.ReversibleSampler`).
        mixing: For ``edict``, likewise.
        tolerance: For ``fixed-point`` (:func:`ddim.inversion.ddim.encode_implicit`).
        max_evaluations: For ``fixed-point``, for one step.

    Raises:
        DDIMError: If the method is unknown, or an option out of range.
    """

    method: EncodingMethod = "o-belm"
    gamma: float = 1.0
    mixing: float = 0.93
    tolerance: float = 1e-5
    max_evaluations: int = 60

    def __post_init__(self) -> None:
        check_method(self.method)
        ReversibleSampler(gamma=self.gamma, mixing=self.mixing)  # checks both
        check_number("tolerance", self.tolerance, above=0)
        check_whole("max_evaluations", self.max_evaluations, least=1)

    def encode(
        self,
        denoise: Denoiser,
        x0: Tensor,
        timesteps: Sequence[int],
        *,
        schedule: NoiseSchedule,
        labels: Tensor | None = None,
        origin: Mapping[str, str] | None = None,
    ) -> Code:
        """Finds the latents of data; arguments and errors are those of :func:`encode`."""
        check_samples(x0=x0)
        denoise = checked(denoise)
        levels, x0, residual = encodable_timesteps(schedule, timesteps), x0.double(), None
        evaluations = 0

        def counted(x_t: Tensor, t: int | Tensor) -> Denoised:
            nonlocal evaluations
            evaluations += 1
            return denoise(x_t, t)

        if self.method == "ddim":
            states = encode_explicit(counted, x0, levels, schedule=schedule).x_T.unsqueeze(0)
        elif self.method == "fixed-point":
            solve = partial(
                encode_implicit, tolerance=self.tolerance, max_evaluations=self.max_evaluations
            )
            found = solve(counted, x0, levels, schedule=schedule)
            states, residual = found.x_T.unsqueeze(0), found.residual
        else:
            sampler = ReversibleSampler(self.method, self.gamma, self.mixing)
            pair = encode_pair(counted, x0, levels, schedule=schedule, sampler=sampler)
            states = torch.stack(pair)
        largest = float(states.detach().abs().max()) if states.numel() else 0.0
        if not largest * torch.finfo(torch.float64).eps < _ROUNDING:  # or NaN
            raise DivergenceError(
                f"the code grew to {largest:.1e}, where noise is of order 1: {self.method} "
                f"diverged at {len(levels)} steps; {_ADVICE.get(self.method, _SOUND)}."
            )
        how = (self.method, tuple(levels), evaluations, self.gamma, self.mixing)
        return Code(states, *how, residual, labels, {} if origin is None else origin)


def encode(
    denoise: Denoiser,
    x0: Tensor,
    timesteps: Sequence[int],
    *,
    schedule: NoiseSchedule,
    method: EncodingMethod | None = None,
    gamma: float = 1.0,
    mixing: float = 0.93,
    tolerance: float = 1e-5,
    max_evaluations: int = 60,
    labels: Tensor | None = None,
    origin: Mapping[str, str] | None = None,
) -> Code:
    r"""Finds the latents of data: walks the DDIM's ODE from data to noise,

    .. math:: \frac{d\bar x}{ds} = \epsilon(x, t),
        \qquad \bar x = x / \alpha_t, \quad s = \sigma_t / \alpha_t,

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
        method: See :class:`Encoder`, and so for its options. Default: ``o-belm``; ``bdia`` at zero
            terminal SNR (:func:`ddim.inversion.codes.default_method`).
        gamma: For ``bdia``.
        mixing: For ``edict``.
        tolerance: For ``fixed-point``.
        max_evaluations: For ``fixed-point``.
        labels: To be kept in the code.
        origin: To be kept in the code.

    Returns:
        The code.

    Raises:
        DDIMError: If the method is unknown, an option out of range, or an argument of another kind.
        DivergenceError: If the code is not finite, or too large for float64 to bring the data back.
    """
    check_schedule(schedule)
    method = default_method(schedule) if method is None else method
    encoder = Encoder(method, gamma, mixing, tolerance, max_evaluations)
    return encoder.encode(denoise, x0, timesteps, schedule=schedule, labels=labels, origin=origin)


def decode_trajectory(
    denoise: Denoiser,
    code: Code,
    *,
    schedule: NoiseSchedule,
    timesteps: Sequence[int] | None = None,
    origin: Mapping[str, str] | None = None,
) -> Iterator[State]:
    """Samples from a code, yielding the state after every step; the state is float64. Autograd
    records it all, unless it is looped over under ``torch.no_grad()``.

    Args:
        denoise: (x_t, t) -> (x0, eps), without clipping.
        code: From :func:`encode`.
        schedule: The levels.
        timesteps: Other levels than the code's, for a code of one state
            (:func:`ddim.inversion.codes.decoding_timesteps`).
        origin: Fingerprints of this decoder; they must be the code's.

    Returns:
        An iterator of states; the last one's ``x_s`` is the data.

    Raises:
        DDIMError: If the levels or the origin are not the code's, before anything is evaluated.
    """
    check_code(code)
    check_origin(code, {} if origin is None else origin)
    levels = decoding_timesteps(code, timesteps, schedule=schedule)
    if not code.is_exact:
        return trajectory(denoise, code.x_T.double(), step_pairs(levels), schedule=schedule)
    pair = StatePair(*code.states.double())
    sampler = ReversibleSampler(cast(Reversible, code.method), code.gamma, code.mixing)
    return decode_pair(denoise, pair, levels, schedule=schedule, sampler=sampler)


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

    Runs :func:`decode_trajectory`, with its arguments and errors, to the end. Autograd records it
    all, unless it is called under ``torch.no_grad()``.

    Returns:
        The data, [B, ...], float64, not clamped.
    """
    states = decode_trajectory(denoise, code, schedule=schedule, timesteps=timesteps, origin=origin)
    x = code.states[-1].double()  # what the two-step methods' pair of a single step holds already
    for state in states:
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
        DDIMError: If these are no floating-point tensors of one shape.
    """
    check_one_shape(images=images, reconstructions=reconstructions)
    difference = images.double().clamp(-1, 1) - reconstructions.double().clamp(-1, 1)
    return (difference / 2).flatten(1).square().mean(1)
