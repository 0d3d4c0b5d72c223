"""``ddim reconstruct``: encodes images, decodes them, and measures what comes back: the paper's Table 2."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ddim.cli._latent import clear_folder, read_images, scaled
from ddim.cli._model import check_positive, describe_model, find_device, open_model, short_name
from ddim.errors import DDIMError

if TYPE_CHECKING:
    from torch import Tensor

    from ddim.pipelines import UnconditionalPipeline

__all__ = ["Command", "defaults", "run"]

SHOWN = 8
"""Images that the sheet shows at most."""

PAPER = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}
"""Table 2 of Song, Meng, Ermon (https://arxiv.org/abs/2010.02502): DDIM on CIFAR-10's test images."""


@dataclass(frozen=True)
class Command:
    """Measures how images come back from their codes, for each method and number of steps: a table, a plot and a sheet.

    What is measured is kept. Running again into the same folder adds other methods and steps.
    """

    data: str
    """Images: a folder, a .npz, IDX files, parquet, digits, fashion-mnist, or a hub dataset id."""
    model: Annotated[str, tyro.conf.Positional] = "fashion-mnist"
    """An embedded model, a folder in diffusers format, or a hub id."""
    split: str = "test"
    """Split of the data."""
    count: int = 256
    """How many images, from the first."""
    steps: tuple[int, ...] = (10, 20, 50, 100)
    """Steps each way."""
    method: tuple[str, ...] = ("ddim", "fixed-point", "o-belm")
    """Encoders: ddim, fixed-point, o-belm, bdia, edict."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] | None = None
    """Which levels are visited; by default what the model's configuration says."""
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
    """Measures what is missing, and writes the table, the plot and the sheet of all that is there."""
    began = time.perf_counter()
    check_positive(command, "count", "batch_size")
    from ddim.encoding import ENCODERS, fingerprint

    unknown = [m for m in command.method if m not in ENCODERS]
    if unknown or not command.method or not command.steps:
        told = f"{unknown[0]!r}" if unknown else "nothing"
        raise DDIMError(f"--method must name some of {', '.join(ENCODERS)}, and --steps some numbers; got {told}.")

    from ddim.cli._run import RunRecord, read_run, versions, write_run
    from ddim.evaluation.report import check_plots
    from ddim.images import write_atomically

    check_plots()
    device = find_device(command.device)
    pipe, folder = open_model(command.model, device=device, dtype=command.dtype)
    for steps in command.steps:
        pipe.check_path(pipe.select_timesteps(steps, timestep_spacing=command.spacing, order=1))
    x0, labels = read_images(pipe, None, command.data, split=command.split, count=command.count, resize=command.resize)
    protocol = {
        "command": "reconstruct",
        **describe_model(command.model, pipe, folder, clip=pipe.select_clip("none"), dtype=command.dtype),
        "timesteps": command.spacing or pipe.scheduler.config.timestep_spacing,
        "eta": 0.0,
        "data": {"name": command.data, "split": command.split, "images": fingerprint(x0)},
        "count": command.count,
    }
    out = Path(command.out or f"out/reconstruct-{short_name(command.model)}")
    clear_folder(out, protocol)
    before = read_run(out)
    results = before.results if before else []
    seconds = before.seconds if before else 0.0

    def save() -> None:
        record = RunRecord(
            protocol=protocol,
            results=results,
            seconds=seconds,
            seconds_total=time.perf_counter() - began,
            evaluations=sum(2 * r["steps"] if r["method"] == "ddim" else r["evaluations"] + r["steps"] for r in results),
            execution={"batch_size": command.batch_size, "device": str(device)},
            versions=versions(),
        )
        write_run(out, record)

    save()  # so that what an interrupted run leaves is known for what it is
    pipe.warm_up(min(command.batch_size, len(x0)))
    missing = [
        (m, s)
        for s in dict.fromkeys(command.steps)
        for m in dict.fromkeys(command.method)
        if not any(r["method"] == m and r["steps"] == s for r in results)
    ]
    for method, steps in missing:
        cell, took = _measure(pipe, x0, labels, command, method=method, steps=steps)
        results, seconds = [*results, cell], seconds + took
        told = "diverged" if cell["mse"] is None else f"mse {cell['mse']:.2e}"
        print(f"{method}, {steps} steps: {told}, {cell['evaluations'] / steps:.1f} evaluations a step, {took:.1f} s", flush=True)
        save()
    results.sort(key=lambda r: (ENCODERS.index(r["method"]), r["steps"]))
    save()
    write_atomically(out / "table.md", _table(results, command))
    _plot(results, out / "reconstruction.png")
    _sheet(pipe, x0[:SHOWN], None if labels is None else labels[:SHOWN], command, out / "sheet.png")
    there = len(results) - len(missing)
    print(f"{len(missing)} cells measured, {there} were there; the table is {out / 'table.md'}, beside a plot and a sheet.")


def _measure(
    pipe: "UnconditionalPipeline", x0: "Tensor", labels: list[int] | None, command: Command, *, method: str, steps: int
) -> tuple[dict[str, Any], float]:
    """One cell, and the seconds it took."""
    import warnings

    import torch

    from ddim.encoding import reconstruction_error
    from ddim.errors import DivergenceError
    from ddim.inversion import ConvergenceWarning

    timesteps = pipe.select_timesteps(steps, timestep_spacing=command.spacing, order=1)
    errors, rms, residuals, evaluations = [], [], [], 0.0
    began, unsolved = time.perf_counter(), 0
    for first in range(0, len(x0), command.batch_size):
        part = x0[first : first + command.batch_size]
        some = None if labels is None else labels[first : first + command.batch_size]
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConvergenceWarning)
                options: dict[str, Any] = {"method": method, "class_labels": some, "batch_size": command.batch_size}
                code = pipe.encode(part, timesteps=timesteps, **options)
            back = pipe.decode(code, batch_size=command.batch_size, output_type="pt")
        except DivergenceError:
            return {"method": method, "steps": steps, "mse": None, "evaluations": (2 if method == "edict" else 1) * steps}, (
                time.perf_counter() - began
            )
        unsolved += sum(issubclass(w.category, ConvergenceWarning) for w in caught)
        errors.append(reconstruction_error(part.cpu(), 2 * back.cpu().double() - 1))
        rms.append(code.rms())
        evaluations += code.evaluations * len(part) / len(x0)
        if code.residual is not None:
            residuals.append(code.residual)
    error = torch.cat(errors)
    cell: dict[str, Any] = {
        "method": method,
        "steps": steps,
        "mse": float(error.mean()),
        "mse_max": float(error.max()),
        "evaluations": evaluations,
        "rms": float(torch.cat(rms).mean()),
        "count": len(x0),
    }
    if residuals:
        cell |= {"residual_max": float(torch.cat(residuals).max()), "unsolved_steps": unsolved}
    return cell, time.perf_counter() - began


