"""``ddim consistency``: what the same latents become under other steps and samplers: the paper's
Figure 5, with numbers."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddim.cli._arguments import ModelArgument
from ddim.cli._latent import begin_run, scaled
from ddim.cli._model import (
    check_positive,
    describe_model,
    draw,
    enough_memory,
    find_device,
    open_model,
    sampling_evaluations,
    seed_label,
    short_name,
)
from ddim.errors import DDIMError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Command", "defaults", "run"]

SAMPLERS = ("ddim", "ddim-2", "o-belm", "bdia", "edict")
SHOWN = 8
"""Images that the sheet shows at most."""


@dataclass(frozen=True)
class Command:
    """Draws the same latents with other steps and samplers, and measures how far each is from the
    longest trajectory.

    With 1000 steps among them, that distance is the ODE error: mean squared error per dimension,
    pixels in [0, 1], no clipping."""

    model: ModelArgument = "fashion-mnist"
    """An embedded model, a folder in diffusers format, or a hub id; none of text."""
    seed: int = 0
    """Seed of the first latent."""
    count: int = 8
    """How many latents: the seeds SEED to SEED+COUNT-1."""
    steps: tuple[int, ...] = (10, 20, 50, 100, 1000)
    """Steps; the most of them, with DDIM, is what the others are compared with."""
    sampler: tuple[str, ...] = ("ddim",)
    """ddim, ddim-2 (its second order), o-belm, bdia, edict."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] | None = None
    """Which levels are visited; by default what the model's configuration says."""
    batch_size: int = 64
    """Images drawn together."""
    out: str | None = None
    """Folder for the results; by default out/consistency-MODEL."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""
    compile: bool = False
    """Compile the network first: a minute, and then faster steps."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Draws and measures, and writes the table, the plot and the sheet."""
    began = time.perf_counter()
    check_positive(command, "count", "batch_size")
    unknown = [s for s in command.sampler if s not in SAMPLERS]
    if unknown or not command.sampler or not command.steps:
        told = f"{unknown[0]!r}" if unknown else "nothing"
        raise DDIMError(
            f"--sampler must name some of {', '.join(SAMPLERS)}, and --steps some numbers; got "
            f"{told}."
        )

    import numpy as np
    import torch

    from ddim.cli._run import RunRecord, versions, write_run
    from ddim.core.noise import check_seeds
    from ddim.evaluation.report import check_plots, save_lines, text_table
    from ddim.files import write_text
    from ddim.inversion.encoding import reconstruction_error
    from ddim.models.images import make_grid, save_png, to_uint8

    check_plots()
    device = find_device(command.device)
    pipe, folder = open_model(command.model, device=device)
    seeds, label = check_seeds(range(command.seed, command.seed + command.count)), seed_label(pipe)
    chosen = {
        s: pipe.select_timesteps(s, timestep_spacing=command.spacing, order=1)
        for s in sorted(set(command.steps))
    }
    for timesteps in chosen.values():
        for sampler in ("ddim", *command.sampler):
            pipe.route(timesteps=timesteps, order=1, clip="none", sampler=sampler)  # type: ignore[arg-type] # one of the three
    spacing = command.spacing or pipe.scheduler.config.timestep_spacing
    protocol = {
        "command": "consistency",
        **describe_model(command.model, pipe, folder, clip=pipe.select_clip("none")),
        "timesteps": {"spacing": spacing, "steps": list(chosen)},
        "eta": 0.0,
        "sampler": list(command.sampler),
        "steps": list(chosen),
        "count": command.count,
        "seed": command.seed,
    }
    out = Path(command.out or f"out/consistency-{short_name(command.model)}")
    execution = {
        "batch_size": command.batch_size,
        "device": str(device),
        "compile": command.compile,
    }
    begin_run(out, protocol, execution)

    def sample(sampler: str, steps: int) -> "Tensor":
        """The images of all seeds, [B, C, H, W] in [-1, 1], clamped."""
        options: dict[str, Any] = (
            {"order": 2}
            if sampler == "ddim-2"
            else {"order": 1}
            if sampler == "ddim"
            else {"sampler": sampler}
        )
        options |= {"timesteps": chosen[steps], "clip": "none", "output_type": "pt"}
        drawn = draw(
            pipe, seeds, batch_size=command.batch_size, fill=command.compile, label=label, **options
        )
        return torch.cat([2 * images.cpu().double() - 1 for _, images, _ in drawn])

    longest = max(chosen)
    results: list[dict[str, Any]] = []
    sheet = []
    with enough_memory(device, command.batch_size):
        (pipe.compile() if command.compile else pipe).warm_up(min(command.batch_size, len(seeds)))
        started = time.perf_counter()
        reference = sample("ddim", longest)
        for sampler in dict.fromkeys(command.sampler):
            for steps, timesteps in chosen.items():
                images = (
                    reference if sampler == "ddim" and steps == longest else sample(sampler, steps)
                )
                error = reconstruction_error(reference, images)
                cell = {
                    "sampler": sampler,
                    "steps": steps,
                    "mse": float(error.mean()),
                    "mse_error": float(error.std()) / len(error) ** 0.5 if len(error) > 1 else None,
                    "evaluations": sampling_evaluations(pipe, sampler, timesteps),
                }
                results.append(cell)
                sheet.append(to_uint8(images[:SHOWN].float()))
                print(
                    f"{sampler}, {steps} steps: {cell['mse']:.2e} from {longest} steps of ddim",
                    flush=True,
                )
    seconds = time.perf_counter() - started
    rows = [["sampler", "steps", "mse", "standard error", "evaluations"]]
    for r in results:
        told = "" if r["mse_error"] is None else f"{r['mse_error']:.1e}"
        rows.append([r["sampler"], str(r["steps"]), f"{r['mse']:.2e}", told, str(r["evaluations"])])
    head = (
        f"# {command.model}: one latent under other trajectories\n\n"
        f"Mean squared error per dimension, pixels in [0, 1], against {longest} steps of DDIM from "
        f"the same {command.count} latents; "
        f"{spacing} timesteps, no clipping. In sheet.png a row is a latent, and the columns are "
        "the rows of this table, in order.\n\n"
    )
    write_text(out / "table.md", head + text_table(rows))
    lines = {
        s: [(r["evaluations"], r["mse"]) for r in results if r["sampler"] == s and r["mse"] > 0]
        for s in command.sampler
    }
    save_lines(
        lines,
        out / "distance.png",
        across="network evaluations",
        up=f"squared distance to {longest} steps",
    )
    pictures = np.stack(sheet, 1).reshape(
        -1, *sheet[0].shape[1:]
    )  # a row an image, a column a trajectory
    save_png(make_grid(pictures, columns=len(sheet)), out / "sheet.png", scale=scaled(pictures))
    record = RunRecord(
        protocol=protocol,
        results=results,
        seconds=seconds,
        seconds_total=time.perf_counter() - began,
        evaluations=sum(r["evaluations"] for r in results)
        + (0 if "ddim" in command.sampler else longest),
        execution=execution,
        versions=versions(),
    )
    write_run(out, record)
    print(
        f"{len(results)} trajectories of {len(seeds)} latents; the table is {out / 'table.md'}, "
        "beside a plot and a sheet."
    )
