"""Turns images into a code file, and a code file back into pictures."""

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from ddim.data.pictures import Selection, check_images, missing_images, read_images
from ddim.errors import DDIMError
from ddim.inversion.codes import Code, default_method, fingerprint, load_code, save_code
from ddim.inversion.ddim import collect_unsolved
from ddim.models.images import from_pil, make_grid, save_picture, sheet_scale
from ddim.runs.engine import Control, FileJob, Made, Row
from ddim.runs.model import PixelJob, enough_memory
from ddim.runs.record import NAME, RunRecord, write_run
from ddim.runs.requests import DecodeRequest, EncodeRequest

__all__ = ["DecodeJob", "EncodeJob"]

SHOWN = 64
"""Most images that the grid shows."""


class EncodeJob(FileJob, PixelJob):
    """One code file, of all images."""

    request: EncodeRequest
    command = "encode"
    classes = "the data's"

    def __init__(self, request: EncodeRequest, control: Control) -> None:
        self.record_name = f"{Path(request.out).name}.{NAME}"
        self.files = [self.record_name]
        super().__init__(request, control)
        check_images(request.images, request.data)
        self.find()
        self.checked_levels(request.steps, encodable=True)
        self.timesteps = self.asked_levels(request.steps)
        self.pictures = read_images(Selection.of(request), self.plan.image_shape, self.model)
        self.note_all(self.pictures.notes)
        self.method = request.method or default_method(self.plan.noise_schedule)
        self.code: Code | None = None
        self.unsolved = list[str]()
        data = {**self.pictures.data, "method": self.method}
        self.protocol = self.deterministic(self.timesteps, data=data)
        self.execution = {"count": len(self.pictures.x0), **self.executed("batch_size")}

    def make(self, missing: Sequence[Path]) -> Generator[Made]:
        request, pipe, (x0, labels, *_) = self.request, self.pipe, self.pictures
        walk: dict[str, Any] = {"timesteps": self.timesteps, "batch_size": request.batch_size}
        with enough_memory(self.device, request.batch_size):
            self.warm_up(len(x0))
            began = time.perf_counter()
            with self.counted() as calls, collect_unsolved() as self.unsolved:
                code = pipe.encode(x0, method=self.method, class_labels=labels, **walk)
        self.code, self.calls = code, calls.each(len(code))
        self.protocol["timesteps"] = list(code.timesteps)
        self.note_levels(self.timesteps, code.timesteps)
        yield Made(self.folder, seconds=time.perf_counter() - began)

    def results(self, rows: list[Row]) -> list[Row]:
        if self.code is None:
            return []
        rows = [{"rms": value} for value in self.code.rms().tolist()]
        if self.code.residual is not None:
            for row, value in zip(rows, self.code.residual.tolist(), strict=True):
                row["residual"] = value
        return [{"image": self.request.seed + n, **row} for n, row in enumerate(rows)]

    def save(self, record: RunRecord) -> None:
        """Writes the record, and then the code: a code without its record could not be made
        again."""
        if self.code is not None:
            self.refuse_existing()
            write_run(self.folder.parent, record, name=self.record_name)
            save_code(self.code, self.folder)


class DecodeJob(PixelJob):
    """The pictures of a code; every run decodes all that it is asked for."""

    request: DecodeRequest
    command = "decode"
    classes = "the code's"

    def __init__(self, request: DecodeRequest, control: Control) -> None:
        super().__init__(request, control)
        whole, first, count = load_code(request.code), request.seed, request.count
        if missing := missing_images(len(whole), first, count):
            raise DDIMError(
                f"{request.code} holds {len(whole)} images, 0 to {len(whole) - 1}; --seed and "
                f"--count ask for {missing}."
            )
        self.code = code = whole[first : None if count is None else first + count]
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
        data = {"code": fingerprint(whole.states), "method": code.method}
        self.protocol = self.deterministic(self.timesteps, sampler=sampler, data=data)
        self.folder = self.out()
        self.execution = {"count": len(code), **self.executed("batch_size")}

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
