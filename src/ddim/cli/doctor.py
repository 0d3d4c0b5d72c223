"""``ddim doctor``: tells what is wrong with a model's noise schedule and sampler, and what it
costs."""

import difflib
import importlib.util
import io
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from ddim.cli._arguments import EtaOption, TimestepsOption
from ddim.errors import CheckpointError, DDIMError, OutputError

if TYPE_CHECKING:
    from ddim.core.prior import DataPrior
    from ddim.doctor.checks import Finding, ModelFacts, Severity
    from ddim.doctor.report import Diagnosis
    from ddim.doctor.symptoms import Brightness, Probe

__all__ = ["Command", "defaults", "run"]

_CONFIG = "scheduler_config.json"
_TRAINED = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "prediction_type",
    "rescale_betas_zero_snr",
)
_WHOLE = 1024  # images whose pixels' covariance is taken
_PROBED = 64
_COUNTED: dict[str, "Severity"] = {"error": "error", "warning": "warning", "note": "info"}
_COLOURS = {"error": "\x1b[31m", "warning": "\x1b[33m", "info": "\x1b[36m"}


@dataclass(frozen=True)
class Command:
    """Looks a scheduler's configuration over: every finding with its numbers, what it does to
    images, and the keys that mend it.

    Needs no weights. Exits with 1 if there is an error.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A scheduler_config.json, a model's folder, an embedded model, a hub id, or the folder or
    card.json of a training run."""
    steps: int | None = None
    """DDIM steps that you sample with; by default 50, and a finding that says so."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] | None = None
    """Which levels are visited; by default what the configuration says."""
    timesteps: TimestepsOption = None
    """The levels themselves, in place of --steps and --spacing."""
    eta: EtaOption = None
    """The eta that you sample with."""
    guidance_scale: float | None = None
    """The guidance that you sample with; by default what the model's card says."""
    guidance_rescale: float | None = None
    """The rescale of guidance that you sample with; by default the card's, else 0."""
    latent: bool = False
    """The model works on latents; known by itself for a folder."""
    data: str | None = None
    """Training data, as of `ddim train`: brightness is predicted for these images."""
    brightness: tuple[float, ...] | None = None
    """MEAN,STD of the images' mean grey levels, pixels in [-1, 1], in place of --data."""
    prior: str | None = None
    """Write what --data tells of the images' mean colours into this file, for `ddim sample
    --prior`."""
    probe: bool = False
    """Call the network a few times on --data: what does it predict, and was it trained at the last
    level?"""
    fix: str | None = None
    """Write a corrected configuration into this new file or folder; what needs training is left as
    it is."""
    plot: str | None = None
    """Draw log-SNR, visited levels and step sizes of each spacing into this PNG."""
    json: bool = False
    """Print JSON on standard output in place of the report."""
    strict: bool = False
    """Exit with 1 on a warning too."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> int:
    """Prints the findings, writes what was asked for, and returns the exit code."""
    fixed = (
        None
        if command.fix is None
        else Path(command.fix) / _CONFIG
        if Path(command.fix).is_dir()
        else Path(command.fix)
    )
    for path in (fixed, None if command.prior is None else Path(command.prior)):
        if path is not None and path.exists():
            raise OutputError(
                f"{path} is there already, and is not overwritten; give another name."
            )
    for name in ("prior", "probe"):
        if getattr(command, name) and command.data is None:
            raise DDIMError(f"--{name} looks at real images; give --data.")
    if command.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise DDIMError(
            "--plot needs matplotlib, which is not installed; run: pip install 'ddim[plot]'."
        )
    given = command.brightness
    if given is not None and (
        command.data is not None
        or len(given) != 2
        or not (math.isfinite(given[0]) and 0 < given[1] < math.inf)
    ):
        raise DDIMError(
            "--brightness must be MEAN,STD, two numbers with STD above 0, in place of --data."
        )

    from ddim.doctor.checks import json_numbers
    from ddim.doctor.report import diagnose
    from ddim.files import write_text
    from ddim.models.checkpoints import read_guidance

    config, model, folder = _read(command)
    brightness, prior, probe = _look_at_data(command, config, model, folder)
    card = {} if folder is None else read_guidance(folder)
    diagnosis = diagnose(
        config,
        steps=command.steps,
        spacing=command.spacing,
        timesteps=command.timesteps,
        eta=command.eta,
        guidance_scale=card.get("guidance_scale")
        if command.guidance_scale is None
        else command.guidance_scale,
        guidance_rescale=card.get("guidance_rescale", 0.0)
        if command.guidance_rescale is None
        else command.guidance_rescale,
        model=model,
        brightness=brightness,
        probe=probe,
    )
    if command.json:
        content = {
            "source": command.source,
            **asdict(diagnosis),
            "fixed": diagnosis.fixed(),
            "probe": probe and asdict(probe),
        }
        print(json.dumps(json_numbers(content), indent=2, allow_nan=False))
    else:
        _report(command.source, diagnosis, probe)
    say = sys.stderr if command.json else sys.stdout
    if prior is not None and command.prior:
        write_text(
            command.prior,
            json.dumps({**asdict(prior), "data": command.data}, sort_keys=True) + "\n",
        )
        print(
            (
                f"The prior is in {command.prior}; use it with: ddim sample MODEL --prior "
                f"{command.prior}"
            ),
            file=say,
        )
    if fixed is not None:
        print(_fix(diagnosis, fixed), file=say)
    if command.plot is not None:
        print(
            _plot(diagnosis, command.plot)
            if diagnosis.summary
            else "There is no plot: this scheduler has no levels.",
            file=say,
        )
    return int(diagnosis.has("error") or (command.strict and diagnosis.has("warning")))


def _read(command: Command) -> "tuple[dict[str, Any], ModelFacts, Path | None]":
    """The scheduler's configuration, what lies beside it about the model, and the model's folder if
    there is one.

    Raises:
        CheckpointError: If there is no scheduler, or a file is damaged.
    """
    from ddim.doctor.checks import ModelFacts
    from ddim.models.checkpoints import is_unconditional, read_json, read_model_index, resolve_model

    path, training = Path(command.source).expanduser(), None
    if path.is_file():
        content = read_json(path)
        training = _training(content)
        folder = path.parent.parent if path.parent.name == "scheduler" else path.parent
        config = content if training is None else training
    elif path.suffix == ".json" and not path.exists():
        raise CheckpointError(f"there is no file {path}; check the path.")
    else:
        found = resolve_model(command.source)
        folder = found if isinstance(found, Path) else _fetch(found)
        places = [
            place for place in (folder / "scheduler" / _CONFIG, folder / _CONFIG) if place.is_file()
        ]
        if not places:
            read_model_index(folder)  # says what else the folder may be
            raise CheckpointError(
                f"{folder} holds no scheduler/{_CONFIG}, so there is no noise schedule to look at."
            )
        config = read_json(places[0])
        records = [
            place
            for place in (folder / "card.json", folder / "training" / "record.json")
            if place.is_file()
        ]
        training = _training(read_json(records[0])) if records else None
    if not (folder / "model_index.json").is_file():
        return config, ModelFacts(latent=command.latent or None, training=training), None
    index = read_model_index(folder)
    latent = command.latent or any(
        index.get(name, [None])[0] is not None for name in ("vae", "vqvae", "movq")
    )
    unet = (
        read_json(folder / "unet" / "config.json")
        if (folder / "unet" / "config.json").is_file()
        else {}
    )
    size, channels = unet.get("sample_size"), unet.get("in_channels")
    height, width = size if isinstance(size, list) else (size, size)
    model = ModelFacts(
        latent=latent,
        guided=not is_unconditional(index),
        shape=(channels, height, width) if channels and height and width and not latent else None,
        num_train_timesteps=unet.get("num_train_timesteps"),
        training=training,
    )
    return config, model, folder


def _training(content: dict[str, Any]) -> dict[str, Any] | None:
    """The schedule of a training run, from its card, its record, or its bare options; None if the
    content is something else."""
    options = content.get("config", content)
    if not (isinstance(options, dict) and "beta_schedule" in options and "data" in options):
        return None
    # As `ddim train` writes its scheduler: an option that was not given is recorded with what it
    # came out as, or is diffusers' default.
    given = {name: options[name] for name in _TRAINED if options.get(name) is not None}
    return {"timestep_spacing": "trailing", "clip_sample": False, **given}


def _fetch(hub_id: str) -> Path:
    """Downloads the configurations of a model of the hub, and no weights."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=["*.json", "scheduler/*.json", "unet/*.json"]
            )
        )
    except Exception as error:
        raise CheckpointError(
            f"{hub_id!r} is neither an embedded model nor an existing file or folder, and the hub "
            "has nothing of that name that can be "
            "read from here; check the name and the connection."
        ) from error


def _look_at_data(
    command: Command, config: dict[str, Any], model: "ModelFacts", folder: Path | None
) -> "tuple[Brightness | None, DataPrior | None, Probe | None]":
    """What the images tell: their brightness, the prior, and the network's answers."""
    if command.data is None:
        return _known_brightness(command, model, folder), None, None
    if model.latent:
        raise DDIMError(
            "--data tells the brightness of pixels, and this model works on latents; leave it out."
        )
    import torch

    from ddim.data.batches import measure_prior, stack_images
    from ddim.data.sources import load_images
    from ddim.doctor.report import complete, levels_of
    from ddim.doctor.symptoms import Brightness, probe
    from ddim.models.checkpoints import find_model, load_network

    if command.probe and (folder is None or model.guided):
        raise DDIMError(
            "--probe calls the network of an unconditional model; give the model's folder, not a "
            "configuration alone."
        )
    channels, resolution = (model.shape[0], max(model.shape[1:])) if model.shape else (None, None)
    data = load_images(command.data, channels=channels, resolution=resolution)
    prior = measure_prior(data)
    brightness = Brightness.of_images(stack_images(data, _spread(len(data), _WHOLE)))
    if not command.probe or folder is None:
        return brightness, prior, None
    schedule = levels_of(complete(config))
    network = load_network(folder if Path(command.source).exists() else find_model(command.source))
    few = _spread(len(data), _PROBED)
    labels = (
        {"class_labels": torch.tensor([data[i][1] for i in few])}
        if network.config.get("num_class_embeds")
        else {}
    )
    found = probe(
        lambda x_t, t: network(x_t, t, **labels).sample[:, : x_t.shape[1]],
        schedule,
        stack_images(data, few),
    )
    return brightness, prior, found


def _spread(total: int, most: int) -> range:
    """At most that many places, evenly over all."""
    return range(0, total, max(1, total // most))[:most]


def _known_brightness(
    command: Command, model: "ModelFacts", folder: Path | None
) -> "Brightness | None":
    """The brightness that was given, or that the model's prior.json tells."""
    from ddim.core.prior import DataPrior
    from ddim.doctor.symptoms import Brightness
    from ddim.models.checkpoints import read_json

    channels, height, width = model.shape or (1, 64, 64)
    if command.brightness is not None:
        return Brightness(command.brightness[0], command.brightness[1], channels * height * width)
    if folder is None or model.shape is None or not (folder / "prior.json").is_file():
        return None
    return Brightness.of(
        DataPrior.from_dict(read_json(folder / "prior.json")), channels * height * width
    )


def _report(source: str, diagnosis: "Diagnosis", probe: "Probe | None") -> None:
    """Prints the findings for people, in colour on a terminal."""
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if summary := diagnosis.summary:
        known = summary["brightness"]
        images = (
            f"images of brightness {known['mean']:.2f} +- {known['std']:.2f} "
            f"({known['dimensions']} numbers each"
        )
        print(
            f"{source}: {summary['scheduler']}, {summary['levels']} levels "
            f"({summary['beta_schedule']}), {summary['prediction_type']}, "
            f"terminal SNR {summary['terminal_snr']:.4g}\n"
            f"{summary['steps']} steps, {summary['timestep_spacing']}: levels "
            f"{summary['first_level']} to {summary['last_level']}\n"
            f"predicted for {images}{', assumed' if known['assumed'] else ''}): brightness off by "
            f"{summary['brightness_bias']:+.3f}, "
            f"spread {summary['brightness_spread']:.3f} of theirs"
            f"{'' if known['whole_images'] else ' (taken for independent of the rest of the image)'}"
        )
    if probe is not None:
        told = {
            True: "trained",
            False: "not trained",
            None: "cannot be told whether it was trained",
        }[probe.trained_at_end]
        print(
            f"the network's answers are those of {probe.prediction_type}; at the last level it was "
            f"{told}"
        )
    for finding in diagnosis.findings:
        colour, reset = (_COLOURS[finding.severity], "\x1b[0m") if coloured else ("", "")
        print(f"\n{colour}{finding.severity} {finding.code}{reset}  {finding.message}")
        for line in (
            finding.consequence,
            _told_fix(finding),
            finding.advice,
            f"See {finding.reference}.",
        ):
            if line:
                print(f"  {line}")
    counts = {
        name: sum(f.severity == s for f in diagnosis.findings) for name, s in _COUNTED.items()
    }
    print(f"\n{', '.join(f'{count} {name}{_plural(count)}' for name, count in counts.items())}.")


def _plural(count: int) -> str:
    return "" if count == 1 else "s"


def _keys(finding: "Finding") -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in finding.fix.items())


def _told_fix(finding: "Finding") -> str:
    return (
        _keys(finding)
        and f"Fix: {_keys(finding)}{' (for a network that is trained anew)' if finding.retrain else ''}"
    )


def _fix(diagnosis: "Diagnosis", path: Path) -> str:
    """Writes the corrected configuration, and returns the difference, what gets worse by it, and
    what is left to training."""
    left = [
        f"{f.code} needs a network that is trained anew, and is left as it is: {_keys(f)}"
        for f in (diagnosis.after or diagnosis).findings
        if f.retrain and f.fix and f.severity != "info"
    ]
    if diagnosis.after is None:
        return "\n".join(
            [f"There is nothing to change without training; {path} is not written.", *left]
        )
    fixed = diagnosis.fixed()
    _write_json(path, fixed)
    before, after = (
        json.dumps(c, indent=2, sort_keys=True).splitlines() for c in (diagnosis.config, fixed)
    )
    diff = difflib.unified_diff(before, after, "as it is", str(path), lineterm="")
    provided = [
        f"{f.code}: {f.advice}"
        for f in diagnosis.findings
        if f.fix and f.advice and not f.retrain and f.severity != "info"
    ]
    worse = [diagnosis.worse] if diagnosis.worse else []
    return "\n".join(
        [*diff, f"The corrected configuration is in {path}.", *worse, *provided, *left]
    )


def _write_json(path: Path | str, content: dict[str, Any]) -> None:
    from ddim.files import write_text

    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _plot(diagnosis: "Diagnosis", path: str) -> str:
    """Draws the schedule, and for each spacing the visited levels and the steps between them in
    log-SNR; says where."""
    import torch
    from matplotlib.figure import Figure
    from PIL import Image

    from ddim.core.timesteps import Spacing, select_timesteps
    from ddim.doctor.report import complete, levels_of
    from ddim.models.images import save_png

    config = complete(diagnosis.config)
    schedule, steps = levels_of(config), diagnosis.summary["steps"]
    log_snr = schedule.log_snr(torch.arange(len(schedule)))
    zero = bool(log_snr.isinf().any())
    log_snr[log_snr.isinf()] = torch.nan  # zero terminal SNR has no place on this axis
    figure = Figure(figsize=(12, 4), layout="constrained")
    curve, visited, sizes = figure.subplots(1, 3)
    curve.plot(log_snr, color="black")
    curve.set(title="schedule", xlabel="level", ylabel="log-SNR")
    spacings: tuple[Spacing, ...] = get_args(Spacing)
    for row, spacing in enumerate(spacings):
        levels = torch.tensor(
            select_timesteps(len(schedule), steps, spacing, steps_offset=config["steps_offset"])
        )
        visited.plot(levels, torch.full((steps,), row), "|", markersize=12)
        sizes.plot(levels[1:], log_snr[levels[1:]] - log_snr[levels[:-1]], ".-", label=spacing)
    visited.set(
        title=f"levels of {steps} steps",
        xlabel="level",
        yticks=range(len(spacings)),
        yticklabels=spacings,
    )
    sizes.set(
        title=f"step sizes{', that out of zero SNR is infinite' if zero else ''}",
        xlabel="level that is reached",
        ylabel="gain of log-SNR",
    )
    sizes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    save_png(Image.open(drawn), path)
    return f"The plot is in {path}."