def _table(results: list[dict[str, Any]], command: Command) -> str:
    """The cells as a document."""
    from ddim.evaluation.report import text_table

    rows = [["method", "steps", "mse", "largest", "evaluations a step", "RMS of the code", "paper (DDIM, CIFAR-10)"]]
    for r in results:
        paper = f"{PAPER[r['steps']]:g}" if r["method"] == "ddim" and r["steps"] in PAPER else ""
        numbers = ["diverged", ""] if r["mse"] is None else [f"{r['mse']:.2e}", f"{r['mse_max']:.2e}"]
        rms = "" if r["mse"] is None else f"{r['rms']:.2f}"
        rows.append([r["method"], str(r["steps"]), *numbers, f"{r['evaluations'] / r['steps']:.2f}", rms, paper])
    return (
        f"# {command.model}: images from their codes\n\n"
        f"Mean squared error per dimension, pixels in [0, 1], of {command.count} images of {command.data} ({command.split}); "
        f"{command.dtype} network, float64 states, no clipping. Evaluations are those of encoding.\n\n" + text_table(rows)
    )


def _plot(results: list[dict[str, Any]], path: Path) -> None:
    from ddim.evaluation.report import save_lines

    methods = dict.fromkeys(r["method"] for r in results)
    lines = {m: [(r["steps"], r["mse"]) for r in results if r["method"] == m and r["mse"]] for m in methods}
    save_lines(lines, path, across="steps each way", up="mean squared error, pixels in [0, 1]")


def _sheet(pipe: "UnconditionalPipeline", x0: "Tensor", labels: list[int] | None, command: Command, path: Path) -> None:
    """Originals in the first row, then a row for each method at the fewest steps."""
    import warnings

    import numpy as np

    from ddim.errors import DivergenceError
    from ddim.images import make_grid, save_png, to_uint8

    rows, timesteps = [to_uint8(x0)], pipe.select_timesteps(min(command.steps), timestep_spacing=command.spacing, order=1)
    for method in command.method:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is not solved is in the table
            try:
                code = pipe.encode(x0, timesteps=timesteps, method=method, class_labels=labels)  # type: ignore[arg-type]
                rows.append(to_uint8(2 * pipe.decode(code, output_type="pt") - 1))
            except DivergenceError:  # an empty row, as the table says
                rows.append(np.zeros_like(rows[0]))
    images = np.concatenate(rows)
    save_png(make_grid(images, columns=len(x0)), path, scale=scaled(images))
