"""Measures this package beside diffusers on a CPU, in one run: ratios, since machines differ and
are noisy. Rows compare like with like: eager with eager, compiled with compiled.

Run: make bench (about sixteen minutes on two cores, on a machine that does nothing else). Writes
benchmarks/result.md. ``--only PART`` measures a part, and prints it. For a GPU there is gpu.py."""

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ddim
from ddim.pipelines.unconditional import UnconditionalPipeline
from drawing import FOLDER, our_images, their_images
from sides import better, in_turn, median, row, started, table
from training import our_training, their_training, training_rows

BATCH, STEPS = 16, 50
STABLE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
"""Options of a scheduler of Stable Diffusion."""


def medians(
    calls: dict[str, Callable[[], object]], *, repeats: int, warm_up: int = 50
) -> dict[str, float]:
    """Median seconds of each call, taken in turn so that what the machine does besides falls on all
    alike."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    gc.collect()
    gc.disable()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - began)
    gc.enable()
    return {name: statistics.median(values) for name, values in taken.items()}


def product_rate(size: int) -> float:
    """Floating-point operations a second of a square matrix product, the best of several."""
    a, b = (torch.randn(size, size) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


class CountedReads(TorchDispatchMode):
    """Counts the operators that read a tensor's value on the host."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def bench_step(rows: list[list[str]]) -> None:
    """A scheduler's step on [1, 4, 64, 64], both tensors returned."""
    ours, theirs = ddim.DDIMScheduler(**STABLE), diffusers.DDIMScheduler(**STABLE)
    sample, output, noise = (torch.randn(1, 4, 64, 64) for _ in range(3))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(50)
    t = ours.timesteps[10]
    number = int(t)

    def call(
        scheduler: diffusers.DDIMScheduler, timestep: object, **more: object
    ) -> Callable[[], object]:
        return lambda: scheduler.step(output, timestep, sample, **more)

    noisy = {"eta": 1.0, "variance_noise": noise}
    with torch.no_grad():
        for name, timestep, more, target in (
            ("a step, tensor t, eta 0", t, {}, 1 / 3),
            ("a step, tensor t, eta 1, noise given", t, noisy, 0.4),
            ("a step, int t, eta 0", number, {}, 1 / 4),
        ):
            took = medians(
                {"ours": call(ours, timestep, **more), "theirs": call(theirs, timestep, **more)},
                repeats=3000,
            )
            rows.append(row(name, took["ours"], took["theirs"], unit="us", most=target))
        reads = []
        for scheduler in (ours, theirs):
            with CountedReads() as counted:
                scheduler.step(output, t, sample)
            reads.append(counted.reads)
    rows.append(["values read by the host in such a step", str(reads[0]), str(reads[1]), "", "0"])


def bench_sampling(rows: list[list[str]]) -> None:
    """The embedded model, 16 images in 50 steps: eager, compiled, and the share of the machine's
    matrix-product rate; and what is left out of ours when it leaves other code alone."""
    eager = {
        "ours": our_images,
        "contiguous": their_images,
        "channels-last": partial(their_images, channels_last=True),
        "no block": partial(our_images, without="block"),
        "no layers": partial(our_images, without="layers"),
    }
    with started(eager) as sides:
        took = {who: median(taken) for who, taken in in_turn(sides, rounds=7, steps=STEPS).items()}
        many = sides["ours"](steps=1000, eta="sigma-hat", clip="static").seconds
    name, ours = f"{BATCH} images, {STEPS} steps, eager", took["ours"]
    rows.append(row(f"{name}; diffusers eager", ours, took["contiguous"], least=1.3))
    told = f"{name}; diffusers eager, channels-last"
    rows.append(row(told, ours, took["channels-last"], least=1.25))
    for without, what in (
        ("no block", "without the freed block"),
        ("no layers", "of plain layers"),
    ):
        rows.append(row(f"{name}; ours {what}", ours, took[without]))
    kinds = {
        "ours": partial(our_images, compiled=True),
        "contiguous": partial(their_images, compiled=True),
        "channels-last": partial(their_images, compiled=True, channels_last=True),
    }
    with started(kinds) as sides:
        once = {who: side.preparing for who, side in sides.items()}
        fast = {who: median(taken) for who, taken in in_turn(sides, rounds=7, steps=STEPS).items()}
    best = better(fast, "contiguous", "channels-last")
    compiling = (
        f"compiled at the same time once: {once['ours']:.0f} s, diffusers' {once[best]:.0f} s"
    )
    name = (
        f"{BATCH} images, {STEPS} steps, compiled; diffusers compiled, {best} (its better layout)"
    )
    rows.append(row(f"{name}; {compiling}", fast["ours"], fast[best], least=1.35))
    pipe = UnconditionalPipeline.from_pretrained(FOLDER)
    x, t = torch.randn(BATCH, *pipe.image_shape), torch.full((BATCH,), 500)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipe.unet(x, t)
    peak = max(product_rate(size) for size in (512, 1024, 2048))
    shares = [
        f"{counter.get_total_flops() * STEPS / each / peak:.0%}" for each in (ours, fast["ours"])
    ]
    name = f"share of the machine's float32 matrix products, {peak / 1e9:.0f} GFLOP/s"
    rows.append([name, ", compiled ".join(shares), "", "", ""])
    name = f"{STEPS} steps of DDIM, 1000 of DDPM (ours both)"
    rows.append([name, f"{ours:.2f} s", f"{many:.1f} s", f"{many / ours:.1f}x", ""])


