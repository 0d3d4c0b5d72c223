"""``ddim sample``: draws images from a model."""

import contextlib
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ddim.cli._arguments import EtaOption, TimestepsOption
from ddim.cli._model import describe_model, draw, find_device, open_model, seed_label, short_name
from ddim.errors import DDIMError, OutputError

if TYPE_CHECKING:
    from ddim.denoiser import Clip
    from ddim.pipelines import UnconditionalPipeline
    from ddim.prior import DataPrior
    from ddim.sampler import State

__all__ = ["Command", "defaults", "run"]

GRID = 64
"""Images that the grid shows at most, so that memory does not grow with the count."""


@dataclass(frozen=True)
class Command:
    """Draws images from a model with DDIM: one file a seed, a grid of the first 64, and a record of the run.

    Running again into the same folder draws what is missing.
    """

    model: Annotated[str, tyro.conf.Positional] = "fashion-mnist"
    """An embedded model, a folder in diffusers format, or a hub id."""
    steps: int | None = None
    """DDIM steps: network evaluations an image. 50 unless --timesteps is given."""
    count: int = 16
    """How many images: the seeds SEED to SEED+COUNT-1."""
    seed: int = 0
    """Seed of the first image."""
    eta: EtaOption = None
    """0 is deterministic and the default, 1 is DDPM's posterior, sigma-hat the larger noise of DDPM."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] | None = None
    """Which levels are visited; by default what the model's configuration says."""
    timesteps: TimestepsOption = None
    """The levels themselves, falling, in place of --steps and --spacing; or a JSON file with the key `timesteps`."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """ddpm: sigma-hat noise, and static clipping with the noise derived again."""
    clip: Literal["none", "static", "dynamic"] | None = None
    """How predicted images are kept in range on the way, the noise being derived again; by default what the configuration says."""
    prior: str = "standard"
    """What the first noise is drawn from: standard is N(0, I); data knows the data's mean colours, from the model's prior.json;
    or a FILE.json that `ddim doctor --prior` wrote."""
    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class of all images, for a class-conditional model; by default the seeds go round the classes."""
    batch_size: int = 16
    """Images drawn together; it never changes an image."""
    out: str | None = None
    """Folder for the pictures; by default out/sample-MODEL."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network; the image between the steps is float32 always."""
    compile: bool = False
    """Compile the network first: a minute, and then faster steps."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Draws what is missing in the folder, then writes the grid and run.json."""
    began = time.perf_counter()
    for name in ("count", "batch_size"):
        if getattr(command, name) < 1:
            raise DDIMError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(command, name)}.")
    if command.sampler == "ddpm" and command.eta is not None:
        raise DDIMError("--sampler ddpm fixes the noise at sigma-hat; leave out --eta, or the sampler.")

    import numpy as np
    import torch

    from ddim.checkpoints import has_scheduler
    from ddim.cli._run import RunRecord, check_protocol, versions, write_run
    from ddim.images import load_image, make_grid, save_png
    from ddim.noise import check_seeds
    from ddim.step import SIGMA_HAT, Eta, check_eta

    device = find_device(command.device)
    seeds = check_seeds(range(command.seed, command.seed + command.count))
    eta: Eta = check_eta(SIGMA_HAT if command.sampler == "ddpm" else command.eta or 0.0)

    pipe, folder = open_model(command.model, device=device, dtype=command.dtype)
    timesteps = pipe.select_timesteps(command.steps, timestep_spacing=command.spacing, timesteps=command.timesteps)
    pipe.check_path(timesteps, eta=eta)
    clip = pipe.select_clip(command.clip or ("static" if command.sampler == "ddpm" else None))
    prior = _prior(command, folder)
    classes = pipe.unet.config.get("num_class_embeds")
    if command.class_ is not None and not 0 <= command.class_ < (classes or 0):
        told = f"must be from 0 to {classes - 1}" if classes else f"is of no use: {command.model} was trained without classes"
        raise DDIMError(f"--class {told}; got {command.class_}.")
    protocol = _protocol(command, pipe, folder, timesteps=timesteps, eta=eta, clip=clip)
    if prior is not None:
        protocol["prior"] = asdict(prior)

    out = Path(command.out or f"out/sample-{short_name(command.model)}")
    there = {int(p.stem): p for p in out.glob("*.png") if re.fullmatch(r"\d{6,}", p.stem)}
    before = check_protocol(out, protocol, empty=not there)
    if there and before is None:
        raise OutputError(f"{out} holds pictures and no run.json that says how they were made; use another --out, or delete that folder.")
    missing = [s for s in seeds if s not in there]
    _note(command, pipe, clip, timesteps, assumed=not has_scheduler(folder))

    label = seed_label(pipe, command.class_)

    def record(done: list[int], seconds: float, **execution: Any) -> RunRecord:  # noqa: ANN401 - what is known by then
        listed = sorted({*done, *there})
        return RunRecord(
            protocol=protocol,
            results=[{"seed": s, "file": f"{s:06d}.png", **label(s)} for s in listed],
            seconds=seconds,
            seconds_total=time.perf_counter() - began,
            evaluations=len(timesteps),
            execution={
                "count": command.count,
                "batch_size": command.batch_size,
                "device": str(device),
                "compile": command.compile,
                **execution,
            },
            versions=versions(),
        )

    out.mkdir(parents=True, exist_ok=True)
    if before is None:
        write_run(out, record([], 0.0, drawn=0))  # so that what an interrupted run leaves is known for what it is
    try:
        seconds, warm_up, batches = _draw(command, pipe, missing, out, label=label, timesteps=timesteps, eta=eta, clip=clip, prior=prior)
    except torch.OutOfMemoryError:
        raise DDIMError(f"{device} has too little memory for {command.batch_size} images at once; give a smaller --batch-size.") from None

    shown = np.stack([load_image(out / f"{s:06d}.png") for s in seeds[:GRID]])
    save_png(make_grid(shown), out / "grid.png", scale=max(1, 96 // shown.shape[2]))
    if missing:
        write_run(out, record(missing, seconds, drawn=len(missing), warm_up_seconds=warm_up))
    there_before = len(seeds) - len(missing)
    print(f"{len(missing)} images drawn, {there_before} were there; they are in {out}, together in {out / 'grid.png'}.")
    if missing:
        step = seconds / (batches * len(timesteps))
        total = len(pipe.noise_schedule)
        print(
            f"{len(timesteps)} steps took {seconds:.1f} s, {1000 * step:.1f} ms a step; "
            f"all {total} steps would have taken {seconds / len(timesteps) * total:.0f} s."
        )


def _draw(
    command: Command,
    pipe: "UnconditionalPipeline",
    seeds: list[int],
    out: Path,
    *,
    label: Callable[[int], dict[str, int]],
    timesteps: list[int],
    **options: Any,  # noqa: ANN401 - of the pipeline's call
) -> tuple[float, float, int]:
    """Draws and writes the pictures of the seeds; returns the seconds of sampling, those of the warm-up, and the number of batches."""
    if not seeds:
        return 0.0, 0.0, 0
    from ddim.images import save_png

    size = min(command.batch_size, len(seeds))
    batches = -(-len(seeds) // size)
    began = time.perf_counter()
    (pipe.compile() if command.compile else pipe).warm_up(size)
    warm_up, seconds = time.perf_counter() - began, 0.0
    with pipe.progress_bar(total=batches * len(timesteps)) if sys.stderr.isatty() else contextlib.nullcontext() as bar:
        advance = None if bar is None else _advance(bar)
        options |= {"timesteps": timesteps, "callback": advance}
        for batch, pictures, took in draw(pipe, seeds, batch_size=size, fill=command.compile, label=label, **options):
            seconds += took
            for seed, picture in zip(batch, pictures, strict=True):
                save_png(picture, out / f"{seed:06d}.png")
    return seconds, warm_up, batches


def _protocol(
    command: Command, pipe: "UnconditionalPipeline", folder: Path, *, timesteps: list[int], eta: float | str, clip: "Clip"
) -> dict[str, Any]:
    """What was asked, resolved; the keys of ``ddim.cli._run.IDENTITY`` are what makes two runs comparable."""
    return {
        "command": "sample",
        **describe_model(command.model, pipe, folder, clip=clip, dtype=command.dtype, fixed=command.class_),
        "sampler": command.sampler,
        "steps": len(timesteps),
        "spacing": None if command.timesteps else command.spacing or pipe.scheduler.config.timestep_spacing,
        "timesteps": timesteps,
        "eta": eta,
        "order": 1,
    }


def _prior(command: Command, folder: Path) -> "DataPrior | None":
    """What the start of sampling is told of the data; None for N(0, I)."""
    if command.prior == "standard":
        return None
    from ddim.checkpoints import read_json
    from ddim.prior import DataPrior

    path = folder / "prior.json" if command.prior == "data" else Path(command.prior)
    if not path.is_file():
        raise DDIMError(
            f"there is no prior at {path}; measure one with `ddim doctor {command.model} --data DATA --prior FILE.json`, "
            "and give --prior FILE.json."
        )
    return DataPrior.from_dict(read_json(path))


def _note(command: Command, pipe: "UnconditionalPipeline", clip: "Clip", timesteps: list[int], *, assumed: bool) -> None:
    """Says in one line what a model's configuration does to its images, where that is not what ours do."""
    last = len(pipe.noise_schedule) - 1
    clips = command.clip is None and command.sampler == "ddim" and clip.kind != "none"
    short = command.spacing is None and command.timesteps is None and timesteps[0] != last
    if assumed:
        print(
            f"note: {command.model} comes without a scheduler; it is taken for a model of {last + 1} linear levels that predicts epsilon."
        )
    elif clips or short:
        does = [f"clips predicted images ({clip.kind})"] * clips + [f"starts at level {timesteps[0]}, not at {last}"] * short
        instead = ["--clip none"] * clips + ["--spacing trailing"] * short
        print(f"note: the model's configuration {' and '.join(does)}; {' '.join(instead)} would not.")


def _advance(bar: Any) -> Callable[["State"], None]:  # noqa: ANN401 - tqdm has no types
    def advance(state: "State") -> None:
        bar.update()

    return advance
