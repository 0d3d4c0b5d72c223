"""``ddim train``: trains a model on a user's data and writes a diffusers folder."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ddim.errors import DDIMError
from ddim.options import given_options, unmet
from ddim.training.config import PRESETS, TrainConfig

if TYPE_CHECKING:
    from ddim.training.trainer import TrainResult

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

    def __post_init__(self) -> None:
        """Leaves the checks to the configuration that the request stands for."""


def defaults(arguments: list[str]) -> Request | None:
    """The request that a ``--preset`` among the arguments stands for, its ``out`` being runs/NAME;
    its ``data`` is missing if the preset leaves it open.

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
        return None
    named: dict[str, Any] = {"data": tyro.MISSING, "out": f"runs/{name}"}
    return Request(**named | PRESETS[name].options)


def configuration(request: Request) -> TrainConfig:
    """What a request stands for. An option of a preset whose need was taken away has no effect, and
    falls back to its default; one that was given is refused before.

    Raises:
        DDIMError: If options do not fit together.
    """
    idle = unmet(request, given_options(request))
    names = (field.name for field in fields(TrainConfig))
    return TrainConfig(**{name: getattr(request, name) for name in names if name not in idle})


def run(request: Request) -> None:
    """Trains, reports progress, and says how to sample the result."""
    from ddim.cli.progress import progress_shown
    from ddim.cli.terminal import say

    def begin(lines: Sequence[str]) -> None:
        for line in lines:
            say(line)

    config = configuration(request)
    try:
        from ddim.runs.model import quiet_libraries
        from ddim.training.record import code_revision
        from ddim.training.trainer import train

        if request.base is not None:
            quiet_libraries(text=True)
        with progress_shown() as show:
            result = train(
                config,
                on_progress=show,
                on_note=lambda text: say(f"ddim: {text}", to_error=True),
                on_start=begin,
                revision=code_revision(),
            )
    except ModuleNotFoundError as error:
        raise DDIMError(
            f"training needs {error.name}, which is not installed; run: pip install 'ddim[train]'."
        ) from error
    if result.is_main_process:
        _tell_end(result)


def _tell_end(result: "TrainResult") -> None:
    from ddim.cli.terminal import say
    from ddim.training.checkpoint import checkpoint_folder

    out, step = result.out, result.step
    if not result.finished and step == 0:
        say("Stopped before the first step, without a checkpoint; the same command begins anew.")
        return
    if not result.finished:
        say(
            f"Stopped at step {step} with a checkpoint; the same command goes on from there, and "
            f"{_sampling(checkpoint_folder(out / 'checkpoints', step))} draws with what there is."
        )
        return
    if result.was_finished:
        say(f"The run was finished already, after {step} steps, and nothing was trained.")
    if result.shortness is not None:
        say(f"note: {result.shortness}")
    say(f"The model is in {out}; sample it with: {_sampling(out)}")


def _sampling(model: Path) -> str:
    """The command that draws with a model."""
    prompt = " --prompt '...'" if (model / "text_encoder").is_dir() else ""
    return f"ddim sample {model}{prompt}"
