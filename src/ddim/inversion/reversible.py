r"""Samplers that can be run backwards exactly: O-BELM, BDIA and EDICT.

Notation: the levels of a trajectory are counted away from the data, i = 0 (clean) to N (noise),
with :math:`x_i = \alpha_i x_0 + \sigma_i \epsilon` and :math:`\epsilon_i = \epsilon(x_i, t_i)`.
O-BELM and BDIA are two-step methods,

.. math:: x_{i-1} = p_i\,x_{i+1} + q_i\,x_i + r_i\,\epsilon_i,

which are solved for :math:`x_{i+1}` just as well: the same eps, at the same state, either way. What
encodes an image is therefore a pair of neighbouring states. EDICT couples two copies of one state
instead, and pays two evaluations a step.

All hold without clipping and at eta = 0, and to rounding: keep the states in float64, and let the
network have its own dtype. At a level without signal (zero SNR) BDIA alone can be turned round; see
:func:`ddim.inversion.ddim.encodable_timesteps`."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ddim.core.checks import (
    brief,
    check_kind,
    check_number,
    check_one_shape,
    check_samples,
    shown,
    wrong_argument,
)
from ddim.core.denoiser import Denoiser, at_clean, checked
from ddim.core.prediction import Denoised
from ddim.core.sampler import State
from ddim.core.schedule import CLEAN, NoiseSchedule, check_schedule
from ddim.core.step import ddim_step, linear_step
from ddim.core.timesteps import check_timesteps
from ddim.errors import DDIMError

__all__ = [
    "REVERSIBLE",
    "DriftWarning",
    "Reversible",
    "ReversibleSampler",
    "StatePair",
    "bdia_coefficients",
    "check_start",
    "decode_pair",
    "encode_pair",
    "o_belm_coefficients",
    "reversible_trajectory",
]

Reversible = Literal["o-belm", "bdia", "edict"]
REVERSIBLE: tuple[str, ...] = get_args(Reversible)
"""The samplers of this module, by name."""


_APART = 0.5  # how far EDICT's copies may end from each other: a quarter of the range of pixels


class DriftWarning(UserWarning):
    """The two copies of one sample that EDICT carries have drifted apart."""


class StatePair(NamedTuple):
    """What a reversible sampler carries: :math:`(x_N, x_{N-1})`, or EDICT's two copies of
    :math:`x_N`; each [B, ...]."""

    x: Tensor
    partner: Tensor

    def __repr__(self) -> str:
        return f"StatePair({brief(self.x)}; {brief(self.partner)})"


class TwoStep(NamedTuple):
    """(p, q, r) of the module's equation for i = 1..N-1, float64 [N-1] each."""

    p: Tensor
    q: Tensor
    r: Tensor


@dataclass(frozen=True)
class ReversibleSampler:
    """Which method, and its constant.

    Attributes:
        method: One of :data:`REVERSIBLE`.
        gamma: For BDIA, in (0, 1]: how much of the step before is taken back. 1 is the most stable;
            its authors edit with 0.96. Running backwards divides by it, so that small values
            diverge.
        mixing: For EDICT, in (0, 1): how far the two copies are kept together; its authors take
            0.93.
    """

    method: Reversible = "o-belm"
    gamma: float = 1.0
    mixing: float = 0.93

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in REVERSIBLE:
            raise DDIMError(
                f"the method of a reversible sampler is one of {', '.join(REVERSIBLE)}; got "
                f"{shown(self.method)}."
            )
        check_number("gamma of BDIA", self.gamma, above=0, most=1)
        check_number("mixing of EDICT", self.mixing, above=0, below=1)

    @property
    def evaluations_per_step(self) -> int:
        """Network calls of a step."""
        return 2 if self.method == "edict" else 1

    def evaluations(self, schedule: NoiseSchedule, timesteps: Sequence[int]) -> int:
        """Network calls an image of :func:`reversible_trajectory` over these levels."""
        return self.evaluations_per_step * (len(_path(schedule, timesteps).levels) - 1)


