"""A run is a function of its configuration, whatever happens to it on the way."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.conftest import edit

from ddim.core.schedule import BETA_SCHEDULES, NoiseSchedule
from ddim.data.sources import load_images
from ddim.errors import CheckpointError, DataError, DDIMError, OutputError
from ddim.files import locked
from ddim.models.checkpoints import load_network, weight_hash
from ddim.models.facts import read_model
from ddim.training import draws, loop, monitoring, package, subject, trainer
from ddim.training.base import Base
from ddim.training.checkpoint import latest_checkpoint, prune
from ddim.training.config import TrainConfig
from ddim.training.division import divide
from ddim.training.loop import EMA, ema_decay_at, learning_rate_at
from ddim.training.monitoring import NonFiniteLossError
from ddim.training.network import make_network
from ddim.training.record import card_guidance
from ddim.training.trainer import train

TINY = {
    "data": "digits",
    "block_out_channels": (8, 16),
    "batch_size": 4,
    "images": 24,
    "lr_warmup_steps": 2,
    "validation_images": 8,
    "checkpoint_every": 2,
    "log_every": 1,
    "preview_every": 0,
    "keep_checkpoints": 9,
}


pytestmark = pytest.mark.usefixtures("alone")


def config(out, **options):
    return TrainConfig(out=str(out), **{**TINY, **options})


def steps_in(out):
    return sorted(int(p.name) for p in (out / "checkpoints").glob("[0-9]*"))


def record_of(folder):
    return json.loads((folder / "training" / "record.json").read_text())


def only_in_training(monkeypatch, replacement):
    """Puts a function in the place of the training loss, and leaves the one on held-out images
    alone."""
    usual = loop.training_loss

    def loss(network, x0, **options):
        return (replacement if "weights" in options else usual)(network, x0, **options)

    monkeypatch.setattr(loop, "training_loss", loss)
    return usual


# Numbers that are not finite


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(tmp_path, monkeypatch):
    calls = []

    def loss(network, x0, **options):
        calls.append(0)
        return usual(network, x0, **options) * (float("nan") if len(calls) == 5 else 1)

    usual = only_in_training(monkeypatch, loss)
    with pytest.raises(
        NonFiniteLossError,
        match=r"the loss became nan at step 5; the last good checkpoint is .*/0000004\. Lower",
    ):
        train(config(tmp_path, log_every=6))
    assert steps_in(tmp_path) == [2, 4]
    assert not (tmp_path / "model_index.json").exists()


def test_weights_that_overflow_are_never_a_checkpoint(tmp_path, monkeypatch):
    """A gradient may overflow where the loss does not: the weights are broken one step before the
    loss tells."""
    monkeypatch.setattr(
        loop, "learning_rate_at", lambda step, *_: float("inf") if step == 3 else 1e-4
    )
    with pytest.raises(
        NonFiniteLossError,
        match=(
            r"the largest weight became (nan|inf) at step 4; the last good checkpoint is "
            r".*/0000002\."
        ),
    ):
        train(config(tmp_path))
    assert steps_in(tmp_path) == [2]


def test_a_network_that_overflows_on_held_out_images_is_never_a_checkpoint(tmp_path, monkeypatch):
    """Weights that are huge, and finite, show in no training loss before the next step."""
    monkeypatch.setattr(monitoring, "validation_loss", lambda *_: float("nan"))
    with pytest.raises(
        NonFiniteLossError,
        match=r"the held-out loss became nan at step 2; the last good checkpoint is none\.",
    ):
        train(config(tmp_path))
    assert steps_in(tmp_path) == []


def test_one_image_trains_to_a_model_without_a_prior(tmp_path):
    np.savez(tmp_path / "one.npz", images=np.zeros((1, 8, 8), np.uint8))
    out = tmp_path / "out"
    train(config(out, data=str(tmp_path / "one.npz")))
    assert (out / "model_index.json").is_file()
    assert not (out / "prior.json").exists()


# Precision


@pytest.mark.slow
def test_bf16_trains_with_noise_and_loss_in_float32(tmp_path, monkeypatch):
    dtypes, inside = set(), set()

    def loss(network, x0, **options):
        result = usual(network, x0, **options)
        dtypes.update({x0.dtype, options["noise"].dtype, result.dtype})
        return result

    usual = only_in_training(monkeypatch, loss)
    make = subject.make_network

    def spied(*args):
        network = make(*args)
        network.conv_in.register_forward_hook(
            lambda module, inputs, output: inside.add((inputs[0].dtype, output.dtype))
        )
        return network

    monkeypatch.setattr(subject, "make_network", spied)
    result = train(
        config(
            tmp_path,
            mixed_precision="bf16",
            images=400,
            learning_rate=3e-3,
            validation_images=0,
            checkpoint_every=100,
        )
    )
    assert dtypes == {torch.float32}
    assert inside == {(torch.float32, torch.bfloat16)}
    losses = [value for _, value in result.losses]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5])
    weights = torch.load(
        tmp_path / "checkpoints" / "0000100" / "training" / "optimizer.pt", weights_only=True
    )
    assert {v.dtype for state in weights["state"].values() for v in state.values()} == {
        torch.float32
    }


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_fp16_is_refused_where_there_is_no_gpu(tmp_path):
    with pytest.raises(
        DDIMError,
        match=r"^--mixed-precision fp16 needs a GPU, and this run is on the CPU; use bf16 or no\.$",
    ):
        train(config(tmp_path / "out", mixed_precision="fp16"))
    assert not (tmp_path / "out").exists()


def test_a_base_of_half_precision_is_trained_in_float32(tmp_path):
    base = tmp_path / "base"
    train(config(base))
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path, {"format": "pt"})
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(config(tmp_path / "out", base=str(base), block_out_channels=None)).finished
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


# Resuming


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "gradient_accumulation": 2,
            "horizontal_flip": True,
            "dropout": 0.2,
            "class_conditional": True,
        },
    ],
)
def test_a_run_that_is_taken_up_again_ends_in_the_same_weights(tmp_path, options):
    whole = train(config(tmp_path, **options), revision="a")
    hashes = weight_hash(tmp_path)
    for step in steps_in(tmp_path)[1:]:
        shutil.rmtree(tmp_path / "checkpoints" / f"{step:07d}")
    rest = train(config(tmp_path, **options), revision="b")
    assert rest.losses == whole.losses[2:]
    assert weight_hash(tmp_path) == hashes
    log = [
        json.loads(line)["step"]
        for line in (tmp_path / "log" / "log.jsonl").read_text().splitlines()
    ]
    assert log == list(range(1, whole.step + 1))  # the steps that were taken twice are logged once
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["revisions"] == [{"step": 0, "revision": "a"}, {"step": 2, "revision": "b"}]
    assert card["weight_hash"] == hashes
    assert card["command"].startswith(f"ddim train --data digits --out {tmp_path}")
    assert card["processes"] == 1


def test_a_model_is_ready_for_a_hub_and_a_card_of_ones_own_is_kept(tmp_path):
    out = tmp_path / "a`name|<b>"
    train(config(out, images=8))
    text = (out / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "diffusers"
    assert head["pipeline_tag"] == "unconditional-image-generation"
    card = json.loads((out / "card.json").read_text())
    assert "# a\\`name\\|\\<b\\>\n" in text
    assert f"| parameters | {card['parameters']} |" in text
    assert f"| weights | {card['weight_hash']} |" in text
    own = text.replace("<!-- written by ddim train", "<!-- mine")
    (out / "README.md").write_text(own)
    (out / "model_index.json").unlink()
    train(config(out, images=8))
    assert (out / "model_index.json").is_file()
    assert (out / "README.md").read_text() == own


def test_a_log_whose_last_line_was_cut_off_is_mended(tmp_path):
    train(config(tmp_path, images=16))
    path = tmp_path / "log" / "log.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]) + '{"step": 3, "lo')
    shutil.rmtree(tmp_path / "checkpoints" / "0000004")
    train(config(tmp_path, images=16))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, name):
    number = getattr(signal, name)

    def interrupt(progress):
        if progress.step == 3:
            signal.raise_signal(number)

    before = signal.signal(number, signal.default_int_handler)  # it may be ignored, as under nohup
    try:
        result = train(config(tmp_path), on_progress=interrupt)
    finally:
        signal.signal(number, before)
    assert (result.finished, result.step, steps_in(tmp_path)) == (False, 4, [2, 4])
    assert not (tmp_path / "model_index.json").exists()
    assert train(config(tmp_path)).finished


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_all_processes_of_a_service_ends_the_run_with_a_checkpoint(tmp_path, name):
    number, told = getattr(signal, name), []

    def interrupt(progress):
        if progress.step == 3:
            for worker in multiprocessing.active_children():
                told.append(worker.pid)
                os.kill(worker.pid, number)
            signal.raise_signal(number)
            time.sleep(0.2)

    before = signal.signal(number, signal.default_int_handler)  # it may be ignored, as under nohup
    try:
        result = train(config(tmp_path, workers=1, images=200), on_progress=interrupt)
    finally:
        signal.signal(number, before)
    assert len(told) == 1
    assert (result.finished, result.step, steps_in(tmp_path)) == (False, 4, [2, 4])


def test_a_signal_that_is_ignored_stays_ignored_as_under_nohup(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = train(
            config(tmp_path), on_progress=lambda progress: signal.raise_signal(signal.SIGHUP)
        )
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.finished


def test_progress_that_cannot_be_shown_does_not_end_the_run(tmp_path):
    def closed(progress):
        raise BrokenPipeError(32, "Broken pipe")

    assert train(config(tmp_path), on_progress=closed).finished


def test_a_run_begins_with_what_was_found_and_ends_with_whether_it_was_long_enough(tmp_path):
    lines = []
    result = train(config(tmp_path, preview_every=None), on_start=lines.extend)
    parameters = sum(p.numel() for p in load_network(tmp_path).parameters())
    assert lines == [
        "data: 1500 grey images of 8x8 (width x height), 8 of them held out, labels of 10 classes "
        "(not used)",
        f"model: {parameters:,} parameters, float32, cpu",
        "run: 6 steps of 4 images, 0.0 passes over the data",
        f"previews: {tmp_path}/previews; tensorboard --logdir {tmp_path}/log",
        f"note: {result.shortness}",
    ]
    assert result.shortness.startswith("a new network learns little in 6 optimiser steps")
    assert [p.name for p in (tmp_path / "previews").iterdir()] == ["0000006.png"]
    with Image.open(tmp_path / "previews" / "0000006.png") as picture:
        assert picture.size == (4 * 128 + 5 * 2,) * 2  # 16 images of 8x8, 16 times as large


def test_the_time_is_estimated_after_the_first_steps(tmp_path):
    seen = []
    train(config(tmp_path, images=40, log_every=100, checkpoint_every=100), on_progress=seen.append)
    assert [progress.step for progress in seen] == [5, 10]
    assert seen[0].seconds_left > 0


def test_what_is_left_is_told_by_all_steps_but_the_first_and_by_what_comes_between(
    tmp_path, monkeypatch
):
    now, usual = [0.0], monitoring.Follower.follow

    def follow(self, result, **options):
        now[0] += 10.0 if result.step <= 5 else 1.0
        usual(self, result, **options)

    def draw(run, path):
        now[0] += 5.0
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(monitoring, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(monitoring.Follower, "follow", follow)
    monkeypatch.setattr(monitoring, "preview", draw)
    seen = []
    options = {"log_every": 5, "preview_every": 10, "checkpoint_every": 100}
    train(config(tmp_path, images=160, **options), on_progress=seen.append)  # 40 steps
    left = {progress.step: progress.seconds_left for progress in seen}
    assert left[5] == pytest.approx(35 * 10)
    assert left[10] == pytest.approx(30 * 1)
    assert left[20] == pytest.approx(20 * (15 + 5) / 15)  # a preview at step 10
    assert left[40] == 0


@pytest.mark.parametrize(
    ("options", "clips"),
    [
        ({}, True),
        ({"clip_sample": "off"}, False),
        ({"prediction_type": "v_prediction"}, False),
        ({"prediction_type": "v_prediction", "clip_sample": "on"}, True),
        ({"base": True}, False),
    ],
)
def test_previews_are_clipped_as_the_saved_model_is(tmp_path, monkeypatch, options, clips):
    """Epsilon prediction without a base is clipped; a base is sampled as it was."""
    if "base" in options:
        train(config(tmp_path / "base", clip_sample="off"))
        options = {"base": str(tmp_path / "base"), "block_out_channels": None}
        AcceleratorState._reset_state(reset_partial_state=True)
    seen, usual = [], monitoring.ModelDenoiser
    monkeypatch.setattr(
        monitoring, "ModelDenoiser", lambda *args: seen.append(args[3].kind) or usual(*args)
    )
    out = tmp_path / "out"
    train(config(out, preview_every=6, preview_count=1, preview_steps=1, **options))
    assert seen == ["static" if clips else "none"]
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["clip_sample"] is clips


def test_a_run_of_the_version_before_goes_on_as_it_began(tmp_path):
    """It held out the end of the data, recorded no revisions, and had fewer options."""
    train(config(tmp_path, images=8), revision="a")
    path = tmp_path / "checkpoints" / "0000002" / "training" / "record.json"
    record = json.loads(path.read_text())
    del (
        record["held_out_images"],
        record["revisions"],
        record["config"]["center_crop"],
        record["config"]["image_column"],
    )
    path.write_text(json.dumps(record | {"config": {**record["config"], "images": 16}}))
    train(config(tmp_path, images=16), revision="b")
    after = record_of(tmp_path / "checkpoints" / "0000004")
    assert after["held_out_images"] == list(range(1492, 1500))
    assert after["revisions"] == [{"step": 2, "revision": "b"}]


@pytest.mark.parametrize("found", ["model_index.json", "card.json", "unet", "scheduler"])
def test_a_model_of_someone_elses_is_not_replaced(tmp_path, found):
    (tmp_path / found).mkdir()
    (tmp_path / found / "precious").touch()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        OutputError,
        match=(
            rf"holds {found} and no checkpoint of a run that made them, and the trained .* use "
            r"another --out"
        ),
    ):
        train(config(tmp_path, data="a missing folder/x"))
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == sorted(
        [found, f"{found}/precious", "checkpoints"]
    )


def test_other_options_than_the_folders_are_refused(tmp_path):
    train(config(tmp_path, images=8))
    with pytest.raises(
        CheckpointError,
        match=(
            r"holds a run with learning_rate=0\.0004, and learning_rate=0\.001 was asked for; use "
            r"another"
        ),
    ):
        train(config(tmp_path, images=8, learning_rate=1e-3))
    with pytest.raises(
        CheckpointError,
        match=(
            r"a run that is finished, of images=8; to go on from its model give --base .*, another "
            r"--out"
        ),
    ):
        train(config(tmp_path, images=12))
    with pytest.raises(
        CheckpointError,
        match=(
            r"holds a run with images=8, and images=4 was asked for; use another --out, or the same"
        ),
    ):
        train(config(tmp_path, images=4))
    path = tmp_path / "checkpoints" / "0000002" / "training" / "record.json"
    edit(path, processes=0)
    with pytest.raises(CheckpointError, match=r"began on 0 processes, which is no number of them"):
        train(config(tmp_path, images=8, checkpoint_every=1, workers=0))  # a free option may differ


def test_data_that_changed_are_told_from_the_option_of_the_same_name(tmp_path):
    source, out = tmp_path / "set.npz", tmp_path / "out"
    np.savez(source, images=np.zeros((40, 8, 8), np.uint8))
    train(config(out, data=str(source), images=8))
    np.savez(source, images=np.zeros((39, 8, 8), np.uint8))
    with pytest.raises(
        CheckpointError,
        match=(
            r"out holds a run whose data .*set\.npz had images=40, and there is images=39 now; use "
            r"another --out, or the data"
        ),
    ):
        train(config(out, data=str(source), images=8))


@pytest.mark.parametrize(
    ("beta", "card", "from_scratch", "expected"),
    [
        (0.01, {}, False, {}),
        (0.01, {"guidance_scale": 3.0}, False, {"guidance_scale": 3.0}),
        (1.0, {}, False, {"guidance_scale": 7.5, "guidance_rescale": 0.7}),
        (
            1.0,
            {"guidance_scale": 3.0, "guidance_rescale": 0.5},
            False,
            {"guidance_scale": 3.0, "guidance_rescale": 0.5},
        ),
        (
            1.0,
            {"guidance_scale": 3.0, "guidance_rescale": 0.0},
            False,
            {"guidance_scale": 3.0, "guidance_rescale": 0.7},
        ),
        (1.0, {"guidance_scale": 3.0}, True, {"guidance_scale": 7.5, "guidance_rescale": 0.7}),
    ],
)
def test_a_text_model_is_guided_as_its_base_and_with_rescale_at_zero_terminal_snr(
    tmp_path, beta, card, from_scratch, expected
):
    (tmp_path / "card.json").write_text(json.dumps(card))
    schedule = NoiseSchedule.from_betas(torch.tensor([0.1, beta], dtype=torch.float64))
    options = config(
        tmp_path / "out", base=str(tmp_path), from_scratch=from_scratch, block_out_channels=None
    )
    for is_text in (True, False):
        base = Base(str(tmp_path), tmp_path, {}, {}, {}, is_text)
        assert card_guidance(options, base, schedule) == (expected if is_text else {})
    assert card_guidance(options, None, schedule) == {}
    (tmp_path / "card.json").write_text('{"guidance_scale": "much"}')
    if not from_scratch:
        with pytest.raises(
            CheckpointError,
            match=r"card\.json must hold a finite number as guidance_scale; got 'much'\.",
        ):
            card_guidance(
                options, base=Base(str(tmp_path), tmp_path, {}, {}, {}, True), schedule=schedule
            )


@pytest.mark.parametrize("name", ["record.json", "optimizer.pt", "network.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    train(config(tmp_path, images=8))
    (tmp_path / "checkpoints" / "0000002" / "training" / name).write_bytes(b"words")
    with pytest.raises(
        CheckpointError,
        match=(
            r"0000002 cannot be (read|restored) \(.*\); delete that folder to go on from an "
            r"earlier one"
        ),
    ):
        train(config(tmp_path, images=8))


# Disks


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("ddim.training.checkpoint.torch.save", full),
        ("ddim.training.checkpoint.safetensors.torch.save_file", full),
        ("ddim.training.checkpoint.os.fsync", full),
        ("pathlib.Path.rename", full),
    ],
)
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint_and_nothing_in_part(
    tmp_path, monkeypatch, place, error
):
    def fill(progress):
        if progress.step == 3:
            monkeypatch.setattr(place, error)

    with pytest.raises(
        OutputError,
        match=(
            r"^the checkpoint of step 4 cannot be written to .*/checkpoints \(No space left on "
            r"device\); mend"
        ),
    ):
        train(config(tmp_path), on_progress=fill)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["0000002"]
    monkeypatch.undo()
    assert train(config(tmp_path)).losses[0][0] == 3


def test_a_model_that_cannot_be_published_leaves_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "weight_hash", full)
    with pytest.raises(
        OutputError,
        match=(
            r"^the model cannot be written to .* \(No space left on device\); mend that, and the "
            r"same command"
        ),
    ):
        train(config(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "log"]
    monkeypatch.undo()
    result = train(config(tmp_path))
    assert (result.finished, result.losses) == (True, ())
    assert (tmp_path / "model_index.json").exists()


def test_weights_may_be_read_by_whoever_may_read_the_folder(tmp_path):
    before = os.umask(0o022)
    try:
        train(config(tmp_path, images=4))
    finally:
        os.umask(before)
    for path in tmp_path.rglob("unet/*.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 10, 11):
        (tmp_path / f"{step:07d}").mkdir()
    (tmp_path / ".0000012.partial").mkdir()
    prune(tmp_path, keep=2, best=2)
    assert sorted(int(p.name) for p in tmp_path.glob("[0-9]*")) == [2, 10, 11]
    assert latest_checkpoint(tmp_path) == tmp_path / "0000011"
    assert latest_checkpoint(tmp_path / "none") is None


# The folder


def test_a_folder_is_held_from_the_first_look_to_the_last_write(tmp_path, monkeypatch):
    def second(*args):
        with pytest.raises(
            OutputError,
            match=r"is being written by another run; wait for it, or use another --out\.$",
        ):
            train(config(tmp_path))
        seen.append(args[0])

    seen = []
    with locked(tmp_path):
        second("before the run")
    for place in ("make_subject", "publish"):
        usual = getattr(trainer, place)
        monkeypatch.setattr(trainer, place, lambda *args, f=usual, p=place: second(p) or f(*args))
    train(config(tmp_path, images=8))
    assert seen == ["before the run", "make_subject", "publish"]


def test_what_killed_runs_left_is_gone_after_a_run_and_nothing_else(tmp_path):
    debris = (
        *(".partial-model/unet", ".model.ab.partial/unet", "checkpoints/.partial-0000002/unet"),
        *("checkpoints/.0000002.partial/unet", "checkpoints/.0000001.old/unet"),
        *("previews/.0000003.png.9.partial", "log/.log.jsonl.9.partial", ".latents.bin.9.partial"),
    )
    for name in debris:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".mine").touch()
    train(config(tmp_path, images=8))
    assert [p for p in tmp_path.rglob(".*")] == [tmp_path / ".mine"]
    train(config(tmp_path, images=8))


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(DataError):
        train(config(tmp_path / "runs" / "out", data="./none"))
    assert not (tmp_path / "runs" / "out").exists()


def test_the_best_is_the_one_of_least_loss_on_held_out_images(tmp_path, monkeypatch):
    held = iter([0.5, 0.2, 0.3])
    monkeypatch.setattr(monitoring, "validation_loss", lambda *args: next(held))
    train(config(tmp_path, keep_checkpoints=1))
    assert steps_in(tmp_path) == [4, 6]
    assert record_of(tmp_path / "checkpoints" / "0000006")["best"] == {
        "step": 4,
        "validation_loss": 0.2,
    }


# What is trained


def test_every_class_is_trained_and_held_out_where_images_are_sorted_by_class(tmp_path):
    labels = np.repeat(np.arange(5), 20)
    np.savez(tmp_path / "sorted.npz", images=np.zeros((100, 8, 8), np.uint8), labels=labels)
    train(
        config(tmp_path / "out", data=str(tmp_path / "sorted.npz"), validation_images=10, images=8)
    )
    held = record_of(tmp_path / "out" / "checkpoints" / "0000002")["held_out_images"]
    assert np.bincount(labels[held]).tolist() == [2] * 5


def test_every_class_is_trained_and_held_out_where_images_are_in_periodic_order(tmp_path):
    """Every tenth image would be all of class 0."""
    labels = np.arange(1000) % 10
    np.savez(tmp_path / "a.npz", images=np.zeros((1000, 8, 8), np.uint8), labels=labels)
    options = {"data": str(tmp_path / "a.npz"), "validation_images": 512, "images": 8}
    train(config(tmp_path / "out", class_conditional=True, **options))
    held = record_of(tmp_path / "out" / "checkpoints" / "0000002")["held_out_images"]
    assert np.bincount(labels[held]).tolist() == [10] * 10


def test_a_stopped_run_goes_on_with_the_images_that_it_held_out(tmp_path, monkeypatch):
    train(config(tmp_path, images=8))
    path = tmp_path / "checkpoints" / "0000002" / "training" / "record.json"
    record = json.loads(path.read_text())
    assert record["held_out_images"] != list(range(8))
    del record["held_out_images"]  # as the version before has it: every so-many-th
    path.write_text(json.dumps(record | {"held_out": [0, 8, 1]}))
    record["config"]["images"] = 16
    path.write_text(json.dumps(record | {"held_out": [0, 8, 1]}))
    train(config(tmp_path, images=16))
    after = record_of(tmp_path / "checkpoints" / "0000004")
    assert after["held_out_images"] == list(range(8))


def test_a_stopped_run_refuses_other_images_of_the_same_number(tmp_path):
    rng = np.random.default_rng(0)
    out, path = tmp_path / "out", tmp_path / "a.npz"
    before, after = rng.integers(0, 256, (2, 40, 8, 8), dtype=np.uint8)
    np.savez(path, images=before, labels=np.arange(40) % 2)
    train(config(out, data=str(path), images=8))
    for images, labels in ((after, np.arange(40) % 2), (before, np.arange(40) // 20)):
        np.savez(path, images=images, labels=labels)
        with pytest.raises(CheckpointError, match="began on other images or labels than .*a.npz"):
            train(config(out, data=str(path), images=8, log_every=2))
    np.savez_compressed(path, images=before, labels=np.arange(40) % 2)  # the same content
    assert train(config(out, data=str(path), images=8)).was_finished


@pytest.mark.parametrize(
    ("count", "asked", "expected"), [(1500, 512, 150), (1500, 7, 7), (1500, 0, 0), (9, 512, 0)]
)
def test_the_images_held_out_are_as_many_as_asked_and_never_trained(
    tmp_path, monkeypatch, count, asked, expected
):
    class Stop(Exception): ...

    def batches(images, *args, **kwargs):
        seen.append(set(images))
        raise Stop

    seen = []
    monkeypatch.setattr(draws, "BatchOrder", batches)
    np.savez(tmp_path / "a.npz", images=np.zeros((count, 8, 8), np.uint8))
    with pytest.raises(Stop):
        train(config(tmp_path / "out", data=str(tmp_path / "a.npz"), validation_images=asked))
    assert len(seen[0]) == count - expected
    assert seen[0] <= set(range(count))


def classes(folder, *names):
    """Three images of one grey level for each class."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for place in range(3):
            level = np.full((8, 8), 40 * (number + 1), np.uint8)
            Image.fromarray(level).save(folder / name / f"{place}.png")
    return str(folder)


