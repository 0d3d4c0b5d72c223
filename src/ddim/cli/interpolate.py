"""``ddim interpolate``: the path between two latents, or the grid between four, drawn."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ddim.cli._arguments import ModelArgument
from ddim.cli._latent import (
    NetworkCalls,
    begin_run,
    check_images,
    note_levels,
    read_images,
    scaled,
    tell_unsolved,
    unsolved_steps,
)
from ddim.cli._model import (
    check_class,
    check_positive,
    describe_model,
    enough_memory,
    find_device,
    open_model,
    short_name,
)
from ddim.errors import DDIMError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Command", "defaults", "run"]


@dataclass(frozen=True)
class Command:
    """Draws the path between two seeds or two images, or with --grid the square between four."""

    model: ModelArgument = "fashion-mnist"
    """An embedded model, a folder in diffusers format, or a hub id; none of text."""
    seeds: tuple[int, ...] | None = None
    """Two seeds; four with --grid: top left, top right, bottom left, bottom right."""
    images: tuple[str, ...] | None = None
    """Or as many picture files, which are encoded first."""
    count: int = 11
    """Pictures of the path, both ends among them; of each side of a grid."""
    grid: bool = False
    """A square between four corners in place of a path."""
    interpolation: Literal["spherical", "linear"] = "spherical"
    """spherical keeps to where latents lie; linear leaves it, for comparison."""
    steps: int | None = None
    """Steps: 50 unless the model's configuration has others."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] | None = None
    """Which levels are visited; by default what the model's configuration says."""
    method: Literal["o-belm", "bdia", "edict", "fixed-point", "ddim"] = "fixed-point"
    """How images are encoded. The codes of fixed-point look most like noise; those of o-belm and
    bdia give the ends back exactly."""
    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class of all pictures, for a class-conditional model."""
    resize: bool = False
    """Resize images of another size (shorter side) and cut them in the centre."""
    gif: bool = False
    """Write the path as a moving picture, there and back, too."""
    batch_size: int = 64
    """Pictures drawn together."""
    out: str | None = None
    """Folder for the pictures; by default out/interpolate-MODEL."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Draws the path, or the grid, and writes it with run.json."""
    began = time.perf_counter()
    check_positive(command, "batch_size")
    given, needed = (
        command.images if command.seeds is None else command.seeds,
        4 if command.grid else 2,
    )
    if given is None or (command.seeds is not None and command.images is not None):
        raise DDIMError(
            "give the ends of the path as --seeds 3,17 or as --images a.png,b.png, one of the two."
        )
    if len(given) != needed:
        what = "a grid has four corners" if command.grid else "a path has two ends"
        raise DDIMError(
            f"{what}, and {len(given)} {'was' if len(given) == 1 else 'were'} given; name "
            f"{needed}, separated by commas."
        )
    if command.count < 2:
        raise DDIMError(
            f"--count must be at least 2, for the ends are among them; got {command.count}."
        )

    import dataclasses

    import numpy as np
    import torch

    from ddim.cli._run import RunRecord, versions, write_run
    from ddim.core.interpolation import interpolate, interpolate_grid
    from ddim.core.noise import check_seeds, seeded_randn
    from ddim.files import replacing
    from ddim.inversion.codes import Code
    from ddim.inversion.ddim import encodable_timesteps
    from ddim.models.images import make_grid, save_png, to_pil

    if command.images is not None:
        check_images(command.images, None)
    device = find_device(command.device)
    pipe, folder = open_model(command.model, device=device)
    asked = pipe.select_timesteps(command.steps, timestep_spacing=command.spacing, order=1)
    timesteps = asked if command.images is None else encodable_timesteps(pipe.noise_schedule, asked)
    pipe.route(timesteps=timesteps, order=1)
    check_class(pipe, command.class_, required=True)
    protocol = {
        "command": "interpolate",
        **describe_model(
            command.model, pipe, folder, clip=pipe.select_clip("none"), fixed=command.class_
        ),
        "timesteps": timesteps,
        "eta": 0.0,
        "count": command.count,
        "interpolation": {"kind": command.interpolation, "grid": command.grid},
    }
    out = Path(command.out or f"out/interpolate-{short_name(command.model)}")
    if command.seeds is not None:
        x_T = seeded_randn(pipe.image_shape, check_seeds(command.seeds)).double()
        labels = None if command.class_ is None else torch.full((needed,), command.class_)
        code = Code(x_T.unsqueeze(0), "ddim", tuple(timesteps), 0, labels=labels)
        protocol["data"] = {"seeds": list(command.seeds)}
    else:
        pictures = read_images(
            pipe, command.images, None, resize=command.resize, fixed=command.class_
        )
        protocol["data"] = {**pictures.data, "method": command.method}

    def path(ends: "Tensor") -> "Tensor":
        if command.grid:
            return interpolate_grid(ends, command.count, command.count, kind=command.interpolation)
        return interpolate(ends[0], ends[1], command.count, kind=command.interpolation)

    execution = {"batch_size": command.batch_size, "device": str(device)}
    begin_run(out, protocol, execution)
    with enough_memory(device, command.batch_size):
        pipe.warm_up()
        started = time.perf_counter()
        with NetworkCalls(pipe) as encoding, unsolved_steps() as unsolved:
            if command.images is not None:
                options: dict[str, Any] = {
                    "method": command.method,
                    "class_labels": pictures.labels,
                    "batch_size": command.batch_size,
                }
                code = pipe.encode(pictures.x0, timesteps=asked, **options)
        # Every state of a code goes along its own path, with one weight: both states of a pair keep
        # their distance.
        states = torch.stack([path(state) for state in code.states])
        along = (
            None if code.labels is None else code.labels[:1].expand(states.shape[1]).contiguous()
        )
        whole = dataclasses.replace(code, states=states, labels=along, residual=None)
        with NetworkCalls(pipe) as decoding:
            pixels = np.stack(
                [
                    np.atleast_3d(np.asarray(p))
                    for p in pipe.decode(whole, batch_size=command.batch_size)
                ]
            )
    seconds = time.perf_counter() - started
    note_levels(asked, timesteps)

    name = "grid.png" if command.grid else "strip.png"
    scale = scaled(pixels)
    save_png(make_grid(pixels, columns=command.count), out / name, scale=scale)
    if command.gif:
        frames = [p.resize((p.width * scale, p.height * scale), 0) for p in to_pil(pixels)]
        with replacing(out / "path.gif") as partial:
            there_and_back = [*frames, *frames[-2:0:-1]]
            there_and_back[0].save(
                partial,
                format="GIF",
                save_all=True,
                append_images=there_and_back[1:],
                duration=120,
                loop=0,
            )
    rms = whole.rms().tolist()
    record = RunRecord(
        protocol=protocol,
        results=[{"place": number, "file": name, "rms": value} for number, value in enumerate(rms)],
        seconds=seconds,
        seconds_total=time.perf_counter() - began,
        evaluations=encoding.each(needed) + decoding.each(len(pixels)),
        execution=execution,
        versions=versions(),
    )
    write_run(out, record)
    reach = f"the root mean square of the latents is {min(rms):.2f} to {max(rms):.2f} (noise: 1)"
    print(
        f"{len(pixels)} pictures in {seconds:.1f} s; they are in {out / name}; "
        f"{reach}.{tell_unsolved(unsolved)}"
    )
