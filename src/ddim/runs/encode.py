"""Turns images into codes: into one file, or shard by shard into a folder."""

import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ddim.data.batches import data_hash
from ddim.data.pictures import Selection, check_images, open_images, read_images
from ddim.errors import DDIMError
from ddim.files import range_name
from ddim.inversion.code_files import save_code
from ddim.inversion.codes import Code, CodeWarning, advice_on_rms, default_method
from ddim.inversion.ddim import collect_unsolved
from ddim.options import Needs, declarations, given_options
from ddim.runs.engine import Control, FileJob, Made, Row
from ddim.runs.model import PixelJob, enough_memory
from ddim.runs.record import NAME, RunRecord, write_run
from ddim.runs.requests import EncodeRequest
from ddim.runs.shards import FOLDER, Blocks, Shard, launched
from ddim.runs.shared_options import Shared
from ddim.runs.sharing import SharedJob

__all__ = ["EncodeFolderJob", "EncodeJob"]

_FILE = "code.safetensors"


class _Encoded(NamedTuple):
    """Images that were encoded together."""

    code: Code
    evaluations: float
    """Network calls an image."""
    unsolved: int
    """Steps that were not solved to the tolerance."""
    seconds: float


class _Encoding(PixelJob):
    """What both kinds of job are."""

    request: EncodeRequest
    command = "encode"
    classes = "the data's"

    def resolve(self) -> None:
        """Finds the model, its levels and the method."""
        request = self.request
        check_images(request.images, request.data)
        self.find()
        self.timesteps = self.checked_levels(request.steps, encodable=True)
        self.note_levels(self.asked_levels(request.steps), self.timesteps)
        self.method = request.method or default_method(self.plan.noise_schedule)

    def encode(self, x0: Tensor, labels: list[int] | None) -> _Encoded:
        """The code of some images, [B, C, H, W] in [-1, 1], of these classes."""
        request, began = self.request, time.perf_counter()
        walk: dict[str, Any] = {"timesteps": self.timesteps, "batch_size": request.batch_size}
        with self.counted() as calls, collect_unsolved() as unsolved:
            code = self.pipe.encode(x0, method=self.method, class_labels=labels, **walk)
        took = time.perf_counter() - began
        return _Encoded(code, calls.each(len(code)), len(unsolved), took)


class EncodeJob(FileJob, _Encoding):
    """One code file, of all images."""

    def __init__(self, request: EncodeRequest, control: Control) -> None:
        request = replace(request, out=_FILE if request.out is None else request.out)
        self.record_name = f"{Path(str(request.out)).name}.{NAME}"
        self.files = [self.record_name]
        super().__init__(request, control)
        _refuse_sharing(request)
        self.resolve()
        self.pictures = read_images(Selection.of(request), self.plan.image_shape, self.model)
        self.note_all(self.pictures.notes)
        self.code: Code | None = None
        self.unsolved = 0
        data = {**self.pictures.data, "method": self.method}
        self.protocol = self.deterministic(self.timesteps, data=data)
        self.execution = {"count": len(self.pictures.x0), **self.executed("batch_size")}

    def make(self, missing: Sequence[Path]) -> Generator[Made]:
        x0, labels, *_ = self.pictures
        with enough_memory(self.device, self.request.batch_size):
            self.warm_up(len(x0))
            self.code, self.calls, self.unsolved, seconds = self.encode(x0, labels)
        yield Made(self.folder, seconds=seconds)

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


class EncodeFolderJob(SharedJob, _Encoding):
    """A folder of code files, a shard each, which processes share."""

    def __init__(self, request: EncodeRequest, control: Control) -> None:
        super().__init__(request, control)
        self.resolve()
        size = request.shard_size
        assert size is not None
        self.pictures = open_images(Selection.of(request), self.plan.image_shape, self.model)
        self.note_all(self.pictures.images.notes)
        self.items = places = self.pictures.places
        self.shards = Blocks(places.start, places.stop, size, origin=places.start)
        self.files = [_file(shard.items) for shard in self.shards]
        hashed = {"hash": data_hash(self.pictures.images), "method": self.method}
        divided = {"shard_size": size, "batch_size": request.batch_size}
        of_data = {"data": {**self.pictures.source, **hashed}, "count": len(places)}
        of_data |= {"seed": request.seed}
        self.protocol = self.deterministic(self.timesteps, **of_data, **divided)
        self.folder = self.out()
        self.agree_on_threads(is_divided=True)
        self.execution = self.executed()

    def left(self, shard: Shard) -> Sequence[int]:
        name, (file,) = self.part(shard, shard.items)
        there = (self.folder / FOLDER / f"{name}.json", self.folder / file)
        return [] if all(path.is_file() for path in there) else shard.items

    def part(self, shard: Shard, items: Sequence[int]) -> tuple[str, list[str]]:
        return range_name(items), [_file(items)]

    def results(self, rows: list[Row]) -> list[Row]:
        return [row for record in self.records() for row in record.rows]

    @property
    def unsolved(self) -> int:
        """Steps that were not solved to the tolerance."""
        steps: int = sum(row.get("unsolved_steps", 0) for row in self.results([]))
        return steps

    def evaluations(self, rows: list[Row]) -> float:
        images: int = sum(row["images"] for row in rows)
        calls: float = sum(row["evaluations"] * row["images"] for row in rows)
        return calls / max(1, images)

    def start(self) -> None:
        with enough_memory(self.device, self.request.batch_size):
            self.warm_up(len(self.shards[0].items))

    def make(self, missing: Sequence[int]) -> Generator[Made]:
        with enough_memory(self.device, self.request.batch_size), warnings.catch_warnings():
            warnings.simplefilter("ignore", CodeWarning)  # once for all of them, at the end
            code, evaluations, unsolved, seconds = self.encode(*self.pictures.read(missing))
        save_code(code, self.folder / _file(missing))
        rms, numbers = code.rms(), {"first": missing[0], "last": missing[-1], "images": len(code)}
        row: Row = {"file": _file(missing), **numbers, "evaluations": evaluations}
        row |= {"rms": float(rms.mean()), "rms_min": float(rms.min()), "rms_max": float(rms.max())}
        if code.residual is not None:
            row |= {"residual_max": float(code.residual.max()), "unsolved_steps": unsolved}
        yield Made(range_name(missing), row, seconds, items=len(code))

    def finish(self, rows: list[Row]) -> None:
        low, high = (min(r["rms_min"] for r in rows), max(r["rms_max"] for r in rows))
        if advice := advice_on_rms(self.method, low, high):
            self.control.note(advice)


def _file(numbers: Sequence[int]) -> str:
    return f"{range_name(numbers)}.safetensors"


def _refuse_sharing(request: EncodeRequest) -> None:
    """Refuses what acts on work that is divided, since one file is not."""
    shared = {field.name for field in fields(Shared)}
    for name in given_options(request):
        if name in shared:
            option = declarations(EncodeRequest)[name].option
            raise DDIMError(str(Needs(option="shard_size").refusal(option, request)))
    if launched():
        raise DDIMError(
            "several processes were launched, and each would write the same file; give "
            "--shard-size, and they share the work in a folder."
        )
