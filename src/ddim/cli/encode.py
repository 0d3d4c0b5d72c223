"""``ddim encode``: images to a code file."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ddim.cli._latent import read_images
from ddim.cli._model import check_positive, find_device, open_model
from ddim.errors import OutputError

__all__ = ["Command", "defaults", "run"]


@dataclass(frozen=True)
class Command:
    """Turns images into one code file, which `ddim decode` turns back."""

    model: Annotated[str, tyro.conf.Positional] = "fashion-mnist"
    """An embedded model, a folder in diffusers format, or a hub id."""
    images: tuple[str, ...] | None = None
    """Picture files."""
    data: str | None = None
    """Or a data set: a folder, a .npz, IDX files, parquet, digits, fashion-mnist, or a hub dataset id."""
    split: str = "test"
    """Split of the data set."""
    count: int | None = None
    """How many of the data set, from the first; by default all."""
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
    """Encodes the images and writes the code."""
    check_positive(command, "batch_size", "count")
    out = Path(command.out)
    if out.exists():
        raise OutputError(f"{out} is there already; use another --out, or delete that file.")
    from ddim.codes import save_code

    pipe, _ = open_model(command.model, device=find_device(command.device), dtype=command.dtype)
    x0, labels = read_images(
        pipe, command.images, command.data, split=command.split, count=command.count, resize=command.resize, fixed=command.class_
    )
    began = time.perf_counter()
    code = pipe.encode(
        x0, command.steps, method=command.method, timestep_spacing=command.spacing, class_labels=labels, batch_size=command.batch_size
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_code(code, out)
    told = "" if code.residual is None else f" The worst step is solved to {float(code.residual.max()):.1e}."
    print(
        f"{len(code)} images encoded by {code.method} in {code.evaluations} evaluations each and {time.perf_counter() - began:.1f} s; "
        f"the root mean square of the codes is {float(code.rms().mean()):.2f} (noise: 1).{told} The code is {out}."
    )
