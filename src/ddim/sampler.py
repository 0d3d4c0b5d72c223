"""The sampling loop: a generator of states, and a function that runs it to the end."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ddim.denoiser import Denoiser
from ddim.errors import DDIMError
from ddim.schedule import NoiseSchedule
from ddim.step import Eta, check_eta, ddim_step
from ddim.timesteps import Pair

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
) -> Iterator[State]:
    """Yields the state after every step; the caller owns progress bars, previews and early stopping.

    Args:
        denoise: (x_t, t) -> (x0, eps).
        x_t: Where to begin, at the level ``pairs[0][0]``, shape [B, ...]; its dtype is the state's. Keep it float32.
        pairs: From :func:`ddim.timesteps.step_pairs`; reversed pairs walk the flow the other way (eta = 0).
        schedule: The levels.
        eta: 0 deterministic, 1 DDPM, ``"sigma-hat"`` the paper's larger noise.
        noise: Called once a step for z [B, ...] where eta is not 0; never called otherwise.

    Yields:
        One :class:`State` a pair.

    Raises:
        DDIMError: If eta is not 0 and there is no noise, or eta is invalid.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Eq. 12. https://arxiv.org/abs/2010.02502
    """
    check_eta(eta)
    if eta != 0 and noise is None:
        raise DDIMError(f"eta={eta} draws noise at every step; give noise=..., for example a SeededNoise.")
    for number, (t, s) in enumerate(pairs):
        x0, eps = denoise(x_t, t)
        x_t = ddim_step(
            x0,
            eps,
            alpha_bar_t=schedule.alpha_bar(t),
            alpha_bar_s=schedule.alpha_bar(s),
            eta=eta,
            noise=noise() if eta != 0 and noise is not None else None,
        )
        yield State(x_t, x0, eps, t, s, number)


def sample(
    denoise: Denoiser,
    x_t: Tensor,
    pairs: Sequence[Pair],
    *,
    schedule: NoiseSchedule,
    eta: Eta = 0.0,
    noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Runs :func:`trajectory` to its end and returns the last sample [B, ...]; x_t itself if there are no pairs."""
    for state in trajectory(denoise, x_t, pairs, schedule=schedule, eta=eta, noise=noise):
        x_t = state.x_s
    return x_t
