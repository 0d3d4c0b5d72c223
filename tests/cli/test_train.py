"""``ddim train`` as users start it: by itself, killed, on a full disk, on two processes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ddim.cli import main
from ddim.cli.train import _tell_end
from ddim.files import locked
from ddim.training.config import PRESETS
from ddim.training.trainer import TrainResult

NPZ = Path(__file__).parents[1] / "data" / "fashion_mnist_2048.npz"
TINY = [
    "--block-out-channels",
    "8,16",
    "--batch-size",
    "8",
    "--lr-warmup-steps",
    "2",
    "--validation-images",
    "16",
    "--preview-every",
    "0",
]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0"),
]


def ddim(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "ddim", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_what_the_command_trains_is_sampled_by_the_other_command_and_by_plain_diffusers(tmp_path):
    out = tmp_path / "model"
    trained = ddim("train", "--data", NPZ, "--out", out, *TINY, "--images", 32, "--log-every", 2)
    assert trained.returncode == 0, trained.stderr
    said = trained.stdout.splitlines()
    assert said[0] == (
        "data: 1024 grey images of 28x28 (width x height), 16 of them held out, labels of 10 "
        "classes (not used)"
    )
    assert [line[:25] for line in said if line.startswith("step 2/4")] == [
        "step 2/4  16 images  loss"
    ]
    short = [line for line in said if line.startswith("note: a new network learns little in 4 ")]
    assert short == [said[-2]] * 2  # at the start and at the end
    assert trained.stdout.endswith(f"sample it with: ddim sample {out}\n")
    assert any(p.name.startswith("events.out.tfevents") for p in (out / "log").iterdir())
    card = json.loads((out / "card.json").read_text())
    assert card["command"] == (
        f"ddim train --data {NPZ} --out {out} --validation-images 16 --block-out-channels 8,16 "
        "--images 32 --batch-size 8 --lr-warmup-steps 2 --preview-every 0 --log-every 2"
    )
    drawn = ["sample", str(out), "--steps", "2", "--out"]
    assert main([*drawn, str(tmp_path / "images"), "--count", "2"]) == 0
    prior = json.loads((out / "prior.json").read_text())
    assert np.shape(prior["image"]) == (1, 28, 28)
    assert main([*drawn, str(tmp_path / "informed"), "--count", "1", "--prior", "data"]) == 0
    assert {p.name for p in (tmp_path / "images").iterdir()} - {".shards"} == {
        "000000.png",
        "000001.png",
        "grid.png",
        "run.json",
    }
    with Image.open(tmp_path / "images" / "000001.png") as picture:
        assert picture.size == (28, 28)
    plain = diffusers.DDIMPipeline.from_pretrained(out)
    assert type(plain.scheduler) is diffusers.DDIMScheduler
    plain.set_progress_bar_config(disable=True)
    assert plain(num_inference_steps=2).images[0].size == (28, 28)


@pytest.fixture
def captioned(tmp_path):
    """A folder of pictures with a metadata.jsonl, as Hugging Face's imagefolder has it."""
    folder, rows = tmp_path / "pictures", []
    folder.mkdir()
    for i in range(20):
        name, colour = [("red", (255, 0, 0)), ("blue", (0, 0, 255))][i % 2]
        Image.new("RGB", (16, 16), colour).save(folder / f"{i}.png")
        rows.append(
            json.dumps(
                {
                    "file_name": f"{i}.png",
                    "text": f"a {name} square" + " on a black background" * (i == 3) * 5,
                }
            )
        )
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.mark.slow
def test_an_epsilon_text_model_becomes_a_zero_snr_one_that_plain_diffusers_samples(
    tmp_path, tiny_text, captioned, capsys
):
    out = tmp_path / "model"
    options = [
        "--prediction-type",
        "v_prediction",
        "--rescale-betas-zero-snr",
        "--images",
        16,
        "--batch-size",
        4,
        "--log-every",
        2,
    ]
    trained = ddim(
        "train",
        "--base",
        tiny_text,
        "--data",
        captioned,
        "--out",
        out,
        *options,
        "--preview-every",
        4,
    )
    assert trained.returncode == 0, trained.stderr
    assert (
        trained.stderr.splitlines()[-1]
        == f"ddim: 1 of 20 captions are longer than the 12 tokens that {tiny_text} reads, and are "
        "cut there."
    )
    assert "\nstep 2/4  8 images  loss " in trained.stdout
    assert ", 2 of them held out, 3 different captions\n" in trained.stdout
    assert trained.stdout.endswith(f"sample it with: ddim sample {out} --prompt '...'\n")
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    assert pipe.scheduler.config.rescale_betas_zero_snr
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.set_progress_bar_config(disable=True)
    guidance = {"guidance_scale": 3.0, "guidance_rescale": 0.7}
    picture = pipe("a red square", num_inference_steps=5, output_type="pt", **guidance).images
    assert picture.shape == (1, 3, 16, 16)
    assert torch.isfinite(picture).all()
    assert pipe.scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
    # The card says how to guide it: `ddim sample` does so, and the doctor misses nothing.
    card = json.loads((out / "card.json").read_text())
    assert (card["guidance_scale"], card["guidance_rescale"]) == (7.5, 0.7)
    assert (
        main(
            [
                "sample",
                str(out),
                "--prompt",
                "a red square",
                "--steps",
                "2",
                "--count",
                "1",
                "--out",
                str(tmp_path / "drawn"),
            ]
        )
        == 0
    )
    told = json.loads((tmp_path / "drawn" / "run.json").read_text())["protocol"]
    assert (told["guidance_scale"], told["guidance_rescale"]) == (7.5, 0.7)
    capsys.readouterr()
    for options, expected in (([], set()), (["--guidance-rescale", "0"], {"DDIM013"})):
        assert main(["doctor", str(out), "--steps", "50", "--json", *options]) == 0
        assert {f["code"] for f in json.loads(capsys.readouterr().out)["findings"]} & {
            "DDIM013"
        } == expected


