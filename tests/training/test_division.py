"""A run may be resumed on another number of processes: its steps stay what they are."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from ddim.errors import CheckpointError
from ddim.training.config import TrainConfig
from ddim.training.division import divide
from ddim.training.draws import BatchOrder, CropOrder, Draws

OPTIONS = (
    "--data digits --block-out-channels 8,16 --images 80 --lr-warmup-steps 2 --checkpoint-every 2 "
    "--validation-images 8 --log-every 1 --preview-every 0 --keep-checkpoints 9 --horizontal-flip "
    "--offset-noise 0.1 --batch-size 4 --gradient-accumulation 1"
).split()


def config(size, passes):
    return TrainConfig(data="digits", out="run", batch_size=size, gradient_accumulation=passes)


small = st.integers(1, 6)


@settings(deadline=None)
@given(size=st.integers(1, 12), passes=small, processes=small, world=small)
def test_every_image_of_a_step_has_its_numbers_whoever_takes_it(size, passes, processes, world):
    chosen = config(size, passes)
    if size * passes * processes % world:
        with pytest.raises(CheckpointError, match="processes cannot share equally"):
            divide(chosen, processes, world)
        return
    images, cpu = list(range(7, 40)), torch.device("cpu")

    def step(division):
        """Of each image of two steps: its index, where it is cut, its pass, and a number of it."""
        found = []
        for rank in range(division.world):
            order = BatchOrder(images, 0, division, start=3, stop=5, rank=rank)
            assert len(list(order)) == 2 * division.each
            for (number, piece), batch in zip(order.turns(), CropOrder(order), strict=True):
                draws = Draws.at(0, number, piece, cpu)
                assert len(batch) == division.size

                def normal(count, draws=draws):
                    return torch.randn(count, generator=draws.generator)

                drawn = draws.own(len(batch), normal).tolist()
                places = [draws.place] * len(batch)
                found += zip(batch, places, drawn, strict=True)
        return sorted(found)

    divided = divide(chosen, processes, world)
    begun = divide(chosen, processes, processes)
    assert divided.images == begun.images == size * passes * processes
    assert begun.each == passes
    assert begun.pieces == 1
    assert step(divided) == step(begun)


def test_a_number_of_processes_that_cannot_share_a_step_is_refused():
    with pytest.raises(
        CheckpointError,
        match=r"^run holds a run of 8 images a step, which 3 processes cannot share equally; use "
        r"a number that divides 8\.$",
    ):
        divide(config(4, 1), 2, 3)


def test_what_changes_is_told():
    assert divide(config(4, 2), 2, 2).sentence is None
    assert divide(config(4, 1), 2, 1).sentence == (
        "the run began on 2 processes and goes on with 1: 2 x 4 images a process and step. Its "
        "images, noise and learning rates stay those of the run; sums are rounded in another "
        "order."
    )
    split = divide(config(4, 1), 1, 2).sentence
    assert split.startswith("the run began on 1 process and goes on with 2: 1 x 2 images")
    assert split.endswith("another order, and dropout draws other numbers in split batches.")


def run_on(processes, out):
    """Trains with the command on so many processes."""
    words = [*OPTIONS, "--out", str(out)]
    if processes == 1:
        start = [sys.executable, "-m", "ddim"]
    else:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(processes), "-m", "ddim"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    return subprocess.run(
        [*start, "train", *words], capture_output=True, text=True, env=environment, timeout=300
    )


def losses(out):
    lines = (out / "log" / "log.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def weights(out, step):
    return load_file(out / "checkpoints" / f"{step:07d}" / "training" / "network.safetensors")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, before, after):
    """On two processes a batch of one is split, and on one process two passes are taken in turn."""
    whole = tmp_path / "whole"
    assert (ran := run_on(before, whole)).returncode == 0, ran.stderr
    last = max(losses(whole))
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for folder in (cut / "checkpoints").iterdir():  # as if it had been stopped after four steps
        if int(folder.name) > 4:
            shutil.rmtree(folder)
    for name in ("unet", "scheduler", "model_index.json", "card.json", "README.md"):
        path = cut / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert (ran := run_on(after, cut)).returncode == 0, ran.stderr
    assert f"goes on with {after}" in ran.stderr + ran.stdout
    known, found = losses(whole), losses(cut)
    assert found.keys() == known.keys()
    assert [found[n] for n in known] == pytest.approx([known[n] for n in known], rel=1e-4)
    # AdamW moves a weight whose gradient is rounding, such as a bias before a norm, at random.
    there, ends = weights(whole, 4), [weights(whole, last), weights(cut, last)]
    moved = sum(float((ends[0][name] - there[name]).square().sum()) for name in there)
    apart = sum(float((ends[0][name] - ends[1][name]).square().sum()) for name in there)
    assert apart < 1e-3 * moved
    card = json.loads((cut / "card.json").read_text())
    assert card["processes"] == before
    assert card["revisions"][-1]["processes"] == after
    assert card["images_seen"] == 80
