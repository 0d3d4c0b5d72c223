"""Examines the configuration of a model, with what its files and its data say."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ddim.core.prior import DataPrior
from ddim.data.batches import measure_prior, pick, stack_images
from ddim.data.dataset import ImageData
from ddim.data.sources import load_images
from ddim.doctor.reading import complete, levels_of
from ddim.doctor.report import Diagnosis, diagnose
from ddim.doctor.symptoms import Brightness, Probe, probe
from ddim.errors import DataError, DDIMError, OutputError
from ddim.figures import FORMATS, check_plots
from ddim.models.checkpoints import check_finite, find_model, load_network, read_guidance
from ddim.models.facts import ScheduleSource, read_source
from ddim.models.folder import read_json
from ddim.models.images import ENDINGS
from ddim.options import check_request
from ddim.runs.requests import DoctorRequest
from ddim.runs.rules import Options
from ddim.runs.text import refuse_unguided

__all__ = ["Examination", "examine"]

_CONFIG = "scheduler_config.json"
_WHOLE = 1024
"""Images whose pixels' covariance is taken."""
_PROBED = 64
"""Images that the network is called on."""


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
    if fix is not None and fix.is_dir():
        fix /= _CONFIG
    named = (request.prior, request.show, request.plot)
    _check_new([*([] if fix is None else [fix]), *(Path(n) for n in named if n is not None)])
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


def _check_new(paths: list[Path]) -> None:
    """Checks that the files can be written, each a new one."""
    for path in paths:
        if path.exists():
            message = f"{path} is there already, and is not overwritten; give another name."
            raise OutputError(message)
        if paths.count(path) > 1:
            raise OutputError(f"{path} is named for two files; give each its own name.")
        if not path.parent.is_dir():
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
    if model.latent:
        raise DDIMError(
            "--data tells the brightness of pixels, and this model works on latents; leave it out."
        )
    if request.probe and (source.folder is None or model.guided):
        raise DDIMError(
            "--probe calls the network of an unconditional model; give the model's folder, not a "
            "configuration alone."
        )
    channels, size = (model.shape[0], model.shape[1:]) if model.shape else (None, None)
    data = load_images(request.data, channels=channels, resolution=size)
    prior = measure_prior(data)
    brightness = Brightness.of_images(
        stack_images(data, pick(len(data), _WHOLE, labels=data.labels))
    )
    if not request.probe or source.folder is None:
        return brightness, prior, None, data.notes
    is_local = Path(request.source).exists()
    network = load_network(source.folder if is_local else find_model(request.source))
    check_finite(request.source, dict(network.named_parameters()))
    few, labels = pick(len(data), _PROBED, labels=data.labels), {}
    if network.config.get("num_class_embeds"):
        labels = {"class_labels": torch.tensor(_classes(data, few, network, request.source))}
    answers = probe(
        lambda x_t, t: network(x_t, t, **labels).sample[:, : x_t.shape[1]],
        levels_of(complete(source.config)),
        stack_images(data, few),
    )
    return brightness, prior, answers, data.notes


def _classes(data: ImageData, chosen: list[int], network: Any, name: str) -> list[int]:
    """The labels of these images, which the network must know."""
    labels, known = [data[i][1] for i in chosen], int(network.config.num_class_embeds)
    if min(labels) < 0 or max(labels) >= known:
        got = "has no labels" if min(labels) < 0 else f"has others; got {max(labels)}"
        raise DataError(
            f"--probe needs labels in 0..{known - 1}, the classes of {name}, and {data.name} {got}."
        )
    return labels


def _known_brightness(request: DoctorRequest, source: ScheduleSource) -> Brightness | None:
    """The brightness that was given, or that the model's prior.json says."""
    shape, folder = source.model.shape, source.folder
    dimensions = math.prod(shape or (1, 64, 64))
    if request.brightness is not None:
        return Brightness(request.brightness[0], request.brightness[1], dimensions)
    if folder is None or shape is None or not (folder / "prior.json").is_file():
        return None
    return Brightness.of(DataPrior.from_dict(read_json(folder / "prior.json")), dimensions)
