"""``ddim reconstruct``: encodes images, decodes them, and measures what comes back: the paper's
Table 2."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ddim.cli._arguments import ModelArgument
from ddim.cli._latent import (
    NetworkCalls,
    Pictures,
    begin_run,
    check_first,
    check_images,
    note_levels,
    read_images,
    scaled,
    unsolved_steps,
)
from ddim.cli._model import (
    check_positive,
    describe_model,
    enough_memory,
    find_device,
    open_model,
    short_name,
)
from ddim.errors import DDIMError

if TYPE_CHECKING:
    from ddim.core.sampler import State
    from ddim.pipelines.unconditional import UnconditionalPipeline

__all__ = ["Command", "defaults", "run"]

SHOWN = 8
"""Images that the sheet shows at most."""

PAPER = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}
"""Table 2 of Song, Meng, Ermon (https://arxiv.org/abs/2010.02502): DDIM on CIFAR-10's test
images."""


@dataclass(frozen=True)
class Command:
    """Measures how images come back from their codes, for each method and number of steps: a table,
    a plot and a sheet.

    What is measured is kept. Running again into the same folder adds other methods and steps.
    """

    data: str
    """Images: a folder, a .npz, IDX files, parquet, digits, fashion-mnist, or a hub dataset id."""
    model: ModelArgument = "fashion-mnist"
    """An embedded model, a folder in diffusers format, or a hub id; none of text."""
    split: str | None = None
    """Split of the data; by default test where there is one, else train."""
    seed: int = 0
    """Number of the first image, counted from 0."""
    count: int = 256
    """How many images, from that one on."""
    steps: tuple[int, ...] = (10, 20, 50, 100)
    """Steps each way."""
    method: tuple[str, ...] = ("ddim", "fixed-point", "o-belm")
    """Encoders: ddim, fixed-point, o-belm, bdia, edict."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] | None = None
    """Which levels are visited; by default what the model's configuration says."""
    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class of all images, for a class-conditional model; by default the data's own."""
    resize: bool = False
    """Resize images of another size (shorter side) and cut them in the centre."""
    batch_size: int = 64
    """Images encoded together."""
    out: str | None = None
    """Folder for the results; by default out/reconstruct-MODEL."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the network; the states are float64 always."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Measures what is missing, and writes the table, the plot and the sheet of all that is
    there."""
    began = time.perf_counter()
    check_positive(command, "count", "batch_size")
    from ddim.inversion.codes import ENCODERS

    unknown = [m for m in command.method if m not in ENCODERS]
    if unknown or not command.method or not command.steps:
        told = f"{unknown[0]!r}" if unknown else "nothing"
        raise DDIMError(
            f"--method must name some of {', '.join(ENCODERS)}, and --steps some numbers; got "
            f"{told}."
        )

    from ddim.cli._run import RunRecord, versions, write_run
    from ddim.evaluation.report import check_plots
    from ddim.files import write_text
    from ddim.inversion.ddim import encodable_timesteps

    check_plots()
    check_first(command.seed)
    check_images(None, command.data)
    device = find_device(command.device)
    pipe, folder = open_model(command.model, device=device, dtype=command.dtype)
    asked = {
        steps: pipe.select_timesteps(steps, timestep_spacing=command.spacing, order=1)
        for steps in dict.fromkeys(command.steps)
    }
    chosen = {
        steps: encodable_timesteps(pipe.noise_schedule, levels) for steps, levels in asked.items()
    }
    for levels in chosen.values():
        pipe.route(timesteps=levels, order=1)
    which: dict[str, Any] = {
        "split": command.split,
        "first": command.seed,
        "count": command.count,
        "resize": command.resize,
    }
    pictures = read_images(pipe, None, command.data, **which, fixed=command.class_)
    read: dict[str, Any] = {
        "clip": pipe.select_clip("none"),
        "dtype": command.dtype,
        "fixed": command.class_,
        "classes": "the data's",
    }
    protocol = {
        "command": "reconstruct",
        **describe_model(command.model, pipe, folder, **read),
        "timesteps": command.spacing or pipe.scheduler.config.timestep_spacing,
        "eta": 0.0,
        "data": pictures.data,
        "count": command.count,
    }
    out = Path(command.out or f"out/reconstruct-{short_name(command.model)}")
    execution = {"batch_size": command.batch_size, "device": str(device)}
    before = begin_run(out, protocol, execution)
    results, seconds = before.results, before.seconds

    def save() -> None:
        record = RunRecord(
            protocol=protocol,
            results=results,
            seconds=seconds,
            seconds_total=time.perf_counter() - began,
            evaluations=sum(r["evaluations"] + r.get("decode_evaluations", 0) for r in results),
            execution=execution,
            versions=versions(),
        )
        write_run(out, record)

    missing = [
        (m, s)
        for s in chosen
        for m in dict.fromkeys(command.method)
        if not any(r["method"] == m and r["steps"] == s for r in results)
    ]
    with enough_memory(device, command.batch_size):
        pipe.warm_up(min(command.batch_size, len(pictures.x0)))
        for method, steps in missing:
            cell, took = _measure(
                pipe, pictures, chosen[steps], method=method, batch_size=command.batch_size
            )
            results, seconds = (
                [*results, {"method": method, "steps": steps, **cell}],
                seconds + took,
            )
            told = "diverged" if cell["mse"] is None else f"mse {cell['mse']:.2e}"
            print(
                (
                    f"{method}, {steps} steps: {told}, {cell['evaluations'] / steps:.1f} "
                    f"evaluations a step, {took:.1f} s"
                ),
                flush=True,
            )
            save()
        results.sort(key=lambda r: (ENCODERS.index(r["method"]), r["steps"]))
        save()
        fewest = min(chosen)
        _sheet(pipe, pictures, chosen[fewest], command.method, out / "sheet.png")
    note_levels(asked[fewest], chosen[fewest])
    write_text(out / "table.md", _table(results, command, pictures.data["split"]))
    _plot(results, out / "reconstruction.png")
    there = len(results) - len(missing)
    print(
        f"{len(missing)} cells measured, {there} were there; the table is {out / 'table.md'}, "
        "beside a plot and a sheet."
    )


def _measure(
    pipe: "UnconditionalPipeline",
    pictures: Pictures,
    timesteps: list[int],
    *,
    method: str,
    batch_size: int,
) -> tuple[dict[str, Any], float]:
    """One cell, and the seconds it took."""
    import torch

    from ddim.errors import DivergenceError
    from ddim.inversion.encoding import reconstruction_error

    errors, rms, residuals = [], [], []
    began, unsolved, done = time.perf_counter(), 0, 0
    encoding, decoding, back = NetworkCalls(pipe), NetworkCalls(pipe), torch.empty(0)

    def keep(state: "State") -> None:
        nonlocal back
        back = state.x_s

    for first in range(0, len(pictures.x0), batch_size):
        part = pictures.x0[first : first + batch_size]
        labels = None if pictures.labels is None else pictures.labels[first : first + batch_size]
        done += len(part)
        try:
            with encoding, unsolved_steps() as told:
                code = pipe.encode(
                    part,
                    timesteps=timesteps,
                    method=method,  # type: ignore[arg-type]
                    class_labels=labels,
                    batch_size=batch_size,
                )
            back = code.states[-1]  # where the pair of a single step holds the data already
            with decoding:
                pipe.decode(
                    code, batch_size=batch_size, output_type="pt", callback=keep
                )  # and is measured before float32 rounds it
        except DivergenceError:
            return {"mse": None, "evaluations": encoding.each(done)}, time.perf_counter() - began
        unsolved += len(told)
        errors.append(reconstruction_error(part.cpu(), back.cpu()))
        rms.append(code.rms())
        if code.residual is not None:
            residuals.append(code.residual)
    error = torch.cat(errors)
    cell: dict[str, Any] = {
        "mse": float(error.mean()),
        "mse_max": float(error.max()),
        "evaluations": encoding.each(done),
        "decode_evaluations": decoding.each(done),
        "rms": float(torch.cat(rms).mean()),
        "count": done,
    }
    if residuals:
        cell |= {"residual_max": float(torch.cat(residuals).max()), "unsolved_steps": unsolved}
    return cell, time.perf_counter() - began


def _table(results: list[dict[str, Any]], command: Command, split: str) -> str:
    """The cells as a document."""
    from ddim.evaluation.report import text_table

    rows = [
        [
            "method",
            "steps",
            "mse",
            "largest",
            "evaluations a step",
            "RMS of the code",
            "paper (DDIM, CIFAR-10)",
        ]
    ]
    for r in results:
        paper = f"{PAPER[r['steps']]:g}" if r["method"] == "ddim" and r["steps"] in PAPER else ""
        numbers = (
            ["diverged", ""] if r["mse"] is None else [f"{r['mse']:.2e}", f"{r['mse_max']:.2e}"]
        )
        rms = "" if r["mse"] is None else f"{r['rms']:.2f}"
        rows.append(
            [
                r["method"],
                str(r["steps"]),
                *numbers,
                f"{r['evaluations'] / r['steps']:.2f}",
                rms,
                paper,
            ]
        )
    begun = f", from number {command.seed} on" if command.seed else ""
    return (
        f"# {command.model}: images from their codes\n\n"
        f"Mean squared error per dimension, pixels in [0, 1], of {command.count} images of "
        f"{command.data} ({split}{begun}); "
        f"{command.dtype} network, float64 states, no clipping. Evaluations are those of encoding. "
        "The rows of sheet.png are the "
        f"originals, then {', '.join(command.method)} at {min(command.steps)} steps.\n\n"
        + text_table(rows)
    )


def _plot(results: list[dict[str, Any]], path: Path) -> None:
    from ddim.evaluation.report import save_lines

    methods = dict.fromkeys(r["method"] for r in results)
    lines = {
        m: [(r["steps"], r["mse"]) for r in results if r["method"] == m and r["mse"]]
        for m in methods
    }
    save_lines(lines, path, across="steps each way", up="mean squared error, pixels in [0, 1]")


def _sheet(
    pipe: "UnconditionalPipeline",
    pictures: Pictures,
    timesteps: list[int],
    methods: Sequence[str],
    path: Path,
) -> None:
    """Originals in the first row, then a row for each method at the fewest steps."""
    import numpy as np

    from ddim.errors import DivergenceError
    from ddim.models.images import make_grid, save_png, to_uint8

    x0, labels = pictures.x0[:SHOWN], None if pictures.labels is None else pictures.labels[:SHOWN]
    rows = [to_uint8(x0)]
    for method in methods:
        with unsolved_steps():  # they are in the table
            try:
                code = pipe.encode(x0, timesteps=timesteps, method=method, class_labels=labels)  # type: ignore[arg-type]
                rows.append(to_uint8(2 * pipe.decode(code, output_type="pt") - 1))
            except DivergenceError:  # an empty row, as the table says
                rows.append(np.zeros_like(rows[0]))
    images = np.concatenate(rows)
    save_png(make_grid(images, columns=len(x0)), path, scale=scaled(images))
