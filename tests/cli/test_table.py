"""``ddim table``: cell by cell, gone on with, in processes, and one writer a folder."""

import csv
import json
import platform
import shutil
import subprocess
import sys
import threading

import filelock
import numpy as np
import pytest
from tests.conftest import edit, record

from ddim.cli import main
from ddim.evaluation.report import Cell
from ddim.runs import table, workers


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A tiny model of twenty levels, so that all steps are few."""
    folder = tmp_path_factory.mktemp("models") / "twenty"
    shutil.copytree(tiny, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    edit(path, num_train_timesteps=20)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Sixty grey images of 8x8."""
    path = tmp_path_factory.mktemp("data") / "reference.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    return path


@pytest.fixture(autouse=True)
def long(monkeypatch):
    """Twenty steps are many here."""
    monkeypatch.setattr(table, "LONG", 10)


def run(model, reference, out, *options):
    given = [] if "--eta" in options else ["--eta", "0,1,sigma-hat"]
    given += [] if "--steps" in options else ["--steps", "2,20"]
    given += [] if "--metrics" in options else ["--metrics", "kid-pixels,recall-pixels"]
    given += [] if "--count" in options else ["--count", "24", "--long-count", "12"]
    return main(
        [
            "table",
            str(model),
            "--reference",
            str(reference),
            "--out",
            str(out),
            *given,
            *map(str, options),
        ]
    )


def cells(folder):
    return {p.name: json.loads(p.read_text()) for p in (folder / "cells").iterdir()}


@pytest.fixture(scope="module")
def whole(model, reference, tmp_path_factory):
    out = tmp_path_factory.mktemp("tables") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "LONG", 10)
        assert run(model, reference, out) == 0
    return out


def without_time(content):
    return {k: v for k, v in content.items() if k not in ("seconds", "speedup")}


def test_it_writes_cells_a_record_a_table_and_plots(whole):
    assert sorted(p.name for p in whole.iterdir() if p.name[0] != ".") == [
        "cells",
        "quality-evaluations.png",
        "quality-seconds.png",
        "run.json",
        "table.csv",
        "table.md",
    ]
    assert set(cells(whole)) == {
        f"eta-{eta}-steps-{steps}.json" for eta in ("0.0", "1.0", "sigma-hat") for steps in (2, 20)
    }
    results = record(whole)["results"]
    assert [(r["eta"], r["steps"], r["evaluations"], r["count"]) for r in results] == [
        (eta, steps, steps, count)
        for eta in (0.0, 1.0, "sigma-hat")
        for steps, count in ((2, 24), (20, 12))
    ]
    ddpm = results[3]
    assert (ddpm["quality_ratio"], ddpm["speedup"]) == (None, 1)  # of a KID there is no ratio
    assert all(
        r["speedup"] == pytest.approx(ddpm["seconds"] / 12 / (r["seconds"] / r["count"]))
        for r in results
    )
    protocol = record(whole)["protocol"]
    assert (protocol["timesteps"], protocol["count"], protocol["long_count"], protocol["seed"]) == (
        "trailing",
        24,
        12,
        0,
    )
    rows = list(csv.DictReader((whole / "table.csv").read_text().splitlines()))
    assert [float(r["kid-pixels"]) for r in rows] == [r["kid-pixels"] for r in results]
    text = (whole / "table.md").read_text()
    assert "24 images a cell (12 above 10 steps), seeds from 0 on, the same in every cell" in text
    assert "## Against DDPM of 20 steps\n\nAll on 12 images of the same seeds" in text