def test_a_folder_of_another_commands_results_is_refused_and_a_finished_run_is_not_logged_again(
    tmp_path, alone, capsys, monkeypatch
):
    out = tmp_path / "out"
    run = ["train", "--data", "digits", "--out", str(out), *TINY, "--images", "16"]
    out.mkdir()
    (out / "run.json").write_text("{}")
    (out / "000000.png").touch()
    assert main(run) == 2
    assert capsys.readouterr().err == (
        f"ddim: {out} holds the results of another command (run.json), and no checkpoint of a run; "
        "use another --out.\n"
    )
    assert sorted(p.name for p in out.iterdir()) == ["000000.png", "run.json"]
    (out / "run.json").unlink()
    assert main(run) == 2
    assert "holds files that no run wrote, such as 000000.png; use" in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["000000.png"]
    (out / "000000.png").rename(out / "train.log")  # as a shell opens it, for what the run prints
    assert main(run) == 0
    assert "finished already" not in capsys.readouterr().out
    (out / "run.json").write_text("{}")  # of samples that were drawn into the model's folder
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr(
        "ddim.training.trainer.RunLog", lambda *args, **options: pytest.fail("logged")
    )
    assert main(run) == 0
    assert capsys.readouterr().out == (
        "The run was finished already, after 2 steps, and nothing was trained.\nThe model is in "
        f"{out}; sample it with: ddim sample {out}\n"
    )
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    shutil.rmtree(out / "unet")  # a model that is not whole is written anew
    assert main(run) == 0
    assert "finished already" not in capsys.readouterr().out
    assert (out / "unet").is_dir()


def test_the_help_names_every_preset_with_its_note(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = capsys.readouterr().out
    assert "--preset" in told
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.note}" in told


