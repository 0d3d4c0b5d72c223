"""Examines the configuration of a model, with what its files and its data say."""

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path

from ddim.core.prior import DataPrior
from ddim.data.batches import measure_prior, pick, stack_images
from ddim.data.sources import load_images
from ddim.doctor.probing import Probe
from ddim.doctor.reading import complete, levels_of
from ddim.doctor.report import Diagnosis, diagnose
from ddim.doctor.symptoms import Brightness
from ddim.errors import DDIMError, OutputError
from ddim.figures import FORMATS, check_plots
from ddim.models.checkpoints import find_model, read_guidance
from ddim.models.facts import ScheduleSource, read_source
from ddim.models.folder import read_json
from ddim.models.images import ENDINGS
from ddim.options import check_request
from ddim.runs.requests import DoctorRequest
from ddim.runs.rules import Options, refuse_unguided

__all__ = ["Examination", "examine"]

_CONFIG = "scheduler_config.json"
_WHOLE = 1024
"""Images whose pixels' covariance is taken."""


@dataclass(frozen=True, eq=False)
class Examination:
    """What was found, and of what; with --probe and --data also what those say, and with --fix its
    file."""

    diagnosis: Diagnosis
    source: ScheduleSource
    probe: Probe | None
    prior: DataPrior | None
    fix: Path | None
    notes: tuple[str, ...] = ()
    """What was left out of the data, and assumed of them."""


def examine(request: DoctorRequest) -> Examination:
    """Reads what was named, and examines it. Nothing is written.

    Raises:
        DDIMError: If options exclude each other, or do not fit the model.
        CheckpointError: If there is no scheduler, or a file is damaged.
        OutputError: If a file that is to be written exists.
    """
    check_request(request)
    fix = None if request.fix is None else Path(request.fix)
    made = None
    if fix is not None and (fix.is_dir() or str(request.fix).endswith(("/", os.sep))):
        made, fix = fix, fix / _CONFIG
        _check_new([] if made.is_dir() else [made])
    named = [fix, request.prior, request.show, request.plot]
    _check_new([Path(name) for name in named if name is not None], made=made)
    if request.plot is not None:
        check_plots()
    for option, path, endings in (
        ("--plot", request.plot, [f".{kind}" for kind in FORMATS]),
        ("--show", request.show, list(ENDINGS)),
    ):
        if path is not None and Path(path).suffix.lower() not in endings:
            raise DDIMError(f"{option} must end in one of {', '.join(endings)}; got {path!r}.")
    _check_brightness(request)
    source = read_source(request.source, latent=request.latent)
    guidance = {"guidance_scale", "guidance_rescale"} if source.model.guided is False else set()
    others = {field.name for field in fields(request)} - guidance
    Options(request, *others).refuse_unread(request.source)
    brightness, prior, answers, notes = _look_at_data(request, source)
    card = {} if source.folder is None else read_guidance(source.folder)
    scale, rescale = request.guidance_scale, request.guidance_rescale
    if scale is None:
        scale = card.get("guidance_scale")
    if scale is not None:
        refuse_unguided(request, scale)
    diagnosis = diagnose(
        source.config,
        steps=request.steps,
        spacing=request.spacing,
        timesteps=request.timesteps,
        eta=request.eta,
        guidance_scale=scale,
        guidance_rescale=card.get("guidance_rescale", 0.0) if rescale is None else rescale,
        model=source.model,
        brightness=brightness,
        probe=answers,
    )
    return Examination(diagnosis, source, answers, prior, fix, notes)


def _check_new(paths: list[Path], *, made: Path | None = None) -> None:
    """Checks that the files can be written, each a new one, perhaps in a folder that is made."""
    for path in paths:
        if path.exists():
            message = f"{path} is there already, and is not overwritten; give another name."
            raise OutputError(message)
        if paths.count(path) > 1:
            raise OutputError(f"{path} is named for two files; give each its own name.")
        if not path.parent.is_dir() and path.parent != made:
            raise OutputError(f"{path} cannot be written: there is no folder {path.parent}.")


def _check_brightness(request: DoctorRequest) -> None:
    given = request.brightness
    if given is None:
        return
    if len(given) != 2 or given[1] <= 0:
        raise DDIMError("--brightness must be MEAN,STD, two numbers with STD above 0.")


def _look_at_data(
    request: DoctorRequest, source: ScheduleSource
) -> tuple[Brightness | None, DataPrior | None, Probe | None, tuple[str, ...]]:
    """What the images say: their brightness, the prior, the network's answers, and notes."""
    model = source.model
    if request.data is None:
        return _known_brightness(request, source), None, None, ()
    folder = _weights(request, source) if request.probe else None
    levels, device = levels_of(complete(source.config)), request.device
    if model.latent:
        if folder is None:
            raise DDIMError(
                "--data tells the brightness of pixels, and this model works on latents; leave it "
                "out, or ask the network about the images with --probe."
            )
        if request.prior is not None:
            raise DDIMError(
                "--prior measures the brightness of pixels, and this model works on latents; leave "
                "it out."
            )
        from ddim.runs.probing import probe_latents  # with all of diffusers, which takes seconds

        return None, None, *probe_latents(folder, request.source, levels, request.data, device)
    channels, size = (model.shape[0], model.shape[1:]) if model.shape else (None, None)
    data = load_images(request.data, channels=channels, resolution=size)
    prior = measure_prior(data)
    brightness = Brightness.of_images(
        stack_images(data, pick(len(data), _WHOLE, labels=data.labels))
    )
    if folder is None:
        return brightness, prior, None, data.notes
    from ddim.runs.probing import probe_pixels

    answers = probe_pixels(folder, request.source, levels, data, device)
    return brightness, prior, answers, data.notes


def _weights(request: DoctorRequest, source: ScheduleSource) -> Path:
    """The folder with the weights of a model that is to be probed."""
    if source.folder is None:
        raise DDIMError(
            f"--probe calls the network, and {request.source} is a configuration or a single file; "
            "give the model's folder, name or hub id."
        )
    is_local = Path(request.source).expanduser().exists()
    return source.folder if is_local else find_model(request.source)


def _known_brightness(request: DoctorRequest, source: ScheduleSource) -> Brightness | None:
    """The brightness that was given, or that the model's prior.json says."""
    shape, folder = source.model.shape, source.folder
    dimensions = math.prod(shape or (1, 64, 64))
    if request.brightness is not None:
        return Brightness(request.brightness[0], request.brightness[1], dimensions)
    if folder is None or shape is None or not (folder / "prior.json").is_file():
        return None
    return Brightness.of(DataPrior.from_dict(read_json(folder / "prior.json")), dimensions)
