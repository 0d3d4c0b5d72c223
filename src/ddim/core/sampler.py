"""The sampling loop: a generator of states, and a function that runs it to the end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddim.core.checks import brief, check_function, check_kind, check_one_shape, check_samples
from ddim.core.denoiser import Denoiser, checked
from ddim.core.route import Route, make_route
from ddim.core.schedule import NoiseSchedule
from ddim.core.step import Eta
from ddim.core.timesteps import Pair
from ddim.errors import DDIMError, DivergenceError

__all__ = ["State", "sample", "trajectory", "walk"]


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

    def __repr__(self) -> str:
        step = f"step {self.number} from level {self.t} to {self.s}"
        return f"State({step}, x_s: {brief(self.x_s)}; x0: {brief(self.x0)})"


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
    """Yields the state after every step; the caller owns progress bars, previews and stopping.

    Autograd records every evaluation, and keeps all steps in memory: loop under ``torch.no_grad()``
    unless you differentiate through sampling.

    Args:
        denoise: (x_t, t) -> (x0, eps).
        x_t: Where to begin, at the level ``pairs[0][0]``, shape [B, ...]; its dtype, which is
            the state's, should be float32.
        pairs: From :func:`ddim.core.timesteps.step_pairs`; reversed ones invert (eta = 0).
        schedule: The levels.
        eta: See :data:`ddim.core.step.Eta`.
        noise: Called once a step for z [B, ...] if eta is not 0 or the variance is analytic; never
            called otherwise.
        order: 1 is DDIM. 2 is its multistep (:func:`ddim.core.step.multistep_weight`), for eta = 0:
            a smaller error at the same cost. Its first and its last step are DDIM's.
        eps_mean_square: For the analytic variance: the value of each level that a step leaves, from
            :func:`ddim.fitting.timesteps.estimate_eps_mean_square`. It adds noise at eta = 0 too.
        previous: The last state of a trajectory that these pairs continue; its ``x_s`` is x_t.

    Raises:
        DDIMError: If ``noise`` is missing, if eta or order is invalid, if ``eps_mean_square`` lacks
            a level, if ``pairs`` is not a list of (t, s), if x_t or ``noise`` is of another kind,
            or if ``denoise`` is of another schedule or does not return a pair.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Eq. 12.
        https://arxiv.org/abs/2010.02502
    """
    if previous is not None:
        check_kind("previous", previous, State, "the last State of a trajectory")
    before = None if previous is None else previous.t
    route = make_route(
        schedule, pairs, eta=eta, order=order, eps_mean_square=eps_mean_square, before=before
    )
    yield from walk(denoise, x_t, route, noise=noise, previous=previous)


def walk(
    denoise: Denoiser,
    x_t: Tensor,
    route: Route,
    *,
    noise: Callable[[], Tensor] | None = None,
    previous: State | None = None,
) -> Iterator[State]:
    """Walks a route, as :func:`trajectory` does; a DDIMError also says if the analytic variance was
    not measured."""
    check_samples(x_t=x_t)
    _check_start(denoise, route.schedule, noise)
    denoise = checked(denoise)
    if route.analytic and route.eps_mean_square is None:
        raise DDIMError("the analytic variance of this route was not measured; see Route.measured.")
    if route.is_random and noise is None:
        what = "the analytic variance" if route.analytic else f"eta={route.eta}"
        raise DDIMError(f"{what} draws noise at every step; give noise=..., such as a SeededNoise.")
    first = 0 if previous is None else previous.number + 1
    # As numbers: looked up step by step they would cost more than the rest of the loop.
    steps = zip(route.pairs, route.weights.rows(), route.multistep.tolist(), strict=True)
    for number, ((t, s), step, weight) in enumerate(steps):
        x0, eps = denoise(x_t, t)
        z = noise() if noise is not None and route.is_random else None
        if z is not None and number == 0:
            check_one_shape(noise=z, x_t=x_t)
        x_t = step.apply(x0, eps, z)
        if weight != 0 and previous is not None:
            x_t.add_(x0 - previous.x0, alpha=weight)
        previous = State(x_t, x0, eps, t, s, first + number)
        yield previous


def _check_start(denoise: Any, schedule: NoiseSchedule, noise: object) -> None:
    """Refuses noise that is no source of it, and a denoiser of another schedule."""
    if noise is not None:
        check_function("noise", noise, "a function that draws z for a step, such as a SeededNoise")
    own = getattr(denoise, "schedule", None)
    if own is None or own is schedule or not isinstance(own, NoiseSchedule):
        return
    if not torch.equal(own.alphas_cumprod, schedule.alphas_cumprod):
        raise DDIMError(
            f"the denoiser has another noise schedule ({_levels(own)}) than the walk "
            f"({_levels(schedule)}); give both the schedule that the network was trained on."
        )


def _levels(schedule: NoiseSchedule) -> str:
    return f"{len(schedule)} levels, the last alpha_bar {float(schedule.alphas_cumprod[-1]):.4g}"


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
    are no pairs. Autograd records it all, unless it runs under ``torch.no_grad()``. A
    DivergenceError refuses a result that is NaN or infinite."""
    route = make_route(schedule, pairs, eta=eta, order=order, eps_mean_square=eps_mean_square)
    for state in walk(denoise, x_t, route, noise=noise):
        x_t = state.x_s
    if not bool(torch.isfinite(x_t).all()):
        why = "look whether the network, its schedule and its prediction_type belong together"
        raise DivergenceError(f"the walk ended in NaN or infinity; {why}.")
    return x_t
