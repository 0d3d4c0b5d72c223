"""Shared work: whoever draws, however it ends, the bytes are the same, and every seed is there
once."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict

import numpy as np
import pytest
from tests.conftest import record

from ddim.cli import main
from ddim.data.sources import load_images
from ddim.runs import sharing
from ddim.runs.engine import Control, execute
from ddim.runs.requests import SampleRequest
from ddim.runs.sample import SampleJob
from ddim.runs.shards import FOLDER, Blocks, ShardRecord, launched, read_records
from ddim.runs.status import Watch

SLOW = """
import sys, time
from ddim.cli import main
from ddim.runs.sample import SampleJob
real, drawn = SampleJob._draw, []
def draw(self, batch):
    drawn.append(batch)
    if len(drawn) == int(sys.argv[1]):
        print("in the middle", flush=True)
        time.sleep(600)
    return real(self, batch)
SampleJob._draw = draw
sys.exit(main(sys.argv[2:]))
"""


OTHERS = """
import json, sys
import datasets, numpy, webdataset
store, *names = sys.argv[1:]
table = datasets.load_dataset(store, data_files=names, split="train")
column = {"webdataset": "png", "parquet": "image"}[store]
seeds = [row["json"]["seed"] if store == "webdataset" else row["seed"] for row in table]
if store == "webdataset":
    samples = webdataset.WebDataset(names, shardshuffle=False)
    assert [json.loads(sample["json"])["seed"] for sample in samples] == seeds
print(json.dumps([seeds, numpy.asarray(table[24][column]).tolist()]))
"""
"""What people do without this package."""


def options(model, out, store="webdataset", **changes):
    """The words of a run of 25 pictures in shards of 10, in batches of 4."""
    words = {"count": 25, "steps": 2, "shard-size": 10, "batch-size": 4, "store": store} | changes
    given = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    return ["sample", str(model), "--out", str(out), *given]


def contents(folder):
    """The bytes of all that was drawn."""
    paths = (p for p in folder.iterdir() if p.is_file() and p.name not in ("run.json", ".lock"))
    return {p.name: p.read_bytes() for p in paths}


def numbers(folder):
    return sorted(n for r in read_records(folder) for n in r.numbers)


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """What one process draws, by store."""
    folder = tmp_path_factory.mktemp("alone")
    for store in ("webdataset", "parquet", "npz", "files"):
        assert main(options(tiny, folder / store, store)) == 0
    return folder


@pytest.fixture
def interrupted(tiny, tmp_path):
    """Starts a process that hangs in a batch; gives it, with its lease taken."""
    started = []

    def start(out, batch, store="webdataset", **changes):
        words = [str(batch), *options(tiny, out, store, **changes)]
        command = [sys.executable, "-c", SLOW, *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        while "in the middle" not in (line := process.stdout.readline()):
            assert line, "it ended by itself"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    "store",
    ["webdataset", *(pytest.param(s, marks=pytest.mark.slow) for s in ("files", "parquet", "npz"))],
)
def test_a_run_that_is_killed_in_a_shard_is_gone_on_with_to_equal_bytes(
    store, alone, tiny, tmp_path, interrupted, capsys
):
    process = interrupted(tmp_path / "out", 5, store)  # in the second batch of the second shard
    process.kill()
    process.wait()
    assert main(options(tiny, tmp_path / "out", store)) == 0
    there = 14 if store == "files" else 10  # the first batch of the second shard is kept as files
    assert f"{25 - there} images drawn, {there} were there" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(alone / store)
    assert numbers(tmp_path / "out") == list(range(25))
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name or "lease" in p.name]


@pytest.mark.parametrize("store", ["webdataset", pytest.param("files", marks=pytest.mark.slow)])
def test_two_processes_one_killed_and_one_joining_late(
    store, alone, tiny, tmp_path, interrupted, capsys
):
    """The second joins while the first is in a shard, and takes it over when that one is killed."""
    process = interrupted(tmp_path / "out", 2, store)
    threading.Timer(1.5, process.kill).start()
    assert main(options(tiny, tmp_path / "out", store)) == 0
    assert "others work on the last 1 shard" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(alone / store)
    assert numbers(tmp_path / "out") == list(range(25))


@pytest.mark.slow
def test_a_process_that_was_stopped_and_goes_on_late_changes_nothing(
    alone, tiny, tmp_path, interrupted
):
    """Its shard is taken over once its lease is stale by the observer's clock; then it wakes up and
    finishes that shard too."""
    slow = SLOW.replace("time.sleep(600)", "time.sleep(1)")
    out = tmp_path / "out"
    words = ["2", *options(tiny, out, lease=1)]
    with subprocess.Popen([sys.executable, "-c", slow, *words], stdout=subprocess.PIPE) as process:
        while b"in the middle" not in (line := process.stdout.readline()):
            assert line
        process.send_signal(signal.SIGSTOP)
        assert main(options(tiny, out, lease=1)) == 0
        assert contents(out) == contents(alone / "webdataset")
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    assert contents(out) == contents(alone / "webdataset")
    assert numbers(out) == list(range(25))


def test_workers_draw_what_one_process_draws(alone, tiny, tmp_path, capsys):
    assert main(options(tiny, tmp_path / "out", workers=2)) == 0
    assert "25 images drawn" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(alone / "webdataset")
    assert "grid.png" in contents(tmp_path / "out")
    assert record(tmp_path / "out")["results"] == record(alone / "webdataset")["results"]
    status = Watch(tmp_path / "out").look()
    assert (status.items, status.total, status.is_done) == (25, 25, True)


def test_the_bytes_of_a_launched_process_are_those_of_workers(
    alone, tiny, tmp_path, monkeypatch, capsys
):
    """Without an option: a launcher's variables alone make the number of threads 1."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched()
    assert main(["sample", str(tiny), "--count", "3", "--out", str(tmp_path / "out")]) == 0
    assert record(tmp_path / "out")["protocol"]["threads"] == 1
    assert main(["sample", str(tiny), "--out", str(tmp_path / "out"), "--overwrite"]) == 2
    assert "--overwrite is for one process" in capsys.readouterr().err


