r"""Which levels a sampler visits, and in what order.

A list of timesteps runs from noise to data, strictly falling, in [0, T). A step goes from a level
``t`` to the *next element of the list* ``s``, never to ``t - T // N``: a stride that misses the
neighbour leaves the list, and the network is then told another amount of noise than there is."""

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from ddim.core.schedule import CLEAN, whole
from ddim.errors import DDIMError

__all__ = [
    "SPACINGS",
    "Pair",
    "Spacing",
    "as_levels",
    "as_pairs",
    "check_timesteps",
    "reverse_pairs",
    "select_timesteps",
    "step_pairs",
    "truncate_timesteps",
]

Spacing = Literal["leading", "linspace", "trailing", "quadratic"]
SPACINGS: tuple[str, ...] = get_args(Spacing)

Pair = tuple[int, int]
"""(t, s): the level that a step leaves, and the one it reaches."""


def select_timesteps(
    num_train_timesteps: int,
    num_inference_steps: int,
    spacing: Spacing = "trailing",
    *,
    steps_offset: int = 0,
) -> list[int]:
    r"""Chooses N of T levels, falling: exactly N distinct levels in [0, T), for every N in 1..T.

    With i = 0..N-1 and c = (T-1)/(N-1)^2:

    ============= ============================================ =================================
    ``leading``   :math:`i \lfloor T/N \rfloor` + steps_offset starts below T-1 unless N = T
    ``linspace``  round(i (T-1)/(N-1))                         starts at T-1 (N = 1: at 0)
    ``trailing``  round(T - i T/N) - 1                         starts at T-1
    ``quadratic`` :math:`\lfloor c\,i^2 \rfloor`, up to T-1     starts at T-1, dense near data
    ============= ============================================ =================================

    Linspace and trailing round in float64 as NumPy does, because diffusers does and ties depend on
    it. Quadratic moves a level up by one where two would coincide. ``steps_offset`` is for leading
    alone, and is ignored where a level would leave [0, T).

    Raises:
        DDIMError: If N is not an integer in 1..T, or the spacing is unknown.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. App. D.2 (linear, quadratic).
        https://arxiv.org/abs/2010.02502

        Lin et al. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023. Table 2.
        https://arxiv.org/abs/2305.08891
    """
    total, count = num_train_timesteps, num_inference_steps
    is_whole = isinstance(count, (int, np.integer)) and not isinstance(count, bool)
    if not is_whole or not 1 <= count <= total:
        what = f"a whole number from 1 to {total}, the number of levels the model was trained on"
        raise DDIMError(f"num_inference_steps must be {what}; got {count!r}.")
    count = int(count)
    if spacing == "leading":
        ratio = total // count
        highest = (count - 1) * ratio
        offset = steps_offset if steps_offset >= 0 and highest + steps_offset < total else 0
        return [i * ratio + offset for i in reversed(range(count))]
    if spacing == "linspace":
        return [int(t) for t in np.linspace(0, total - 1, count).round()[::-1]]
    if spacing == "trailing":
        # The float range yields an N+1st entry, -1, for some N (61, 103, ... of 1000): the first N
        # are right.
        return [int(t) for t in np.round(np.arange(total, 0, -total / count))[:count] - 1]
    if spacing == "quadratic":
        levels: list[int] = []
        for i in range(count):
            level = (total - 1) * i * i // (count - 1) ** 2 if count > 1 else total - 1
            levels.append(max(level, levels[-1] + 1) if levels else level)
        return levels[::-1]
    raise DDIMError(f"timestep_spacing must be one of {', '.join(SPACINGS)}; got {spacing!r}.")


