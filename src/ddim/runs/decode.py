"""Turns codes back into pictures."""

import time
from collections.abc import Generator, Sequence
from pathlib import Path

from ddim.data.pictures import missing_images
from ddim.errors import DDIMError
from ddim.inversion.code_files import open_code
from ddim.models.images import from_pil, make_grid, save_picture, sheet_scale
from ddim.runs.engine import Control, Made, Row
from ddim.runs.model import PixelJob, enough_memory
from ddim.runs.record import read_run
from ddim.runs.requests import DecodeRequest

__all__ = ["DecodeJob"]

SHOWN = 64
"""Most images that the grid shows."""


class DecodeJob(PixelJob):
    """The pictures of a code; every run decodes all that it is asked for."""

    request: DecodeRequest
    command = "decode"
    classes = "the code's"

    def __init__(self, request: DecodeRequest, control: Control) -> None:
        super().__init__(request, control)
        stored, first, count = open_code(request.code), request.seed, request.count
        if missing := missing_images(len(stored), first, count):
            raise DDIMError(
                f"{request.code} holds {len(stored)} images, 0 to {len(stored) - 1}; --seed and "
                f"--count ask for {missing}."
            )
        self._refuse_unfinished(len(stored))
        self.code = code = stored.load(first, len(stored) - first if count is None else count)
        self.find()
        steps, spacing = request.steps, request.spacing
        if steps is None and spacing is not None:
            steps = len(code.timesteps)
        if steps is not None:
            self.asked_levels(steps)  # refuses them before the weights are loaded
        self.timesteps = self.pipe.decoding_timesteps(code, steps, timestep_spacing=spacing)
        if steps is not None and len(self.timesteps) != steps:
            control.note(
                f"the code lies at level {self.timesteps[0]}; {steps - len(self.timesteps)} of the "
                f"{steps} levels are not below it."
            )
        self.items = range(first, first + len(code))
        self.grid = f"grid.{request.picture}"
        self.files = [*map(self._file, self.items), self.grid]
        sampler = code.method if code.is_exact else "ddim"
        data = {"code": stored.fingerprint, "method": code.method}
        self.protocol = self.deterministic(self.timesteps, sampler=sampler, data=data)
        self.folder = self.out()
        self.execution = {"count": len(code), **self.executed("batch_size")}

    def _refuse_unfinished(self, count: int) -> None:
        """Refuses a folder that holds the codes of ``count`` images, and more were asked for."""
        folder = Path(self.request.code)
        run = read_run(folder) if folder.is_dir() else None
        if run is not None and count < (total := run.protocol.get("count", 0)):
            raise DDIMError(
                f"{folder} holds the codes of {count} of {total} images; go on with the `ddim "
                "encode` that wrote it, and decode then."
            )

    def make(self, missing: Sequence[int]) -> Generator[Made]:
        request, pipe, code = self.request, self.pipe, self.code
        with enough_memory(self.device, request.batch_size):
            self.warm_up(len(code))
            began = time.perf_counter()
            with self.counted() as calls:
                pictures = pipe.decode(
                    code, timesteps=self.timesteps, batch_size=request.batch_size
                )
        self.calls, seconds = calls.each(len(code)), time.perf_counter() - began
        for number, picture in zip(missing, pictures, strict=True):
            file = self._file(number)
            save_picture(picture, self.folder / file)
            yield Made(number, {"image": number, "file": file}, seconds / len(pictures))
        shown = from_pil(pictures[:SHOWN])
        save_picture(make_grid(shown), self.folder / self.grid, scale=sheet_scale(shown))

    def _file(self, number: int) -> str:
        return f"{number:06d}.{self.request.picture}"

    def results(self, rows: list[Row]) -> list[Row]:
        latest = {row["image"]: row for row in rows}
        return [latest[number] for number in sorted(latest)]