def o_belm_coefficients(alpha_bar: Tensor) -> TwoStep:
    r"""The two-step method of lowest local error: O-BELM.

    With :math:`h_i = \sigma_i / \alpha_i - \sigma_{i-1} / \alpha_{i-1}` and :math:`\rho = h_i /
    h_{i+1}`, its authors write :math:`p = \rho^2 \alpha_{i-1} / \alpha_{i+1}`, :math:`q = (1 -
    \rho^2)\,\alpha_{i-1} / \alpha_i` and :math:`r = -h_i (1 + \rho)\,\alpha_{i-1}`. Here h is
    expressed by :math:`\Delta_i = \sigma_i \alpha_{i-1} - \sigma_{i-1} \alpha_i = h_i \alpha_i
    \alpha_{i-1}`, so that nothing is infinite where alpha_N = 0: there p is 0, and the step is
    DDIM's.

    Args:
        alpha_bar: Levels 0..N, falling, shape [N+1], float64; above 0 but for the last.

    References:
        Wang et al. BELM: Bidirectional Explicit Linear Multi-step Sampler for Exact Inversion in
        Diffusion Models. 2024. https://arxiv.org/abs/2410.07273
    """
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    delta = sigma[1:] * alpha[:-1] - sigma[:-1] * alpha[1:]
    lower, here, upper = alpha[:-2], alpha[1:-1], alpha[2:]
    quotient = delta[:-1] / delta[1:]
    rho = quotient * upper / lower
    p, q = quotient**2 * upper / lower, (1 - rho**2) * lower / here
    return TwoStep(p, q, -(1 + rho) * delta[:-1] / here)


def bdia_coefficients(alpha_bar: Tensor, gamma: float = 1.0) -> TwoStep:
    r"""Bi-directional integration: the step down, and gamma times the step up taken back.

    .. math:: x_{i-1} = \gamma x_{i+1} + (1 - \gamma) x_i - \gamma\,D(i \to i+1) + D(i \to i-1)

    with :math:`D(i \to j)` the change that a DDIM step from i to j makes.

    Args:
        alpha_bar: Levels 0..N, falling, shape [N+1], float64; above 0 but for the last.
        gamma: In (0, 1].

    References:
        Zhang, Lewis, Kleijn. Exact Diffusion Inversion via Bi-directional Integration
        Approximation. 2024. https://arxiv.org/abs/2307.10829
    """
    here = alpha_bar[1:-1]
    down, up = (linear_step("epsilon", here, there) for there in (alpha_bar[:-2], alpha_bar[2:]))
    p = torch.full_like(here, gamma)
    return TwoStep(p, down.x - gamma * up.x, down.output - gamma * up.output)


class _Path(NamedTuple):
    levels: list[int]  # CLEAN, then the timesteps, rising
    alpha_bar: Tensor  # of each, [N+1] float64


def _path(schedule: NoiseSchedule, timesteps: Sequence[int]) -> _Path:
    check_schedule(schedule)
    rising = check_timesteps(timesteps, len(schedule))[::-1]
    alpha_bar = schedule.alpha_bar(torch.tensor([CLEAN, *rising]))
    # Where clean data is level 0 itself (set_alpha_to_one is off), there is no step between them.
    if alpha_bar[0] == alpha_bar[1]:
        rising, alpha_bar = rising[1:], alpha_bar[1:]
    if not rising:
        raise DDIMError(
            "a reversible sampler needs a level above that of clean data; got timesteps [0]."
        )
    return _Path([CLEAN, *rising], alpha_bar)


def _rows(places: Sequence[int], steps: TwoStep) -> list[tuple[int, float, float, float]]:
    """(place, p, q, r) of each step, as numbers."""
    return list(zip(places, *map(Tensor.tolist, steps), strict=True))


def _two_step(sampler: ReversibleSampler, alpha_bar: Tensor) -> TwoStep:
    if sampler.method == "o-belm":
        return o_belm_coefficients(alpha_bar)
    return bdia_coefficients(alpha_bar, sampler.gamma)


