"""Measures this package beside diffusers, in one run: ratios, since machines differ and are noisy.

Run: make bench (about thirteen minutes on two cores, on a machine that does nothing else). Writes
benchmarks/result.md. With ``--device cuda`` it measures there what depends on the device, and
writes result-cuda.md."""

import argparse
import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ddim
from ddim.pipelines.unconditional import UnconditionalPipeline
from ddim.runs.model import find_device

BATCH, STEPS = 16, 50
STABLE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
"""Options of a scheduler of Stable Diffusion."""


def wait(device: torch.device) -> None:
    """Until what was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(
    name: str, took: dict[str, float], wanted: str, *, unit: str = "s", faster: bool = False
) -> list[str]:
    """A row of the table: both times, and their ratio (how many times faster ours is, where that is
    the question)."""
    scale, digits = (1e6, 1) if unit == "us" else (1.0, 2)
    told = [f"{took[who] * scale:.{digits}f} {unit}" for who in ("ours", "theirs")]
    quotient = (
        f"{took['theirs'] / took['ours']:.2f}x"
        if faster
        else f"{took['ours'] / took['theirs']:.2f}"
    )
    return [name, *told, quotient, wanted]


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


def product_rate(size: int, device: torch.device) -> float:
    """Floating-point operations a second of a square matrix product, the best of several."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        wait(device)
        began = time.perf_counter()
        torch.mm(a, b)
        wait(device)
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
            rows.append(ratio(name, took, f"at most {target:.2f}", unit="us"))
        reads = []
        for scheduler in (ours, theirs):
            with CountedReads() as counted:
                scheduler.step(output, t, sample)
            reads.append(counted.reads)
    rows.append(["values read by the host in such a step", str(reads[0]), str(reads[1]), "", "0"])


def bench_walk(rows: list[list[str]], device: torch.device) -> None:
    """Fifty steps of a scheduler on a device, [1, 4, 64, 64], of an output that is there: what a
    loop pays beside its network."""
    schedulers = {"ours": ddim.DDIMScheduler(**STABLE), "theirs": diffusers.DDIMScheduler(**STABLE)}
    sample, output, noise = (torch.randn(1, 4, 64, 64, device=device) for _ in range(3))
    for scheduler in schedulers.values():
        scheduler.set_timesteps(STEPS, device=device)

    def walk(scheduler: diffusers.DDIMScheduler, eta: float) -> None:
        x = sample
        for t in scheduler.timesteps:
            x = scheduler.step(output, t, x, eta, variance_noise=noise if eta else None).prev_sample
        wait(device)

    for eta in (0.0, 1.0):
        took = medians(
            {who: partial(walk, scheduler, eta) for who, scheduler in schedulers.items()},
            repeats=100,
        )
        a_step = {who: seconds / STEPS for who, seconds in took.items()}
        given = ", noise given" if eta else ""
        rows.append(
            ratio(f"a step of {STEPS}, tensor t, eta {eta:.0f}{given}", a_step, "", unit="us")
        )


FOLDER = Path(ddim.__file__).parent / "zoo" / "fashion-mnist"


def serve(who: str, device: torch.device, asked: Connection) -> None:
    """A process that draws images with one pipeline whenever it is asked to; it first says how long
    compiling took."""
    if who == "theirs":
        theirs = diffusers.DDIMPipeline.from_pretrained(FOLDER).to(device)
        theirs.set_progress_bar_config(disable=True)

        def draw(**options: object) -> object:
            return theirs(
                batch_size=BATCH,
                generator=[torch.Generator().manual_seed(seed) for seed in range(BATCH)],
                **options,
            )
    else:
        ours = UnconditionalPipeline.from_pretrained(FOLDER).to(device)
        draw = partial(ours, seeds=range(BATCH), progress=False)
    began = time.perf_counter()
    if who == "compiled":
        with tempfile.TemporaryDirectory() as empty:  # what an earlier run left is no compiling
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
            ours.compile().warm_up(BATCH)
    asked.send(time.perf_counter() - began)
    while options := asked.recv():
        draw(**options)
        asked.send(None)


