"""The benchmark of a GPU walks through its parts on a CPU, and tables say what was missed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def sides(monkeypatch):
    """The module of the tables."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import sides

    yield sides
    sys.modules.pop("sides", None)


@pytest.mark.parametrize(
    ("figures", "options", "told"),
    [
        ((2.0, 3.0), {"least": 1.3}, ["2.00 s", "3.00 s", "1.50x", "at least 1.30x"]),
        ((2.0, 2.5), {"least": 1.3}, ["2.00 s", "2.50 s", "1.25x", "at least 1.30x: missed"]),
        ((4e-6, 1e-5), {"unit": "us", "most": 0.5}, ["4.0 us", "10.0 us", "0.40", "at most 0.50"]),
        (
            (6e-6, 1e-5),
            {"unit": "us", "most": 0.5},
            ["6.0 us", "10.0 us", "0.60", "at most 0.50: missed"],
        ),
        (
            (90.0, 80.0),
            {"unit": "images/s", "least": 1.05},
            ["90.0 images/s", "80.0 images/s", "1.12x", "at least 1.05x"],
        ),
        ((2.0, 3.0), {}, ["2.00 s", "3.00 s", "1.50x", ""]),
    ],
)
def test_a_row_says_whether_it_is_as_wanted(figures, options, told, sides):
    assert sides.row("name", *figures, **options) == ["name", *told]


def drawing():
    return lambda n=1: None


def test_sides_take_turns(sides):
    with sides.started({"a": drawing, "b": drawing}, apart=False) as both:
        taken = sides.in_turn(both, rounds=3, n=2)
    assert [len(each) for each in taken.values()] == [3, 3]
    assert sides.better({"a": 2.0, "b": 1.0}, "a", "b") == "b"


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_walks_through_its_parts_on_a_cpu():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    last = done.stdout.rpartition("| measured")[2]
    for part in ("a step of", "stable-diffusion-v1-5", "embedded model", "training", "2-1"):
        assert part in last
    assert "failed" not in last


@pytest.mark.slow
def test_without_a_gpu_it_says_so_in_a_sentence():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "there is no CUDA device here" in done.stderr