def bench_training(rows: list[list[str]]) -> None:
    """Images a second of training a new network of the embedded one's shape."""
    options = {"batch": 32, "steps": 41}
    kinds = {
        "ours": partial(our_training, **options),
        "contiguous": partial(their_training, **options),
        "channels-last": partial(their_training, **options, channels_last=True),
    }
    with started(kinds) as sides:
        taken = in_turn(sides, rounds=3, warm_up=0)
    took = {who: median(each) for who, each in taken.items()}
    best = better(took, "contiguous", "channels-last")
    rows += training_rows(taken["ours"], took[best], best, least=1.05, batch=options["batch"])


def bench_start(rows: list[list[str]]) -> None:
    """A cold start: what ``ddim sample`` of one image takes beside the import of its network."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def started_with(*arguments: str) -> Callable[[], object]:
        whole = [sys.executable, *arguments]
        return lambda: subprocess.run(whole, check=True, capture_output=True, env=environment)

    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        sample = ("-m", "ddim", "sample", "--count", "1", "--overwrite", "--out", out)
        calls = {
            "import": started_with("-c", "import torch, diffusers.models.unets.unet_2d"),
            "one": started_with(*sample),
            "step": started_with(*sample, "--steps", "1"),
        }
        took = medians(calls, repeats=5, warm_up=1)
    more, drawing = took["one"] - took["import"], took["one"] - took["step"]
    name = "`ddim sample`, one image; beside the import of its network"
    wanted = "at most 0.80 s more" + (": missed" if more > 0.8 else "")
    rows.append([name, f"{took['one']:.2f} s", f"{took['import']:.2f} s", f"{more:+.2f} s", wanted])
    rows.append(["of that, 49 of its 50 steps", f"{drawing:.2f} s", "", "", ""])


class Free(torch.nn.Module):
    """Stands in for a network whose prediction costs nothing."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.config, self.dtype, self.device = network.config, network.dtype, torch.device("cpu")
        self.prediction = torch.randn(2, 4, 64, 64)

    def forward(self, *inputs, **options):  # noqa: ANN002, ANN003, ANN204
        return (self.prediction,)


