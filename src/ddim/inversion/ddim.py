r"""From data to noise: the walk of the DDIM's own ODE, explicit and implicit.

With eps held fixed, a step between two levels is

.. math:: x_t = \frac{\alpha_t}{\alpha_s} x_s
    + \Big(\sigma_t - \frac{\alpha_t \sigma_s}{\alpha_s}\Big)\,\epsilon,

in either direction. The explicit encoder takes eps at the state it leaves, :math:`\epsilon(x_s,
s)`, while sampling will take it at the state it reaches, and so comes back to somewhere else, at a
distance of first order in 1/N. The implicit encoder solves for the :math:`x_t` from which sampling
does step back to :math:`x_s`.

Its iteration is accelerated by Anderson's method, each sample by itself, and a sample stops when
its own residual is below the tolerance, so that samples do not influence each other. It starts from
eps of the step before, which costs nothing. Next to the data a denoiser's x0 hardly depends on what
lies across the data, so that the step out of the clean level is close to singular: it takes dozens
of evaluations, for a tolerance fifty times as large, since no later step enlarges its error. An
error next to the noise may be enlarged a thousandfold on the way back; those steps are smooth, and
take three to five evaluations.

Clean data is no level that a network knows: there it is called at level 0.

References:
    Pan et al. Effective Real Image Editing with Accelerated Iterative Diffusion Inversion. 2023.
    https://arxiv.org/abs/2309.04907

    Garibi et al. ReNoise: Real Image Inversion Through Iterative Noising. 2024.
    https://arxiv.org/abs/2403.14602

    Walker, Ni. Anderson Acceleration for Fixed-Point Iterations. 2011.
    https://doi.org/10.1137/10078356X
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.core.checks import brief, check_number, check_samples, check_whole
from ddim.core.denoiser import Denoiser, at_clean, checked
from ddim.core.sampler import sample
from ddim.core.schedule import NoiseSchedule, check_schedule
from ddim.core.step import linear_step
from ddim.core.timesteps import as_levels, reverse_pairs, step_pairs
from ddim.errors import DDIMError, DivergenceError

__all__ = [
    "ConvergenceWarning",
    "collect_unsolved",
    "Encoding",
    "encodable_timesteps",
    "encode_explicit",
    "encode_implicit",
]


_FIRST = 50.0  # times the tolerance, for the step out of the clean level
_PATIENCE = 4.0  # an iterate that many times as bad as the best is given up


class ConvergenceWarning(UserWarning):
    """An implicit step was not solved to the tolerance that was asked for."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """What an encoder found.

    Attributes:
        x_T: The latent, shape [B, ...].
        evaluations: Network calls an image.
        residual: The largest distance (root mean square over elements) by which a sampling step
            from a state that was found misses the state before, shape [B]; None for the explicit
            encoder, which checks nothing.
    """

    x_T: Tensor
    evaluations: int
    residual: Tensor | None = None

    def __repr__(self) -> str:
        worst = "" if self.residual is None else f", residual {brief(self.residual)}"
        return f"Encoding({brief(self.x_T)}, {self.evaluations} evaluations{worst})"


def encodable_timesteps(schedule: NoiseSchedule, timesteps: Sequence[int]) -> list[int]:
    """The same levels, those without any signal moved to the level below: no encoder can put an
    image where a sample is noise alone.

    Args:
        schedule: The levels.
        timesteps: Falling, as :func:`ddim.core.timesteps.select_timesteps` gives them.

    Returns:
        Falling levels with alpha_bar above 0; as many, unless the level below was in the list.

    Raises:
        DDIMError: If nothing is left, or these are no levels of the schedule.
    """
    check_schedule(schedule)
    levels = as_levels(timesteps)
    while levels and float(schedule.alpha_bar(levels[0])) == 0:
        lower = levels[0] - 1
        levels = ([] if lower < 0 or lower in levels else [lower]) + levels[1:]
    if not levels:
        raise DDIMError(
            f"an encoder needs a level whose SNR is above 0; got timesteps {list(timesteps)}."
        )
    return levels


def encode_explicit(
    denoise: Denoiser, x0: Tensor, timesteps: Sequence[int], *, schedule: NoiseSchedule
) -> Encoding:
    """The paper's encoder: Euler's method backwards, with eps at the less noisy state, evaluated
    once a step. Autograd records it all, unless it is called under ``torch.no_grad()``.

    Args:
        denoise: (x_t, t) -> (x0, eps), without clipping.
        x0: Data, shape [B, ...]. Keep the state float32 or float64.
        timesteps: The levels that sampling visits, falling; alpha_bar above 0
            (:func:`encodable_timesteps`).
        schedule: The levels.

    Returns:
        The latent at ``timesteps[0]``.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Sec. 4.3 and 5.4.
        https://arxiv.org/abs/2010.02502
    """
    check_schedule(schedule)
    check_samples(x0=x0)
    pairs = reverse_pairs(step_pairs(timesteps))
    return Encoding(sample(at_clean(denoise, schedule), x0, pairs, schedule=schedule), len(pairs))


def encode_implicit(
    denoise: Denoiser,
    x0: Tensor,
    timesteps: Sequence[int],
    *,
    schedule: NoiseSchedule,
    tolerance: float = 1e-5,
    max_evaluations: int = 60,
    depth: int = 2,
) -> Encoding:
    r"""Solves each step for the state from which sampling comes back: :math:`x_t = F(x_t)` with eps
    at :math:`(x_t, t)`. Autograd records it all, unless it is called under ``torch.no_grad()``.

    Args:
        denoise: (x_t, t) -> (x0, eps), without clipping.
        x0: Data, shape [B, ...].
        timesteps: Falling; alpha_bar above 0 (:func:`encodable_timesteps`).
        schedule: The levels.
        tolerance: Largest residual (root mean square over elements) of a step, above 0; fifty times
            that for the first.
        max_evaluations: For one step, at least 1.
        depth: Earlier iterates that the acceleration combines; 0 is plain iteration.

    Returns:
        The latent, the evaluations of the slowest sample at each step, and the residuals.

    Raises:
        DDIMError: If an option is out of range.
        DivergenceError: If a residual is not finite.

    Warns:
        ConvergenceWarning: If a step was not solved; the best iterate was taken.
    """
    check_number("tolerance", tolerance, above=0)
    max_evaluations = check_whole("max_evaluations", max_evaluations, least=1)
    depth = check_whole("depth", depth, least=0)
    check_schedule(schedule)
    check_samples(x0=x0)
    denoise, x, total = checked(denoise), x0, 0
    eps: Tensor | None = None
    worst = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    for number, (s, t) in enumerate(reverse_pairs(step_pairs(timesteps))):
        wanted = tolerance if number else _FIRST * tolerance
        up = linear_step("epsilon", schedule.alpha_bar(s), schedule.alpha_bar(t))
        grow, add = float(up.x), float(up.output)
        if eps is None:
            eps = denoise(x, t).eps
            total += 1
        # A residual of x_t is 1/grow times as large where sampling lands.
        limits = (1 / grow, wanted, max_evaluations, depth)
        x, eps, residual, used = _solve_step(denoise, grow * x, eps, t, add, *limits)
        total += used
        worst = torch.maximum(worst, residual)
        _check_solved(residual, wanted, t, used)
    return Encoding(x, total, worst)


def _check_solved(residual: Tensor, wanted: float, t: int, used: int) -> None:
    """Refuses a step whose residuals [B] are not finite, and warns of one that was not solved."""
    largest = float(residual.detach().max()) if len(residual) else 0.0
    if not math.isfinite(largest):
        raise DivergenceError(
            f"the implicit encoder diverged at t={t}: the network's prediction became NaN or "
            "infinite; use float32, or method o-belm."
        )
    if largest > wanted:
        warnings.warn(
            f"The implicit step to t={t} was solved to {largest:.1e}, not to {wanted:.1e}, in "
            f"{used} evaluations; use more steps or evaluations, or method o-belm.",
            ConvergenceWarning,
            stacklevel=3,
        )


def _solve_step(
    denoise: Denoiser,
    base: Tensor,
    eps: Tensor,
    t: int,
    add: float,
    scale: float,
    tolerance: float,
    max_evaluations: int,
    depth: int,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Solves y = base + add eps(y, t), and returns (y, its eps, residual [B], evaluations)."""

    def shaped(row: Tensor) -> Tensor:
        return row.reshape(-1, *[1] * (base.ndim - 1))

    y = base + add * eps
    best, best_eps, best_image = y, eps, y
    lowest = torch.full((len(y),), float("inf"), dtype=torch.float64, device=y.device)
    # Of each iterate: itself, its image, and in which samples they still count.
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    for used in range(1, max_evaluations + 1):
        eps = denoise(y, t).eps
        image = base + add * eps
        residual = scale * (image - y).flatten(1).double().square().mean(1).sqrt()
        take = (residual < lowest) & (lowest > tolerance)  # a solved sample keeps what it has
        best, best_eps, best_image = (
            torch.where(shaped(take), new, old)
            for new, old in ((y, best), (eps, best_eps), (image, best_image))
        )
        lowest = torch.where(take, residual, lowest)
        if bool((lowest <= tolerance).all()) or not bool(torch.isfinite(lowest).all()):
            return best, best_eps, lowest, used
        # An accelerated residual need not fall at each step. Where it is far above the lowest (or
        # NaN), the sample forgets its history and takes a plain step from the best.
        sound = residual <= _PATIENCE * lowest
        history = [(a, b, valid & sound) for a, b, valid in history[-depth:]] if depth else []
        proposal = _anderson(history, y, image) if history else image
        history.append((y, image, sound))
        y = torch.where(shaped(sound), proposal, best_image)
    return best, best_eps, lowest, max_evaluations


