"""Draws the images of seeds, and of prompts, into a folder: a file each, or archives."""

import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ddim.bounds import MOST_IMAGES
from ddim.core.denoiser import Denoiser
from ddim.core.noise import check_seeds
from ddim.core.prior import DataPrior
from ddim.core.route import Route
from ddim.core.step import SIGMA_HAT
from ddim.data.batches import data_hash, pick, stack_images
from ddim.data.dataset import ImageData
from ddim.data.sources import is_here, load_images
from ddim.errors import DataError, DDIMError, OutputError
from ddim.files import range_name, write_json
from ddim.fitting.timesteps import estimate_eps_mean_square
from ddim.models.facts import FoundModel
from ddim.models.folder import read_json
from ddim.models.images import label_rows, load_image, make_grid, save_picture, sheet_scale
from ddim.pipelines.networks import COARSE, is_coarse
from ddim.runs.engine import Control, Made, Row
from ddim.runs.model import ModelJob, enough_memory, sampling_evaluations, spacing_of
from ddim.runs.record import identity
from ddim.runs.requests import SampleRequest
from ddim.runs.rules import Options
from ddim.runs.shards import Blocks, Shard, ShardRecord
from ddim.runs.sharing import SharedJob
from ddim.runs.stores import SUFFIXES, Picture, first_pictures, kept_pictures
from ddim.runs.text import Item, TextOptions, read_text
from ddim.runs.values import FittedLevels

__all__ = ["SampleJob"]

SHOWN = 64
"""Most images that the grid shows, so that memory does not grow with the count."""

MEASURED = 256
"""Images of the data that the analytic variance is measured on."""

_FITTED_TO = {"weight_hash": "weights", "configuration_hash": "configuration", "order": "order"}


