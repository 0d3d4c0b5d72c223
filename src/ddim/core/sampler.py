"""The sampling loop: a generator of states, and a function that runs it to the end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddim.core.denoiser import Denoiser, checked
from ddim.core.schedule import CLEAN, NoiseSchedule
from ddim.core.step import Eta, check_eta, check_order, multistep_weight, step_coefficients
from ddim.core.timesteps import Pair, as_pairs
from ddim.errors import DDIMError

__all__ = ["State", "sample", "trajectory"]


class State(NamedTuple):
    """Where a trajectory is after one step; tensors are [B, ...]."""

    x_s: Tensor
    """The sample at the level that was reached."""
    x0: Tensor
    """The clean data that was predicted from the level before."""
    eps: Tensor
    """The noise that was predicted there."""
    t: int
    """The level that the step left."""
    s: int
    """The level that it reached; -1 is clean data."""
    number: int
    """The step's place in the list, from 0."""


def trajectory(
    denoise: Denoiser,
    x_t: Tensor,
    pairs: Sequence[Pair],
    *,
    schedule: NoiseSchedule,
    eta: Eta = 0.0,
    noise: Callable[[], Tensor] | None = None,
    order: int = 1,
    eps_mean_square: Mapping[int, float] | None = None,
    previous: State | None = None,
) -> Iterator[State]:
    """Yields the state after every step; the caller owns progress bars, previews and early
    stopping.

    Autograd records every evaluation, so that sampling can be differentiated through. Where it is
    not, loop under ``torch.no_grad()``: the graph keeps all steps in memory.

    Args:
        denoise: (x_t, t) -> (x0, eps).
        x_t: Where to begin, at the level ``pairs[0][0]``, shape [B, ...]; its dtype is the state's.
            Keep it float32.
        pairs: From :func:`ddim.core.timesteps.step_pairs`; reversed pairs walk the flow the other
            way (eta = 0).
        schedule: The levels.
        eta: 0 deterministic, 1 DDPM, ``"sigma-hat"`` the paper's larger noise.
        noise: Called once a step for z [B, ...] if eta is not 0 or the variance is analytic; never
            called otherwise.
        order: 1 is DDIM. 2 is its multistep, which also looks at the prediction of the step before:
            as many evaluations, a smaller error; eta = 0 only. Its first step, and the step to
            clean data, are DDIM's.
        eps_mean_square: For the analytic variance: the value of each level that a step leaves, from
            :func:`ddim.fitting.timesteps.estimate_eps_mean_square`. It adds the noise that the
            prediction leaves out, at eta = 0 too.
        previous: The last state of a trajectory that these pairs go on with, whose ``x_s`` is x_t.

    Yields:
        One :class:`State` a pair.

    Raises:
        DDIMError: If ``noise`` is missing, if eta or order is invalid, if ``eps_mean_square`` lacks
            a level, if ``pairs`` is not a list of (t, s), or if ``denoise`` does not return a pair.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Eq. 12.
        https://arxiv.org/abs/2010.02502

        Lu et al. DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models.
        2022. Algorithm 2. https://arxiv.org/abs/2211.01095
    """
    denoise, pairs = checked(denoise), as_pairs(pairs)
    check_eta(eta)
    check_order(order, eta=eta, analytic=eps_mean_square is not None)
    random = eta != 0 or eps_mean_square is not None
    if random and noise is None:
        what = f"eta={eta}" if eps_mean_square is None else "the analytic variance"
        raise DDIMError(
            f"{what} draws noise at every step; give noise=..., for example a SeededNoise."
        )
    first = 0 if previous is None else previous.number + 1
    missing = [t for t, _ in pairs if eps_mean_square is not None and t not in eps_mean_square]
    if missing:
        raise DDIMError(
            f"eps_mean_square has no value for level {missing[0]}; estimate it for all levels that "
            "are visited."
        )
    # All coefficients at once, as numbers: looked up step by step they would cost more than the
    # rest of the loop.
    alpha_bar_t, alpha_bar_s = (
        schedule.alpha_bar(torch.tensor([pair[i] for pair in pairs], dtype=torch.int64))
        for i in (0, 1)
    )
    mean_squares = (
        None
        if eps_mean_square is None
        else torch.tensor([eps_mean_square[t] for t, _ in pairs], dtype=torch.float64)
    )
    weights = [
        w.tolist()
        for w in step_coefficients(alpha_bar_t, alpha_bar_s, eta=eta, eps_mean_square=mean_squares)
    ]
    before = alpha_bar_t[:1] if previous is None else schedule.alpha_bar(torch.tensor([previous.t]))
    multistep = multistep_weight(
        torch.cat([before, alpha_bar_t])[: len(pairs)], alpha_bar_t, alpha_bar_s
    ).tolist()
    for number, ((t, s), of_x0, of_eps, of_noise, of_change) in enumerate(
        zip(pairs, *weights, multistep, strict=True)
    ):
        x0, eps = denoise(x_t, t)
        x_t = torch.mul(x0, of_x0).add_(eps, alpha=of_eps)
        if random and noise is not None:
            x_t.add_(noise(), alpha=of_noise)
        if order == 2 and previous is not None and s != CLEAN:
            x_t.add_(x0 - previous.x0, alpha=of_change)
        previous = State(x_t, x0, eps, t, s, number + first)
        yield previous


def sample(
    denoise: Denoiser,
    x_t: Tensor,
    pairs: Sequence[Pair],
    *,
    schedule: NoiseSchedule,
    eta: Eta = 0.0,
    noise: Callable[[], Tensor] | None = None,
    order: int = 1,
    eps_mean_square: Mapping[int, float] | None = None,
) -> Tensor:
    """Runs :func:`trajectory` to its end and returns the last sample [B, ...]; x_t itself if there
    are no pairs.

    Autograd records it all, unless it is called under ``torch.no_grad()``.
    """
    for state in trajectory(
        denoise,
        x_t,
        pairs,
        schedule=schedule,
        eta=eta,
        noise=noise,
        order=order,
        eps_mean_square=eps_mean_square,
    ):
        x_t = state.x_s
    return x_t
