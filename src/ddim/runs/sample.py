"""Draws the images of seeds, and of prompts, into a folder."""

import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ddim.core.denoiser import Denoiser
from ddim.core.noise import check_seeds
from ddim.core.prior import DataPrior
from ddim.core.route import Route
from ddim.core.step import SIGMA_HAT
from ddim.data.batches import data_hash, pick, stack_images
from ddim.data.dataset import ImageData
from ddim.data.sources import is_here, load_images
from ddim.errors import DataError, OutputError
from ddim.files import write_json
from ddim.fitting.timesteps import estimate_eps_mean_square
from ddim.models.facts import FoundModel
from ddim.models.folder import read_json
from ddim.models.images import label_rows, load_image, make_grid, save_picture, sheet_scale
from ddim.pipelines.networks import COARSE, is_coarse
from ddim.runs.engine import Control, Made, Row
from ddim.runs.model import ModelJob, draw, enough_memory, sampling_evaluations, spacing_of
from ddim.runs.record import RunRecord, identity
from ddim.runs.requests import SampleRequest
from ddim.runs.rules import Options
from ddim.runs.text import Item, TextOptions, read_text
from ddim.runs.values import FittedLevels

__all__ = ["SampleJob"]

SHOWN = 64
"""Most images that the grid shows, so that memory does not grow with the count."""

MEASURED = 256
"""Images of the data that the analytic variance is measured on."""

_FITTED_TO = {"weight_hash": "weights", "configuration_hash": "configuration", "order": "order"}


class SampleJob(ModelJob):
    """The pictures of a request. Those in the folder are kept."""

    request: SampleRequest
    command = "sample"
    route: Route
    text: TextOptions | None = None
    prior: DataPrior | None = None
    data: ImageData | None = None
    """Images that the analytic variance is measured on."""
    batches = 0
    """Batches that this run drew."""

    def __init__(self, request: SampleRequest, control: Control) -> None:
        super().__init__(request, control)
        seeds = check_seeds(range(request.seed, request.seed + request.count))
        self.find()
        self._resolve()
        items = [Item(None, seed) for seed in seeds]
        self.items = items if self.text is None else self.text.items(seeds)
        self.protocol = self._protocol()
        self.folder = self.out()
        measured = ["gamma.json"] if self.route.analytic else []
        self.grid = f"grid.{request.picture}"
        self.files = [*map(self._file, self.items), self.grid, *measured]
        self.execution = self.executed("count", "batch_size", "compile")
        self._note_configuration()
        self._note_fitted()

    def _resolve(self) -> None:
        """Resolves the options."""
        always = "device seed count model batch_size compile out overwrite picture dtype"
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

    def there(self, record: RunRecord | None) -> set[Item]:
        drawn, listed = self._drawn(), None if self.files is None else set(self.files)
        return drawn if listed is None else {item for item in drawn if self._file(item) in listed}

    def _drawn(self) -> set[Item]:
        """The items whose pictures are in the folder, of whomever."""
        found = (Item.of(path.stem) for path in self.folder.glob(f"*.{self.request.picture}"))
        return {item for item in found if item is not None}

    def _file(self, item: Item) -> str:
        return f"{item.stem}.{self.request.picture}"

    def is_empty(self, record: RunRecord) -> bool:
        return not any(Item.of(path.stem) for path in self.folder.iterdir())

    def results(self, rows: list[Row]) -> list[Row]:
        there = sorted(self.there(None), key=self._file)
        seeds = [item.seed for item in there]
        known = None if self.text else self.model.labels_of(seeds, self.label)
        labels: Sequence[int | None] = [None] * len(there) if known is None else known
        return [self._row(item, label) for item, label in zip(there, labels, strict=True)]

    def _row(self, item: Item, label: int | None) -> Row:
        return {
            "seed": item.seed,
            "file": self._file(item),
            **({} if label is None else {"class": label}),
            **({} if self.text is None else {"prompt": self.text.prompt_of(item)}),
        }

    def seconds(self, drawn: float, before: RunRecord | None) -> float:
        return before.seconds if before is not None and not drawn else drawn

    def evaluations(self, rows: list[Row]) -> float:
        calls = 1 if self.text is None else self.text.calls_a_step
        return calls * sampling_evaluations(self.plan, self.route)

    def make(self, missing: Sequence[Item]) -> Generator[Made]:
        request, text = self.request, self.text
        self.execution |= {"drawn": len(missing)}
        if not missing:
            return
        route = self.route if self.data is None else self.route.measured(self._measure(self.data))
        size = min(request.batch_size, len(missing))
        self.batches = -(-len(missing) // size)
        self.control.steps = self.batches * len(route)
        with enough_memory(self.device, request.batch_size):
            began, guidance = time.perf_counter(), {} if text is None else text.scale
            self.warm_up(size, **guidance)
            self.execution["warm_up_seconds"] = time.perf_counter() - began

            def pictures(batch: list[Item]) -> Any:
                seeds = [item.seed for item in batch]
                asked: dict[str, Any] = {"progress": False, "callback": self.control.step}
                if text is None:
                    labels = self.model.labels_of(seeds, self.label)
                    asked |= {"class_labels": labels, "prior": self.prior}
                else:
                    asked |= text.draw_options(batch)
                return self.pipe.draw(route, seeds=seeds, **asked).images

            drawn = draw(missing, pictures, batch_size=size, fill=request.compile)
            for batch, images, took in drawn:
                for item, image in zip(batch, images, strict=True):
                    save_picture(image, self.folder / self._file(item))
                    yield Made(item, seconds=took / len(batch))

    def finish(self, rows: list[Row]) -> None:
        prompts = 1 if self.text is None else len(self.text.prompts)
        row = len(self.items) // prompts
        columns = row if prompts == 1 else max(1, min(row, SHOWN // prompts, 8))
        places = [p * row + k for p in range(min(prompts, SHOWN)) for k in range(columns)]
        shown = [self.items[place] for place in places[:SHOWN]]
        loaded = [load_image(self.folder / self._file(item)) for item in shown]
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
            labels = [self.text.prompt_of(item) for item in shown[::columns]]
            seeds = [f"seed {item.seed}" for item in shown[:columns]]
            save_picture(label_rows(pictures, labels, columns=seeds, scale=scale), grid)

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