@contextmanager
def drawing(who: str, device: torch.device) -> Iterator[tuple[Callable[..., object], float]]:
    """A function that has such a process draw, and waits for it; and how long compiling took."""
    context = multiprocessing.get_context("spawn")
    ask, asked = context.Pipe()
    process = context.Process(target=serve, args=(who, device, asked), daemon=True)
    process.start()
    asked.close()  # so that a process that ended is no longer waited for

    compiling = ask.recv()

    def draw(**options: object) -> None:
        ask.send(options)
        ask.recv()

    yield draw, compiling
    ask.send(None)
    process.join()


def bench_sampling(rows: list[list[str]], device: torch.device) -> None:
    """The embedded model, 16 images in 50 steps, and the share of the machine's matrix-product
    rate.

    Each pipeline has a process of its own, as those who use it have, and they take turns: memory
    that one frees serves no other."""
    on_cpu = device.type == "cpu"
    ours = UnconditionalPipeline.from_pretrained(FOLDER).to(device)
    x, t = (
        torch.randn(BATCH, *ours.image_shape, device=device),
        torch.full((BATCH,), 500, device=device),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours.unet(x, t)
    peak = max(
        product_rate(size, device) for size in ((512, 1024, 2048) if on_cpu else (4096, 8192))
    )
    with ExitStack() as processes:
        started = {
            who: processes.enter_context(drawing(who, device))
            for who in ("ours", "compiled", "theirs")
        }
        calls = {
            who: partial(draw, num_inference_steps=STEPS) for who, (draw, _) in started.items()
        }
        took = medians(calls, repeats=11, warm_up=1)
        began = time.perf_counter()
        started["ours"][0](num_inference_steps=1000, eta="sigma-hat", clip="static")
        many = time.perf_counter() - began

    rows.append(
        ratio(
            f"{BATCH} images, {STEPS} steps", took, "at least 1.1x" if on_cpu else "", faster=True
        )
    )
    with_compile = {"ours": took["compiled"], "theirs": took["theirs"]}
    wanted = "at least 1.4x" if on_cpu else ""
    once = started["compiled"][1]
    rows.append(
        ratio(f"the same with --compile (once: {once:.0f} s)", with_compile, wanted, faster=True)
    )
    digits = 0 if on_cpu else 1
    shares = [
        f"{counter.get_total_flops() * STEPS / took[who] / peak:.{digits}%}"
        for who in ("ours", "compiled")
    ]
    name = f"share of the machine's float32 matrix products, {peak / 1e9:.0f} GFLOP/s"
    rows.append([name, ", compiled ".join(shares), "", "", ""])
    few = took["ours"]
    rows.append(
        [
            f"{STEPS} steps of DDIM, 1000 of DDPM (ours both)",
            f"{few:.2f} s",
            f"{many:.1f} s",
            f"{many / few:.1f}x",
            "",
        ]
    )


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
        rows.append(ratio(name, a_step, "at most 0.50", unit="us"))
    took = medians(
        {who: call(pipe, STEPS, output_type="pt") for who, pipe in pipes.items()},
        repeats=11,
        warm_up=1,
    )
    rows.append(
        ratio(f"an image of a small text model, {STEPS} steps", took, "at least 1x", faster=True)
    )


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, there = (
        find_device(options.device),
        options.device == "cuda",
    )  # in float32 as our commands, for both
    out = options.out or Path(__file__).parent / ("result-cuda.md" if there else "result.md")
    rows = [["measured", "ours", "diffusers (or as said)", "ratio", "wanted"]]
    sampling = partial(bench_sampling, device=device)
    parts = (
        [partial(bench_walk, device=device), sampling]
        if there
        else [bench_step, sampling, bench_text, bench_process]
    )
    for part in parts:
        first = len(rows)
        part(rows)
        for row in rows[first:]:
            print("  ".join(cell for cell in row if cell), flush=True)
    where = (
        torch.cuda.get_device_name(device)
        if there
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    machine = f"{where}; Python {platform.python_version()}"
    told = f"torch {torch.__version__}, diffusers {diffusers.__version__}, ddim {ddim.__version__}"
    table = "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * 5, *rows[1:]])
    command = f"python benchmarks/bench.py --device {device}" if there else "make bench"
    out.write_text(f"# Beside diffusers\n\n`{command}` on {machine}; {told}.\n\n{table}\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
