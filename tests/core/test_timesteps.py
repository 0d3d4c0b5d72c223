import re
import warnings

import diffusers
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from ddim.core.oracle import GaussianOracle
from ddim.core.route import make_route
from ddim.core.sampler import sample, trajectory
from ddim.core.schedule import CLEAN, NoiseSchedule, make_betas
from ddim.core.timesteps import (
    SPACINGS,
    as_pairs,
    check_timesteps,
    reverse_pairs,
    select_timesteps,
    step_pairs,
    truncate_timesteps,
)
from ddim.errors import DDIMError


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("total", [1, 2, 5, 100, 999, 1000, 1024])
def test_every_count_gives_that_many_distinct_falling_levels(spacing, total):
    for count in range(1, total + 1):
        levels = select_timesteps(total, count, spacing)
        assert len(levels) == count
        assert all(a > b for a, b in zip(levels, levels[1:], strict=False))
        assert 0 <= levels[-1] <= levels[0] < total
        if spacing in ("trailing", "quadratic"):
            assert levels[0] == total - 1


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("total", [100, 999, 1000])
@pytest.mark.parametrize("offset", [0, 1])
def test_levels_equal_diffusers_wherever_its_list_is_valid(spacing, total, offset):
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=total, timestep_spacing=spacing, steps_offset=offset
    )
    compared = 0
    for count in range(1, total + 1):
        scheduler.set_timesteps(count)
        theirs = scheduler.timesteps.tolist()
        if len(set(theirs)) == count and min(theirs) >= 0 and max(theirs) < total:
            assert select_timesteps(total, count, spacing, steps_offset=offset) == theirs
            compared += 1
    assert compared >= 0.9 * total


def test_counts_where_diffusers_visits_minus_one_keep_the_first_levels():
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    bad = 0
    for count in range(1, 1001):
        scheduler.set_timesteps(count)
        theirs = scheduler.timesteps.tolist()
        if theirs[-1] == -1:
            bad += 1
            assert select_timesteps(1000, count, "trailing") == theirs[:-1]
    assert bad == 62


def test_the_papers_table_of_ten_steps():
    assert select_timesteps(1000, 10, "leading", steps_offset=0) == [
        t - 1 for t in range(901, 0, -100)
    ]
    assert select_timesteps(1000, 10, "linspace") == [
        t - 1 for t in (1000, 889, 778, 667, 556, 445, 334, 223, 112, 1)
    ]
    assert select_timesteps(1000, 10, "trailing") == [t - 1 for t in range(1000, 0, -100)]


def test_quadratic_follows_the_formula_where_its_levels_are_distinct():
    levels = select_timesteps(1000, 10, "quadratic")
    assert levels[::-1] == [999 * i * i // 81 for i in range(10)]
    gaps = [a - b for a, b in zip(levels, levels[1:], strict=False)]
    assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("offset", [-1, -500])
def test_a_negative_offset_would_leave_the_range_and_is_dropped(offset):
    for count in (1, 3, 1000):
        assert select_timesteps(1000, count, "leading", steps_offset=offset) == select_timesteps(
            1000, count, "leading"
        )


def test_an_offset_that_leaves_the_range_is_dropped():
    assert select_timesteps(1000, 1000, "leading", steps_offset=1) == list(range(999, -1, -1))
    assert select_timesteps(1000, 50, "leading", steps_offset=1)[0] == 981
    assert select_timesteps(1000, 50, "trailing", steps_offset=1) == select_timesteps(
        1000, 50, "trailing"
    )


@given(st.lists(st.integers(0, 999), min_size=1, max_size=30, unique=True))
def test_pairs_are_neighbours_and_reverse_into_themselves(levels):
    levels = sorted(levels, reverse=True)
    pairs = step_pairs(check_timesteps(levels, 1000))
    assert [t for t, _ in pairs] == levels
    assert [s for _, s in pairs] == [*levels[1:], CLEAN]
    assert reverse_pairs(reverse_pairs(pairs)) == pairs
    assert reverse_pairs(pairs)[0] == (CLEAN, levels[-1])


def test_truncation_keeps_as_many_levels_as_diffusers():
    levels = select_timesteps(1000, 50, "leading")
    for strength in (0.02, 0.3, 0.5, 0.99, 1.0):
        assert (
            truncate_timesteps(levels, strength)
            == levels[max(50 - min(int(50 * strength), 50), 0) :]
        )


@pytest.mark.parametrize("count", [0, -5, 1001, 2.5, None, "50", True])
def test_impossible_counts_are_refused(count):
    with pytest.raises(
        DDIMError, match=r"num_inference_steps must be a whole number from 1 to 1000"
    ):
        select_timesteps(1000, count, "trailing")


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], "at least one level"),
        ([1.5], "must be whole numbers; got 1.5"),
        ([1000], r"must lie in \[0, 1000\).*got 1000"),
        ([5, -1], r"must lie in \[0, 1000\).*got -1"),
        ([9, 5, 5], "must not repeat a level; got 5 twice"),
        ([3, 500], "must fall from noise to data; got 500 after 3"),
        ([float("nan")], "must be whole numbers; got nan"),
        ([float("inf"), 1], "must be whole numbers; got inf"),
        (["a"], "must be whole numbers; got 'a'"),
        ([None, 3], "must be whole numbers; got None"),
        ([True], "must be whole numbers; got True"),
        ([[5, 3]], r"must be whole numbers; got \[5, 3\]"),
        (5, r"must be one list of levels, such as \[999, 500, 3\]; got 5"),
        (None, "must be one list of levels, .* got None"),
        (torch.tensor(5), r"must be one list of levels, .* got tensor\(5\)"),
        (torch.tensor([[5], [3]]), "must be one list of levels"),
        (np.array([[5, 3]]), "must be one list of levels"),
        (np.array([5.5, 3]), "must be whole numbers; got 5.5"),
        (torch.tensor([5.0, float("nan")]), "must be whole numbers; got nan"),
    ],
)
def test_bad_lists_are_refused(levels, message):
    with pytest.raises(DDIMError, match=message):
        check_timesteps(levels, 1000)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (
            [0, 500, 999],
            "must fall from noise to data; got 500 after 0. Sort them in descending order",
        ),
        ([999, 5, 5], "must not repeat a level; got 5 twice"),
        ([5, CLEAN], "must not repeat a level; got -1 twice"),
        ([], "at least one level"),
        ([9.5, 3], "must be whole numbers; got 9.5"),
        (999, "must be one list of levels"),
    ],
)
def test_only_falling_levels_are_paired(levels, message):
    with pytest.raises(DDIMError, match=message):
        step_pairs(levels)
    with pytest.raises(DDIMError, match="must fall from noise to data; got 7 after 5"):
        step_pairs([9, 5], end=7)
    assert step_pairs(torch.tensor([9.0, 5.0]), end=2) == [(9, 5), (5, 2)]


