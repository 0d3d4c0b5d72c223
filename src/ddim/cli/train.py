"""``ddim train``: trains a model on a user's data and writes a diffusers folder."""

import sys
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ddim.errors import DDIMError
from ddim.training.config import PRESETS, TrainConfig

if TYPE_CHECKING:
    from ddim.training.monitoring import Progress

__all__ = ["Request", "defaults", "run"]

_PRESETS_HELP = "Begin with the options of a preset, which those given replace. " + " ".join(
    f"{k}: {v.note}" for k, v in PRESETS.items()
)


@dataclass(frozen=True)
class Request(TrainConfig):
    """Trains an unconditional, class-conditional or text-conditional model, and writes a folder
    that diffusers loads too."""

    preset: Annotated[str | None, tyro.conf.arg(help=_PRESETS_HELP, metavar="|".join(PRESETS))] = (
        None
    )


def defaults(arguments: list[str]) -> tuple[Request | None, list[str]]:
    """What a ``--preset`` among the arguments stands for, its ``out`` being runs/NAME, and the
    arguments.

    Raises:
        DDIMError: If the preset's name is missing or unknown.
    """
    name = None
    for value, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if value == "--preset" or value.startswith("--preset="):
            name = value.partition("=")[2] if "=" in value else following
            if name not in PRESETS:
                raise DDIMError(f"--preset must be one of {', '.join(PRESETS)}; got {name!r}.")
    if name is None:
        return None, arguments
    options: dict[str, Any] = {"out": f"runs/{name}", **PRESETS[name].options}
    return Request(**options), arguments


def run(request: Request) -> None:
    """Trains, reports progress on standard output, and says how to sample the result."""

    def show(progress: "Progress") -> None:
        left = (
            time.strftime("%H:%M:%S", time.gmtime(progress.seconds_left))
            if progress.seconds_left < 86400
            else f"{progress.seconds_left / 86400:.1f} days"
        )
        held = (
            "" if progress.validation_loss is None else f"  held out {progress.validation_loss:.4f}"
        )
        print(
            f"step {progress.step}/{progress.steps}  {progress.images} images  loss "
            f"{progress.loss:.4f}{held}  "
            f"{progress.images_per_second:.1f} images/s  {left} left",
            flush=True,
        )

    config = TrainConfig(
        **{field.name: getattr(request, field.name) for field in fields(TrainConfig)}
    )
    try:
        from ddim.runs.model import quiet_libraries
        from ddim.training.record import code_revision
        from ddim.training.trainer import train

        if request.base is not None:
            quiet_libraries(text=True)
        result = train(
            config,
            on_progress=show,
            on_note=lambda note: print(f"ddim: {note}", file=sys.stderr),
            revision=code_revision(),
        )
    except ModuleNotFoundError as error:
        raise DDIMError(
            f"training needs {error.name}, which is not installed; run: pip install 'ddim[train]'."
        ) from error
    if not result.is_main_process:
        return
    if result.finished:
        prompt = " --prompt '...'" if (result.out / "text_encoder").is_dir() else ""
        if result.was_finished:
            print(
                f"The run was finished already, after {result.step} steps, and nothing was trained."
            )
        print(f"The model is in {result.out}; sample it with: ddim sample {result.out}{prompt}")
    else:
        print(
            f"Stopped at step {result.step} with a checkpoint; the same command goes on from there."
        )