def test_timing_rounds_take_the_time_of_all_cells_again(
    whole, model, reference, tmp_path, monkeypatch, capsys
):
    shutil.copytree(whole, tmp_path / "out")
    drawn = []

    def time_batch(self, cell):
        drawn.append((cell.eta, cell.steps))
        # A machine that was busy in the second round.
        return cell.steps * (1.0, 50.0, 2.0)[(len(drawn) - 1) // 6]

    monkeypatch.setattr(table.TableJob, "_time_batch", time_batch)
    assert run(model, reference, tmp_path / "out", "--steps", "2", "--timing-rounds", "3") == 0
    assert "6 cells timed in turn, the median of 3 each.\n" in capsys.readouterr().out
    assert drawn[:6] == drawn[6:12] == drawn[12:]
    assert len(set(drawn)) == 6
    for cell in cells(tmp_path / "out").values():
        assert cell["seconds"] == cell["steps"] * 2.0 * (24 if cell["steps"] == 2 else 12)
    assert {r["speedup"] for r in record(tmp_path / "out")["results"]} == {1, 10}
    assert "the median of 3 each" in (tmp_path / "out" / "table.md").read_text()


def test_a_batch_is_timed_an_image(whole, model, reference, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    drawn = []

    def draw(job, route, seeds, *, seconds, batch_size):
        drawn.append((list(seeds), route.eta, len(route)))
        yield seconds.append(4.0)

    monkeypatch.setattr(table.TableJob, "sample_batches", draw)
    assert run(model, reference, tmp_path / "out", "--timing-rounds", "1", "--batch-size", "8") == 0
    assert sorted(drawn, key=str) == sorted(
        ((list(range(8)), c["eta"], c["steps"]) for c in cells(whole).values()), key=str
    )
    before, after = cells(whole), cells(tmp_path / "out")
    assert all(
        after[name]["seconds"] == 4.0 / 8 * (24 if after[name]["steps"] == 2 else 12)
        for name in before
    )
    assert all(after[name]["results"] == before[name]["results"] for name in before)


def test_a_cell_is_what_evaluate_says_of_it(whole, model, reference, tmp_path):
    options = [
        "--steps",
        "2",
        "--eta",
        "1",
        "--count",
        "24",
        "--metrics",
        "kid-pixels,recall-pixels",
        "--out",
        str(tmp_path),
    ]
    assert main(["evaluate", str(model), "--reference", str(reference), *options]) == 0
    cell = cells(whole)["eta-1.0-steps-2.json"]
    for one, other in zip(record(tmp_path)["results"], cell["results"], strict=True):
        assert (one["value"], one["floor"], one["std"]) == pytest.approx(
            (other["value"], other["floor"], other["std"]), rel=1e-3
        )
    assert [r["count"] for r in cell["compared"]] == [12, 12]
    assert cell["timesteps"] == [19, 9]


@pytest.mark.slow
def test_processes_and_batches_change_no_number(whole, model, reference, tmp_path, capsys):
    assert run(model, reference, tmp_path, "--workers", 2, "--batch-size", 5, "--steps", 2) == 0
    assert "3 cells measured; the table is" in capsys.readouterr().out
    for name, cell in cells(tmp_path).items():
        for one, other in zip(cell["results"], cells(whole)[name]["results"], strict=True):
            assert one["value"] == pytest.approx(other["value"], rel=2e-3, abs=1e-3)


def test_processes_take_the_longest_cells_first():
    places = ((0.0, 5), (1.0, 5), (0.0, 10), (0.0, 20), (0.0, 100))
    cells = [table.Item(*place) for place in places]
    assert [steps for _, steps in table._longest_first(cells, (24, 18))] == [100, 20, 10, 5, 5]
    assert [steps for _, steps in table._longest_first(cells, (24, 1))] == [
        10,
        5,
        5,
        100,
        20,
    ]  # those beyond ten are of one image


def test_an_interrupted_table_is_gone_on_with(model, reference, tmp_path, capsys, monkeypatch):
    real, measured = table.TableJob.measure, []

    def interrupt(self, item):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(item)
        return real(self, item)

    monkeypatch.setattr(table.TableJob, "measure", interrupt)
    assert run(model, reference, tmp_path) == 130
    assert "the same command goes on from what is there" in capsys.readouterr().err
    kept = {name: content for name, content in cells(tmp_path).items()}
    assert len(kept) == len(record(tmp_path)["results"]) == 2
    measured.clear()
    monkeypatch.setattr(
        table.TableJob, "measure", lambda self, item: measured.append(item) or real(self, item)
    )
    assert run(model, reference, tmp_path) == 0
    assert "4 cells measured, 2 were there" in capsys.readouterr().out
    assert measured == [("sigma-hat", 2), (0.0, 20), (1.0, 20), ("sigma-hat", 20)]
    assert kept.items() <= cells(tmp_path).items()
    assert not [p for p in tmp_path.rglob("*.partial")]


def test_other_etas_and_steps_join_a_table(model, reference, tmp_path, capsys):
    assert run(model, reference, tmp_path, "--eta", 0, "--steps", 2) == 0
    assert run(model, reference, tmp_path, "--eta", "0,0.5", "--steps", "2,3") == 0
    assert "3 cells measured, 1 was there" in capsys.readouterr().out
    assert [(r["eta"], r["steps"]) for r in record(tmp_path)["results"]] == [
        (0, 2),
        (0, 3),
        (0.5, 2),
        (0.5, 3),
    ]


def test_repeats_are_other_seeds(whole, model, reference, tmp_path):
    assert run(model, reference, tmp_path / "a", "--eta", 0, "--steps", 2, "--repeats", 2) == 0
    assert run(model, reference, tmp_path / "b", "--eta", 0, "--steps", 2, "--seed", 24) == 0
    name = "eta-0.0-steps-2.json"
    both, one, other = (
        cells(folder)[name]["results"][0] for folder in (tmp_path / "a", whole, tmp_path / "b")
    )
    assert one["value"] != other["value"]
    assert both["value"] == pytest.approx((one["value"] + other["value"]) / 2, rel=1e-6)
    assert both["std"] == pytest.approx(abs(one["value"] - other["value"]) / 2**0.5, rel=1e-6)


def test_two_runs_in_one_folder_are_refused(model, reference, tmp_path, capsys):
    with filelock.FileLock(tmp_path / ".lock"):
        assert run(model, reference, tmp_path) == 2
    assert (
        f"{tmp_path} is being written by another run; wait for it, or use another --out."
        in capsys.readouterr().err
    )
    assert not (tmp_path / "cells").exists()


HANG = """
import sys, time
from ddim.cli import main
from ddim.runs.table import TableJob
real, done = TableJob.measure, []
def measure(self, item):
    if done:
        print("in the middle", flush=True)
        time.sleep(600)
    done.append(item)
    return real(self, item)
TableJob.measure = measure
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_lets_go_of_its_folder_and_of_no_finished_cell(
    model, reference, tmp_path, capsys
):
    options = [
        "--eta",
        "0",
        "--steps",
        "2,3",
        "--metrics",
        "kid-pixels",
        "--count",
        "24",
        "--long-count",
        "12",
    ]
    command = ["table", str(model), "--reference", str(reference), "--out", str(tmp_path), *options]
    with subprocess.Popen(
        [sys.executable, "-c", HANG, *command], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            while "in the middle" not in (line := other.stdout.readline()):
                assert line, "it ended by itself"
            kept = cells(tmp_path)
            threading.Timer(2.0, other.kill).start()
            assert main(command) == 0  # it waits, and takes over what the other leaves
        finally:
            other.kill()
    assert list(kept) == ["eta-0.0-steps-2.json"]
    told = capsys.readouterr().out
    assert f"others work on the last 1 shard ({platform.node()}-{other.pid})" in told
    assert "1 cell measured, 1 was there" in told
    assert kept.items() <= cells(tmp_path).items()
    assert [r["steps"] for r in record(tmp_path)["results"]] == [2, 3]
    assert not [p for p in tmp_path.rglob("*.partial")]
    assert not [p for p in tmp_path.rglob("*.lease*")]


def test_fitted_timesteps_and_the_order_of_a_configuration_are_used_and_said(
    model, reference, tmp_path, capsys
):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"multistep_order": 2, "fitted_timesteps": [[18, 9, 2]]}
    path.write_text(json.dumps(config))
    out = tmp_path / "out"
    assert run(folder, reference, out, "--eta", 0, "--steps", "2,3") == 0
    assert {name: cell["timesteps"] for name, cell in cells(out).items()} == {
        "eta-0.0-steps-2.json": [19, 9],
        "eta-0.0-steps-3.json": [18, 9, 2],
    }
    assert record(out)["protocol"]["timesteps"] == {"fitted": [[18, 9, 2]], "otherwise": "trailing"}
    assert (
        "DDIM of order 2, trailing timesteps, at 3 steps the model's fitted timesteps, clipping "
        "none" in (out / "table.md").read_text()
    )
    path.write_text(json.dumps(config | {"fitted_timesteps": [[17, 9, 2]]}))
    assert run(folder, reference, out, "--eta", 0, "--steps", "2,3") == 2
    assert "holds results of another protocol: timesteps is" in capsys.readouterr().err
    assert (
        run(
            folder, reference, tmp_path / "plain", "--eta", 0, "--steps", 3, "--spacing", "trailing"
        )
        == 0
    )
    assert record(tmp_path / "plain")["protocol"]["timesteps"] == "trailing"
    assert cells(tmp_path / "plain")["eta-0.0-steps-3.json"]["timesteps"] == [19, 12, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--count", "20"), "count is 24 there and 20 here"),
        (("--seed", "1"), "seed is 0 there and 1 here"),
        (
            ("--metrics", "swd-pixels"),
            'metrics is ["kid-pixels", "recall-pixels"] there and ["swd-pixels"] here',
        ),
        (("--spacing", "leading"), 'timesteps is "trailing" there and "leading" here'),
        (("--clip", "static"), 'clip is {"kind": "none"} there'),
    ],
)
def test_another_protocol_is_refused_with_what_differs(
    options, message, whole, model, reference, capsys
):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    assert run(model, reference, whole, *options) == 2
    told = capsys.readouterr().err
    assert f"ddim: {whole} holds results of another protocol: " in told
    assert message in told
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_a_damaged_cell_is_named(whole, model, reference, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "cells" / "eta-0.0-steps-2.json").write_text("{}")
    assert run(model, reference, tmp_path / "out") == 2
    assert "eta-0.0-steps-2.json is not a cell of this program" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_that_die_are_told_and_finished_cells_are_kept(
    model, reference, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(workers, "_work", len)  # fails in the process, for it takes one argument
    assert run(model, reference, tmp_path, "--workers", 2) == 2
    assert (
        "all 2 processes ended before the work was done, perhaps for want of memory; what is done "
        "is kept" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--count", "0"), "--count must be at least 1; got 0."),
        (("--workers", "0"), "--workers must be at least 1; got 0."),
        (("--repeats", "0"), "--repeats must be from 1 to 1000; got 0."),
        (
            ("--count", "10", "--long-count", "11"),
            "--long-count must be from 1 to --count, 10; got 11.",
        ),
        (("--count", "24", "--long-count", "5"), "recall-pixels needs at least 6 images; got 5."),
        (
            ("--count", "61"),
            "61 samples need a reference of as many images, and it holds 60; use at most 60.",
        ),
        (("--eta", ","), "--eta must name at least one value."),
        (("--eta", "0,big"), "--eta: it must be a number or sigma-hat; got 'big'."),
        (("--eta", "0,9"), "eta=9.0 would draw more noise than the level can hold"),
        (("--timing-rounds", "-1"), "--timing-rounds must be from 0 to 1000; got -1"),
        (("--steps", "21"), "ddim: --steps must be a whole number from 1 to 20"),
        (("--metrics", "kid-moon"), "'kid-moon' is no metric"),
    ],
)
def test_bad_options_are_one_sentence_before_anything_is_drawn(
    options, message, model, reference, tmp_path, capsys
):
    assert run(model, reference, tmp_path / "out", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_cells_know_their_time_an_image():
    numbers = (table_result(10),)
    assert Cell(0.0, 2, (19, 9), 2, 5.0, numbers, numbers).seconds_per_image == 0.5


def table_result(count):
    from ddim.evaluation.protocol import Result

    return Result("kid-pixels", "pixels", 1.0, 0.5, None, count, count)
