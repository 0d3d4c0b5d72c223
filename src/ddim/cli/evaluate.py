"""``ddim evaluate``: measures images, or a model's, against real ones."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ddim.cli._arguments import EtaOption
from ddim.cli._evaluation import (
    describe_reference,
    draw_batches,
    image_batches,
    note_few,
    open_panel,
    open_reference,
    shuffled_batches,
)
from ddim.cli._model import check_positive, describe_model, find_device, open_model, short_name
from ddim.errors import DataError, DDIMError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Command", "defaults", "run"]

COUNT = 2048
"""Images that are drawn from a model, unless another number is asked for."""


@dataclass(frozen=True)
class Command:
    """Measures a folder of images, an array file, or a model against real images; each number
    beside its floor and its spread."""

    samples_or_model: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="SAMPLES_OR_MODEL")
    ]
    """A folder of pictures (such as `ddim sample` writes), a .npz, or a model: embedded, a
    diffusers folder, or a hub id; none of text."""
    reference: str
    """Real images: a folder, a .npz, IDX files, parquet, digits, fashion-mnist, or a hub dataset
    id."""
    split: str = "train"
    """Split of the reference."""
    resize: bool = False
    """Resize the reference (shorter side) and cut it in the centre to the samples' size, where that
    is another."""
    count: int | None = None
    """How many samples are measured: the first of a folder, by default all; 2048 of a model."""
    metrics: tuple[str, ...] | None = None
    """METRIC-EXTRACTOR each, such as fd-fashion,kid-pixels; by default a panel that fits the
    images."""
    weights: tuple[str, ...] = ()
    """NAME=PATH each: where the weights of the extractors inception, dinov2 and efficientnet-lite0
    lie."""
    steps: int | None = None
    """Of a model: DDIM steps, 50 unless given."""
    eta: EtaOption = None
    """Of a model: 0 is deterministic and the default, 1 DDPM's posterior, sigma-hat the larger
    noise of DDPM."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] | None = None
    """Of a model: which levels are visited; by default what its configuration says."""
    seed: int = 0
    """Of a model: seed of the first image."""
    batch_size: int = 64
    """Of a model: images drawn together."""
    out: str | None = None
    """Folder for run.json; by default out/evaluate-NAME."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""
    compile: bool = False
    """Of a model: compile the network first."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What is measured."""

    count: int
    shape: tuple[int, int, int]
    batches: "Iterator[Tensor]"
    protocol: dict[str, Any]
    evaluations: float
    seconds: list[float]
    """Of each batch that was drawn; empty for images that were there."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Measures, prints the numbers, and writes run.json."""
    began = time.perf_counter()
    check_positive(command, "count", "batch_size")

    from ddim.cli._run import RunRecord, check_protocol, versions, write_run
    from ddim.evaluation.protocol import collect, collect_reference, measure, sample_cuts
    from ddim.evaluation.report import spread_text, text_table
    from ddim.files import locked

    device = find_device(command.device)
    samples = (
        _of_model(command, device) if _is_model(command.samples_or_model) else _of_images(command)
    )
    data = open_reference(
        command.reference,
        split=command.split,
        shape=samples.shape,
        what=command.samples_or_model,
        resize=command.resize,
    )
    asked: dict[str, Any] = {
        "weights": command.weights,
        "counts": [samples.count],
        "available": len(data),
    }
    panel = open_panel(command.metrics, shape=samples.shape, device=device, **asked)
    against = describe_reference(data, command.split, panel, resize=command.resize)
    protocol = {"command": "evaluate", **samples.protocol, **against, "count": samples.count}
    out = Path(command.out or f"out/evaluate-{short_name(command.samples_or_model)}")
    with locked(out):
        check_protocol(out, protocol)
        reference = collect_reference(
            shuffled_batches(data), panel, available=len(data), counts=[samples.count]
        )
        collected = collect(samples.batches, panel, cuts=sample_cuts([samples.count]))
        results = measure(collected, reference, panel, count=samples.count)
        record = RunRecord(
            protocol=protocol,
            results=[asdict(result) for result in results],
            seconds=sum(samples.seconds),
            seconds_total=time.perf_counter() - began,
            evaluations=samples.evaluations,
            execution={
                "device": str(device),
                "batch_size": command.batch_size,
                "compile": command.compile,
            },
            versions=versions(),
        )
        write_run(out, record)
    rows = [["metric", "value", "spread", "real images"]]
    rows += [[r.metric, f"{r.value:.4g}", spread_text(r), f"{r.floor:.4g}"] for r in results]
    print(text_table(rows), end="")
    note_few(
        panel,
        shape=samples.shape,
        counts=[samples.count],
        available=len(data),
        chosen=command.metrics is not None,
    )
    if (halves := results[0].floor_count) < samples.count:
        print(
            f"note: the reference has {halves} images a half, so its floor is of {halves} and too "
            f"high for {samples.count}."
        )
    print(
        f"{samples.count} images against {len(data)} of {command.reference} ({command.split}); the "
        f"record is in {out / 'run.json'}."
    )