def reversible_trajectory(
    denoise: Denoiser,
    x_T: Tensor,
    timesteps: Sequence[int],
    *,
    schedule: NoiseSchedule,
    sampler: ReversibleSampler = ReversibleSampler(),
) -> Iterator[State]:
    """Samples: from one latent to data, yielding the state after every step. Two-step methods begin
    with a step of DDIM; EDICT with two equal copies. Autograd records it all, unless it is looped
    over under ``torch.no_grad()``.

    Args:
        denoise: (x_t, t) -> (x0, eps), without clipping.
        x_T: Shape [B, ...]; its dtype is the state's.
        timesteps: Falling, in [0, T).
        schedule: The levels.
        sampler: The method.

    Returns:
        An iterator of one :class:`~ddim.core.sampler.State` a step.

    Raises:
        DDIMError: As ``check_start``, before anything is evaluated.
    """
    check_samples(x_T=x_T)
    check_start(schedule, timesteps, sampler)
    denoise, path = checked(denoise), _path(schedule, timesteps)
    if sampler.method == "edict":
        return _edict_down(denoise, StatePair(x_T, x_T), path, sampler.mixing)
    return _two_step_from_noise(denoise, x_T, path, _two_step(sampler, path.alpha_bar))


def check_start(
    schedule: NoiseSchedule, timesteps: Sequence[int], sampler: ReversibleSampler
) -> None:
    """Refuses levels that this sampler cannot start from, with a DDIMError: invalid ones, and zero
    SNR for EDICT, whose steps divide by 0 there."""
    check_kind("sampler", sampler, ReversibleSampler, "a ReversibleSampler")
    path = _path(schedule, timesteps)
    if sampler.method == "edict" and path.alpha_bar[-1] == 0:
        raise DDIMError(
            f"edict cannot start at t={path.levels[-1]}, where the SNR is 0; start a level lower, "
            "or use o-belm or bdia."
        )


def encode_pair(
    denoise: Denoiser,
    x0: Tensor,
    timesteps: Sequence[int],
    *,
    schedule: NoiseSchedule,
    sampler: ReversibleSampler = ReversibleSampler(),
) -> StatePair:
    """Runs a sampler backwards: from data to the pair of states that :func:`decode_pair` brings
    back exactly.

    Two-step methods begin with an explicit step out of the clean level; what it guesses is part of
    the code, so the round trip is exact whatever the guess. N evaluations, or 2N with EDICT.
    Autograd records it all, unless it is called under ``torch.no_grad()``.

    Args:
        denoise: (x_t, t) -> (x0, eps), without clipping.
        x0: Data, shape [B, ...]; its dtype is the state's: float64.
        timesteps: The levels that sampling visits, falling; alpha_bar above 0
            (:func:`ddim.inversion.ddim.encodable_timesteps`).
        schedule: The levels.
        sampler: The method.

    Returns:
        The pair, each [B, ...].

    Raises:
        DDIMError: If a level has no signal, where nothing but BDIA can be turned round.
    """
    check_samples(x0=x0)
    denoise, path = checked(denoise), _path(schedule, timesteps)
    _refuse_zero_snr(path, sampler)
    if sampler.method == "edict":
        return _edict_up(denoise, x0, path, sampler.mixing)
    levels, alpha_bar = path
    below, first = x0, at_clean(denoise, schedule)(x0, CLEAN)
    x = ddim_step(*first, alpha_bar_t=alpha_bar[0], alpha_bar_s=alpha_bar[1])
    for level, p, q, r in _rows(levels[1:-1], _two_step(sampler, alpha_bar)):
        below, x = x, (below - q * x - r * denoise(x, level).eps) / p
    return StatePair(x, below)


def decode_pair(
    denoise: Denoiser,
    pair: StatePair,
    timesteps: Sequence[int],
    *,
    schedule: NoiseSchedule,
    sampler: ReversibleSampler = ReversibleSampler(),
) -> Iterator[State]:
    """Samples from a pair of states: the way back of :func:`encode_pair`, with the same arguments
    and errors. Autograd records it all, unless it is looped over under ``torch.no_grad()``.

    Returns:
        An iterator of one :class:`~ddim.core.sampler.State` a step: N - 1 for the two-step methods,
        whose pair holds the result of the first.
    """
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise wrong_argument("pair", "be a StatePair, which encode_pair gives", pair)
    check_one_shape(pair=pair[0], partner=pair[1])
    denoise, path = checked(denoise), _path(schedule, timesteps)
    _refuse_zero_snr(path, sampler)
    if sampler.method == "edict":
        return _edict_down(denoise, pair, path, sampler.mixing)
    return _two_step_down(denoise, pair, path, _two_step(sampler, path.alpha_bar))