def test_columns_of_a_hub_data_set_are_chosen_by_name(tmp_path, monkeypatch, alone, capsys):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(np.full((8, 8), i * 20, np.uint8)) for i in range(10)]
    table = datasets.Dataset.from_list([{"scan": p, "kind": i % 2} for i, p in enumerate(pictures)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: table)
    run = ["train", "--data", "owner/set", "--out", str(tmp_path / "out"), *TINY, "--images", "8"]
    assert main([*run, "--image-column", "photo"]) == 2
    assert "ddim: owner/set has no column 'photo'; it has scan, kind.\n" in capsys.readouterr().err
    assert (
        main([*run, "--image-column", "scan", "--label-column", "kind", "--class-conditional"]) == 0
    )
    assert json.loads((tmp_path / "out" / "card.json").read_text())["data"]["classes"] == ["0", "1"]


def test_no_network_is_one_sentence(tmp_path, monkeypatch, alone, capsys):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach 'owner/set' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert main(["train", "--data", "owner/set", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "ddim: there is no folder or file 'owner/set' here, and the hub cannot be reached (no "
        "route to the hub); "
        "check the path if one was meant, else the network.\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_a_number_is_one_sentence(tmp_path, monkeypatch, alone, capsys):
    from ddim.training import loop

    usual = loop.training_loss
    monkeypatch.setattr(
        loop, "training_loss", lambda *args, **options: usual(*args, **options) * float("nan")
    )
    assert main(["train", "--data", "digits", "--out", str(tmp_path), *TINY, "--images", "32"]) == 2
    note, refusal = capsys.readouterr().err.splitlines()
    assert note.startswith("ddim: the images of digits are of 10 classes, of which the model")
    assert refusal == (
        "ddim: the loss became nan at step 1; the last good checkpoint is none. "
        "Lower --learning-rate, or use --mixed-precision bf16 or no."
    )
    assert [p.name for p in tmp_path.iterdir()] == ["log"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, alone, capsys):
    (tmp_path / "file").touch()
    assert (
        main(
            [
                "train",
                "--data",
                "digits",
                "--out",
                str(tmp_path / "file" / "out"),
                *TINY,
                "--images",
                "32",
            ]
        )
        == 2
    )
    told = capsys.readouterr().err
    assert told.startswith(f"ddim: cannot read or write {tmp_path / 'file'}")
    assert told.count("\n") == 1


@pytest.mark.slow
def test_killed_at_any_moment_and_out_of_disk_it_goes_on_to_the_same_weights(tmp_path):
    options = [
        "train",
        "--data",
        "digits",
        *TINY,
        "--images",
        4000,
        "--checkpoint-every",
        5,
        "--log-every",
        5,
    ]
    out, checkpoints = tmp_path / "out", tmp_path / "out" / "checkpoints"

    def whole():
        return sorted(p.name for p in checkpoints.glob("[0-9]*")) if checkpoints.is_dir() else []

    running = subprocess.Popen(
        [sys.executable, "-m", "ddim", *map(str, options), "--out", str(out)],
        stdout=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 300
        while not whole() and time.monotonic() < until and running.poll() is None:
            time.sleep(0.02)
    finally:
        running.kill()
        running.wait()
    before = whole()
    assert before
    assert not (out / "model_index.json").exists()

    def small_disk():
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (50_000, 50_000)
        )  # the log fits, the weights do not

    failed = ddim(*options, "--out", out, preexec_fn=small_disk)
    assert failed.returncode == 2
    told = failed.stderr.splitlines()[-1]
    assert told.startswith(
        f"ddim: the checkpoint of step {int(before[-1]) + 5} cannot be written to {checkpoints} ("
    )
    assert "Traceback" not in failed.stderr
    assert whole() == before
    assert list(checkpoints.glob(".partial*")) == []

    for folder in (out, tmp_path / "unbroken"):
        done = ddim(*options, "--out", folder)
        assert done.returncode == 0, done.stderr
    cards = [
        json.loads((folder / "card.json").read_text()) for folder in (out, tmp_path / "unbroken")
    ]
    assert cards[0]["weight_hash"] == cards[1]["weight_hash"]


@pytest.mark.slow
def test_two_processes_share_one_cache_of_latents(tmp_path, tiny_text, captioned):
    out = tmp_path / "out"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ddim",
        "train",
    ]
    options = [
        "--base",
        tiny_text,
        "--data",
        captioned,
        "--out",
        out,
        "--images",
        32,
        "--batch-size",
        4,
        "--cache-latents",
        "disk",
    ]
    command = list(map(str, [*launch, *options, "--train-text-encoder"]))
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    card = json.loads((out / "card.json").read_text())
    assert (card["processes"], card["step"], card["images_seen"]) == (2, 4, 32)
    assert not list(out.glob("*latents*"))


LAUNCHED = """
import os, sys
import numpy as np
from ddim.cli import main
from ddim.training import loop

usual, drawn = loop.training_loss, []

def recorded(network, x0, **options):
    if "weights" in options:
        drawn.append((x0.numpy().copy(), options["noise"].numpy().copy()))
    return usual(network, x0, **options)

loop.training_loss = recorded
code = main(sys.argv[2:])
x0, noise = zip(*drawn)
np.savez(f"{sys.argv[1]}/rank-{os.environ['RANK']}.npz", x0=x0, noise=noise)
sys.exit(code)
"""


@pytest.mark.slow
def test_two_processes_train_one_model_on_different_images_and_noise_and_resume(tmp_path):
    script, out = tmp_path / "launched.py", tmp_path / "out"
    script.write_text(LAUNCHED)
    options = [
        "train",
        "--data",
        "digits",
        "--out",
        out,
        *TINY,
        "--images",
        96,
        "--checkpoint-every",
        2,
        "--keep-checkpoints",
        9,
    ]

    def run(launcher):
        command = list(map(str, [*launcher, script, tmp_path, *options]))
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("The model is in ") == 1
        return [dict(np.load(tmp_path / f"rank-{rank}.npz")) for rank in (0, 1)]

    first, second = run(TORCHRUN)
    assert first["noise"].shape == (6, 8, 1, 8, 8)
    for name in ("noise", "x0"):
        assert not any(np.array_equal(a, b) for a, b in zip(first[name], second[name], strict=True))
    assert abs(np.corrcoef(first["noise"].ravel(), second["noise"].ravel())[0, 1]) < 0.05
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "0000002",
        "0000004",
        "0000006",
    ]
    card = json.loads((out / "card.json").read_text())
    assert (card["processes"], card["images_seen"]) == (2, 96)
    assert card["command"].startswith("torchrun --nproc-per-node 2 -m ddim train --data digits")

    for step in ("0000004", "0000006"):
        (out / "checkpoints" / step).rename(tmp_path / step)
    again = run(ACCELERATE)[0]
    assert np.array_equal(again["noise"], first["noise"][2:])
    assert json.loads((out / "card.json").read_text())["step"] == 6
    alone = ddim(*options)
    assert alone.returncode == 0, alone.stderr  # any number of processes goes on with the run
    assert "The run was finished already, after 6 steps" in alone.stdout

    with locked(out):  # the second process learns of the refusal instead of waiting for ever
        done = subprocess.run(
            list(map(str, [*TORCHRUN, script, tmp_path, *options])),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
    assert done.returncode != 0
    assert f"ddim: {out} is being written by another run; wait for it, or" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_processes_that_a_launcher_stops_leave_after_the_running_step_with_a_checkpoint(
    tmp_path, launcher
):
    out = tmp_path / "out"
    options = ["--log-every", 1_000_000, "--checkpoint-every", 1_000_000, "--images", 1_000_000]
    command = [*launcher, "-m", "ddim", "train", "--data", "digits", "--out", out]
    running = subprocess.Popen(
        list(map(str, [*command, *TINY, *options])),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        for line in running.stdout:
            if line.startswith("step 5/"):  # by now the signals are held
                break
        running.send_signal(signal.SIGTERM)
        rest, _ = running.communicate(timeout=300)
    finally:
        running.kill()
    assert rest.count("Stopped at step ") == 1
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert f"Stopped at step {int(checkpoint.name)} with a checkpoint" in rest
    assert f"ddim sample {checkpoint} draws with what there is." in rest
    assert (checkpoint / "training" / "record.json").is_file()


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_the_run_with_a_checkpoint(tmp_path):
    termios = pytest.importorskip("termios")
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    here, there = os.openpty()

    def with_this_terminal():
        os.setsid()
        fcntl.ioctl(there, termios.TIOCSCTTY, 0)

    options = ["--data", "digits", "--out", str(out), *TINY, "--images", "1000000"]
    running = subprocess.Popen(
        [sys.executable, "-m", "ddim", "train", *options, "--log-every", "1"],
        stdin=there,
        stdout=there,
        stderr=there,
        preexec_fn=with_this_terminal,
    )
    try:
        os.close(there)
        shown = b""
        while b"step 5/" not in shown:
            shown += os.read(here, 4096)
        os.close(here)
        assert running.wait(timeout=300) == 0
    finally:
        running.kill()
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert (checkpoint / "training" / "record.json").is_file()


def test_a_run_that_stopped_says_what_draws_with_its_checkpoint(tmp_path, capsys):
    result = TrainResult(tmp_path, 1200, False, None, (), True)
    checkpoint = tmp_path / "checkpoints" / "0001200"
    for prompt in ("", " --prompt '...'"):
        _tell_end(result)
        assert capsys.readouterr().out == (
            "Stopped at step 1200 with a checkpoint; the same command goes on from there, and "
            f"ddim sample {checkpoint}{prompt} draws with what there is.\n"
        )
        (checkpoint / "text_encoder").mkdir(parents=True, exist_ok=True)
