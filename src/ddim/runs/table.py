"""Measures a model at every eta and number of steps: the cells of the paper's Table 1."""

import statistics
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ddim.bounds import MOST_IMAGES
from ddim.configuration import fitted_lists
from ddim.core.noise import check_seeds
from ddim.core.route import Route
from ddim.errors import DDIMError, plain_words
from ddim.evaluation.protocol import Reference, collect, measure, over_repeats, sample_cuts
from ddim.evaluation.report import (
    PLOTS,
    Cell,
    flat_records,
    read_cell,
    save_plots,
    to_csv,
    to_markdown,
    write_cell,
)
from ddim.figures import check_plots
from ddim.files import write_text
from ddim.runs.engine import Control, Made, Row
from ddim.runs.measuring import MeasuringJob
from ddim.runs.record import RunRecord
from ddim.runs.requests import TableRequest
from ddim.runs.shards import Shard, launched
from ddim.runs.sharing import SharedJob

__all__ = ["TableJob"]

LONG = 100
"""Cells of more steps than this draw --long-count images."""


class Item(NamedTuple):
    """A cell's place in the table."""

    eta: float | str
    steps: int


class TableJob(SharedJob, MeasuringJob):
    """The cells of a table, a file and a shard each. Those in the folder are kept."""

    request: TableRequest
    command = "table"
    timed = 0
    """Cells that were timed in turn."""

    def __init__(self, request: TableRequest, control: Control) -> None:
        super().__init__(request, control)
        count, long = request.counts
        if not 1 <= long <= count:
            raise DDIMError(
                f"--long-count must be from 1 to --count, {count}; got {request.long_count}."
            )
        if (images := count * request.repeats) > MOST_IMAGES:
            most = f"must be at most {MOST_IMAGES} together"
            raise DDIMError(f"--count times --repeats {most}; got {images}.")
        check_plots()
        self.seeds = check_seeds(range(request.seed, request.seed + request.repeats * count))
        self.find()
        etas, numbers = dict.fromkeys(request.eta), sorted(set(request.steps))
        self.items = [Item(eta, steps) for steps in numbers for eta in etas]
        self.routes: dict[Item, Route] = {}
        first = [self.route(item) for item in self.items][0]
        against = self.open_metrics(self.plan.image_shape, request.counts)
        self._reference: Reference | None = None
        self._is_warm = False
        self.levels = len(self.plan.noise_schedule)
        config = self.plan.scheduler.config
        self.fitted = [] if request.spacing else fitted_lists(config)
        spacing: Any = request.spacing or config.timestep_spacing
        self.protocol = {
            **self.describe(clip=first.clip),
            "sampler": "ddim",
            "timesteps": {"fitted": self.fitted, "otherwise": spacing} if self.fitted else spacing,
            "order": first.order,
            **against,
            "count": count,
            "long_count": long,
            "repeats": request.repeats,
            "seed": request.seed,
        }
        self.folder = self.out()
        self.agree_on_threads(is_divided=False)
        if request.timing_rounds and launched():
            raise DDIMError("--timing-rounds is for one process, and several were launched.")
        order = self.items if request.workers == 1 else _longest_first(self.items, request.counts)
        self.shards = [Shard(_stem(item), [item]) for item in order]
        plots = [f"{name}.{kind}" for name in PLOTS for kind in request.plot_format]
        self.files = ["table.md", "table.csv", *plots, *map(_cell_name, self.items)]
        self.execution = self.executed("batch_size", "compile", "workers")

    @property
    def batch_size(self) -> int:
        """Images drawn together, the same in every cell."""
        return min(self.request.batch_size, *self.request.counts)

    def route(self, item: Item) -> Route:
        """The walk of a cell, of this request or of an earlier one."""
        if item not in self.routes:
            walk: dict[str, Any] = {"timestep_spacing": self.request.spacing, "eta": item.eta}
            self.routes[item] = self.plan.route(item.steps, **walk, clip=self.request.clip)
        return self.routes[item]

    def left(self, shard: Shard) -> Sequence[Item]:
        return [item for item in shard.items if not self._file(item).is_file()]

    def part(self, shard: Shard, items: Sequence[Item]) -> tuple[str, list[str]]:
        return shard.name, [_cell_name(item) for item in items]

    def beside(self, results: list[Row]) -> int:
        return len(results) - sum(map(self.done, self.shards))

    def is_made(self) -> bool:
        return any((self.folder / "cells").glob("*.json"))

    def cells(self) -> list[Cell]:
        """The finished cells of the folder."""
        return [read_cell(path) for path in sorted((self.folder / "cells").glob("*.json"))]

    def results(self, rows: list[Row]) -> list[Row]:
        return flat_records(self.cells(), levels=self.levels)

    def seconds(self, drawn: float, before: RunRecord | None) -> float:
        return sum(cell.seconds for cell in self.cells())

    def evaluations(self, rows: list[Row]) -> float:
        return sum(cell.evaluations for cell in self.cells())

    def start(self) -> None:
        self._reference = self.collect_real()
        self._warm_once()

    def make(self, missing: Sequence[Item]) -> Generator[Made]:
        for item in missing:
            cell = self.measure(item)
            self._file(item).parent.mkdir(exist_ok=True)
            write_cell(self._file(item), cell)
            quality = cell.results[0]
            text = f"eta {cell.eta}, {cell.steps} steps: {quality.metric} {quality.value:.4g}, "
            yield Made(item, text=f"{text}{cell.seconds:.1f} s for {cell.count} images")

    def save(self, record: RunRecord) -> None:
        super().save(record)
        self._write_tables()

    def finish(self, rows: list[Row]) -> None:
        if self.request.timing_rounds:
            self._time_in_turn()
        self._write_tables()
        save_plots(self.cells(), self.folder, self.request.plot_format)
        self.note_few()

    def measure(self, item: Item) -> Cell:
        """Draws and measures one cell; of the images only what the metrics need is kept."""
        request, (count, long) = self.request, self.request.counts
        assert self._reference is not None  # start has collected it
        count = long if item.steps > LONG else count
        results, compared, seconds = [], [], []
        for first in range(0, len(self.seeds), request.count):
            took: list[float] = []
            images = self._draw(item, self.seeds[first : first + count], took)
            collected = collect(images, self.panel, cuts=sample_cuts({count, long}))
            results.append(measure(collected, self._reference, self.panel, count=count))
            compared.append(measure(collected, self._reference, self.panel, count=long))
            seconds.append(sum(took))
        timesteps = self.route(item).timesteps
        return Cell(
            **item._asdict(),
            timesteps=tuple(timesteps),
            evaluations=len(timesteps),
            seconds=sum(seconds) / len(seconds),
            results=tuple(over_repeats(results)),
            compared=tuple(over_repeats(compared)),
        )

    def _draw(self, item: Item, seeds: list[int], took: list[float]) -> Iterator[Tensor]:
        route, size = self.route(item), self.batch_size
        return self.sample_batches(route, seeds, batch_size=size, seconds=took)

    def _time_in_turn(self) -> None:
        """Replaces the seconds of all cells by those of batches that they draw in turn, so that
        other work of the machine falls on all of them alike.

        The cells' own seconds were measured hours apart, perhaps on several machines.
        """
        cells, rounds = self.cells(), self.request.timing_rounds
        self._warm_once()
        took = [[self._time_batch(cell) for cell in cells] for _ in range(rounds)]
        for cell, seconds in zip(cells, zip(*took, strict=True), strict=True):
            median = statistics.median(seconds) * cell.count
            item = Item(cell.eta, cell.steps)
            write_cell(self._file(item), replace(cell, seconds=median, timing_rounds=rounds))
        self.timed = len(cells)

    def _time_batch(self, cell: Cell) -> float:
        """Seconds an image of the first batch of a cell."""
        took: list[float] = []
        list(self._draw(Item(cell.eta, cell.steps), self.seeds[: self.batch_size], took))
        return sum(took) / self.batch_size

    def _warm_once(self) -> None:
        if not self._is_warm:
            self.warm_up(self.batch_size)
            self._is_warm = True

    def _file(self, item: Item) -> Path:
        return self.folder / _cell_name(item)

    def _write_tables(self) -> None:
        """Writes the table in Markdown and CSV, as far as there are cells."""
        if cells := self.cells():
            write_text(self.folder / "table.csv", to_csv(flat_records(cells, levels=self.levels)))
            title, reference = f"{self.request.model}: eta and steps", self.request.reference
            words = {"title": title, "protocol": self._described(), "reference": reference}
            write_text(self.folder / "table.md", to_markdown(cells, levels=self.levels, **words))

    def _described(self) -> str:
        """What was done, in sentences."""
        request, protocol = self.request, self.protocol
        extractors = protocol["extractors"].items()
        networks = ", ".join(f"{name} ({code})" if code else name for name, code in extractors)
        spacing = protocol["timesteps"]
        if self.fitted:
            numbers = ", ".join(map(str, sorted(len(levels) for levels in self.fitted)))
            spacing = f"{spacing['otherwise']} timesteps, at {numbers} steps the model's fitted"
        count, long = request.counts
        fewer = f" ({long} above {LONG} steps)" if long < count else ""
        repeats, compiled = request.repeats, "compiled" if request.compile else "not compiled"
        spread = f"over {repeats} repeats" if repeats > 1 else "from disjoint thirds of the images"
        return (
            f"DDIM of order {protocol['order']}, {spacing} timesteps, clipping "
            f"{protocol['clip']['kind']}, float32, weights {protocol['weight_hash']}; {count} "
            f"images a cell{fewer}, seeds from {request.seed} on, the same in every cell; "
            f"reference {plain_words(str(request.reference))} ({request.split}, "
            f"{len(self.real)} images); extractors: {networks}; ± is the spread over seeds, "
            f"{spread}. Time: {self.execution['device']}, batches of "
            f"{request.batch_size}, {request.workers} at once, {compiled}."
        )


def _stem(item: Item) -> str:
    return f"eta-{item.eta}-steps-{item.steps}"


def _cell_name(item: Item) -> str:
    return f"cells/{_stem(item)}.json"


def _longest_first(items: Sequence[Item], counts: tuple[int, int]) -> list[Item]:
    """The order in which processes take cells: a long one left to the end would be drawn while the
    others idle."""
    return sorted(items, key=lambda item: -item.steps * counts[item.steps > LONG])
