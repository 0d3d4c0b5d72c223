r"""Which levels a sampler visits, and in what order.

A list of timesteps runs from noise to data, strictly falling, in [0, T). A step goes from a level
``t`` to the *next element of the list* ``s``, never to ``t - T // N``: a stride that misses the
neighbour leaves the list, and the network is then told another amount of noise than there is."""

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from ddim.core.checks import check_choice, check_number, check_whole, wrong_argument
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
"""Names of the spacings that :func:`select_timesteps` knows."""

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
        DDIMError: If N is no whole number in 1..T, T or steps_offset no whole number, or the
            spacing is unknown.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. App. D.2 (linear, quadratic).
        https://arxiv.org/abs/2010.02502

        Lin et al. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023. Table 2.
        https://arxiv.org/abs/2305.08891
    """
    total = check_whole("num_train_timesteps", num_train_timesteps, least=1)
    offset = check_whole("steps_offset", steps_offset)
    check_choice("timestep_spacing", spacing, SPACINGS)
    try:
        count = check_whole("num_inference_steps", num_inference_steps, least=1, most=total)
    except DDIMError:
        wanted = (
            f"be a whole number from 1 to {total}, the number of levels the model was trained on"
        )
        raise wrong_argument("num_inference_steps", wanted, num_inference_steps) from None
    if spacing == "leading":
        ratio = total // count
        highest = (count - 1) * ratio
        offset = offset if offset >= 0 and highest + offset < total else 0
        return [i * ratio + offset for i in reversed(range(count))]
    if spacing == "linspace":
        return [int(t) for t in np.linspace(0, total - 1, count).round()[::-1]]
    if spacing == "trailing":
        # The float range yields an N+1st entry, -1, for some N (61, 103, ... of 1000): the first N
        # are right.
        return [int(t) for t in np.round(np.arange(total, 0, -total / count))[:count] - 1]
    if count == 1:
        return [total - 1]
    square = (count - 1) ** 2
    rest = ((total - 1) * i * i // square - i for i in range(count))
    # One up where two would coincide: what is above the place must not fall.
    return [level + i for i, level in enumerate(itertools.accumulate(rest, max))][::-1]


def as_levels(timesteps: Iterable[int] | Tensor) -> list[int]:
    """Returns a list, array or tensor of whole numbers as plain integers; a DDIMError refuses
    anything else."""
    try:
        values = timesteps.tolist() if hasattr(timesteps, "tolist") else list(timesteps)
    except TypeError:
        values = None
    if values is None or getattr(timesteps, "ndim", 1) != 1:
        raise wrong_argument("timesteps", "be one list of levels, such as [999, 500, 3]", timesteps)
    if set(map(type, values)) <= {int}:  # as in nearly all lists, perhaps of a million
        return list(values)
    levels = []
    for value in values:
        if isinstance(value, (np.generic, Tensor)) and value.ndim == 0:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
            raise wrong_argument("timesteps", "be whole numbers", value)
        levels.append(int(value))
    return levels


def check_timesteps(timesteps: Sequence[int] | Tensor, num_train_timesteps: int) -> list[int]:
    """Returns a custom list of levels as plain integers; a DDIMError refuses a list that is empty,
    not of whole numbers, or not strictly falling in [0, T)."""
    levels = as_levels(timesteps)
    num_train_timesteps = check_whole("num_train_timesteps", num_train_timesteps, least=1)
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
    if all(map(operator.gt, levels, itertools.islice(levels, 1, None))):
        return
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
    levels, end = as_levels(timesteps), check_whole("end", end)
    _check_falling(levels)
    _check_falling([levels[-1], end])
    return list(zip(levels, [*levels[1:], end], strict=True))


def as_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Returns a list of steps (t, s), each from where the one before ended; a DDIMError refuses
    anything else, such as levels."""
    try:
        given = [(t, s) for t, s in pairs]
    except (TypeError, ValueError):
        wanted = (
            "be steps (t, s) from a level to the next, which step_pairs([999, 500, 0]) makes of "
            "timesteps"
        )
        raise wrong_argument("pairs", wanted, pairs) from None
    steps = [(whole(t), whole(s)) for t, s in given]
    for before, after in itertools.pairwise(steps):
        if before[1] != after[0]:
            raise DDIMError(
                "pairs must be one walk, each step from the level that the one before reached; got "
                f"{after} after {before}. step_pairs makes such pairs of timesteps."
            )
    return steps


def reverse_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """The same path walked from data to noise: [(s, t), ...] from the last pair to the first; a
    DDIMError refuses what is no list of steps (t, s)."""
    return [(s, t) for t, s in reversed(as_pairs(pairs))]


def truncate_timesteps(timesteps: Sequence[int], strength: float) -> list[int]:
    """Keeps the last int(N strength) levels, where image-to-image begins; strength 1 keeps all.

    The sample must then be noised to the first level that is kept.

    Raises:
        DDIMError: If strength is outside (0, 1], or keeps no level; or timesteps are no levels.
    """
    check_number("strength", strength, above=0, most=1)
    timesteps = as_levels(timesteps)
    kept = int(len(timesteps) * strength)
    if kept == 0:
        count = len(timesteps)
        scale = 10 ** (3 + len(str(count)))  # rounded up: a strength that is advised is taken
        raise DDIMError(
            f"strength {strength} of {count} steps keeps none; use a strength of at least "
            f"{-(-scale // max(count, 1)) / scale:.9g}, or more steps."
        )
    return timesteps[len(timesteps) - kept :]
