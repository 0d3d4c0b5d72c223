"""Measures this package beside diffusers on a CUDA device, each side in a process of its own, and
is meant to take under four minutes there: Stable Diffusion 1.5 and 2.1 of random weights in
float16, the embedded model in float32, a scheduler's step, and training in bfloat16.

Run: python benchmarks/gpu.py. Writes benchmarks/result-cuda.md after each part, so that a run that
is cut off leaves what it has measured. ``--dry`` walks through all of it on a CPU, with tiny
networks, in this process, and prints the table: its figures mean nothing."""

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

import ddim
from drawing import our_images, our_texts, their_images, their_texts, wait
from sides import Maker, Taken, better, in_turn, median, row, started, table
from training import our_training, their_training, training_rows

TINY: dict[str, Any] = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "vae": {
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
}
"""Sizes of a dry run."""


@dataclass(frozen=True)
class Plan:
    """What is measured where."""

    device: str = "cuda"
    steps: int = 50
    rounds: int = 3
    batch: int = 16
    images: int = 4
    dtype: str = "float16"
    sizes: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(
        default_factory=lambda: {"batch": 128, "steps": 60, "precision": "bf16"}
    )
    apart: bool = True
    compiles: bool = True


DRY = Plan(
    device="cpu",
    steps=2,
    rounds=1,
    batch=2,
    images=2,
    dtype="float32",
    sizes=TINY,
    training={"batch": 2, "steps": 21},
    apart=False,
    compiles=False,
)


