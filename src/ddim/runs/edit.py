"""Edits a picture by words: its code under one prompt, decoded under another."""

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ddim.core.guidance import check_scale
from ddim.data.captions import read_prompts
from ddim.errors import CheckpointError
from ddim.files import file_hash
from ddim.inversion.codes import default_method
from ddim.models.checkpoints import read_guidance
from ddim.models.images import open_picture, save_picture
from ddim.runs.engine import Control, Made, Row
from ddim.runs.model import ModelJob, enough_memory
from ddim.runs.requests import EditRequest

__all__ = ["EditJob"]


class EditJob(ModelJob):
    """The picture before, what comes back of its code under the same prompt, and the edit.

    Attributes:
        method: How the picture is encoded.
    """

    request: EditRequest
    command = "edit"

    def __init__(self, request: EditRequest, control: Control) -> None:
        super().__init__(request, control)
        (self.prompt,), (self.to,) = read_prompts([request.prompt]), read_prompts([request.to])
        self.find()
        if not self.model.is_text:
            raise CheckpointError(
                f"{self.model.name} makes images without prompts, and an edit needs two; give a "
                "text-to-image model, such as fashion-text."
            )
        scale = request.guidance_scale
        card = read_guidance(self.model.folder)
        self.scale = card.get("guidance_scale", 7.5) if scale is None else scale
        check_scale(self.scale)
        self.picture: Image.Image | None = None
        data: dict[str, Any] = {"seed": request.seed}
        if request.image is not None:
            path = Path(request.image)
            self.picture = open_picture(path)
            data = {"image": {"name": path.name, "hash": file_hash([path])}}
        walk: dict[str, Any] = {"timestep_spacing": request.spacing, "order": 1}
        self.route = self.plan.route(request.steps, **walk, clip="none")
        self.method = default_method(self.plan.noise_schedule)
        described = self.describe(clip=self.plan.select_clip("none"))
        self.protocol = {
            **described,
            "prompt": self.prompt,
            "guidance_scale": self.scale,
            "timesteps": self.route.timesteps,
            "eta": 0.0,
            "data": {**data, "to": self.to, "method": self.method, "resize": request.resize},
        }
        self.items = [f"{name}.{request.picture}" for name in ("before", "decoded", "after")]
        self.files = list(self.items)
        self.folder = self.out()
        self.execution = self.executed("batch_size")

    def make(self, missing: Sequence[str]) -> Generator[Made]:
        request, pipe, step = self.request, self.pipe, self.control.step
        walk: dict[str, Any] = {"timesteps": self.route.timesteps}
        walks = 4 if self.picture is None else 3
        self.control.steps = walks * len(self.route)
        with enough_memory(self.device, 1):
            pipe.warm_up(1, guidance_scale=self.scale)
            began = time.perf_counter()
            before = self.picture
            if before is None:
                seeds = {"seeds": [request.seed], "guidance_scale": self.scale}
                shown: dict[str, Any] = {"callback": step, "progress": False}
                before = pipe(self.prompt, **seeds, **walk, **shown).images[0]
            with self.counted() as encoding:
                code = pipe.encode(
                    [before], self.prompt, **walk, method=self.method, resize=request.resize
                )
            (decoded,) = pipe.decode(code, self.prompt, callback=step)
            (after,) = pipe.decode(code, self.to, guidance_scale=self.scale, callback=step)
        self.calls = encoding.each(1)
        seconds = (time.perf_counter() - began) / 3
        for name, picture in zip(self.items, (before, decoded, after), strict=True):
            save_picture(picture.convert("RGB"), self.folder / name)
            prompt = self.to if name == self.items[-1] else self.prompt
            yield Made(name, {"file": name, "prompt": prompt}, seconds)

    def results(self, rows: list[Row]) -> list[Row]:
        return list({row["file"]: row for row in rows}.values())