def as_levels(timesteps: Sequence[int] | Tensor) -> list[int]:
    """Returns a list, array or tensor of whole numbers as plain integers; a DDIMError refuses
    anything else."""
    try:
        values = timesteps.tolist() if hasattr(timesteps, "tolist") else list(timesteps)
    except TypeError:
        values = None
    if values is None or getattr(timesteps, "ndim", 1) != 1:
        example = "one list of levels, such as [999, 500, 3]"
        raise DDIMError(f"timesteps must be {example}; got {timesteps!r}.")
    levels = []
    for value in values:
        if isinstance(value, (np.generic, Tensor)) and value.ndim == 0:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
            raise DDIMError(f"timesteps must be whole numbers; got {value!r}.")
        levels.append(int(value))
    return levels


def check_timesteps(timesteps: Sequence[int] | Tensor, num_train_timesteps: int) -> list[int]:
    """Returns a custom list of levels as plain integers; a DDIMError refuses a list that is empty,
    not of whole numbers, or not strictly falling in [0, T)."""
    levels = as_levels(timesteps)
    outside = [t for t in levels if not 0 <= t < num_train_timesteps]
    if outside:
        raise DDIMError(
            f"timesteps must lie in [0, {num_train_timesteps}), the levels the model was trained "
            f"on; got {outside[0]}."
        )
    _check_falling(levels)
    return levels


def _check_falling(levels: Sequence[int]) -> None:
    if not levels:
        raise DDIMError("timesteps must name at least one level; got an empty list.")
    for earlier, later in itertools.pairwise(levels):
        if earlier == later:
            raise DDIMError(f"timesteps must not repeat a level; got {later} twice.")
        if earlier < later:
            order = f"got {later} after {earlier}. Sort them in descending order."
            raise DDIMError(f"timesteps must fall from noise to data; {order}")


def step_pairs(timesteps: Sequence[int] | Tensor, *, end: int = CLEAN) -> list[Pair]:
    """Pairs each level with its neighbour in the list, the last with ``end``: [(t, s), ...].

    Args:
        timesteps: Falling from noise to data; :func:`reverse_pairs` turns the pairs around.
        end: The level below the last. Default: clean data.

    Raises:
        DDIMError: If the list is empty, not of whole numbers, repeats a level, or does not fall
            down to ``end``.
    """
    levels = as_levels(timesteps)
    _check_falling(levels)
    _check_falling([levels[-1], end])
    return list(zip(levels, [*levels[1:], end], strict=True))


def as_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Returns a list of steps (t, s), each from where the one before ended; a DDIMError refuses
    anything else, such as levels."""
    try:
        given = [(t, s) for t, s in pairs]
    except (TypeError, ValueError):
        text = repr(pairs)
        raise DDIMError(
            "pairs must be steps (t, s) from a level to the next, which step_pairs([999, 500, 0]) "
            f"makes of timesteps; got {text if len(text) <= 60 else text[:57] + '...'}."
        ) from None
    steps = [(whole(t), whole(s)) for t, s in given]
    for before, after in itertools.pairwise(steps):
        if before[1] != after[0]:
            raise DDIMError(
                "pairs must be one walk, each step from the level that the one before reached; got "
                f"{after} after {before}. step_pairs makes such pairs of timesteps."
            )
    return steps


def reverse_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """The same path walked from data to noise: [(s, t), ...] from the last pair to the first."""
    return [(s, t) for t, s in reversed(pairs)]


def truncate_timesteps(timesteps: Sequence[int], strength: float) -> list[int]:
    """Keeps the last int(N strength) levels, where image-to-image begins; strength 1 keeps all.

    The sample must then be noised to the first level that is kept.

    Raises:
        DDIMError: If strength is outside (0, 1], or keeps no level.
    """
    if not 0 < strength <= 1:
        raise DDIMError(f"strength must lie in (0, 1]; got {strength}.")
    kept = int(len(timesteps) * strength)
    if kept == 0:
        count = len(timesteps)
        scale = 10 ** (3 + len(str(count)))  # rounded up: a strength that is advised is taken
        raise DDIMError(
            f"strength {strength} of {count} steps keeps none; use a strength of at least "
            f"{-(-scale // max(count, 1)) / scale:.9g}, or more steps."
        )
    return [int(t) for t in timesteps[len(timesteps) - kept :]]