def bench_step(plan: Plan, rows: list[list[str]]) -> None:
    """A step of the scheduler in a loop of outputs that are there."""
    options: dict[str, Any] = {"beta_schedule": "scaled_linear", "clip_sample": False}
    schedulers = {
        "ours": ddim.DDIMScheduler(**options),
        "theirs": diffusers.DDIMScheduler(**options),
    }
    sample, output, noise = (torch.randn(1, 4, 64, 64, device=plan.device) for _ in range(3))
    for eta in (0.0, 1.0):
        took: dict[str, list[float]] = {who: [] for who in schedulers}
        for _ in range(10 * plan.rounds + 1):
            for who, scheduler in schedulers.items():
                scheduler.set_timesteps(plan.steps, device=plan.device)
                x = sample
                wait(plan.device)
                began = time.perf_counter()
                for t in scheduler.timesteps:
                    given = noise if eta else None
                    x = scheduler.step(output, t, x, eta, variance_noise=given).prev_sample
                wait(plan.device)
                took[who].append((time.perf_counter() - began) / plan.steps)
        ours, theirs = (sorted(each[1:])[len(each) // 2 - 1] for each in took.values())
        told = f"a step of {plan.steps}, tensor t, eta {eta:.0f}{', noise given' * bool(eta)}"
        rows.append(row(told, ours, theirs, unit="us"))


def bench_text(
    model: str, plan: Plan, rows: list[list[str]], *, least: tuple[float, float] | None
) -> None:
    """Text to image: the first call, one image, and several where ``least`` says how many times
    faster both should be."""
    given = (model, plan.device, plan.dtype, plan.sizes)
    kinds: dict[str, Maker] = {
        "ours": partial(our_texts, *given),
        "launched": partial(our_texts, *given, records=False),
        "theirs": partial(their_texts, *given),
        "theirs, channels-last": partial(their_texts, *given, channels_last=True),
    }
    side, seconds = f"{model}, {plan.dtype}, {plan.steps} steps", {}
    with started(kinds, apart=plan.apart) as sides:
        first = {who: s(steps=plan.steps, images=1).seconds for who, s in sides.items()}
        for images, rounds in ((1, plan.rounds if least else 1), (plan.images, 2 if least else 0)):
            if rounds:
                options = {"steps": plan.steps, "images": images}
                taken = in_turn(sides, rounds=rounds, warm_up=int(images > 1), **options)
                seconds[images] = {who: median(each) for who, each in taken.items()}
        held = sides["ours"](what="recordings").facts
    for (images, took), wanted in zip(seconds.items(), least or (None,), strict=True):
        name = f"{side}, images at once: {images}"
        told = f"{name}, not compiled; diffusers eager"
        rows.append(row(told, took["ours"], took["theirs"], least=wanted))
        rows.append(row(f"{told}, channels-last", took["ours"], took["theirs, channels-last"]))
        told = f"{name}; ours, launched one by one"
        rows.append(row(told, took["ours"], took["launched"], least=1.0))
    more = first["ours"] - first["launched"]
    told = "at most 0.50 s more" + (": missed" if more > 0.5 else "")
    figures = [f"{first[who]:.2f} s" for who in ("ours", "launched")]
    name = f"{side}, the first call; ours, launched one by one"
    rows.append([name, *figures, f"{more:+.2f} s", told])
    told = f"{held['count']} recordings, {held['bytes'] / 2**20:.0f} MiB"
    rows.append([f"{side}, recordings that are kept", told, "", "", ""])


def bench_images(plan: Plan, rows: list[list[str]]) -> None:
    """The embedded model in float32, not compiled and compiled."""
    ours, theirs = (
        partial(make, plan.device, batch=plan.batch) for make in (our_images, their_images)
    )
    kinds: dict[str, Maker] = {
        "ours": ours,
        "launched": partial(ours, records=False),
        "theirs": theirs,
        "theirs, channels-last": partial(theirs, channels_last=True),
    }
    if plan.compiles:
        kinds |= {
            "compiled": partial(ours, compiled=True),
            "theirs, compiled": partial(theirs, compiled=True),
            "theirs, compiled, channels-last": partial(theirs, compiled=True, channels_last=True),
        }
    with started(kinds, apart=plan.apart) as sides:
        once = {who: side.preparing for who, side in sides.items()}
        turns = in_turn(sides, rounds=plan.rounds, steps=plan.steps)
        took = {who: median(taken) for who, taken in turns.items()}
    name, mine = f"{plan.batch} images of the embedded model, {plan.steps} steps", took["ours"]
    told = f"{name}, not compiled; diffusers eager"
    rows.append(row(told, mine, took["theirs"], least=4.0))
    rows.append(row(f"{told}, channels-last", mine, took["theirs, channels-last"]))
    rows.append(row(f"{name}; ours, launched one by one", mine, took["launched"], least=1.0))
    if plan.compiles:
        best = better(took, "theirs, compiled", "theirs, compiled, channels-last")
        seconds = f"once: {once['compiled']:.0f} s, diffusers' {once[best]:.0f} s"
        told = f"{name}, compiled ({seconds}); diffusers compiled, the better of its two layouts"
        rows.append(row(told, took["compiled"], took[best]))


def bench_training(plan: Plan, rows: list[list[str]]) -> None:
    """Images a second of training."""
    kinds: dict[str, Maker] = {
        "ours": partial(our_training, **plan.training),
        "contiguous": partial(their_training, **plan.training),
        "channels-last": partial(their_training, **plan.training, channels_last=True),
    }
    with started(kinds, apart=plan.apart) as sides:
        taken: dict[str, list[Taken]] = in_turn(sides, rounds=min(plan.rounds, 2), warm_up=0)
    took = {who: median(each) for who, each in taken.items()}
    best = better(took, "contiguous", "channels-last")
    rows += training_rows(taken["ours"], took[best], best, least=None, batch=plan.training["batch"])


PARTS: dict[str, Callable[[Plan, list[list[str]]], None]] = {
    "step": bench_step,
    "sd15": partial(bench_text, "stable-diffusion-v1-5", least=(1.8, 1.3)),
    "images": bench_images,
    "training": bench_training,
    "sd21": partial(bench_text, "stable-diffusion-2-1", least=None),
}


def measure(plan: Plan, only: str | None, write: Callable[[list[list[str]]], None]) -> None:
    """Measures the parts, and hands over all rows after each."""
    rows: list[list[str]] = []
    for name, part in PARTS.items():
        if only in (None, name):
            began = time.perf_counter()
            try:
                part(plan, rows)
            except RuntimeError as error:  # the other parts are worth measuring
                reason = str(error).strip().splitlines()[-1]
                rows.append([f"{name} failed: {reason}", "", "", "", ": missed"])
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            write(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "result-cuda.md")
    options = parser.parse_args()
    if options.dry:
        measure(DRY, options.only, lambda rows: None if len(rows) == 0 else print(table(rows)))
        return
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry walks through it on a CPU.")
    where = f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    versions = f"Python {platform.python_version()}; torch {torch.__version__}"
    told = f"{versions}, diffusers {diffusers.__version__}, ddim {ddim.__version__}"
    head = f"# Beside diffusers\n\n`python benchmarks/gpu.py` on {where}; {told}."

    def write(rows: list[list[str]]) -> None:
        options.out.write_text(f"{head}\n\n{table(rows)}\n")

    began = time.perf_counter()
    measure(Plan(), options.only, write)
    print(f"written to {options.out} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