CLASSES = {"class_conditional": True, "images": 4, "log_every": 1}


def test_a_base_and_the_data_agree_on_classes_by_name(tmp_path):
    train(config(tmp_path / "base", data=classes(tmp_path / "a", "ant", "cat", "dog"), **CLASSES))
    options = CLASSES | {"base": str(tmp_path / "base"), "block_out_channels": None}
    notes = []
    data = classes(tmp_path / "b", "cat", "dog")
    train(config(tmp_path / "out", data=data, **options), on_note=notes.append)
    assert notes == [
        "the classes are 0 ant, 1 cat, 2 dog.",
        "classes without images are not drawn: 0 ant.",
    ]
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["data"]["classes"] == ["ant", "cat", "dog"]
    assert card["data"]["empty_classes"] == [0]
    found, _ = trainer.make_subject(
        config(tmp_path / "out", data=data, **options), trainer.open_base(options["base"])
    )
    assert [found[i][1] for i in (0, 5)] == [1, 2]
    with pytest.raises(DataError, match="has the class 'bee', and the model knows ant, cat, dog"):
        train(config(tmp_path / "no", data=classes(tmp_path / "c", "bee", "cat", "dog"), **options))


@pytest.mark.parametrize("unnamed", ["base", "data"])
def test_classes_without_names_are_told_to_go_by_number(tmp_path, unnamed):
    np.savez(tmp_path / "a.npz", images=np.zeros((6, 8, 8), np.uint8), labels=np.arange(6) % 2)
    sources = [classes(tmp_path / "b", "cat", "dog"), str(tmp_path / "a.npz")]
    base, data = sources if unnamed == "data" else sources[::-1]
    train(config(tmp_path / "base", data=base, **CLASSES))
    notes, options = [], CLASSES | {"base": str(tmp_path / "base"), "block_out_channels": None}
    train(config(tmp_path / "out", data=data, **options), on_note=notes.append)
    assert "does not name its classes, so its class 0 is taken for 'cat'" in notes[0]
    assert notes[1] == "the classes are 0 cat, 1 dog."