def text_pipelines(unet: torch.nn.Module, vae: torch.nn.Module | None) -> tuple[object, object]:
    """Ours and diffusers' pipeline of the same parts; prompts come as embeddings."""
    parts = {
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet,
        "safety_checker": None,
        "feature_extractor": None,
    }
    scheduler = diffusers.DDIMScheduler(
        **STABLE, steps_offset=1, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    ours = ddim.TextToImagePipeline(**parts, scheduler=scheduler, requires_safety_checker=False)
    theirs = diffusers.StableDiffusionPipeline(
        **parts, scheduler=scheduler, requires_safety_checker=False
    )
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return ours, theirs


def bench_text(rows: list[list[str]]) -> None:
    """Text to image: what the loop costs beside the network, [1, 4, 64, 64]; and whole images of a
    small network of random weights."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
    ).eval()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    ).eval()
    with tempfile.TemporaryDirectory() as folder:  # each loads the checkpoint as its users do
        text_pipelines(unet, vae)[1].save_pretrained(folder)
        absent = dict.fromkeys(
            ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
        )
        kinds = {"ours": ddim.TextToImagePipeline, "theirs": diffusers.StableDiffusionPipeline}
        pipes = {who: kind.from_pretrained(folder, **absent) for who, kind in kinds.items()}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    names = ("prompt_embeds", "negative_prompt_embeds")
    given = {name: torch.randn(1, 77, 64) for name in names}

    def call(pipe: object, steps: int, **more: object) -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        return lambda: pipe(**given, num_inference_steps=steps, generator=generator, **more)

    for rescale in (0.0, 0.7):
        free = dict(zip(("ours", "theirs"), text_pipelines(Free(unet), None), strict=True))
        more = {
            "latents": torch.randn(1, 4, 64, 64),
            "output_type": "latent",
            "guidance_rescale": rescale,
        }
        calls = {
            (who, steps): call(pipe, steps, **more)
            for who, pipe in free.items()
            for steps in (10, 110)
        }
        took = medians(calls, repeats=100, warm_up=2)
        a_step = {who: (took[who, 110] - took[who, 10]) / 100 for who in free}
        told = f", rescale {rescale}" if rescale else ""
        name = f"a step of text to image beside its network{told}"
        rows.append(row(name, a_step["ours"], a_step["theirs"], unit="us", most=0.45))
    took = medians(
        {who: call(pipe, STEPS, output_type="pt") for who, pipe in pipes.items()},
        repeats=11,
        warm_up=1,
    )
    name = f"an image of a small text model, {STEPS} steps, eager; diffusers eager"
    rows.append(row(name, took["ours"], took["theirs"], least=1.0))


def bench_process(rows: list[list[str]]) -> None:
    """Memory while many images are drawn, and what starting costs above a bare interpreter."""
    # VmHWM, not getrusage: the latter remembers the process that started this one.
    code = (
        "import sys; from ddim.cli import main; assert main(sys.argv[1:]) == 0; "
        "print(next(line.split()[1] for line in open('/proc/self/status') if "
        "line.startswith('VmHWM')))"
    )
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (64, 1000):
            words = f"sample --steps 2 --count {count} --out {folder}/{count}"
            out = [sys.executable, "-c", code, *words.split()]
            printed = subprocess.run(out, check=True, capture_output=True, text=True).stdout
            peaks.append(int(printed.split()[-1]) / 1024)
    grown = f"{peaks[1] / peaks[0]:.2f}x"
    rows.append(
        [
            "peak memory, 64 images and 1,000",
            f"{peaks[0]:.0f} MiB",
            f"{peaks[1]:.0f} MiB",
            grown,
            "does not grow",
        ]
    )

    def started(*arguments: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    calls = {
        "bare": started("-c", ""),
        "import": started("-c", "import ddim"),
        "help": started("-m", "ddim", "--help"),
    }
    took = medians(calls, repeats=15, warm_up=2)
    rows.append(
        [
            "`import ddim`, above a bare interpreter",
            f"{(took['import'] - took['bare']) * 1000:.0f} ms",
            "",
            "",
            "under 50 ms",
        ]
    )
    rows.append(
        [
            "`ddim --help`, interpreter and all",
            f"{took['help'] * 1000:.0f} ms",
            "",
            "",
            "under 300 ms",
        ]
    )


PARTS = {
    "step": bench_step,
    "sampling": bench_sampling,
    "text": bench_text,
    "training": bench_training,
    "start": bench_start,
    "process": bench_process,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "result.md")
    options = parser.parse_args()
    rows: list[list[str]] = []
    for name, part in PARTS.items():
        if options.only in (None, name):
            first = len(rows)
            part(rows)
            for each in rows[first:]:
                print("  ".join(cell for cell in each if cell), flush=True)
    if options.only is None:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
        python = f"Python {platform.python_version()}; torch {torch.__version__}"
        told = f"{python}, diffusers {diffusers.__version__}, ddim {ddim.__version__}"
        options.out.write_text(
            f"# Beside diffusers\n\n`make bench` on {machine}; {told}.\n\n{table(rows)}\n"
        )
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
