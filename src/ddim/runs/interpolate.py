"""Draws the path between two latents, or the grid between four."""

import dataclasses
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddim.core.interpolation import interpolate, interpolate_grid
from ddim.core.noise import check_seeds, seeded_randn
from ddim.data.pictures import Pictures, Selection, check_images, read_images
from ddim.errors import DDIMError, printable
from ddim.inversion.codes import Code
from ddim.inversion.ddim import collect_unsolved
from ddim.models.images import from_pil, label_rows, save_gif, save_picture, sheet_scale
from ddim.runs.engine import Control, Made, Row
from ddim.runs.model import PixelJob, enough_memory
from ddim.runs.requests import InterpolateRequest

__all__ = ["InterpolateJob"]


class InterpolateJob(PixelJob):
    """One sheet of pictures, drawn whole in every run."""

    request: InterpolateRequest
    command = "interpolate"
    ends: Code | Pictures
    """The codes of seeds, or pictures that are to be encoded."""
    pictures: NDArray[np.uint8]
    """The drawn pictures, bytes [B, H, W, C]."""

    def __init__(self, request: InterpolateRequest, control: Control) -> None:
        super().__init__(request, control)
        needed = self._check_ends()
        if request.images is not None:
            check_images(request.images, None)
        self.find()
        self.model.find_class(request.class_, required=True)
        encodable = request.images is not None
        self.timesteps = self.checked_levels(request.steps, encodable=encodable)
        if request.seeds is not None:
            x_T = seeded_randn(self.plan.image_shape, check_seeds(request.seeds)).double()
            labels = None if self.label is None else torch.full((needed,), self.label)
            levels = tuple(self.timesteps)
            self.ends = Code(x_T.unsqueeze(0), "ddim", levels, 0, labels=labels)
            data: dict[str, Any] = {"seeds": list(request.seeds)}
        else:
            self.note_levels(self.asked_levels(request.steps), self.timesteps)
            self.ends = read_images(Selection.of(request), self.plan.image_shape, self.model)
            data = {**self.ends.data, "method": request.method}
        self.rms, self.unsolved = list[float](), list[str]()
        self.items = [f"{'grid' if request.grid else 'strip'}.{request.picture}"]
        self.files = [*self.items, *(["path.gif"] if request.gif else [])]
        how = {"kind": request.interpolation, "grid": request.grid}
        self.protocol = self.deterministic(
            self.timesteps, count=request.count, interpolation=how, data=data
        )
        self.folder = self.out()
        self.execution = self.executed("batch_size")

    def _check_ends(self) -> int:
        """How many ends the path or the grid needs, once it is known that they are given."""
        request = self.request
        ends = request.images if request.seeds is None else request.seeds
        if ends is None:
            raise DDIMError(
                "give the ends of the path as --seeds 3,17 or as --images a.png,b.png, one of the "
                "two."
            )
        needed = 4 if request.grid else 2
        if len(ends) != needed:
            what = "a grid has four corners" if request.grid else "a path has two ends"
            given = f"{len(ends)} {'was' if len(ends) == 1 else 'were'} given"
            raise DDIMError(f"{what}, and {given}; name {needed}, separated by commas.")
        return needed

    def results(self, rows: list[Row]) -> list[Row]:
        name = self.items[0]
        return [{"place": n, "file": name, "rms": value} for n, value in enumerate(self.rms)]

    def make(self, missing: Sequence[str]) -> Generator[Made]:
        request, pipe = self.request, self.pipe
        walk: dict[str, Any] = {"timesteps": self.timesteps, "batch_size": request.batch_size}
        with enough_memory(self.device, request.batch_size):
            pipe.warm_up()
            began = time.perf_counter()
            encoding, decoding = self.counted(), self.counted()
            if request.images is None:
                many = request.count**2 if request.grid else request.count
                self.control.steps = -(-many // request.batch_size) * len(self.timesteps)
            with encoding, collect_unsolved() as unsolved:
                if isinstance(self.ends, Pictures):
                    x0, classes, *_ = self.ends
                    code = pipe.encode(x0, method=request.method, class_labels=classes, **walk)
                else:
                    code = self.ends
            # Each state of a code goes along its own path, with one weight: the two states of a
            # pair keep their distance.
            states = torch.stack([self._path(state) for state in code.states])
            labels = code.labels
            if labels is not None:
                labels = labels[:1].expand(states.shape[1]).contiguous()
            whole = dataclasses.replace(code, states=states, labels=labels, residual=None)
            with decoding:
                decoded = pipe.decode(whole, batch_size=request.batch_size)
        self.pictures = pixels = from_pil(decoded)
        seconds = time.perf_counter() - began
        self.rms, self.unsolved = whole.rms().tolist(), unsolved
        self.calls = encoding.each(len(code)) + decoding.each(len(pixels))
        scale, name = sheet_scale(pixels), missing[0]
        rows, columns = self._labels()
        sheet = label_rows(pixels, rows, columns=columns, scale=scale)
        save_picture(sheet, self.folder / name)
        if request.gif:
            save_gif(pixels, self.folder / "path.gif", scale=scale)
        yield Made(name, seconds=seconds)

    def _labels(self) -> tuple[list[str], list[str]]:
        """What stands over the rows of the sheet, and over its columns: the weight of the end."""
        request, count = self.request, self.request.count
        names = [f"seed {seed}" for seed in request.seeds or ()]
        names = names or [printable(Path(name).name) for name in request.images or ()]
        paths = [f"{a} to {b}" for a, b in zip(names[::2], names[1::2], strict=True)]
        weights = [f"{place / (count - 1):.2f}" for place in range(count)]
        how = f"{request.interpolation}, {len(self.timesteps)} steps"
        rows = [f"{paths[0]} ({how})"]
        if request.grid:
            rows += [*weights[1:-1], paths[1]]
        return rows, weights

    def _path(self, ends: Tensor) -> Tensor:
        count, kind = self.request.count, self.request.interpolation
        if self.request.grid:
            return interpolate_grid(ends, count, count, kind=kind)
        return interpolate(ends[0], ends[1], count, kind=kind)