def test_a_folder_keeps_its_number_of_threads(alone, tiny, tmp_path, capsys):
    shutil.copytree(alone / "npz", tmp_path / "out")
    assert record(tmp_path / "out")["protocol"]["threads"] == 1
    assert main([*options(tiny, tmp_path / "out", "npz"), "--threads", "2"]) == 2
    assert "threads is 1 there and 2 here" in capsys.readouterr().err
    out = tmp_path / "plain"
    assert main(["sample", str(tiny), "--steps", "2", "--count", "1", "--out", str(out)]) == 0
    assert record(out)["protocol"]["threads"] is None  # such a folder agrees with any number
    words = ["--steps", "2", "--count", "2", "--out", str(out), "--threads", "1"]
    assert main(["sample", str(tiny), *words]) == 0


def test_archives_grow_and_hold_each_seed_once(tiny, tmp_path, alone):
    out = tmp_path / "out"
    assert main(options(tiny, out, count=13)) == 0
    assert main(options(tiny, out)) == 0
    assert numbers(out) == list(range(25))
    assert sorted(p.name for p in out.glob("*.tar")) == [
        "0000000000-0000000009.tar",
        "0000000010-0000000012.tar",
        "0000000013-0000000019.tar",
        "0000000020-0000000024.tar",
    ]
    listed = record(out)["files"]
    assert sorted(p.name for p in out.glob("*.tar")) == [n for n in listed if n.endswith(".tar")]
    ours, theirs = load_images(str(out)), load_images(str(alone / "webdataset"))
    assert len(ours) == len(theirs) == 25
    assert np.abs(ours[14][0].int().numpy() - theirs[14][0].int().numpy()).max() <= 1
    assert main([*options(tiny, out, steps=3, count=2), "--overwrite"]) == 0
    assert [p.name for p in out.glob("*.tar")] == ["0000000000-0000000001.tar"]


def test_an_archive_that_was_cut_or_deleted_is_drawn_again(tiny, tmp_path, alone, capsys):
    out = tmp_path / "out"
    shutil.copytree(alone / "webdataset", out)
    (out / "0000000000-0000000009.tar").unlink()
    path = out / "0000000010-0000000019.tar"
    path.write_bytes(path.read_bytes()[:-100])
    assert main(options(tiny, out)) == 0
    assert "20 images drawn, 5 were there" in capsys.readouterr().out
    assert contents(out) == contents(alone / "webdataset")


