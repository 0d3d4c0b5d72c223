"""Encodes images, decodes them, and measures what comes back: the paper's Table 2."""

import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddim.core.sampler import State
from ddim.data.pictures import Selection, check_images, read_images
from ddim.errors import DivergenceError, plain_words
from ddim.evaluation.latents import plot_errors, reconstruction_table
from ddim.figures import check_plots
from ddim.files import write_text
from ddim.inversion.codes import ENCODERS
from ddim.inversion.ddim import collect_unsolved
from ddim.inversion.encoding import reconstruction_error
from ddim.models.images import label_rows, save_picture, sheet_scale, to_uint8
from ddim.runs.engine import Control, Made, Row
from ddim.runs.model import PixelJob, enough_memory
from ddim.runs.requests import ReconstructRequest
from ddim.runs.shards import FOLDER, Shard
from ddim.runs.sharing import SharedJob

__all__ = ["ReconstructJob"]

SHOWN = 8
"""Most images that the sheet shows."""


class Cell(NamedTuple):
    """A cell of the table, which is an item and a row of the record."""

    method: str
    steps: int


class ReconstructJob(SharedJob, PixelJob):
    """The cells of a table, a shard each. Those in the folder are kept."""

    request: ReconstructRequest
    command = "reconstruct"
    classes = "the data's"

    def __init__(self, request: ReconstructRequest, control: Control) -> None:
        super().__init__(request, control)
        check_plots()
        check_images(None, request.data)
        self.find()
        self.asked = {steps: self.asked_levels(steps) for steps in dict.fromkeys(request.steps)}
        self.timesteps = {s: self.checked_levels(s, encodable=True) for s in self.asked}
        self.pictures = read_images(Selection.of(request), self.plan.image_shape, self.model)
        self.note_all(self.pictures.notes)
        methods = dict.fromkeys(request.method)
        self.items = [Cell(method, steps) for steps in self.timesteps for method in methods]
        self.plots = [f"reconstruction.{kind}" for kind in request.plot_format]
        self.files = ["table.md", "sheet.png", *self.plots]
        spacing = request.spacing or self.plan.scheduler.config.timestep_spacing
        data = self.pictures.data
        self.protocol = self.deterministic(spacing, data=data, count=request.count)
        self.folder = self.out()
        self.agree_on_threads(is_divided=False)
        self.shards = [Shard(f"{cell.method}-{cell.steps}", [cell]) for cell in self.items]
        self.execution = self.executed("batch_size")

    def left(self, shard: Shard) -> Sequence[Cell]:
        return [] if (self.folder / FOLDER / f"{shard.name}.json").is_file() else shard.items

    def part(self, shard: Shard, items: Sequence[Cell]) -> tuple[str, list[str]]:
        return shard.name, []

    def beside(self, results: list[Row]) -> int:
        return len(results) - sum(map(self.done, self.shards))

    def results(self, rows: list[Row]) -> list[Row]:
        found = [row for record in self.records() for row in record.rows]
        return sorted(found, key=lambda row: (ENCODERS.index(row["method"]), row["steps"]))

    def evaluations(self, rows: list[Row]) -> float:
        calls: float = sum(r["evaluations"] + r.get("decode_evaluations", 0) for r in rows)
        return calls

    def start(self) -> None:
        with enough_memory(self.device, self.request.batch_size):
            self.warm_up(len(self.pictures.x0))

    def make(self, missing: Sequence[Cell]) -> Generator[Made]:
        with enough_memory(self.device, self.request.batch_size):
            for cell in missing:
                row, took = self._measure(cell)
                mse = "diverged" if row["mse"] is None else f"mse {row['mse']:.2e}"
                calls = row["evaluations"] / cell.steps
                text = f"{cell.method}, {cell.steps} steps: {mse}, {calls:.1f} evaluations a step, "
                yield Made(cell, {**cell._asdict(), **row}, took, f"{text}{took:.1f} s")

    def _measure(self, cell: Cell) -> tuple[Row, float]:
        """One cell, and the seconds it took."""
        errors, rms, residuals = [], [], []
        began, unsolved, done = time.perf_counter(), 0, 0
        encoding, decoding = self.counted(), self.counted()
        pipe, size = self.pipe, self.request.batch_size
        walk: dict[str, Any] = {"timesteps": self.timesteps[cell.steps], "method": cell.method}
        back = torch.empty(0)

        def keep(state: State) -> None:
            nonlocal back
            back = state.x_s

        for first in range(0, len(self.pictures.x0), size):
            x0, labels, *_ = self.pictures.part(first, size)
            done += len(x0)
            try:
                with encoding, collect_unsolved() as unsolved_here:
                    code = pipe.encode(x0, class_labels=labels, batch_size=size, **walk)
                back = code.states[-1]  # where the pair of a single step holds the data already
                with decoding:  # the last state is measured before float32 rounds it
                    pipe.decode(code, batch_size=size, output_type="pt", callback=keep)
            except DivergenceError:
                evaluations = encoding.each(done)
                return {"mse": None, "evaluations": evaluations}, time.perf_counter() - began
            unsolved += len(unsolved_here)
            errors.append(reconstruction_error(x0.cpu(), back.cpu()))
            rms.append(code.rms())
            if code.residual is not None:
                residuals.append(code.residual)
        error = torch.cat(errors)
        row: Row = {
            "mse": float(error.mean()),
            "mse_max": float(error.max()),
            "evaluations": encoding.each(done),
            "decode_evaluations": decoding.each(done),
            "rms": float(torch.cat(rms).mean()),
            "count": done,
        }
        if residuals:
            row |= {"residual_max": float(torch.cat(residuals).max()), "unsolved_steps": unsolved}
        return row, time.perf_counter() - began

    def finish(self, rows: list[Row]) -> None:
        fewest = min(self.timesteps)
        self.note_levels(self.asked[fewest], self.timesteps[fewest])
        with enough_memory(self.device, self.request.batch_size):
            self._write_sheet(self.timesteps[fewest])
        request = self.request
        start = f", from number {request.seed} on" if request.seed else ""
        setting = (
            f"Mean squared error per dimension, pixels in [0, 1], of {request.count} images of "
            f"{plain_words(str(request.data))} ({self.pictures.data['split']}{start}); "
            f"{request.dtype} network, float64 states, no clipping. Evaluations are those of "
            "encoding. The rows of sheet.png are the originals, then "
            f"{', '.join(request.method)} at {fewest} steps."
        )
        table = reconstruction_table(rows, title=request.model, setting=setting)
        write_text(self.folder / "table.md", table)
        labels = {"across": "steps each way", "up": "mean squared error, pixels in [0, 1]"}
        paths = [self.folder / name for name in self.plots]
        plot_errors(rows, paths, name="method", along="steps", **labels)

    def _write_sheet(self, timesteps: list[int]) -> None:
        """Originals in the first row, then a row for each method at the fewest steps."""
        x0, labels, *_ = self.pictures.part(0, SHOWN)
        rows, names = [to_uint8(x0)], ["originals"]
        walk: dict[str, Any] = {"timesteps": timesteps, "class_labels": labels}
        for method in self.request.method:
            names.append(f"{method}, {len(timesteps)} steps each way")
            with collect_unsolved():  # they are in the table
                try:
                    code = self.pipe.encode(x0, **walk, method=method)
                    back: Tensor = self.pipe.decode(code, output_type="pt")
                    rows.append(to_uint8(2 * back - 1))
                except DivergenceError:  # an empty row, as the table says
                    rows.append(np.zeros_like(rows[0]))
                    names[-1] += ": diverged"
        images = np.concatenate(rows)
        numbers = [f"image {self.request.seed + n}" for n in range(len(x0))]
        sheet = label_rows(images, names, columns=numbers, scale=sheet_scale(images))
        save_picture(sheet, self.folder / "sheet.png")
