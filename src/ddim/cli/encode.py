"""``ddim encode``: images to a code file."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ddim.cli._arguments import ModelArgument
from ddim.cli._latent import (
    NetworkCalls,
    check_first,
    check_images,
    note_levels,
    read_images,
    tell_unsolved,
    unsolved_steps,
)
from ddim.cli._model import check_positive, describe_model, enough_memory, find_device, open_model
from ddim.errors import OutputError

__all__ = ["Command", "defaults", "run"]


@dataclass(frozen=True)
class Command:
    """Turns images into one code file, which `ddim decode` turns back; OUT.run.json beside it says
    how it was made."""

    model: ModelArgument = "fashion-mnist"
    """An embedded model, a folder in diffusers format, or a hub id; none of text."""
    images: tuple[str, ...] | None = None
    """Picture files."""
    data: str | None = None
    """Or a data set: a folder, a .npz, IDX files, parquet, digits, fashion-mnist, or a hub dataset
    id."""
    split: str | None = None
    """Split of the data set; by default test where there is one, else train."""
    seed: int = 0
    """Number of the first image of the data set, counted from 0."""
    count: int | None = None
    """How many of the data set, from that one on; by default all."""
    steps: int | None = None
    """Steps: 50 unless the model's configuration has others."""
    method: Literal["o-belm", "bdia", "edict", "fixed-point", "ddim"] = "o-belm"
    """o-belm, bdia and edict come back exactly, fixed-point nearly, ddim is the paper's own."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] | None = None
    """Which levels are visited; by default what the model's configuration says."""
    resize: bool = False
    """Resize images of another size (shorter side) and cut them in the centre."""
    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class of all images, for a class-conditional model; by default the data's own."""
    batch_size: int = 64
    """Images encoded together."""
    out: str = "code.safetensors"
    """The file to write; it must not be there."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the network; the states are float64 always."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Encodes the images, and writes the code and its record."""
    began = time.perf_counter()
    check_positive(command, "batch_size", "count")
    out = Path(command.out)
    if out.exists():
        raise OutputError(f"{out} is there already; use another --out, or delete that file.")
    check_first(command.seed, files=command.images is not None)
    check_images(command.images, command.data)

    from ddim.cli._run import NAME, RunRecord, versions, write_run
    from ddim.inversion.codes import save_code

    device = find_device(command.device)
    pipe, folder = open_model(command.model, device=device, dtype=command.dtype)
    asked = pipe.select_timesteps(command.steps, timestep_spacing=command.spacing, order=1)
    chosen: dict[str, Any] = {
        "split": command.split,
        "first": command.seed,
        "count": command.count,
        "resize": command.resize,
    }
    x0, labels, data = read_images(
        pipe, command.images, command.data, **chosen, fixed=command.class_
    )
    with enough_memory(device, command.batch_size):
        pipe.warm_up(min(command.batch_size, len(x0)))
        started = time.perf_counter()
        with NetworkCalls(pipe) as calls, unsolved_steps() as unsolved:
            code = pipe.encode(
                x0,
                timesteps=asked,
                method=command.method,
                class_labels=labels,
                batch_size=command.batch_size,
            )
    seconds, rms, evaluations = (
        time.perf_counter() - started,
        code.rms().tolist(),
        calls.each(len(code)),
    )
    note_levels(asked, code.timesteps)
    residuals = (
        [{}] * len(code)
        if code.residual is None
        else [{"residual": r} for r in code.residual.tolist()]
    )
    read: dict[str, Any] = {
        "clip": pipe.select_clip("none"),
        "dtype": command.dtype,
        "fixed": command.class_,
        "classes": "the data's",
    }
    record = RunRecord(
        protocol={
            "command": "encode",
            **describe_model(command.model, pipe, folder, **read),
            "timesteps": list(code.timesteps),
            "eta": 0.0,
            "data": {**data, "method": code.method},
        },
        results=[
            {"image": number, "rms": value, **residual}
            for number, (value, residual) in enumerate(
                zip(rms, residuals, strict=True), start=command.seed
            )
        ],
        seconds=seconds,
        seconds_total=time.perf_counter() - began,
        evaluations=evaluations,
        execution={"count": len(code), "batch_size": command.batch_size, "device": str(device)},
        versions=versions(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_run(
        out.parent, record, name=f"{out.name}.{NAME}"
    )  # first, for a code without its record could not be written again
    save_code(code, out)
    told = (
        ""
        if code.residual is None
        else f" The worst step is solved to {float(code.residual.max()):.1e}."
    )
    told += tell_unsolved(unsolved)
    print(
        f"{len(code)} images encoded by {code.method} in {evaluations:.4g} evaluations each and "
        f"{seconds:.1f} s; "
        f"the root mean square of the codes is {sum(rms) / len(rms):.2f} (noise: 1).{told} The "
        f"code is {out}."
    )
