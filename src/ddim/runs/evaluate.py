"""Measures images, or a model's, against real ones."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.core.noise import check_seeds
from ddim.data.batches import as_batches
from ddim.data.sources import load_images
from ddim.errors import DataError
from ddim.evaluation.protocol import collect, measure, sample_cuts
from ddim.models.checkpoints import embedded_models
from ddim.models.facts import read_model
from ddim.runs.engine import Control, Made, Row
from ddim.runs.measuring import BATCH, MeasuringJob
from ddim.runs.model import find_device, spacing_of
from ddim.runs.options import Options
from ddim.runs.record import RunRecord, read_run
from ddim.runs.requests import EvaluateRequest

__all__ = ["EvaluateJob"]

COUNT = 2048
"""Images that are drawn from a model, unless another number is asked for."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What is measured."""

    count: int
    shape: tuple[int, int, int]
    batches: Iterator[Tensor]
    protocol: dict[str, Any]
    evaluations: float
    seconds: list[float]
    """Of each batch that was drawn; empty for images that were there."""


class EvaluateJob(MeasuringJob):
    """All metrics of the samples, as one item; every run measures them."""

    request: EvaluateRequest
    command = "evaluate"

    def __init__(self, request: EvaluateRequest, control: Control) -> None:
        super().__init__(request, control)
        self.device = find_device(request.device)
        always = "model reference split resize metrics weights out device count"
        is_model = _is_model(request.model)
        acts = " batch_size compile" if is_model else ""
        options = Options(request, *(always + acts).split())
        self.samples = self._from_model(options) if is_model else _from_images(request, options)
        count = self.samples.count
        against = self.open_metrics(self.samples.shape, [count])
        self.rows: list[Row] = []
        self.items = ["metrics"]
        self.folder = self.out()
        self.protocol = {
            "command": self.command,
            **self.samples.protocol,
            **against,
            "count": count,
        }
        self.execution = self.executed("batch_size", "compile")

    def _from_model(self, options: Options) -> Samples:
        """Images that are drawn from a model as they are asked for."""
        request, found = self.request, read_model(self.request.model)
        count = COUNT if request.count is None else request.count
        seeds = check_seeds(range(options.seed, options.seed + count))
        steps, spacing, eta = options.steps, options.spacing, options.eta or 0.0
        size = min(request.batch_size, count)
        options.refuse_unread(found.name, found.kinds)
        self.open()
        pipe = self.pipe
        route = pipe.route(steps, timestep_spacing=spacing, eta=eta)
        seconds: list[float] = []

        def batches() -> Iterator[Tensor]:
            self.control.steps = -(-count // size) * len(route)
            self.warm_up(count)
            yield from self.sample_batches(route, seeds, batch_size=size, seconds=seconds)

        protocol = {
            **self.describe(clip=route.clip),
            "sampler": "ddim",
            "steps": len(route),
            "spacing": spacing or spacing_of(pipe, route.timesteps),
            "timesteps": route.timesteps,
            "eta": route.eta,
            "order": route.order,
            "seed": request.seed,
        }
        return Samples(count, pipe.image_shape, batches(), protocol, len(route), seconds)

    def is_empty(self, record: RunRecord) -> bool:
        return not record.results

    def make(self, missing: Sequence[str]) -> Generator[Made]:
        samples, count, real = self.samples, self.samples.count, self.collect_real()
        collected = collect(samples.batches, self.panel, cuts=sample_cuts([count]))
        found = measure(collected, real, self.panel, count=count)
        self.rows = [asdict(result) for result in found]
        yield Made("metrics", seconds=sum(samples.seconds))

    def results(self, rows: list[Row]) -> list[Row]:
        return self.rows or rows

    def evaluations(self, rows: list[Row]) -> float:
        return self.samples.evaluations

    def finish(self, rows: list[Row]) -> None:
        self.note_few()
        if (halves := rows[0]["floor_count"]) < (count := self.samples.count):
            self.control.note(
                f"the reference has {halves} images a half, so its floor is of {halves} and too "
                f"high for {count}."
            )


def _is_model(name: str) -> bool:
    """Whether a name means a model: embedded, a folder that is or will be one, or nothing on this
    machine."""
    path = Path(name).expanduser()
    marks = ("model_index.json", "config.json", "checkpoints")
    return (
        name in embedded_models()
        or not path.exists()
        or (path.is_dir() and any((path / mark).exists() for mark in marks))
    )


def _from_images(request: EvaluateRequest, options: Options) -> Samples:
    """Images that are there: a run of ``ddim sample``, or whatever training reads."""
    name = request.model
    options.refuse_unread(f"{name}, which holds images")
    path = Path(name).expanduser()
    run = read_run(path) if path.is_dir() else None
    listed = [] if run is None else [row["file"] for row in run.results if "file" in row]
    if run is not None and (absent := [file for file in listed if not (path / file).is_file()]):
        raise DataError(
            f"{name} lacks {len(absent)} of the pictures that its run.json lists, such as "
            f"{absent[0]}; draw them again."
        )
    data = load_images(name)
    count = request.count or len(data)
    if count > len(data):
        raise DataError(f"{name} holds {len(data)} images; got --count {count}.")
    protocol = {"samples": name, "sampled": run and run.protocol}
    shape = (data.channels, *data.resolution)
    evaluations = run.evaluations if run else 0
    return Samples(
        count, shape, as_batches(data, range(count), size=BATCH), protocol, evaluations, []
    )
