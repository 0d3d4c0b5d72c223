"""``ddim train``: trains a model on a user's data and writes a diffusers folder."""

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ddim.errors import DDIMError
from ddim.training.config import PRESETS, TrainConfig

__all__ = ["Command", "defaults", "preset_defaults", "run", "take_preset"]

Command = TrainConfig


def defaults(arguments: list[str]) -> tuple[TrainConfig | None, list[str]]:
    """What a ``--preset`` among the arguments stands for, and the other arguments."""
    name, rest = take_preset(arguments)
    return (None if name is None else preset_defaults(name)), rest


def take_preset(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Splits ``--preset NAME`` off the arguments: a preset is a set of defaults, so it must be known before they are parsed.

    Raises:
        DDIMError: If the name is missing or unknown.
    """
    rest, name = [], None
    values = iter(arguments)
    for value in values:
        if value == "--preset" or value.startswith("--preset="):
            name = value.partition("=")[2] if "=" in value else next(values, "")
            if name not in PRESETS:
                raise DDIMError(f"--preset must be one of {', '.join(PRESETS)}; got {name!r}.")
        else:
            rest.append(value)
    return name, rest


def preset_defaults(name: str) -> TrainConfig:
    """The configuration that a preset stands for; its ``out`` is runs/NAME."""
    options: dict[str, Any] = {"out": f"runs/{name}", **PRESETS[name].options}
    return TrainConfig(**options)


def run(config: TrainConfig) -> None:
    """Trains, reports progress on standard output, and says how to sample the result."""
    try:
        from ddim.training.trainer import NonFiniteLossError, Progress, train
    except ModuleNotFoundError as error:
        raise DDIMError(f"training needs {error.name}, which is not installed; run: pip install 'ddim[train]'.") from error

    def show(progress: Progress) -> None:
        left = (
            time.strftime("%H:%M:%S", time.gmtime(progress.seconds_left))
            if progress.seconds_left < 86400
            else f"{progress.seconds_left / 86400:.1f} days"
        )
        held = "" if progress.validation_loss is None else f"  held out {progress.validation_loss:.4f}"
        print(
            f"step {progress.step}/{progress.steps}  {progress.images} images  loss {progress.loss:.4f}{held}  "
            f"{progress.images_per_second:.1f} images/s  {left} left",
            flush=True,
        )

    card = {"command": shlex.join(["ddim", *sys.argv[1:]]), "revision": _revision()}
    try:
        result = train(config, on_progress=show, card=card)
    except NonFiniteLossError as error:
        raise DDIMError(str(error)) from error
    if result.finished:
        print(f"The model is in {result.out}; sample it with: ddim sample {result.out}")
    else:
        print(f"Stopped at step {result.step} with a checkpoint; the same command goes on from there.")


def _revision() -> str | None:
    """The git revision of this code, with -dirty where it has uncommitted changes; None outside a repository."""
    folder = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return answer.stdout.strip() or None
