"""``ddim table``: measures a model at every eta and number of steps, as the paper's Table 1."""

import contextlib
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddim.cli._arguments import EtasOption, ModelArgument
from ddim.cli._evaluation import (
    describe_reference,
    draw_batches,
    note_few,
    open_panel,
    open_reference,
    shuffled_batches,
)
from ddim.cli._model import check_positive, describe_model, find_device, open_model, short_name
from ddim.errors import DDIMError, OutputError

if TYPE_CHECKING:
    from ddim.evaluation.report import Cell

__all__ = ["Command", "defaults", "run"]

LONG = 100
"""Cells of more steps than this draw --long-count images."""


@dataclass(frozen=True)
class Command:
    """Measures a model at every eta and number of steps: quality, time, and the ratio of both to
    DDPM.

    Each finished cell is kept. Running again into the same folder measures what is missing, other
    etas and steps too."""

    reference: str
    """Real images: a folder, a .npz, IDX files, parquet, digits, fashion-mnist, or a hub dataset
    id."""
    model: ModelArgument = "fashion-mnist"
    """An embedded model, a folder in diffusers format, or a hub id; none of text."""
    split: str = "train"
    """Split of the reference."""
    resize: bool = False
    """Resize the reference (shorter side) and cut it in the centre to the model's size, where that
    is another."""
    eta: EtasOption = (0.0, 0.2, 0.5, 1.0, "sigma-hat")
    """0 is deterministic, 1 DDPM's posterior, sigma-hat the larger noise of DDPM."""
    steps: tuple[int, ...] = (10, 20, 50, 100, 1000)
    """DDIM steps: network evaluations an image."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] | None = None
    """Which levels are visited; by default what the model's configuration says."""
    clip: Literal["none", "static", "dynamic"] | None = None
    """How predicted images are kept in range on the way; by default what the configuration says."""
    count: int = 2048
    """Images a cell: the seeds SEED to SEED+COUNT-1, the same in every cell."""
    long_count: int | None = None
    """Images of the cells of more than 100 steps, by default COUNT. Every cell is measured on that
    many too, for the ratios."""
    repeats: int = 1
    """Times that each cell is drawn, from other seeds each time; from 2 on, the spread is over
    these."""
    seed: int = 0
    """Seed of the first image."""
    metrics: tuple[str, ...] | None = None
    """METRIC-EXTRACTOR each, such as fd-fashion,kid-pixels; the first is the quality of the ratios
    and plots."""
    weights: tuple[str, ...] = ()
    """NAME=PATH each: where the weights of the extractors inception, dinov2 and efficientnet-lite0
    lie."""
    batch_size: int = 64
    """Images drawn together; it changes no image but for rounding, one grey level in float32."""
    processes: int = 1
    """Processes that measure cells side by side, the longest first; each gets its share of the
    cores."""
    out: str | None = None
    """Folder for the table; by default out/table-MODEL."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""
    compile: bool = False
    """Compile the network first: a minute, and then faster steps."""
    timing_rounds: int = 0
    """Rounds in which each cell of the folder draws one more batch, in turn, for times that can be
    compared; 0 keeps the cells' own."""

    @property
    def counts(self) -> tuple[int, int]:
        """Images of a cell, and of a long one."""
        return self.count, self.count if self.long_count is None else self.long_count


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Measures the cells that are missing in the folder, and writes the table of all that are
    there."""
    began = time.perf_counter()
    check_positive(command, "count", "repeats", "batch_size", "processes")
    if not 1 <= command.counts[1] <= command.count:
        raise DDIMError(
            f"--long-count must be from 1 to --count, {command.count}; got {command.long_count}."
        )
    if command.timing_rounds < 0:
        raise DDIMError(f"--timing-rounds must be 0 or more; got {command.timing_rounds}.")
    if not command.eta or not command.steps:
        raise DDIMError("--eta and --steps must each name at least one value.")

    from ddim.cli._run import check_protocol
    from ddim.evaluation.report import check_plots, save_plots
    from ddim.files import locked

    check_plots()
    bench = Bench(command)
    wanted = [
        (eta, steps) for steps in sorted(set(command.steps)) for eta in dict.fromkeys(command.eta)
    ]
    for eta, steps in wanted:
        bench.pipe.route(timesteps=bench.timesteps(steps), eta=eta)
    out = Path(command.out or f"out/table-{short_name(command.model)}")
    with locked(out):
        (out / "cells").mkdir(exist_ok=True)
        check_protocol(out, bench.protocol, empty=not any((out / "cells").iterdir()))
        missing = [
            (eta, steps) for eta, steps in wanted if not _cell_file(out, eta, steps).exists()
        ]
        _write(out, bench, began)  # so that what an interrupted run leaves is known for what it is
        with contextlib.closing(_measured(command, bench, missing, out)) as measured:
            for done, cell in enumerate(measured, start=1):
                quality = cell.results[0]
                print(
                    f"eta {cell.eta}, {cell.steps} steps: {quality.metric} {quality.value:.4g}, "
                    f"{cell.seconds:.1f} s for {cell.count} "
                    f"images; {done} of {len(missing)} cells",
                    flush=True,
                )
                _write(out, bench, began)
        if command.timing_rounds:
            _time_again(bench, out)
            _write(out, bench, began)
        save_plots(_read_cells(out), out)
    note_few(
        bench.panel,
        shape=bench.pipe.image_shape,
        counts=command.counts,
        available=len(bench.data),
        chosen=command.metrics is not None,
    )
    print(
        f"{len(missing)} cells measured, {len(wanted) - len(missing)} were there; the table is "
        f"{out / 'table.md'}."
    )


class Bench:
    """What measures cells: the model, the metrics, and, once a cell is asked for, the reference."""

    def __init__(self, command: Command) -> None:
        from ddim.core.noise import check_seeds

        self.command = command
        self.device = find_device(command.device)
        self.seeds = check_seeds(
            range(command.seed, command.seed + command.repeats * command.count)
        )
        self.pipe, folder = open_model(command.model, device=self.device)
        self.clip = self.pipe.select_clip(command.clip)
        shape = self.pipe.image_shape
        self.data = open_reference(
            command.reference,
            split=command.split,
            shape=shape,
            what=command.model,
            resize=command.resize,
        )
        asked: dict[str, Any] = {
            "weights": command.weights,
            "counts": command.counts,
            "available": len(self.data),
        }
        self.panel = open_panel(command.metrics, shape=shape, device=self.device, **asked)
        self.levels = len(self.pipe.noise_schedule)
        config = self.pipe.scheduler.config
        spacing = command.spacing or config.timestep_spacing
        self.fitted = [] if command.spacing else config.get("fitted_timesteps") or []
        self.protocol = {
            "command": "table",
            **describe_model(command.model, self.pipe, folder, clip=self.clip),
            "sampler": "ddim",
            "timesteps": {"fitted": self.fitted, "otherwise": spacing} if self.fitted else spacing,
            "order": self.pipe.select_order(),
            **describe_reference(self.data, command.split, self.panel, resize=command.resize),
            "count": command.count,
            "long_count": command.counts[1],
            "repeats": command.repeats,
            "seed": command.seed,
        }
        self._reference: Any = None
        self._warm = False

    def timesteps(self, steps: int) -> list[int]:
        """The levels that a cell visits."""
        return self.pipe.select_timesteps(steps, timestep_spacing=self.command.spacing)

    @property
    def batch_size(self) -> int:
        """Images drawn together, the same in every cell."""
        return min(self.command.batch_size, *self.command.counts)

    def warm_up(self) -> None:
        """Compiles, where that is asked for, and allocates: once."""
        if not self._warm:
            (self.pipe.compile() if self.command.compile else self.pipe).warm_up(self.batch_size)
            self._warm = True

    def time_batch(self, eta: float | str, steps: int) -> float:
        """Seconds an image of the first batch of a cell."""
        took: list[float] = []
        for _ in draw_batches(
            self.pipe,
            self.seeds[: self.batch_size],
            took,
            **self._options(eta, self.timesteps(steps)),
        ):
            pass
        return sum(took) / self.batch_size

    def _options(self, eta: float | str, timesteps: list[int]) -> dict[str, Any]:
        fill = self.command.compile
        return {
            "batch_size": self.batch_size,
            "fill": fill,
            "timesteps": timesteps,
            "eta": eta,
            "clip": self.clip,
        }

    def cell(self, eta: float | str, steps: int) -> "Cell":
        """Draws and measures one cell; of the images stays what the metrics need."""
        from ddim.evaluation.protocol import (
            collect,
            collect_reference,
            measure,
            over_repeats,
            sample_cuts,
        )
        from ddim.evaluation.report import Cell

        long = self.command.counts[1]
        if self._reference is None:
            images = shuffled_batches(self.data)
            self._reference = collect_reference(
                images, self.panel, available=len(self.data), counts=self.command.counts
            )
            self.warm_up()
        timesteps = self.timesteps(steps)
        count = long if steps > LONG else self.command.count
        options = self._options(eta, timesteps)
        results, compared, seconds = [], [], []
        for first in range(0, len(self.seeds), self.command.count):
            took: list[float] = []
            images = draw_batches(self.pipe, self.seeds[first : first + count], took, **options)
            collected = collect(images, self.panel, cuts=sample_cuts({count, long}))
            results.append(measure(collected, self._reference, self.panel, count=count))
            compared.append(measure(collected, self._reference, self.panel, count=long))
            seconds.append(sum(took))
        return Cell(
            eta=eta,
            steps=steps,
            timesteps=tuple(timesteps),
            evaluations=len(timesteps),
            seconds=sum(seconds) / len(seconds),
            results=tuple(over_repeats(results)),
            compared=tuple(over_repeats(compared)),
        )


def _measured(
    command: Command, bench: Bench, missing: Sequence[tuple[float | str, int]], out: Path
) -> "Generator[Cell]":
    """Measures cells, here or in processes; each is in its file before it is told."""
    if command.processes == 1 or len(missing) < 2:
        for eta, steps in missing:
            yield _save_cell(bench, eta, steps, out)
        return
    count, others = min(command.processes, len(missing)), set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(
        count, mp_context=context, initializer=_start, initargs=(command, count)
    )
    try:
        cells = _longest_first(missing, command.counts)
        for future in as_completed(
            [executor.submit(_save_in_process, eta, steps, out) for eta, steps in cells]
        ):
            yield future.result()
    except BrokenProcessPool:
        raise DDIMError(
            "a process ended before its cell, perhaps for want of memory; finished cells are kept, "
            "so run again with fewer --processes."
        ) from None
    finally:
        for process in (
            set(multiprocessing.active_children()) - others
        ):  # idle ones, unless the run was interrupted
            process.terminate()
        executor.shutdown(cancel_futures=True)


def _longest_first(
    cells: Sequence[tuple[float | str, int]], counts: tuple[int, int]
) -> list[tuple[float | str, int]]:
    """Cells in the order in which processes take them: a long one left to the end would be drawn
    while the others idle."""
    return sorted(cells, key=lambda cell: -cell[1] * counts[cell[1] > LONG])


def _time_again(bench: Bench, out: Path) -> None:
    """Replaces the seconds of all cells by those of batches that they draw in turn, so that what
    the machine does besides falls on all.

    Cells are measured hours apart, perhaps on several machines: their own seconds are of what the
    machine was then."""
    cells, rounds = _read_cells(out), bench.command.timing_rounds
    bench.warm_up()
    took = [[bench.time_batch(cell.eta, cell.steps) for cell in cells] for _ in range(rounds)]
    for cell, seconds in zip(cells, zip(*took, strict=True), strict=True):
        _write_cell(
            replace(cell, seconds=statistics.median(seconds) * cell.count, timing_rounds=rounds),
            out,
        )
    print(f"{len(cells)} cells timed in turn, the median of {rounds} each.", flush=True)


_bench: Bench | None = None


def _start(command: Command, processes: int) -> None:
    """Prepares a process: a share of the cores, and an end when the command ends in whatever
    way."""
    import signal

    import torch

    global _bench
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the command's own process answers, and ends this one
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel
    threading.Thread(
        target=lambda: connection.wait([sentinel]) and os._exit(1), daemon=True
    ).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    _bench = Bench(command)


def _save_in_process(eta: float | str, steps: int, out: Path) -> "Cell":
    assert _bench is not None
    return _save_cell(_bench, eta, steps, out)


def _cell_file(out: Path, eta: float | str, steps: int) -> Path:
    return out / "cells" / f"eta-{eta}-steps-{steps}.json"


def _save_cell(bench: Bench, eta: float | str, steps: int, out: Path) -> "Cell":
    return _write_cell(bench.cell(eta, steps), out)


def _write_cell(cell: "Cell", out: Path) -> "Cell":
    from ddim.files import write_text

    write_text(
        _cell_file(out, cell.eta, cell.steps),
        json.dumps(asdict(cell), indent=2, allow_nan=False) + "\n",
    )
    return cell


def _read_cells(out: Path) -> "list[Cell]":
    """All finished cells of a folder."""
    from ddim.evaluation.protocol import Result
    from ddim.evaluation.report import Cell

    cells = []
    for path in sorted((out / "cells").glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            numbers: Any = {
                key: tuple(Result(**r) for r in content.pop(key)) for key in ("results", "compared")
            }
            cells.append(Cell(timesteps=tuple(content.pop("timesteps")), **numbers, **content))
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(
                f"{path} is not a cell of this program ({error}); delete it, and it is measured "
                "again."
            ) from error
    return cells


def _write(out: Path, bench: Bench, began: float) -> None:
    """Writes run.json, and the table in markdown and CSV as far as there are cells."""
    from ddim.cli._run import RunRecord, versions, write_run
    from ddim.evaluation.report import flat_records, to_csv, to_markdown
    from ddim.files import write_text

    command, cells = bench.command, _read_cells(out)
    records = flat_records(cells, levels=bench.levels)
    execution = {
        "device": str(bench.device),
        "batch_size": command.batch_size,
        "compile": command.compile,
        "processes": command.processes,
    }
    record = RunRecord(
        protocol=bench.protocol,
        results=records,
        seconds=sum(cell.seconds for cell in cells),
        seconds_total=time.perf_counter() - began,
        evaluations=sum(cell.evaluations for cell in cells),
        execution=execution,
        versions=versions(),
    )
    write_run(out, record)
    if cells:
        write_text(out / "table.csv", to_csv(records))
        text = to_markdown(
            cells,
            levels=bench.levels,
            title=f"{command.model}: eta and steps",
            protocol=_told(bench),
            reference=command.reference,
        )
        write_text(out / "table.md", text)


def _told(bench: Bench) -> str:
    """What was done, in sentences."""
    command, told = bench.command, bench.protocol
    networks = ", ".join(
        f"{name} ({code})" if code else name for name, code in told["extractors"].items()
    )
    spacing, numbers = told["timesteps"], sorted(len(levels) for levels in bench.fitted)
    if numbers:
        spacing = (
            f"{spacing['otherwise']} timesteps, at {', '.join(map(str, numbers))} steps the "
            "model's fitted"
        )
    count, long = command.counts
    fewer = f" ({long} above {LONG} steps)" if long < count else ""
    spread = (
        f"over {command.repeats} repeats"
        if command.repeats > 1
        else "from disjoint thirds of the images"
    )
    return (
        f"DDIM of order {told['order']}, {spacing} timesteps, clipping {told['clip']['kind']}, "
        f"float32, weights {told['weight_hash']}; "
        f"{count} images a cell{fewer}, seeds from {command.seed} on, the same in every cell; "
        f"reference {command.reference} ({command.split}, {len(bench.data)} images); extractors: "
        f"{networks}; "
        f"± is the spread over seeds, {spread}. Time: {bench.device}, batches of "
        f"{command.batch_size}, "
        f"{command.processes} at once, {'compiled' if command.compile else 'not compiled'}."
    )