class SampleJob(SharedJob, ModelJob):
    """The pictures of a request. Those in the folder are kept.

    Pictures are numbered: seed times the number of prompts, plus the place of the prompt.
    """

    request: SampleRequest
    command = "sample"
    route: Route
    text: TextOptions | None = None
    prior: DataPrior | None = None
    data: ImageData | None = None
    """Images that the analytic variance is measured on."""

    def __init__(self, request: SampleRequest, control: Control) -> None:
        super().__init__(request, control)
        check_seeds([request.seed, request.seed + request.count - 1])
        self.archive = SUFFIXES.get(request.store)
        if self.archive is None and request.count > MOST_IMAGES:
            raise DDIMError(
                f"--count must be at most {MOST_IMAGES} where each picture is a file; got "
                f"{request.count}. Give --store webdataset, parquet or npz."
            )
        self.find()
        self._resolve()
        self.prompts = 1 if self.text is None else len(self.text.prompts)
        first, last = (self.prompts * (request.seed + n) for n in (0, request.count))
        size = request.shard_size or (1000 if self.archive else request.batch_size)
        self.items = range(first, last)
        # A batch more for a first seed that no multiple falls on is dear where shards are batches.
        self.shards = Blocks(first, last, size, 0 if self.archive else first)
        self.protocol = {**self._protocol(), **self._stored(size)}
        self.folder = self.out()
        self.agree_on_threads(is_divided=bool(self.archive or request.shard_size))
        measured = ["gamma.json"] if self.route.analytic else []
        self.grid = f"grid.{request.picture}"
        self.execution = self.executed("count", "batch_size", "compile")
        self._size, self._placed = size, 0
        self._places: dict[int, list[ShardRecord]] = {}
        parts = (part for shard in self.shards for part in self._planned(shard))
        self.files = [*chain.from_iterable(map(self._files, parts)), self.grid, *measured]
        self._note_configuration()
        self._note_fitted()

    def _resolve(self) -> None:
        """Resolves the options."""
        always = "device seed count model batch_size compile out overwrite picture dtype"
        always += " store shard_size threads workers lease engine ray_address"
        model, options = self.model, Options(self.request, *always.split())
        is_ddpm, clip = options.sampler == "ddpm", options.clip
        walk = {
            "num_inference_steps": options.steps,
            "timestep_spacing": options.spacing,
            "timesteps": options.timesteps,
            "order": options.order,
            "eta": SIGMA_HAT if is_ddpm else options.eta or 0.0,
            "sampler": "ddim" if is_ddpm else options.sampler,
        }
        given = None
        if model.is_text:
            self.text = text = read_text(options, model, image=True)
            walk["strength"] = text.strength
        else:
            model.find_class(options.class_)
            self.prior = model.read_prior(options.prior)
            walk["analytic"], given = options.variance == "analytic", options.data
            clip = clip or ("static" if is_ddpm else None)  # latents have no range to clip to
        options.refuse_unread(model.name, model.kinds)
        if self.prior is not None:
            self.prior.check_shape(self.plan.image_shape)
        self.route = self.plan.route(**walk, clip=clip)
        if self.text is not None and self.text.picture is not None:
            self.has_picture = True
            self.text.check_picture(self.pipe)
        if self.route.analytic:
            self.data = _open_data(given, model, self.plan)
            self.note_all(self.data.notes)

    def _protocol(self) -> dict[str, Any]:
        request, route = self.request, self.route
        spacing = request.spacing or spacing_of(self.plan, route.timesteps)
        data, variance = self.data, None
        if data is not None:
            measured = {"images": min(MEASURED, len(data)), "hash": data_hash(data)}
            variance = {"kind": "analytic", "data": data.name, **measured}
        return {
            **self.describe(clip=route.clip),
            "sampler": request.sampler,
            "steps": len(route),
            "spacing": None if request.timesteps else spacing,
            "timesteps": route.timesteps,
            "eta": route.eta,
            "order": route.order,
            "variance": variance,
            **({} if self.prior is None else {"prior": self.prior.describe()}),
            **({} if self.text is None else self.text.protocol),
        }

    def _stored(self, size: int) -> dict[str, Any]:
        """The part of the protocol about archives: fixed batches make fixed bytes."""
        if self.archive is None:
            return {}
        divided = {"shard_size": size, "batch_size": self.request.batch_size}
        return {"store": self.request.store, **divided}

    def item(self, number: int) -> Item:
        """The picture of a number."""
        seed, place = divmod(number, self.prompts)
        return Item(place if self.prompts > 1 else None, seed)

    def _file(self, number: int) -> str:
        return f"{self.item(number).stem}.{self.request.picture}"

    def _files(self, numbers: Sequence[int]) -> list[str]:
        """What is written for consecutive numbers."""
        if self.archive is not None:
            return [f"{range_name(numbers)}.{self.archive}"]
        return [*map(self._file, numbers)]

    def _planned(self, shard: Shard) -> list[Sequence[int]]:
        """The parts of a shard that the files of this run will be of: of archives those that none
        holds yet, since a request may go on where a smaller one ended."""
        if self.archive is None or self.request.overwrite:
            return [shard.items]
        self.records()
        return [*_gaps(shard.items, self._whole(shard))]

    def left(self, shard: Shard) -> Sequence[int]:
        items = shard.items
        if self.archive is None:
            absent = {n for n in items if not (self.folder / self._file(n)).is_file()}
            if not absent:
                return []
            # What a shard that was not finished left is drawn again beside the rest: a batch is
            # whole, so that its bytes do not tell of the interruption. It is not written again.
            told = [held for held in self._told if held[0] <= items[-1] and items[0] <= held[-1]]
            return [n for n in items if n in absent or not any(n in held for held in told)]
        self.records()
        return next(_gaps(items, self._whole(shard)), range(0))

    def done(self, shard: Shard) -> int:
        if self.archive is None:
            return sum((self.folder / self._file(n)).is_file() for n in shard.items)
        first, last = shard.items[0], shard.items[-1]
        whole = self._whole(shard)
        return sum(len(range(max(w[0], first), min(w[-1], last) + 1)) for w in whole)

    def _whole(self, shard: Shard) -> list[range]:
        """The numbers of archives that hold a part of a shard, by the records that are known."""
        for record in islice(self._known.values(), self._placed, None):
            self._places.setdefault(record.numbers[0] // self._size, []).append(record)
        self._placed = len(self._known)
        near = self._places.get(shard.items[0] // self._size, [])
        return [record.numbers for record in near if record.is_whole(self.folder)]

    @cached_property
    def _told(self) -> list[range]:
        """The numbers of records that were there when the run began."""
        return [record.numbers for record in self.records() if record.numbers]

    def part(self, shard: Shard, items: Sequence[int]) -> tuple[str, list[str]]:
        return range_name(items), self._files(items)

    def is_made(self) -> bool:
        if self.archive is not None:
            return super().is_made()
        return any(Item.of(path.stem) for path in self.folder.iterdir())

    def beside(self, results: list[Row]) -> int:
        if self.archive is not None:
            held: int = sum(row["images"] for row in results)
            return held - sum(map(self.done, self.shards))
        listed = (self._number(Item.of(Path(row["file"]).stem)) for row in results)
        return sum(number is not None and number not in self.items for number in listed)

    def _number(self, item: Item | None) -> int | None:
        """The number of a picture; None where this request has no such prompt."""
        if item is None or (item.prompt is None) != (self.prompts == 1):
            return None
        return item.seed * self.prompts + (item.prompt or 0)

    def _drawn(self) -> Iterator[Item]:
        """The items whose pictures are in the folder, of whomever."""
        for path in self.folder.glob(f"*.{self.request.picture}"):
            if (item := Item.of(path.stem)) is not None:
                yield item

    def results(self, rows: list[Row]) -> list[Row]:
        if self.archive is not None:
            return [_row_of_shard(record) for record in self.records()]
        listed = None if self.files is None else set(self.files)
        there = {number for item in self._drawn() if (number := self._number(item)) is not None}
        found = sorted(self._file(n) for n in there if listed is None or self._file(n) in listed)
        items = [item for name in found if (item := Item.of(Path(name).stem)) is not None]
        known = None if self.text else self.model.labels_of([i.seed for i in items], self.label)
        labels: Sequence[int | None] = [None] * len(items) if known is None else known
        return [self._row(item, label) for item, label in zip(items, labels, strict=True)]

    def _row(self, item: Item, label: int | None) -> Row:
        return {
            "seed": item.seed,
            "file": f"{item.stem}.{self.request.picture}",
            **({} if label is None else {"class": label}),
            **({} if self.text is None else {"prompt": self.text.prompt_of(item)}),
        }

    def evaluations(self, rows: list[Row]) -> float:
        calls = 1 if self.text is None else self.text.calls_a_step
        return calls * sampling_evaluations(self.plan, self.route)

    def start(self) -> None:
        """Measures what the analytic variance needs, and evaluates the network once."""
        text, size = self.text, self.request.batch_size
        remaining = len(self.items) - sum(map(self.done, self.shards))
        if self.data is not None:
            self.route = self.route.measured(self._measure(self.data))
        self.size = min(size, remaining)
        self.control.steps = -(-remaining // self.size) * len(self.route)
        with enough_memory(self.device, size):
            began = time.perf_counter()
            self.warm_up(self.size, **({} if text is None else text.scale))
            self.execution["warm_up_seconds"] = time.perf_counter() - began

    def make(self, missing: Sequence[int]) -> Generator[Made]:
        """Draws pictures in batches: those of a batch are written once it is drawn, those of an
        archive once it is whole."""
        with enough_memory(self.device, self.request.batch_size):
            drawn = self._draw_archive(missing) if self.archive else self._draw_files(missing)
            for made in drawn:
                self.execution["drawn"] = self.execution.get("drawn", 0) + made.items
                yield made

    def _draw_files(self, missing: Sequence[int]) -> Generator[Made]:
        def is_absent(number: int) -> bool:
            return not (self.folder / self._file(number)).is_file()

        for batch in _batches(missing, self.request.batch_size):
            if not any(map(is_absent, batch)):
                continue
            images, took = self._draw(batch)
            absent = [(n, image) for n, image in zip(batch, images, strict=True) if is_absent(n)]
            for number, image in absent:
                save_picture(image, self.folder / self._file(number), sync=True)
                yield Made(self._file(number), seconds=took / len(absent))

    def _draw_archive(self, missing: Sequence[int]) -> Generator[Made]:
        (name,), seconds = self._files(missing), 0.0
        options: dict[str, Any] = {"count": len(missing), "picture": self.request.picture}
        with kept_pictures(self.request.store, [self.folder / name], **options) as add:
            for batch in _batches(missing, self.request.batch_size):
                images, took = self._draw(batch)
                seconds += took
                for number, image in zip(batch, images, strict=True):
                    add(self._picture(number, image))
        yield Made(name, seconds=seconds, items=len(missing))

    def _picture(self, number: int, image: Any) -> Picture:
        item = self.item(number)
        labels = None if self.text else self.model.labels_of([item.seed], self.label)
        prompt = None if self.text is None else self.text.prompt_of(item)
        return Picture(item.stem, image, item.seed, labels[0] if labels else None, prompt)

    def _draw(self, batch: Sequence[int]) -> tuple[Any, float]:
        """The pictures of a batch, and the seconds that they took. A compiled network is compiled
        for one size, so a short batch is filled up, and the surplus dropped."""
        items = [self.item(number) for number in batch]
        if self.request.compile:
            items += items[-1:] * (self.size - len(items))
        seeds = [item.seed for item in items]
        asked: dict[str, Any] = {"progress": False, "callback": self.control.step}
        if self.text is None:
            asked["class_labels"] = self.model.labels_of(seeds, self.label)
            asked["prior"] = self.prior
        else:
            asked |= self.text.draw_options(items)
        began = time.perf_counter()
        images = self.pipe.draw(self.route, seeds=seeds, **asked).images
        self.batches_drawn += 1
        return images[: len(batch)], time.perf_counter() - began

    def finish(self, rows: list[Row]) -> None:
        prompts, row = self.prompts, self.request.count
        columns = row if prompts == 1 else max(1, min(row, SHOWN // prompts, 8))
        places = [k * prompts + p for p in range(min(prompts, SHOWN)) for k in range(columns)]
        shown = [self.items[place] for place in places[:SHOWN]]
        loaded = self._load(shown)
        usual = Counter(picture.shape for picture in loaded).most_common(1)[0][0]
        pairs = zip(shown, loaded, strict=True)
        if odd := [self._file(item) for item, picture in pairs if picture.shape != usual]:
            raise OutputError(
                f"{self.folder / odd[0]} has another size than the pictures beside it; delete it, "
                "and run again."
            )
        pictures = np.stack(loaded)
        scale, grid = sheet_scale(pictures), self.folder / self.grid
        if self.text is None or prompts == 1:
            save_picture(make_grid(pictures), grid, scale=scale)
        else:
            labels = [self.text.prompt_of(self.item(number)) for number in shown[::columns]]
            seeds = [f"seed {self.item(number).seed}" for number in shown[:columns]]
            save_picture(label_rows(pictures, labels, columns=seeds, scale=scale), grid)

    def _load(self, numbers: Sequence[int]) -> list[Any]:
        """Pictures of the folder."""
        if self.archive is None:
            return [load_image(self.folder / self._file(number)) for number in numbers]
        found: dict[int, Any] = {}
        for record in self.records():
            if record.numbers and record.numbers[0] <= max(numbers):
                path = self.folder / record.files[0]
                pictures = first_pictures(path, max(numbers) + 1 - record.numbers[0])
                found |= dict(zip(record.numbers, pictures, strict=False))
        return [np.atleast_3d(np.asarray(found[number])) for number in numbers]

    def _measure(self, data: ImageData) -> dict[int, float]:
        """What the analytic variance needs at each level: from gamma.json where that file is of the
        same protocol, else measured."""
        path = self.folder / "gamma.json"
        described = identity(self.protocol)
        if path.is_file() and (content := read_json(path)).get("protocol") == described:
            return {int(t): float(value) for t, value in content["gamma"].items()}
        chosen = pick(len(data), MEASURED, labels=data.labels)
        size = self.request.batch_size

        def batches() -> Iterator[tuple[Denoiser, Tensor]]:
            for first in range(0, len(chosen), size):
                part = chosen[first : first + size]
                x0 = stack_images(data, part).to(self.device)
                labels = [data[i][1] for i in part] if self.model.classes else None
                yield self.pipe.denoiser(len(x0), class_labels=labels, clip=self.route.clip), x0

        schedule = self.plan.noise_schedule
        measured = estimate_eps_mean_square(batches(), self.route.timesteps, schedule=schedule)
        write_json(path, {"gamma": measured, "protocol": described})
        return measured

    def prepare(self) -> None:
        super().prepare()
        if is_coarse(self.pipe):
            self.control.note(f"{COARSE}; --dtype float32 is the way out.")

    def _note_configuration(self) -> None:
        """Says what a model's configuration does to its images, where embedded models differ."""
        request, route = self.request, self.route
        last, first = len(self.plan.noise_schedule) - 1, route.timesteps[0]
        clips = request.clip is None and request.sampler == "ddim" and route.clip.kind != "none"
        is_chosen = request.spacing or request.timesteps or request.image
        is_fitted = spacing_of(self.plan, route.timesteps) == "fitted"
        late = first != last and not is_fitted and not is_chosen
        if not self.model.has_scheduler:
            self.control.note(
                f"{self.model.name} comes without a scheduler; it is taken for a model of "
                f"{last + 1} linear levels that predicts epsilon."
            )
        elif clips or late:
            does = [f"clips predicted images ({route.clip.kind})"] * clips
            does += [f"starts at level {first}, not at {last}"] * late
            instead = " ".join(["--clip none"] * clips + ["--spacing trailing"] * late)
            joined = " and ".join(does)
            self.control.note(f"the model's configuration {joined}; {instead} would not.")

    def _note_fitted(self) -> None:
        """Says that levels from a file were fitted to another model or order than this."""
        if not isinstance(self.request.timesteps, FittedLevels):
            return
        fitted = self.request.timesteps.protocol
        other = [
            f"{what} {fitted[key]}, not {self.protocol[key]}"
            for key, what in _FITTED_TO.items()
            if key in fitted and fitted[key] != self.protocol[key]
        ]
        if other:
            found = f"fitted to {fitted.get('model')} ({'; '.join(other)})"
            self.control.note(f"these timesteps were {found}; `ddim fit-steps` fits others.")


def _open_data(given: str | None, model: FoundModel, pipe: Any) -> ImageData:
    """The images that were given, else those of the model's card, which has no host asked."""
    source = given or model.trained_on()
    if given is None and not is_here(source):
        raise DataError(
            f"the card of {model.name} names {source} as its data, which is not on this machine; "
            f"give --data {source} to have it fetched, or other images."
        )
    channels, height, width = pipe.image_shape
    return load_images(source, channels=channels, resolution=(height, width))


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]


def _gaps(items: Sequence[int], whole: Sequence[range]) -> Iterator[range]:
    """The runs of consecutive numbers that are in none of the ranges."""
    first, end = items[0], items[-1] + 1
    for held in sorted(whole, key=lambda numbers: numbers[0]):
        if first < held[0] < end:
            yield range(first, held[0])
        first = max(first, held[-1] + 1)
    if first < end:
        yield range(first, end)


def _row_of_shard(record: ShardRecord) -> Row:
    """A shard's row in the record of the run."""
    numbers = record.numbers
    held = {"first": numbers[0], "last": numbers[-1], "images": record.count}
    return {"file": record.files[0], **held, "sha256": record.sha256}
