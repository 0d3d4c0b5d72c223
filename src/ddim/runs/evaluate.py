"""Measures images, or a model's, against real ones."""

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.core.noise import check_seeds
from ddim.data.batches import as_batches, pick
from ddim.data.sources import load_images
from ddim.errors import DataError
from ddim.evaluation.protocol import collect, measure, sample_cuts
from ddim.evaluation.sketches import load_collected, save_collected
from ddim.files import range_name, replacing
from ddim.models.checkpoints import embedded_models
from ddim.models.facts import read_model
from ddim.models.images import load_image
from ddim.runs.engine import Control, Made, Row
from ddim.runs.measuring import BATCH, MeasuringJob
from ddim.runs.model import find_device, spacing_of
from ddim.runs.record import RunRecord, read_run
from ddim.runs.requests import EvaluateRequest
from ddim.runs.rules import Options
from ddim.runs.shards import FOLDER, Blocks, Shard
from ddim.runs.sharing import SharedJob
from ddim.runs.stores import SUFFIXES, Picture, kept_pictures
from ddim.runs.text import Item

__all__ = ["EvaluateJob"]

COUNT = 2048
"""Images that are drawn from a model, unless another number is asked for."""


SIZE = 1024
"""Images of a shard."""


class EvaluateJob(SharedJob, MeasuringJob):
    """All metrics of the samples. What they need of the images of a shard is a file, and these add
    up in their order, so that the numbers are the same whoever drew what."""

    request: EvaluateRequest
    command = "evaluate"
    count: int
    batches: Callable[[Sequence[int]], Iterator[Tensor]]
    """The images of these numbers, in batches."""
    took: list[float]
    """Seconds of each batch that was drawn; empty for images that were there."""
    seeds: Sequence[int] = ()
    """The seeds of images that are drawn."""
    keep: Callable[[int, Any, int | None], None] | None = None
    """What keeps the picture of a seed and its class."""

    def __init__(self, request: EvaluateRequest, control: Control) -> None:
        super().__init__(request, control)
        self.device, self.took = find_device(request.device), []
        always = "model reference split resize metrics weights out overwrite device count"
        always += " threads workers lease engine ray_address"
        self.draws = _is_model(request.model)
        acts = " batch_size compile store picture" if self.draws else ""
        options = Options(request, *(always + acts).split())
        shape, samples = (self._draw_model if self.draws else self._read_images)(options)
        against = self.open_metrics(shape, [self.count])
        self.rows: list[Row] = []
        self.items = range(self.count)
        self.shards = Blocks(0, self.count, SIZE)
        self.protocol = {"command": self.command, **samples, **against, "count": self.count}
        self.folder = self.out()
        self.agree_on_threads(is_divided=request.store in SUFFIXES)
        self.execution = self.executed("batch_size", "compile")
        self.files = [*chain.from_iterable(map(self._pictures, self.shards))]

    def _draw_model(self, options: Options) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """Images that are drawn from a model as they are asked for."""
        found = read_model(self.request.model)
        self.count = count = COUNT if options.count is None else options.count
        seeds = check_seeds(range(options.seed, options.seed + count))
        steps, spacing, eta = options.steps, options.spacing, options.eta or 0.0
        size = min(options.batch_size, count)
        options.refuse_unread(found.name, found.kinds)
        self.find()
        route = self.plan.route(steps, timestep_spacing=spacing, eta=eta)

        def batches(numbers: Sequence[int]) -> Iterator[Tensor]:
            chosen, told = [seeds[number] for number in numbers], {"seconds": self.took}
            return self.sample_batches(route, chosen, batch_size=size, keep=self.keep, **told)

        store = self.request.store
        kept: dict[str, Any] = {} if store is None else {"store": store}
        if store in SUFFIXES:  # fixed batches make fixed bytes
            kept |= {"shard_size": SIZE, "batch_size": self.request.batch_size}
        self.seeds, self.batches, self.calls = seeds, batches, len(route)
        self.control.steps = -(-count // size) * len(route)
        return self.plan.image_shape, {
            **self.describe(clip=route.clip),
            "sampler": "ddim",
            "steps": len(route),
            "spacing": spacing or spacing_of(self.plan, route.timesteps),
            "timesteps": route.timesteps,
            "eta": route.eta,
            "order": route.order,
            "seed": seeds[0],
            **kept,
        }

    def _read_images(self, options: Options) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """Images that are there: a run of ``ddim sample``, or whatever training reads."""
        name = self.request.model
        options.refuse_unread(f"{name}, which holds images")
        path = Path(name).expanduser()
        run = read_run(path) if path.is_dir() else None
        listed = [] if run is None else [row["file"] for row in run.results if "file" in row]
        if absent := [file for file in listed if not (path / file).is_file()]:
            raise DataError(
                f"{name} lacks {len(absent)} of the pictures that its run.json lists, such as "
                f"{absent[0]}; draw them again."
            )
        # WebP knows no grey pictures, and grey ones come out of it with three equal channels.
        is_webp = bool(listed) and listed[0].endswith(".webp")
        first = load_image(path / listed[0]) if is_webp else None
        is_grey = first is not None and bool((first == first[..., :1]).all())
        data = load_images(name, channels=1 if is_grey else None)
        if listed and listed[0].endswith(".jpg"):
            self.control.note("jpg changes pixels a little; png or webp pictures measure better.")
        self.note_all(data.notes)
        self.count = count = options.count or len(data)
        if count > len(data):
            raise DataError(f"{name} holds {len(data)} images; got --count {count}.")
        # Sorted by class or prompt, some pictures and the thirds of the spread were of one kind.
        chosen: Sequence[int] = range(count)
        if run is None or run.protocol.get("prompt") is not None:
            chosen = random.Random(0).sample(pick(len(data), count, labels=data.labels), count)
        self.batches = lambda numbers: as_batches(data, [chosen[n] for n in numbers], size=BATCH)
        self.calls = run.evaluations if run else 0
        shape = (data.channels, *data.resolution)
        return shape, {"samples": name, "sampled": run and run.protocol}

    def prepare(self) -> None:
        if self.draws:
            super().prepare()

    def _pictures(self, shard: Shard) -> list[str]:
        """The files that keep the pictures of a shard."""
        store, picture = self.request.store, self.request.picture
        if store is None:
            return []
        seeds = range(self.seeds[shard.items[0]], self.seeds[shard.items[-1]] + 1)
        if store in SUFFIXES:
            return [f"{range_name(seeds)}.{SUFFIXES[store]}"]
        return [f"{Item(None, seed).stem}.{picture}" for seed in seeds]

    def left(self, shard: Shard) -> Sequence[int]:
        _, files = self.part(shard, shard.items)
        return [] if all((self.folder / file).is_file() for file in files) else shard.items

    def part(self, shard: Shard, items: Sequence[int]) -> tuple[str, list[str]]:
        return shard.name, [_statistics(shard), *self._pictures(shard)]

    def start(self) -> None:
        if self.draws:
            self.warm_up(self.count)

    def make(self, missing: Sequence[int]) -> Generator[Made]:
        first, self.took = missing[0], []
        cuts = [max(0, cut - first) for cut in sample_cuts([self.count])]
        shard, store = self.shards[first // SIZE], self.request.store
        with ExitStack() as stack:
            if store is not None:
                paths = [self.folder / name for name in self._pictures(shard)]
                options: dict[str, Any] = {"count": len(missing), "picture": self.request.picture}
                add = stack.enter_context(kept_pictures(store, paths, **options))
                self.keep = lambda seed, image, label: add(
                    Picture(Item(None, seed).stem, image, seed, label, None)
                )
            collected = collect(self.batches(missing), self.panel, cuts=cuts)
        (self.folder / FOLDER).mkdir(exist_ok=True)
        with replacing(self.folder / _statistics(shard), sync=True) as partial:
            save_collected(collected, partial, first=first)
        yield Made(shard.name, seconds=sum(self.took), items=len(missing))

    def is_told(self, before: RunRecord) -> bool:
        return bool(before.results)

    def results(self, rows: list[Row]) -> list[Row]:
        if self.rows:
            return self.rows
        before = read_run(self.folder)
        return [] if before is None else before.results

    def _measure(self) -> list[Row]:
        """The metrics of all images."""
        files = [self.folder / _statistics(shard) for shard in self.shards]
        collected = load_collected(files, self.panel)
        found = measure(collected, self.collect_real(), self.panel, count=self.count)
        return [asdict(result) for result in found]

    def finish(self, rows: list[Row]) -> None:
        self.rows = rows = self._measure()
        self.note_few()
        if (halves := rows[0]["floor_count"]) < self.count:
            self.control.note(
                f"the reference has {halves} images a half, so its floor is of {halves} and too "
                f"high for {self.count}."
            )


def _statistics(shard: Shard) -> str:
    return f"{FOLDER}/{shard.name}.safetensors"


def _is_model(name: str) -> bool:
    """Whether a name means a model: embedded, a folder that is or will be one, or nothing on this
    machine."""
    path = Path(name).expanduser()
    marks = ("model_index.json", "config.json", "checkpoints")
    is_folder_of_one = any((path / mark).exists() for mark in marks)
    return name in embedded_models() or not path.exists() or is_folder_of_one