def _anderson(history: list[tuple[Tensor, Tensor, Tensor]], y: Tensor, image: Tensor) -> Tensor:
    """The combination of images whose residuals cancel best, in the least-squares sense, for each
    sample; type II of Walker and Ni."""
    residual = (image - y).flatten(1).double()
    changes, moves = [], []
    for earlier, earlier_image, valid in history:
        keep = valid.double().unsqueeze(1)
        changes.append(keep * (residual - (earlier_image - earlier).flatten(1).double()))
        moves.append(keep * (image - earlier_image).flatten(1).double())
    change, move = torch.stack(changes, 2), torch.stack(moves, 2)  # [B, d, depth]
    gram = change.transpose(1, 2) @ change
    # A ridge far below the residuals' own rounding keeps parallel columns, and the empty ones of a
    # forgotten history, solvable.
    ridge = 1e-12 * gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    unit = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    gram = gram + ridge[:, None, None] * unit
    weights: Tensor = torch.linalg.solve(gram, change.transpose(1, 2) @ residual.unsqueeze(2))
    combined: Tensor = image.flatten(1).double() - (move @ weights).squeeze(2)
    return combined.reshape(y.shape).to(y.dtype)


@contextlib.contextmanager
def collect_unsolved() -> Iterator[list[str]]:
    """Collects the warnings of implicit encoders about steps that they could not solve."""
    unsolved: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        yield unsolved
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            unsolved.append(str(warning.message))
        else:
            place = warning.filename, warning.lineno
            warnings.warn_explicit(warning.message, warning.category, *place)