def _refuse_zero_snr(path: _Path, sampler: ReversibleSampler) -> None:
    check_kind("sampler", sampler, ReversibleSampler, "a ReversibleSampler")
    if sampler.method != "bdia" and path.alpha_bar[-1] == 0:
        raise DDIMError(
            f"{sampler.method} cannot be run backwards from t={path.levels[-1]}, where the SNR is "
            "0 and a sample holds no signal; start lower (encodable_timesteps), or use bdia."
        )


def _two_step_from_noise(
    denoise: Denoiser, x_T: Tensor, path: _Path, coefficients: TwoStep
) -> Iterator[State]:
    t, s = path.levels[-1], path.levels[-2]
    x0, eps = denoise(x_T, t)
    x = ddim_step(x0, eps, alpha_bar_t=path.alpha_bar[-1], alpha_bar_s=path.alpha_bar[-2])
    yield State(x, x0, eps, t, s, 0)
    yield from _two_step_down(denoise, StatePair(x_T, x), path, coefficients)


def _two_step_down(
    denoise: Denoiser, pair: StatePair, path: _Path, coefficients: TwoStep
) -> Iterator[State]:
    above, x = pair
    count = len(path.levels) - 1
    for i, p, q, r in reversed(_rows(range(1, count), coefficients)):
        x0, eps = denoise(x, path.levels[i])
        above, x = x, p * above + q * x + r * eps
        yield State(x, x0, eps, path.levels[i], path.levels[i - 1], count - i)


def _edict_steps(path: _Path) -> list[tuple[int, int, float, float]]:
    """(t, s, a, b) of each step from i to i-1, i rising: x_s = a x_t + b eps; alpha_bar above 0."""
    steps, levels = linear_step("epsilon", path.alpha_bar[1:], path.alpha_bar[:-1]), path.levels
    return list(zip(levels[1:], levels[:-1], steps.x.tolist(), steps.output.tolist(), strict=True))


def _edict_down(denoise: Denoiser, pair: StatePair, path: _Path, p: float) -> Iterator[State]:
    r"""Coupled steps, then a mixing of the copies: x <- p x + (1 - p) y, y <- p y + (1 - p) x.

    Each copy steps with eps at the other. Where a step is long the copies drift apart, faster than
    mixing brings them together.

    References:
        Wallace, Gokul, Naik. EDICT: Exact Diffusion Inversion via Coupled Transformations. 2023.
        https://arxiv.org/abs/2211.12446
    """
    x, y = pair
    for number, (t, s, a, b) in enumerate(reversed(_edict_steps(path))):
        x = a * x + b * denoise(y, t).eps
        found: Denoised = denoise(x, t)
        y = a * y + b * found.eps
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
        yield State(x, found.x0, found.eps, t, s, number)
    apart = float((x - y).detach().flatten(1).square().mean(1).sqrt().max()) if len(x) else 0.0
    if apart > _APART:
        warnings.warn(
            f"EDICT's two copies of an image ended {apart:.1e} apart (pixels in [-1, 1]), so "
            "neither is right; sample with more steps, decode a code of fewer, or use o-belm.",
            DriftWarning,
            stacklevel=2,
        )


def _edict_up(denoise: Denoiser, x0: Tensor, path: _Path, p: float) -> StatePair:
    """The same, undone in the opposite order; undoing the mixing enlarges a difference of the
    copies by 1/p^2 a step."""
    x = y = x0
    for t, _, a, b in _edict_steps(path):
        y = (y - (1 - p) * x) / p
        x = (x - (1 - p) * y) / p
        y = (y - b * denoise(x, t).eps) / a
        x = (x - b * denoise(y, t).eps) / a
    return StatePair(x, y)