def _is_model(name: str) -> bool:
    """Whether a name means a model: embedded, a folder that is one or will be, or nothing on this
    machine."""
    from ddim.models.checkpoints import embedded_models

    path = Path(name).expanduser()
    marks = ("model_index.json", "config.json", "checkpoints")
    return (
        name in embedded_models()
        or not path.exists()
        or (path.is_dir() and any((path / mark).exists() for mark in marks))
    )


def _of_model(command: Command, device: "torch.device") -> Samples:
    """Images that are drawn from a model as they are asked for."""
    from ddim.core.noise import check_seeds
    from ddim.core.step import check_eta

    eta = check_eta(command.eta or 0.0)
    count = COUNT if command.count is None else command.count
    seeds = check_seeds(range(command.seed, command.seed + count))
    pipe, folder = open_model(command.samples_or_model, device=device)
    timesteps = pipe.select_timesteps(command.steps, timestep_spacing=command.spacing)
    pipe.route(timesteps=timesteps, eta=eta)
    fitted = pipe.scheduler.config.get("fitted_timesteps") or []
    seconds: list[float] = []

    def batches() -> "Iterator[Tensor]":
        (pipe.compile() if command.compile else pipe).warm_up(min(command.batch_size, count))
        options = {
            "batch_size": command.batch_size,
            "fill": command.compile,
            "timesteps": timesteps,
            "eta": eta,
        }
        yield from draw_batches(pipe, seeds, seconds, **options)

    protocol = {
        **describe_model(command.samples_or_model, pipe, folder, clip=pipe.select_clip()),
        "sampler": "ddim",
        "steps": len(timesteps),
        "spacing": command.spacing
        or ("fitted" if timesteps in fitted else pipe.scheduler.config.timestep_spacing),
        "timesteps": timesteps,
        "eta": eta,
        "order": pipe.select_order(),
        "seed": command.seed,
    }
    return Samples(count, pipe.image_shape, batches(), protocol, len(timesteps), seconds)


def _of_images(command: Command) -> Samples:
    """Images that are there: a run of ``ddim sample``, or whatever training reads."""
    from ddim.cli._run import read_run
    from ddim.data.sources import load_images

    name = command.samples_or_model
    for option in ("steps", "eta", "spacing"):
        if getattr(command, option) is not None:
            raise DDIMError(
                f"--{option} tells how a model is sampled, and {name} holds images; leave it out."
            )
    path = Path(name).expanduser()
    run = read_run(path) if path.is_dir() else None
    if run is not None and (
        absent := [
            r["file"] for r in run.results if "file" in r and not (path / r["file"]).is_file()
        ]
    ):
        raise DataError(
            f"{name} lacks {len(absent)} of the pictures that its run.json lists, such as "
            f"{absent[0]}; draw them again."
        )
    data = load_images(name)
    count = command.count or len(data)
    if count > len(data):
        raise DataError(f"{name} holds {len(data)} images; got --count {count}.")
    shape, batches = (data.channels, *data.resolution), image_batches(data, range(count))
    return Samples(
        count,
        shape,
        batches,
        {"samples": name, "sampled": run and run.protocol},
        run.evaluations if run else 0,
        [],
    )
