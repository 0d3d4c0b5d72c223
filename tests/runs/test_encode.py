"""The codes of a folder: whoever encodes, however it ends, the bytes are the same."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.conftest import record

from ddim import UnconditionalPipeline
from ddim.cli import main
from ddim.data.sources import load_images
from ddim.errors import DataError
from ddim.inversion.code_files import load_code, save_code
from ddim.runs import encode
from ddim.runs.shards import read_records
from ddim.runs.status import Watch

NAMES = [f"{n:010d}-{min(n + 9, 26):010d}.safetensors" for n in (2, 12, 22)]
"""The parts of 25 images from number 2 on, in shards of 10."""


def options(model, data, out, **changes):
    words = {"data": data, "seed": 2, "count": 25, "steps": 3, "shard-size": 10, "batch-size": 4}
    given = [w for name, value in (words | changes).items() for w in (f"--{name}", str(value))]
    return ["encode", str(model), "--out", str(out), *given]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, images=images, labels=np.arange(30) % 4)
    return path


@pytest.fixture(scope="module")
def alone(tiny, data, tmp_path_factory):
    """What one process encodes."""
    folder = tmp_path_factory.mktemp("alone") / "codes"
    assert main(options(tiny, data, folder)) == 0
    return folder


def test_a_folder_holds_what_the_pipeline_encodes(alone, tiny, data):
    assert sorted(contents(alone)) == NAMES
    whole, images = load_code(alone), load_images(str(data))
    pipe, threads = UnconditionalPipeline.from_pretrained(tiny), torch.get_num_threads()
    x0 = torch.stack([images[i][0] for i in range(2, 27)]) / 127.5 - 1
    torch.set_num_threads(1)
    parts = [pipe.encode(x0[n : n + 10], 3, batch_size=4) for n in (0, 10, 20)]
    torch.set_num_threads(threads)
    assert torch.equal(whole.states, torch.cat([part.states for part in parts], 1))
    assert whole.timesteps == parts[0].timesteps
    rows = record(alone)["results"]
    assert [row["file"] for row in rows] == NAMES
    assert [(row["first"], row["last"], row["images"]) for row in rows] == [
        (2, 11, 10),
        (12, 21, 10),
        (22, 26, 5),
    ]
    assert record(alone)["evaluations"] == parts[0].evaluations
    rms = parts[1].rms()
    told = [rows[1][name] for name in ("rms", "rms_min", "rms_max")]
    assert told == [float(rms.mean()), float(rms.min()), float(rms.max())]


@pytest.mark.parametrize(
    "how", [pytest.param("workers", marks=pytest.mark.slow), "launched", "interrupted"]
)
def test_the_bytes_do_not_depend_on_who_encodes(how, alone, tiny, data, tmp_path, monkeypatch):
    out, words = tmp_path / "codes", options(tiny, data, tmp_path / "codes")
    if how == "workers":
        assert main([*words, "--workers", "2"]) == 0
    elif how == "launched":
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(words) == 0
    else:
        real, made = encode.save_code, []

        def stop(code, path):
            made.append(path)
            if len(made) == 2:
                raise KeyboardInterrupt
            real(code, path)

        monkeypatch.setattr(encode, "save_code", stop)
        assert main(words) == 130
        monkeypatch.undo()
        assert len(contents(out)) == 1
        assert main(words) == 0
    assert contents(out) == contents(alone)
    assert record(out)["results"] == record(alone)["results"]
    assert [r.files for r in read_records(out)] == [[name] for name in NAMES]
    assert [n for r in read_records(out) for n in r.numbers] == list(range(2, 27))
    assert Watch(out).look().is_done


@pytest.mark.slow
def test_a_run_that_is_killed_before_a_record_goes_on(alone, tiny, data, tmp_path, capsys):
    out = tmp_path / "codes"
    kill = (
        "import os, sys; from ddim.runs import encode; from ddim.cli import main\n"
        "real, made = encode.save_code, []\n"
        "def save(code, path):\n"
        "    real(code, path); made.append(path); len(made) < 3 or os._exit(9)\n"
        "encode.save_code = save\n"
        "main(sys.argv[1:])\n"
    )
    words = options(tiny, data, out)
    assert subprocess.run([sys.executable, "-c", kill, *words]).returncode == 9
    assert [r.files for r in read_records(out)] == [[name] for name in NAMES[:2]]
    assert main(words) == 0
    assert "25 images encoded (20 of them were there) by o-belm" in capsys.readouterr().out
    assert contents(out) == contents(alone)
    assert record(out)["results"] == record(alone)["results"]


def test_a_folder_whose_last_codes_are_not_there_yet_is_not_decoded(alone, tiny, tmp_path, capsys):
    shutil.copytree(alone, tmp_path / "codes")
    (tmp_path / "codes" / NAMES[2]).unlink()
    words = ["decode", str(tiny), "--code", str(tmp_path / "codes"), "--count", "5"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "holds the codes of 20 of 25 images; go on with" in capsys.readouterr().err


@pytest.mark.parametrize(("seed", "count"), [(0, 25), (8, 6), (24, 1)])
def test_a_folder_is_decoded_as_one_file(seed, count, alone, tiny, tmp_path):
    save_code(load_code(alone), tmp_path / "code.safetensors")
    pictures = []
    for name, code in (("whole", tmp_path / "code.safetensors"), ("parts", alone)):
        words = ["decode", str(tiny), "--code", str(code), "--out", str(tmp_path / name)]
        assert main([*words, "--seed", str(seed), "--count", str(count)]) == 0
        pictures.append({p.name: p.read_bytes() for p in (tmp_path / name).glob("0*.png")})
    assert pictures[0] == pictures[1]
    assert len(pictures[1]) == count


def test_the_parts_that_are_not_asked_for_are_not_read(alone, tiny, tmp_path, capsys):
    copy = tmp_path / "codes"
    shutil.copytree(alone, copy)
    damaged = (copy / NAMES[2]).read_bytes()
    (copy / NAMES[2]).write_bytes(damaged[:-9] + bytes([damaged[-9] ^ 1]) + damaged[-8:])
    words = ["decode", str(tiny), "--code", str(copy), "--out", str(tmp_path / "out")]
    assert main([*words, "--count", "20"]) == 0
    with pytest.raises(DataError, match=f"{NAMES[2]}: the code is damaged"):
        load_code(copy)
    capsys.readouterr()
    assert main(words) == 2
    assert "the code is damaged: its states" in capsys.readouterr().err


def test_a_folder_of_other_codes_is_another_code(alone, tiny, data, tmp_path, capsys):
    """The pictures of one are not gone on with from the other."""
    out = str(tmp_path / "out")
    assert main(options(tiny, data, tmp_path / "other", seed=3)) == 0
    assert main(["decode", str(tiny), "--code", str(alone), "--out", out]) == 0
    capsys.readouterr()
    assert main(["decode", str(tiny), "--code", str(tmp_path / "other"), "--out", out]) == 2
    assert "another" in capsys.readouterr().err


@pytest.mark.slow
def test_classes_and_unsolved_steps_are_kept(tiny_classes, data, tmp_path, capsys):
    out = tmp_path / "codes"
    words = options(tiny_classes, data, out, method="fixed-point", steps=2)
    assert main(words) == 0
    said = capsys.readouterr().out
    assert load_code(out).labels.tolist() == [n % 4 for n in range(2, 27)]
    rows = record(out)["results"]
    unsolved = sum(row["unsolved_steps"] for row in rows)
    assert unsolved > 0
    assert f"{unsolved} steps were not solved to the tolerance" in said
    worst = max(row["residual_max"] for row in rows)
    assert f"The worst step is solved to {worst:.1e}." in said
    assert worst == float(load_code(out).residual.max())
    assert said.count("note: the codes of fixed-point have a root mean square from") <= 1


def test_codes_that_are_no_noise_are_told_once(tiny, data, tmp_path, capsys):
    assert main(options(tiny, data, tmp_path / "codes", steps=2)) == 0
    said = capsys.readouterr()
    rms = load_code(tmp_path / "codes").rms()
    span = f"from {float(rms.min()):.3g} to {float(rms.max()):.3g}"
    assert said.out.count(f"the codes of o-belm have a root mean square {span}") == 1
    assert "warning" not in said.err


def test_a_folder_without_all_of_its_parts_is_refused(alone, tmp_path):
    copy = tmp_path / "codes"
    shutil.copytree(alone, copy)
    (copy / NAMES[1]).unlink()
    with pytest.raises(DataError, match="lacks the codes of the images 12 to 21; run the command"):
        load_code(copy)
    for path in copy.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(DataError, match="holds no code that `ddim encode` wrote"):
        load_code(copy)


def test_what_a_code_file_holds_alone_is_refused(tiny, data, tmp_path, capsys, monkeypatch):
    for option in ("--workers 2", "--threads 1", "--lease 5", "--engine ray", "--overwrite"):
        words = ["encode", str(tiny), "--data", str(data), *option.split()]
        assert main(words) == 2
        named = option.split()[0]
        expected = f"{named} acts only with --shard-size; give both, or leave out {named}."
        assert expected in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    assert main(["encode", str(tiny), "--data", str(data)]) == 2
    assert "several processes were launched" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_another_request_in_the_folder_is_refused(alone, tiny, data, tmp_path, capsys):
    copy = tmp_path / "codes"
    shutil.copytree(alone, copy)
    for changes in ({"count": 24}, {"shard-size": 5}, {"steps": 4}, {"method": "bdia"}):
        assert main(options(tiny, data, copy, **changes)) == 2
        assert "another" in capsys.readouterr().err
    assert main([*options(tiny, data, copy, steps=4), "--overwrite"]) == 0
    assert len(load_code(copy).timesteps) == 4
