"""``ddim decode``: a code file back to images."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddim.cli._arguments import ModelArgument
from ddim.cli._latent import NetworkCalls, begin_run, beyond, check_first, scaled
from ddim.cli._model import check_positive, describe_model, enough_memory, find_device, open_model
from ddim.errors import DDIMError

__all__ = ["Command", "defaults", "run"]

GRID = 64
"""Images that the grid shows at most."""


@dataclass(frozen=True)
class Command:
    """Turns a code file back into pictures: one file an image, and a grid of the first 64."""

    model: ModelArgument = "fashion-mnist"
    """The model that encoded: an embedded model, a folder in diffusers format, or a hub id; none of
    text."""
    code: str = "code.safetensors"
    """The file that `ddim encode` wrote."""
    steps: int | None = None
    """Other steps than the code's, which only codes of fixed-point and ddim take; they begin where
    the code lies."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] | None = None
    """Of those steps."""
    seed: int = 0
    """Number of the first image of the code, counted from 0."""
    count: int | None = None
    """How many, from that one on; by default all."""
    batch_size: int = 64
    """Images decoded together."""
    out: str = "out/decode"
    """Folder for the pictures."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the network, as it was when encoding; the states are float64 always."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Decodes the code and writes the pictures."""
    began = time.perf_counter()
    check_positive(command, "batch_size", "count")
    check_first(command.seed)
    import numpy as np

    from ddim.cli._run import RunRecord, versions, write_run
    from ddim.inversion.codes import fingerprint, load_code
    from ddim.models.images import make_grid, save_png

    whole = load_code(command.code)
    if missing := beyond(len(whole), command.seed, command.count):
        raise DDIMError(
            f"{command.code} holds {len(whole)} images, 0 to {len(whole) - 1}; --seed and --count "
            f"ask for {missing}."
        )
    code = whole[command.seed : None if command.count is None else command.seed + command.count]
    device = find_device(command.device)
    pipe, folder = open_model(command.model, device=device, dtype=command.dtype)
    steps = (
        command.steps
        if command.steps is not None or command.spacing is None
        else len(code.timesteps)
    )
    timesteps = pipe.decoding_timesteps(code, steps, timestep_spacing=command.spacing)
    if steps is not None and len(timesteps) != steps:
        print(
            f"note: the code lies at level {timesteps[0]}; {steps - len(timesteps)} of the {steps} "
            "levels are not below it."
        )
    protocol = {
        "command": "decode",
        **describe_model(
            command.model,
            pipe,
            folder,
            clip=pipe.select_clip("none"),
            dtype=command.dtype,
            classes="the code's",
        ),
        "sampler": code.method if code.is_exact else "ddim",
        "timesteps": timesteps,
        "eta": 0.0,
        "data": {"code": fingerprint(whole.states), "method": code.method},
    }
    out = Path(command.out)
    execution = {"count": len(code), "batch_size": command.batch_size, "device": str(device)}
    before = begin_run(out, protocol, execution)
    with enough_memory(device, command.batch_size):
        pipe.warm_up(min(command.batch_size, len(code)))
        started = time.perf_counter()
        with NetworkCalls(pipe) as calls:
            pictures = pipe.decode(code, timesteps=timesteps, batch_size=command.batch_size)
    seconds = time.perf_counter() - started
    files = {
        number: f"{number:06d}.png" for number in range(command.seed, command.seed + len(pictures))
    }
    for file, picture in zip(files.values(), pictures, strict=True):
        save_png(picture, out / file)
    results = [r for r in before.results if r["image"] not in files] + [
        {"image": n, "file": file} for n, file in files.items()
    ]
    shown = np.stack([np.atleast_3d(np.asarray(picture)) for picture in pictures[:GRID]])
    save_png(make_grid(shown), out / "grid.png", scale=scaled(shown))
    record = RunRecord(
        protocol=protocol,
        results=sorted(results, key=lambda r: r["image"]),
        seconds=seconds,
        seconds_total=time.perf_counter() - began,
        evaluations=calls.each(len(code)),
        execution=execution,
        versions=versions(),
    )
    write_run(out, record)
    print(
        f"{len(pictures)} images decoded in {seconds:.1f} s; they are in {out}, together in "
        f"{out / 'grid.png'}."
    )
