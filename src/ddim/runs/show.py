"""Draws the same seeds as a model is configured, and with each fix of the doctor."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddim.core.noise import check_seeds
from ddim.doctor.report import Diagnosis
from ddim.doctor.text import fix_rows
from ddim.errors import DDIMError
from ddim.models.facts import ScheduleSource
from ddim.models.images import from_pil, label_rows, save_picture, sheet_scale
from ddim.runs.engine import Control, FileJob, Made
from ddim.runs.model import ModelJob, enough_memory
from ddim.runs.requests import DoctorRequest
from ddim.runs.rules import Options
from ddim.runs.shared_options import Text
from ddim.runs.text import Item, TextOptions, read_text
from ddim.runs.values import Eta, Levels
from ddim.scheduler import as_ddim

__all__ = ["ShowJob", "ShowRequest", "show_request"]

_SHARED = "device seed count steps timesteps eta prompt negative_prompt guidance_scale"


@dataclass(frozen=True, kw_only=True)
class ShowRequest(Text):
    """What the doctor is asked to draw: a configuration, and rows of changes to it."""

    model: str
    out: str
    config: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    device: str
    seed: int
    count: int
    steps: int | None
    timesteps: Levels
    eta: Eta


def show_request(
    request: DoctorRequest, source: ScheduleSource, diagnosis: Diagnosis
) -> ShowRequest:
    """What ``--show`` asks for, of the model that was examined.

    Raises:
        DDIMError: If the source is no model, whose images could be drawn.
    """
    is_file = Path(request.source).expanduser().is_file()
    if source.folder is None:
        raise DDIMError(
            f"--show draws images, and {request.source} is no model in diffusers format; give a "
            "model's folder, name or hub id."
        )
    return ShowRequest(
        model=str(source.folder) if is_file else request.source,
        out=str(request.show),
        config=diagnosis.config | diagnosis.asked,
        rows=fix_rows(diagnosis),
        guidance_rescale=request.guidance_rescale,
        **{name: getattr(request, name) for name in _SHARED.split()},
    )


class ShowJob(FileJob, ModelJob):
    """One picture: a row as the model is configured, one for each fix that needs no training, and
    one with all of them.

    Attributes:
        drawn: By the rows that are drawn so far: the images; or None, and how they are refused.
    """

    request: ShowRequest
    command = "doctor"
    text: TextOptions | None = None

    def __init__(self, request: ShowRequest, control: Control) -> None:
        super().__init__(request, control)
        self.seeds = check_seeds(range(request.seed, request.seed + request.count))
        self.find()
        always = "model out config rows device seed count steps timesteps eta"
        options = Options(request, *always.split())
        if self.model.is_text:
            self.text = read_text(options, self.model)
        options.refuse_unread(self.model.name, self.model.kinds)
        alone = [Item(None, seed) for seed in self.seeds]
        self.items = alone if self.text is None else self.text.items(self.seeds)
        self.protocol = {"command": self.command, "rows": request.rows, "seeds": self.seeds}
        self.execution = {}
        self.drawn = dict[str, tuple[NDArray[np.uint8] | None, str]]()

    def make(self, missing: Sequence[Path]) -> Generator[Made]:
        request = self.request
        for name, fix in request.rows.items():
            self.drawn[name] = self._draw(fix)
        drawn = list(self.drawn.values())
        shape = next((images.shape for images, _ in drawn if images is not None), (1, 64, 64, 1))
        shape = (len(self.items), *shape[1:])
        refused = np.full(shape, 128, np.uint8)
        pictures = np.concatenate([refused if p is None else p for p, _ in drawn])
        labels = [f"{name}{told}" for name, (_, told) in zip(request.rows, drawn, strict=True)]
        columns = [_column(item) for item in self.items]
        scale = sheet_scale(pictures)
        save_picture(label_rows(pictures, labels, columns=columns, scale=scale), self.folder)
        yield Made(self.folder)

    def _draw(self, fix: Mapping[str, Any]) -> tuple[NDArray[np.uint8] | None, str]:
        """The images with a fix; or None, and how they are refused."""
        request, pipe = self.request, self.pipe
        seeds = [item.seed for item in self.items]
        options: dict[str, Any] = {"seeds": seeds, "progress": False}
        if self.text is None:
            options["class_labels"] = self.model.labels_of(self.seeds)
        else:
            options |= self.text.draw_options(self.items)
        try:
            pipe.scheduler = as_ddim({**request.config, **fix})
            steps = None if request.timesteps else request.steps
            eta = 0.0 if request.eta is None else request.eta
            route = pipe.route(steps, timesteps=request.timesteps, eta=eta)
            with enough_memory(self.device, len(self.items)):
                images = pipe.draw(route, callback=self.control.step, **options).images
        except DDIMError as error:
            return None, f" - refused: {error}"
        return from_pil(images), ""


def _column(item: Item) -> str:
    """What stands above the pictures of a seed, and of one of several prompts."""
    seed = f"seed {item.seed}"
    return seed if item.prompt is None else f"text {item.prompt + 1}, {seed}"