def test_another_protocol_or_size_of_shards_is_refused(alone, tiny, tmp_path, capsys):
    shutil.copytree(alone / "npz", tmp_path / "out")
    before = contents(tmp_path / "out")
    for changes, message in (
        ({"steps": 3}, "timesteps is"),
        ({"shard-size": 5}, "shard-size is 10 there and 5 here"),
        ({"batch-size": 5}, "batch-size is 4 there and 5 here"),
    ):
        assert main(options(tiny, tmp_path / "out", "npz", **changes)) == 2
        assert message in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_folder_that_disappears_is_told_in_one_sentence(tiny, tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "out", SampleJob._draw

    def draw(self, batch):
        shutil.rmtree(out)
        return real(self, batch)

    monkeypatch.setattr(SampleJob, "_draw", draw)
    assert main(options(tiny, out)) == 2
    assert f"{out} has disappeared while this run was writing there" in capsys.readouterr().err
    assert not out.exists()


def test_a_full_disk_leaves_whole_shards_and_no_lease(tiny, tmp_path, capsys, monkeypatch):
    out, real, calls = tmp_path / "out", SampleJob._picture, []

    def picture(self, number, image):
        calls.append(number)
        if len(calls) == 15:
            raise OSError(28, "No space left on device", str(out / "x"))
        return real(self, number, image)

    monkeypatch.setattr(SampleJob, "_picture", picture)
    assert main(options(tiny, out)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == [
        FOLDER,
        "0000000000-0000000009.tar",
        "run.json",
    ]
    assert [p.name for p in (out / FOLDER).iterdir()] == ["0000000000-0000000009.json"]


def test_a_damaged_record_of_a_shard_and_an_unreadable_lease_are_named(
    alone, tiny, tmp_path, capsys
):
    shutil.copytree(alone / "webdataset", tmp_path / "out")
    path = tmp_path / "out" / FOLDER / "0000000000-0000000009.json"
    path.write_text("{")
    assert main(options(tiny, tmp_path / "out")) == 2
    assert f"{path} is not the record of a shard" in capsys.readouterr().err
    record = ShardRecord("a", 1, ["../outside.tar"], 1, "", 0.0, 0.0, "w")
    path.write_text(json.dumps(asdict(record)))
    assert main(options(tiny, tmp_path / "out")) == 2
    assert "it names a file outside of its folder" in capsys.readouterr().err
    path.unlink()
    lease = path.with_suffix(".lease")
    lease.mkdir()
    assert main(options(tiny, tmp_path / "out")) == 2
    assert f"the lease {lease} cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_overwriting_waits_for_nobody_and_takes_nothing_from_those_at_work(
    tiny, tmp_path, interrupted, capsys
):
    interrupted(tmp_path / "out", 2)
    assert main([*options(tiny, tmp_path / "out"), "--overwrite"]) == 2
    assert "is being written by another run" in capsys.readouterr().err
    assert main(options(tiny, tmp_path / "out", steps=3)) == 2  # it is not empty: somebody works
    assert "another protocol" in capsys.readouterr().err


@pytest.mark.slow
def test_status_of_a_run_that_goes_on_and_of_one_that_was_killed(
    tiny, tmp_path, interrupted, capsys
):
    out = tmp_path / "out"
    process = interrupted(out, 5)
    assert main(["status", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["items"], told["total"], told["shards"], told["in_hand"]) == (10, 25, 1, 1)
    assert told["seconds_left"] > 0
    (worker,) = told["workers"]
    assert worker["name"].endswith(f"-{process.pid}")
    assert worker["is_present"]
    assert worker["in_hand"] == ["0000000010-0000000019"]
    process.kill()
    process.wait()
    assert main(["status", str(out)]) == 0
    told = capsys.readouterr().out
    assert "sample: 10 of 25 items in 1 shards; 0 shards in hand" in told
    assert "; gone" in told
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run.json, so no run of this program" in capsys.readouterr().err


@pytest.mark.parametrize("store", ["webdataset", pytest.param("parquet", marks=pytest.mark.slow)])
def test_archives_are_data_to_us_and_to_others(store, alone):
    data = load_images(str(alone / store))
    files = load_images(str(alone / "files"))
    assert len(data) == 25
    for index in range(25):
        assert (data[index][0] == files[index][0]).all()
    names = sorted(str(p) for p in (alone / store).glob("*-*.*"))
    command = [sys.executable, "-W", "ignore", "-c", OTHERS, store, *names]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seeds, pixels = json.loads(told.splitlines()[-1])
    assert seeds == list(range(25))
    assert pixels == files[24][0].numpy().squeeze().tolist()


def test_npz_holds_what_the_files_show(alone):
    files = load_images(str(alone / "files"))
    with np.load(alone / "npz" / "0000000010-0000000019.npz") as archive:
        assert archive["seeds"].tolist() == list(range(10, 20))
        assert (archive["images"][3] == files[13][0].numpy().squeeze()).all()


def test_evaluations_of_a_model_go_on_and_do_not_depend_on_who_drew(tiny, tmp_path, monkeypatch):
    from ddim.runs import evaluate

    monkeypatch.setattr(evaluate, "SIZE", 10)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", images=rng.integers(0, 256, (60, 8, 8), dtype=np.uint8))
    words = ["evaluate", str(tiny), "--reference", str(tmp_path / "real.npz"), "--count", "25"]
    words += ["--steps", "2", "--threads", "1", "--metrics", "kid-pixels,swd-pixels"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    whole = record(tmp_path / "a")["results"]
    assert len(read_records(tmp_path / "a")) == 3
    real, made = evaluate.EvaluateJob.make, []

    def make(self, missing):
        if made:
            raise KeyboardInterrupt
        made.append(missing)
        return real(self, missing)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.EvaluateJob, "make", make)
        assert main([*words, "--out", str(tmp_path / "b")]) == 130
    assert record(tmp_path / "b")["results"] == []
    assert main([*words, "--out", str(tmp_path / "b")]) == 0
    assert record(tmp_path / "b")["results"] == whole


@pytest.mark.parametrize("store", ["files", "webdataset", "npz"])
def test_pictures_that_are_measured_are_kept_if_asked(tiny, tmp_path, store, monkeypatch):
    from ddim.runs import evaluate

    monkeypatch.setattr(evaluate, "SIZE", 10)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", images=rng.integers(0, 256, (60, 8, 8), dtype=np.uint8))
    words = ["evaluate", str(tiny), "--reference", str(tmp_path / "real.npz"), "--count", "25"]
    words += ["--steps", "2", "--threads", "1", "--metrics", "kid-pixels", "--batch-size", "4"]
    assert main([*words, "--out", str(tmp_path / "plain")]) == 0
    out = tmp_path / "kept"
    assert main([*words, "--out", str(out), "--seed", "7", "--store", store]) == 0
    assert main(options(tiny, tmp_path / "drawn", "files", seed=7)) == 0
    if store == "npz":
        parts = [np.load(path)["images"] for path in sorted(out.glob("*.npz"))]
        found = np.concatenate(parts)[:, None]
    else:
        found = np.stack([image.numpy() for image, _ in load_images(str(out))])
    assert (found == np.stack([i.numpy() for i, _ in load_images(str(tmp_path / "drawn"))])).all()
    files = record(out)["files"]
    assert files == sorted(p.name for p in out.iterdir() if p.name[0] == "0")
    lost = out / files[1]
    before = lost.read_bytes()
    lost.unlink()  # what is lost is drawn again
    assert main([*words, "--out", str(out), "--seed", "7", "--store", store]) == 0
    assert lost.read_bytes() == before
    assert record(tmp_path / "plain")["files"] == []


def test_pictures_that_are_there_are_not_kept_again(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", images=rng.integers(0, 256, (60, 8, 8), dtype=np.uint8))
    words = ["evaluate", str(tmp_path / "real.npz"), "--reference", str(tmp_path / "real.npz")]
    assert main([*words, "--store", "npz"]) == 2
    assert "--store has no effect on" in capsys.readouterr().err
    assert main([*words, "--picture", "jpg"]) == 2
    assert "--picture acts only with --store" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_measure_what_one_process_measures(tiny, tmp_path, capfd):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", images=rng.integers(0, 256, (60, 8, 8), dtype=np.uint8))
    words = ["evaluate", str(tiny), "--reference", str(tmp_path / "real.npz"), "--count", "25"]
    words += ["--steps", "2", "--threads", "1", "--metrics", "kid-pixels,swd-pixels"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert main([*words, "--out", str(tmp_path / "two"), "--workers", "2"]) == 0
    assert "Traceback" not in capfd.readouterr().err  # of a process
    assert record(tmp_path / "two")["results"] == record(tmp_path / "one")["results"]


def test_blocks_divide_every_range_once():
    for first, count, size, origin in [
        (0, 1, 1, 0),
        (7, 30, 10, 0),
        (7, 30, 10, 7),
        (95, 5, 10, 0),
    ]:
        blocks = Blocks(first, first + count, size, origin)
        assert [n for block in blocks for n in block.items] == list(range(first, first + count))
        assert len({block.name for block in blocks}) == len(blocks)
        assert all(0 < len(block.items) <= size for block in blocks)
    assert Blocks(7, 37, 10)[1].name == Blocks(0, 100, 10)[1].name
    assert len(Blocks(0, 2**32, 1000)) == 4294968


def test_a_record_on_the_way_that_lists_all_does_not_end_a_run(tiny, tmp_path, monkeypatch):
    """What is made of all pictures together is made, although the last record told of them all."""
    monkeypatch.setattr(sharing, "_SHARE", 1e9)
    assert main(options(tiny, tmp_path / "out")) == 0
    assert (tmp_path / "out" / "grid.png").is_file()
    assert record(tmp_path / "out")["execution"]["finished"] is True


def test_two_jobs_share_a_folder_in_one_process(tiny, tmp_path):
    """Threads of one process are as any two: together they draw each picture once."""
    given = {"model": str(tiny), "steps": 4, "count": 24, "batch_size": 2, "out": str(tmp_path)}
    made = []

    def run():
        made.append(execute(SampleJob(SampleRequest(**given), Control())).made)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(made) == 24
    assert len(list(tmp_path.glob("0*.png"))) == 24


RAY = """
import os, signal, sys, threading, time
from pathlib import Path
from ddim.cli import main
from ddim.runs.leases import Leases
out = Path(sys.argv[1])
def kill():
    import json
    while True:  # the first actor that holds a shard
        for path in Leases(out / ".shards").present():
            if not path.name.startswith("worker-"):
                os.kill(int(json.loads(path.read_text())["worker"].rpartition("-")[2]), 9)
                print("killed", path.name, flush=True)
                return
        time.sleep(0.01)
threading.Thread(target=kill, daemon=True).start()
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_ray_draws_the_same_bytes_also_where_an_actor_is_killed(tiny, tmp_path):
    pytest.importorskip("ray")
    assert main(options(tiny, tmp_path / "alone", steps=20)) == 0
    out = tmp_path / "out"
    words = [str(out), *options(tiny, out, engine="ray", steps=20)]
    command = [sys.executable, "-W", "ignore", "-c", RAY, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "killed" in done.stdout
    assert contents(out) == contents(tmp_path / "alone")
    assert numbers(out) == list(range(25))
    assert record(out)["results"] == record(tmp_path / "alone")["results"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "table", "reconstruct", "encode"])
def test_ray_gives_the_numbers_of_one_process(command, tiny, tmp_path):
    """Also of what is measured and encoded."""
    pytest.importorskip("ray")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    data = str(tmp_path / "real.npz")
    np.savez(data, images=images)
    measured = ["--reference", data, "--metrics", "kid-pixels,swd-pixels", "--count", "20"]
    words = {
        "evaluate": [*measured, "--steps", "2", "--store", "webdataset"],
        "table": [*measured, "--eta", "0,1", "--steps", "2,3"],
        "reconstruct": ["--data", data, "--count", "10", "--method", "ddim,o-belm", "--steps", "3"],
        "encode": ["--data", data, "--count", "20", "--shard-size", "8", "--steps", "3"],
    }[command]
    words = [command, str(tiny), *words, "--threads", "1"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    script = "import sys; from ddim.cli import main; sys.exit(main(sys.argv[1:]))"
    rayed = [*words, "--out", str(tmp_path / "ray"), "--engine", "ray"]
    run = [sys.executable, "-W", "ignore", "-c", script, *rayed]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    times = ("seconds", "speedup")
    kept = [
        [{k: v for k, v in row.items() if k not in times} for row in record(out)["results"]]
        for out in (tmp_path / "one", tmp_path / "ray")
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) > 1
    workers = {r.worker for r in read_records(tmp_path / "ray")}
    assert workers.isdisjoint(r.worker for r in read_records(tmp_path / "one"))
    for kind in ("*.tar", "*.safetensors"):
        there = [sorted((tmp_path / out).glob(kind)) for out in ("one", "ray")]
        assert [p.read_bytes() for p in there[0]] == [p.read_bytes() for p in there[1]]
