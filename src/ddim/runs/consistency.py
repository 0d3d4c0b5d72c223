"""Draws the same latents with other steps and samplers: the paper's Figure 5, with numbers."""

import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim.core.noise import check_seeds
from ddim.core.route import Route
from ddim.evaluation.latents import plot_errors, trajectory_table
from ddim.figures import check_plots
from ddim.files import write_text
from ddim.inversion.encoding import reconstruction_error
from ddim.models.images import label_rows, save_picture, sheet_scale, to_uint8
from ddim.runs.engine import Control, Made, Row
from ddim.runs.model import PixelJob, enough_memory, sampling_evaluations
from ddim.runs.requests import ConsistencyRequest

__all__ = ["ConsistencyJob"]

SHOWN = 8
"""Most images that the sheet shows."""


class Trajectory(NamedTuple):
    """An item; ``ddim-2`` is DDIM of order 2."""

    sampler: str
    steps: int


class ConsistencyJob(PixelJob):
    """The trajectories of a request; every run draws all of them."""

    request: ConsistencyRequest
    command = "consistency"

    def __init__(self, request: ConsistencyRequest, control: Control) -> None:
        super().__init__(request, control)
        check_plots()
        self.seeds = check_seeds(range(request.seed, request.seed + request.count))
        self.find()
        numbers, samplers = sorted(set(request.steps)), list(dict.fromkeys(request.sampler))
        self.items = [Trajectory(name, steps) for name in samplers for steps in numbers]
        self.longest = Trajectory("ddim", numbers[-1])
        self.routes = {item: self._route(item) for item in [self.longest, *self.items]}
        self.sheet: list[NDArray[np.uint8]] = []
        self.spacing = request.spacing or self.plan.scheduler.config.timestep_spacing
        self.plots = [f"distance.{kind}" for kind in request.plot_format]
        self.files = ["table.md", "sheet.png", *self.plots]
        self.protocol = self.deterministic(
            {"spacing": self.spacing, "steps": numbers},
            sampler=list(request.sampler),
            steps=numbers,
            count=request.count,
            seed=request.seed,
        )
        self.folder = self.out()
        self.execution = self.executed("batch_size", "compile")

    def _route(self, item: Trajectory) -> Route:
        levels, order = self.asked_levels(item.steps), {"ddim": 1, "ddim-2": 2}.get(item.sampler)
        sampler: Any = "ddim" if order else item.sampler
        return self.plan.route(timesteps=levels, order=order, clip="none", sampler=sampler)

    def results(self, rows: list[Row]) -> list[Row]:
        return rows[-len(self.items) :] if len(rows) >= len(self.items) else rows

    def evaluations(self, rows: list[Row]) -> float:
        extra = 0 if self.longest in self.items else self.longest.steps
        calls: float = sum(row["evaluations"] for row in rows) + extra
        return calls

    def make(self, missing: Sequence[Trajectory]) -> Generator[Made]:
        with enough_memory(self.device, self.request.batch_size):
            self.warm_up(len(self.seeds))
            began = time.perf_counter()
            reference = self._images(self.longest)
            for item in missing:
                images = reference if item == self.longest else self._images(item)
                error = reconstruction_error(reference, images)
                many = len(error) > 1
                row = {
                    **item._asdict(),
                    "mse": float(error.mean()),
                    "mse_error": float(error.std()) / len(error) ** 0.5 if many else None,
                    "evaluations": sampling_evaluations(self.plan, self.routes[item]),
                }
                self.sheet.append(to_uint8(images[:SHOWN].float()))
                text = f"{item.sampler}, {item.steps} steps: {row['mse']:.2e} from "
                text += f"{self.longest.steps} steps of ddim"
                yield Made(item, row, time.perf_counter() - began, text)
                began = time.perf_counter()

    def _images(self, item: Trajectory) -> Tensor:
        """The images of all seeds, [B, C, H, W] in [-1, 1], clamped."""
        size = self.request.batch_size
        drawn = self.draw(self.routes[item], self.seeds, batch_size=size, output_type="pt")
        return torch.cat([2 * images.cpu().double() - 1 for _, images, _ in drawn])

    def finish(self, rows: list[Row]) -> None:
        request, longest = self.request, self.longest.steps
        setting = (
            f"Mean squared error per dimension, pixels in [0, 1], against {longest} steps of DDIM "
            f"from the same {request.count} latents; {self.spacing} timesteps, no clipping. "
            "sheet.png shows them."
        )
        table = trajectory_table(rows, title=request.model, setting=setting)
        write_text(self.folder / "table.md", table)
        labels = {
            "across": "network evaluations",
            "up": f"squared distance to ddim, {longest} steps",
        }
        paths = [self.folder / name for name in self.plots]
        plot_errors(rows, paths, name="sampler", along="evaluations", **labels)
        pictures = np.concatenate(self.sheet)
        names = [f"{item.sampler}, {item.steps} steps" for item in self.items]
        seeds = [f"seed {seed}" for seed in self.seeds[:SHOWN]]
        sheet = label_rows(pictures, names, columns=seeds, scale=sheet_scale(pictures))
        save_picture(sheet, self.folder / "sheet.png")