def test_classes_without_images_are_told_and_left_out_of_the_round(tmp_path):
    images = np.zeros((10, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(10) % 5 + 1)
    notes = []
    options = {**CLASSES, "preview_every": 1, "preview_count": 6, "preview_steps": 1}
    options["data"] = str(tmp_path / "a.npz")
    train(config(tmp_path / "out", **options), on_note=notes.append)
    assert notes[1] == "classes without images are not drawn: 0."
    model = read_model(str(tmp_path / "out"))
    assert model.labels_of(range(7)) == [1, 2, 3, 4, 5, 1, 2]
    assert model.labels_of(range(2), given=0) == [0, 0]
    seen = []

    class Network:
        def __call__(self, x, t, class_labels, return_dict):
            seen.extend(class_labels.tolist())
            return (x,)

    _, made = trainer.make_subject(config(tmp_path / "new", **options), None)
    predict, _ = made.preview(Network(), 7, torch.device("cpu"))
    predict(torch.zeros(7, 1, 8, 8), 0)
    assert seen == [1, 2, 3, 4, 5, 1, 2]


def pictures(folder, *sizes):
    """A coloured picture of each size (width, height)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return str(folder)


@pytest.mark.parametrize("model", ["new", "deep", "base", "wide base"])
def test_the_hint_for_images_of_several_sizes_works_at_the_first_try(tmp_path, model):
    folder = pictures(tmp_path / "data", (50, 30), (30, 50), (41, 30))
    options = {"data": folder, "images": 4, "log_every": 1}
    if model == "deep":
        options["block_out_channels"] = (8, 8, 8, 8)
    elif "base" in model:
        size = "24x16" if model == "wide base" else 16
        train(config(tmp_path / "base", **options, resolution=size))
        options |= {"base": str(tmp_path / "base"), "block_out_channels": None}
    with pytest.raises(DataError, match=r"bring all to one size with --resolution \S+\.$") as told:
        train(config(tmp_path / "out", **options))
    hint = re.search(r"--resolution (\w+)", str(told.value))[1]
    hint = int(hint) if hint.isdigit() else hint
    assert hint == {"new": 30, "deep": 32, "base": 16, "wide base": "24x16"}[model]
    assert train(config(tmp_path / "out", **options, resolution=hint)).finished


def test_the_hint_for_images_that_cannot_be_halved_keeps_their_shape(tmp_path):
    options = {"data": pictures(tmp_path / "data", (25, 17), (25, 17)), "images": 4}
    with pytest.raises(DDIMError, match="images of 25x17 cannot be .*; use --resolution 24x16,"):
        train(config(tmp_path / "out", **options))
    assert train(config(tmp_path / "out", **options, resolution="24x16")).finished
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    assert tuple(unet.config.sample_size) == (16, 24)
    prior = json.loads((tmp_path / "out" / "prior.json").read_text())
    assert np.shape(prior["image"]) == (3, 16, 24)


def test_random_crops_follow_from_the_seed_and_the_step(tmp_path, monkeypatch):
    """Stopped and started again, a run cuts as it would have without a stop."""
    seen = []
    usual = subject.PixelSubject.clean

    def clean(self, batch, device, draws):
        if draws is not None:
            seen.append(batch[0].clone())
        return usual(self, batch, device, draws)

    monkeypatch.setattr(subject.PixelSubject, "clean", clean)
    options = {"data": pictures(tmp_path / "data", (20, 8), (30, 12)), "log_every": 1}
    options |= {"images": 16, "random_crop": True, "resolution": 8}
    train(config(tmp_path / "a", **options))
    whole, seen = seen, []
    monkeypatch.setattr(subject.PixelSubject, "clean", clean)
    train(config(tmp_path / "b", **options, workers=1))
    assert len({image.numpy().tobytes() for batch in whole for image in batch}) > 8
    assert torch.equal(torch.cat(whole), torch.cat(seen))
    alone = divide(config(tmp_path, **options), 1, 1)
    order = draws.BatchOrder([0, 1], 0, alone, start=0, stop=4, rank=0)
    later = draws.BatchOrder([0, 1], 0, alone, start=2, stop=4, rank=0)
    assert list(draws.CropOrder(order))[2:] == list(draws.CropOrder(later))


def test_every_image_is_seen_once_an_epoch_and_shared_between_processes(tmp_path):
    images, pair = list(range(5, 29)), divide(config(tmp_path), 2, 2)
    shares = [
        [
            i
            for batch in draws.BatchOrder(images, 0, pair, start=0, stop=6, rank=rank)
            for i in batch
        ]
        for rank in (0, 1)
    ]
    first = [i for share in shares for i in share[:12]]
    assert sorted(first) == images
    assert first != images
    later = list(draws.BatchOrder(images, 0, pair, start=4, stop=6, rank=1))
    assert [i for batch in later for i in batch] == shares[1][16:]


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_every_schedule_trains_at_zero_terminal_snr(tmp_path, beta_schedule, prediction_type):
    options = {
        "beta_schedule": beta_schedule,
        "prediction_type": prediction_type,
        "weighting": "min-snr",
        "num_train_timesteps": 50,
    }
    result = train(config(tmp_path, images=4, rescale_betas_zero_snr=True, **options))
    assert np.isfinite(result.loss)
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.alphas_cumprod[-1] < 1e-6  # diffusers leaves 2**-24 in float32
    assert scheduler.config.prediction_type == prediction_type
    assert scheduler.config.clip_sample is False


def test_gradients_are_accumulated_under_accelerate_launch_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")  # as it sets it
    result = train(config(tmp_path, gradient_accumulation=3, images=24))
    assert result.step == 2
    state = torch.load(
        tmp_path / "checkpoints" / "0000002" / "training" / "optimizer.pt", weights_only=True
    )["state"]
    assert state[0]["step"] == 2


def test_previews_and_class_labels(tmp_path):
    train(
        config(tmp_path, class_conditional=True, preview_every=3, preview_count=4, preview_steps=2)
    )
    assert [p.name for p in sorted((tmp_path / "previews").iterdir())] == [
        "0000003.png",
        "0000006.png",
    ]
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["num_class_embeds"] == 10


def test_class_labels_that_are_not_there(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((9, 8, 8), np.uint8))
    with pytest.raises(
        DDIMError,
        match=(
            "a class-conditional model needs labels, and .* has none; leave out --class-conditional"
        ),
    ):
        train(config(tmp_path / "out", data=str(tmp_path / "a.npz"), class_conditional=True))


def test_data_that_the_first_step_cannot_read_leave_no_folder(tmp_path):
    """16 bits that are seldom used are seen only when the pixels are read."""
    (tmp_path / "data").mkdir()
    for name in ("0.tif", "1.tif"):
        values = np.arange(64, dtype=np.int32).reshape(8, 8)
        Image.fromarray(values).save(tmp_path / "data" / name)
    options = {"data": str(tmp_path / "data"), "validation_images": 0}
    with pytest.raises(DataError, match="so its white is unknown; convert it to 8 bits"):
        train(config(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_halved(tmp_path):
    with pytest.raises(
        DDIMError,
        match=r"images of 8x8 cannot be halved 4 times, .*; use --resolution 16, or fewer entries",
    ):
        make_network(config(tmp_path, block_out_channels=(8,) * 5), load_images("digits"))


# The learning rate and the average


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_sentence_from_a_worker_too(tmp_path, workers):
    for i in range(8):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_text("words")
    with pytest.raises(DataError) as caught:
        train(
            config(
                tmp_path / "out",
                data=str(tmp_path),
                resolution=8,
                workers=workers,
                validation_images=0,
            )
        )
    assert str(caught.value).startswith(f"{tmp_path}/5.png is not an image that can be read (")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
def test_the_learning_rate_rises_and_falls(tmp_path, kind):
    run = config(tmp_path, lr_schedule=kind, lr_warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_at(step, 100, run) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[55] == pytest.approx(1 if kind == "constant" else 0.5)
    assert rates[99] == pytest.approx(
        {"constant": 1, "linear": 1 / 90, "cosine": 0.5 * (1 + np.cos(np.pi * 89 / 90))}[kind]
    )


def test_the_average_follows_parameters_and_copies_buffers():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = EMA(network, 0.9)
    expected = torch.zeros(2, 2) + average.network[0].weight
    for step in range(200):
        with torch.no_grad():
            network[0].weight.add_(torch.ones(2, 2))
            network[1].running_mean.fill_(step)
        average.update(network, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network[0].weight.detach()
    torch.testing.assert_close(average.network[0].weight, expected)
    assert average.network[1].running_mean.tolist() == [199, 199]
    assert not any(p.requires_grad for p in average.network.parameters())
    assert [ema_decay_at(n, 0.9995) for n in (0, 10**6)] == [0.1, 0.9995]


# Slow


@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create 2 worker processes"
)  # where there is one core
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's compiler, about itself
def test_compiled_and_loaded_by_workers_it_learns_the_same(tmp_path):
    plain, other = (
        train(config(tmp_path / "a")),
        train(config(tmp_path / "b", compile=True, workers=2)),
    )
    assert [value for _, value in other.losses] == pytest.approx(
        [value for _, value in plain.losses], rel=1e-4
    )
    assert latest_checkpoint(Path(tmp_path / "b" / "checkpoints"))


@pytest.mark.parametrize("size", [0.0, 0.3, 0.9999999, 1.0, 1.0000001, 40.0, math.inf, math.nan])
def test_clipped_gradients_are_torchs_bit_for_bit(size):
    """Although those below the bound are left alone."""
    ours, theirs = (torch.nn.Linear(7, 5) for _ in range(2))
    direction = [torch.randn_like(p) for p in ours.parameters()]
    norm = torch.nn.utils.get_total_norm(direction)
    for network in (ours, theirs):
        for weight, along in zip(network.parameters(), direction, strict=True):
            weight.grad = along * (size / norm)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = trainer.make_accelerator(TrainConfig(data="x", out="y"))
    loop.clip_gradients(accelerator, torch.optim.SGD(ours.parameters()), 1.0)
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad.view(torch.int32), b.grad.view(torch.int32))