@pytest.mark.parametrize(
    "pairs",
    [
        [999, 500, 0],
        list(range(999, -1, -1)),
        torch.tensor([999, 500]),
        [(999, 500, 0)],
        5,
        [(999,)],
    ],
)
def test_a_list_of_levels_is_none_of_steps(pairs):
    with pytest.raises(
        DDIMError,
        match=r"pairs must be steps \(t, s\).*step_pairs\(\[999, 500, 0\]\) makes .*; got .*\d",
    ) as caught:
        as_pairs(pairs)
    assert len(str(caught.value)) < 250
    assert as_pairs([(999, 500), [500, CLEAN]]) == [(999, 500), (500, CLEAN)]


@pytest.mark.parametrize("pairs", [[(999, 500), (400, 0)], [(0, 400), (500, 999)], [(9, 5)] * 2])
def test_steps_that_are_no_walk_are_refused_wherever_pairs_are_taken(pairs):
    oracle, x = GaussianOracle(NoiseSchedule.from_betas(make_betas())), torch.zeros(1, 2)
    for use in (
        as_pairs,
        lambda pairs: make_route(oracle.schedule, pairs),
        lambda pairs: list(trajectory(oracle.denoise, x, pairs, schedule=oracle.schedule)),
        lambda pairs: sample(oracle.denoise, x, pairs, schedule=oracle.schedule),
    ):
        with pytest.raises(DDIMError, match=r"one walk, each .* got \(.*\) after \(.*\)\. step_pa"):
            use(pairs)


def test_other_errors():
    with pytest.raises(
        DDIMError,
        match=(
            "timestep_spacing must be one of leading, linspace, trailing, quadratic; got 'karras'"
        ),
    ):
        select_timesteps(1000, 5, "karras")
    with pytest.raises(DDIMError, match=r"strength must lie in \(0, 1\]; got 0"):
        truncate_timesteps([3, 2], 0)
    with pytest.raises(DDIMError, match="keeps none"):
        truncate_timesteps([3, 2], 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_timesteps((2.0, 1.0), 3) == [2, 1]
        for levels in (
            range(2, 0, -1),
            np.array([2.0, 1.0]),
            torch.tensor([2, 1]),
            [np.int64(2), torch.tensor(1)],
        ):
            assert [type(t) for t in check_timesteps(levels, 3)] == [int, int]
            assert check_timesteps(levels, 3) == [2, 1]


def test_the_strength_that_a_refusal_advises_is_taken():
    for count in [*range(1, 300), 1000, 4000]:
        levels = list(range(count))[::-1]
        with pytest.raises(DDIMError, match="use a strength of at least") as caught:
            truncate_timesteps(levels, 1e-9)
        advised = float(re.search(r"at least (\S+), or", str(caught.value))[1])
        assert len(truncate_timesteps(levels, advised)) == 1


def test_pairs_are_whole_levels():
    assert as_pairs([(3.0, np.int64(1)), (1, -1)]) == [(3, 1), (1, -1)]
    for pairs, message in (
        ([(3.7, 1)], "a timestep must be a whole number or a tensor; got 3.7"),
        ([(True, -1)], "a timestep must be a whole number or a tensor; got True"),
    ):
        with pytest.raises(DDIMError, match=message):
            as_pairs(pairs)
