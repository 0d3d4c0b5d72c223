"""``ddim sample``: draws images from a model."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ddim.cli._arguments import EtaOption, FittedLevels, ModelArgument, TimestepsOption
from ddim.cli._model import (
    check_class,
    check_positive,
    describe_model,
    enough_memory,
    find_device,
    in_batches,
    progress_bar,
    sampling_evaluations,
    seed_label,
    short_name,
)
from ddim.cli._text import Item, TextRequest, open_any
from ddim.errors import DDIMError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

    from ddim.core.denoiser import Clip, Denoiser
    from ddim.core.prior import DataPrior
    from ddim.core.sampler import State
    from ddim.data.dataset import ImageData
    from ddim.pipelines.unconditional import UnconditionalPipeline

__all__ = ["Command", "defaults", "run"]

GRID = 64
"""Images that the grid shows at most, so that memory does not grow with the count."""

MOST = 1_000_000
"""Images of one run: each is a line of its record."""

MEASURED = 256
"""Images of the data that the analytic variance is measured on."""


@dataclass(frozen=True)
class Command:
    """Draws images from a model with DDIM: one file a seed, a grid of the first 64, and a record of
    the run.

    Running again into the same folder draws what is missing; the grid shows the images of the last
    request, and no others that are there."""

    model: ModelArgument = "fashion-mnist"
    """An embedded model, a folder in diffusers format, or a hub id."""
    steps: int | None = None
    """DDIM steps: network evaluations an image. 50 unless --timesteps is given."""
    count: int = 16
    """How many images: the seeds SEED to SEED+COUNT-1."""
    seed: int = 0
    """Seed of the first image."""
    eta: EtaOption = None
    """0 is deterministic and the default, 1 is DDPM's posterior, sigma-hat the larger noise of
    DDPM."""
    order: Literal[1, 2] | None = None
    """Of the solver: 1 is DDIM, 2 its multistep, with a smaller error at the same steps; by default
    what the configuration says."""
    variance: Literal["eta", "analytic"] = "eta"
    """analytic: the noise that makes up for what the prediction leaves out, at eta 0 too; measured
    on data first, into gamma.json."""
    data: str | None = None
    """Of --variance analytic: images as `ddim train --data` takes them; by default those that the
    model was trained on."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] | None = None
    """Which levels are visited; by default what the model's configuration says, fitted ones
    first."""
    timesteps: TimestepsOption = None
    """The levels themselves, falling, in place of --steps and --spacing; or a JSON file with the
    key `timesteps`."""
    sampler: Literal["ddim", "ddpm", "o-belm", "bdia", "edict"] = "ddim"
    """ddpm: sigma-hat noise, and static clipping with the noise derived again; the last three can
    be run backwards exactly."""
    clip: Literal["none", "static", "dynamic"] | None = None
    """How predicted images are kept in range on the way, the noise being derived again; by default
    what the configuration says."""
    prior: str = "standard"
    """What the first noise is drawn from: standard is N(0, I); data knows the data's mean colours,
    from the model's prior.json; or a FILE.json that `ddim doctor --prior` wrote."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Of a model of text: what the images show. Given again for more, or FILE.txt with one in a
    line; each has one image a seed."""
    negative_prompt: str | None = None
    """What guidance leads away from; by default the empty text."""
    guidance_scale: float | None = None
    """How far it leads: 1 is off. By default what the model's card says, else 7.5."""
    guidance_rescale: float | None = None
    """How far guided predictions are brought back to the contrast of unguided ones, from 0 to 1; by
    default the card's, else 0."""
    image: str | None = None
    """A picture to begin with, in place of noise."""
    strength: float | None = None
    """Of --image: the share of the steps that is walked, up to 1 that keeps little or nothing of
    it; 0.8 by default."""
    class_: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class of all images, for a class-conditional model; by default the seeds go round the
    classes."""
    batch_size: int = 16
    """Images drawn together; it changes no image but for rounding: one grey level in float32, a few
    in half precision."""
    out: str | None = None
    """Folder for the pictures; by default out/sample-MODEL."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network; the image between the steps is float32 always."""
    compile: bool = False
    """Compile the network first: a minute, and then faster steps."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Draws what is missing in the folder, then writes the grid and run.json."""
    began = time.perf_counter()
    check_positive(command, "count", "batch_size")
    if command.count > MOST:
        raise DDIMError(
            f"--count must be at most {MOST} in one run; got {command.count}, so go on from there "
            "with --seed."
        )
    if command.data is not None and command.variance != "analytic":
        raise DDIMError("--data is what --variance analytic is measured on; give both, or neither.")
    if command.sampler == "ddpm" and command.eta is not None:
        raise DDIMError(
            "--sampler ddpm fixes the noise at sigma-hat; leave out --eta, or the sampler."
        )

    from ddim.cli._run import RunRecord, check_protocol, versions, write_run
    from ddim.core.noise import check_seeds
    from ddim.core.step import SIGMA_HAT, Eta, check_eta
    from ddim.core.timesteps import truncate_timesteps
    from ddim.models.checkpoints import has_scheduler

    device = find_device(command.device)
    seeds = check_seeds(range(command.seed, command.seed + command.count))
    eta: Eta = check_eta(SIGMA_HAT if command.sampler == "ddpm" else command.eta or 0.0)

    pipe, folder = open_any(
        command.model, device=device, dtype=command.dtype, image=command.image is not None
    )
    text = TextRequest.read(command, pipe, folder, image=command.image, strength=command.strength)
    useful = {
        "class": command.class_ is None,
        "prior": command.prior == "standard",
        "variance": command.variance == "eta",
    }
    if text is not None and not all(useful.values()):
        raise DDIMError(
            f"--{min(useful, key=useful.__getitem__)} is not for models of text; leave it out."
        )
    order = pipe.select_order(command.order)
    listed = pipe.select_timesteps(
        command.steps, timestep_spacing=command.spacing, timesteps=command.timesteps, order=order
    )
    timesteps = (
        listed
        if text is None or text.strength is None
        else truncate_timesteps(listed, text.strength)
    )
    analytic = command.variance == "analytic"
    sampler = "ddim" if command.sampler == "ddpm" else command.sampler
    clip = pipe.select_clip(
        command.clip or ("static" if command.sampler == "ddpm" and text is None else None)
    )  # latents have no range
    pipe.route(
        timesteps=timesteps,
        eta=eta,
        order=command.order,
        clip=clip,
        sampler=sampler,
        analytic=analytic,
    )
    prior = _prior(command, folder)
    check_class(pipe, command.class_)
    images = _open_data(command, pipe, folder) if analytic else None
    protocol = _protocol(
        command, pipe, folder, timesteps=timesteps, eta=eta, order=order, clip=clip
    )
    protocol["variance"] = (
        None if images is None else {"kind": "analytic", "data": images.name, "images": MEASURED}
    )
    if prior is not None:
        protocol["prior"] = prior.describe()
    if text is not None:
        protocol |= text.protocol

    out = Path(command.out or f"out/sample-{short_name(command.model)}")
    items = [Item(None, seed) for seed in seeds] if text is None else text.items(seeds)

    def drawn() -> set[Item]:
        return {
            item
            for item in map(Item.of, (path.stem for path in out.glob("*.png")))
            if item is not None
        }

    there = drawn()
    before = check_protocol(out, protocol, empty=not there)
    if there and before is None:
        raise OutputError(
            f"{out} holds pictures and no run.json that says how they were made; use another "
            "--out, or delete that folder."
        )
    missing = [item for item in items if item not in there]
    _note(command, pipe, clip, listed, assumed=not has_scheduler(folder))
    _note_fitted(command.timesteps, protocol)

    label = seed_label(pipe, command.class_)

    def record(seconds: float, **execution: Any) -> RunRecord:
        results = [
            {
                "seed": i.seed,
                "file": i.file,
                **label(i.seed),
                **({} if text is None else {"prompt": text.prompt_of(i)}),
            }
            for i in sorted(drawn(), key=lambda item: item.file)
        ]
        return RunRecord(
            protocol=protocol,
            results=results,
            seconds=seconds,
            seconds_total=time.perf_counter() - began,
            evaluations=sampling_evaluations(pipe, sampler, timesteps)
            * (2 if text is not None and text.is_guided else 1),
            execution={
                "count": command.count,
                "batch_size": command.batch_size,
                "device": str(device),
                "compile": command.compile,
                **execution,
            },
            versions=versions(),
        )

    out.mkdir(parents=True, exist_ok=True)
    if before is None:
        write_run(
            out, record(0.0, drawn=0)
        )  # so that what an interrupted run leaves is known for what it is
    with enough_memory(device, command.batch_size):
        options: dict[str, Any] = {
            "timesteps": listed,
            "eta": eta,
            "order": order,
            "clip": clip,
            "sampler": sampler,
        }
        if text is None:
            eps_mean_square = None
            if images is not None and missing:
                eps_mean_square = _measure_eps_mean_square(
                    protocol, pipe, images, out / "gamma.json", batch_size=command.batch_size
                )
            options |= {"eps_mean_square": eps_mean_square, "prior": prior}
        seconds, warm_up, batches = _draw(
            command, pipe, missing, out, text=text, label=label, steps=len(timesteps), **options
        )

    _write_grid(out, items, text)
    now = record(seconds, drawn=len(missing), warm_up_seconds=warm_up)
    if missing:
        write_run(out, now)
    elif (
        before is not None and before.results != now.results
    ):  # of a run that was killed before it said what it drew
        write_run(out, replace(before, results=now.results))
    others = len(there - set(items))
    beside = (
        f" {others} of other seeds{'' if text is None else ' or prompts'} are there too, and not "
        "in the grid."
        if others
        else ""
    )
    told = f"{len(missing)} images drawn, {len(items) - len(missing)} were there"
    print(f"{told}; they are in {out}, together in {out / 'grid.png'}.{beside}")
    if missing:
        step = seconds / (batches * len(timesteps))
        total = len(pipe.noise_schedule)
        print(
            f"{len(timesteps)} steps "
            f"{'' if batches == 1 else f'in each of {batches} batches '}took {seconds:.1f} s, "
            f"{1000 * step:.1f} ms a step; "
            f"all {total} steps would have taken {seconds / len(timesteps) * total:.0f} s."
        )


def _draw(
    command: Command,
    pipe: Any,
    items: list[Item],
    out: Path,
    *,
    text: TextRequest | None,
    label: Callable[[int], dict[str, int]],
    steps: int,
    **options: Any,
) -> tuple[float, float, int]:
    """Draws and writes the pictures of the items; returns the seconds of sampling, those of the
    warm-up, and the number of batches."""
    if not items:
        return 0.0, 0.0, 0
    from ddim.models.images import save_png

    size = min(command.batch_size, len(items))
    batches = -(-len(items) // size)
    began = time.perf_counter()
    (pipe.compile() if command.compile else pipe).warm_up(
        size, **({} if text is None else {"guidance_scale": text.guidance_scale})
    )
    warm_up, seconds = time.perf_counter() - began, 0.0
    with progress_bar(pipe, batches * steps) as bar:
        options["callback"] = None if bar is None else _advance(bar)

        def make(batch: list[Item]) -> Any:
            seeds = [item.seed for item in batch]
            labels = [number for seed in seeds for number in label(seed).values()]
            asked = {"class_labels": labels or None} if text is None else text.options(batch)
            return pipe(seeds=seeds, progress=False, **asked, **options).images

        for batch, pictures, took in in_batches(items, make, batch_size=size, fill=command.compile):
            seconds += took
            for item, picture in zip(batch, pictures, strict=True):
                save_png(picture, out / item.file)
    return seconds, warm_up, batches


def _write_grid(out: Path, items: list[Item], text: TextRequest | None) -> None:
    """The first images together; of several prompts, a row each under its text."""
    import numpy as np

    from ddim.models.images import label_rows, load_image, make_grid, save_png

    prompts = 1 if text is None else len(text.prompts)
    row = len(items) // prompts
    columns = row if prompts == 1 else max(1, min(row, GRID // prompts, 8))
    shown = [items[p * row + k] for p in range(min(prompts, GRID)) for k in range(columns)][:GRID]
    loaded = [load_image(out / item.file) for item in shown]
    usual = Counter(picture.shape for picture in loaded).most_common(1)[0][0]
    for item, picture in zip(shown, loaded, strict=True):
        if picture.shape != usual:
            raise OutputError(
                f"{out / item.file} has another size than the pictures beside it; delete it, and "
                "run again."
            )
    pictures = np.stack(loaded)
    scale = max(1, 96 // pictures.shape[2])
    if text is None or prompts == 1:
        save_png(make_grid(pictures), out / "grid.png", scale=scale)
    else:
        labels = [text.prompt_of(item) for item in shown[::columns]]
        save_png(label_rows(pictures.repeat(scale, 1).repeat(scale, 2), labels), out / "grid.png")


def _protocol(
    command: Command,
    pipe: Any,
    folder: Path,
    *,
    timesteps: list[int],
    eta: float | str,
    order: int,
    clip: "Clip",
) -> dict[str, Any]:
    """What was asked, resolved; the keys of ``ddim.cli._run.IDENTITY`` are what makes two runs
    comparable."""
    config = pipe.scheduler.config
    fitted = timesteps in (config.get("fitted_timesteps") or [])
    return {
        "command": "sample",
        **describe_model(
            command.model, pipe, folder, clip=clip, dtype=command.dtype, fixed=command.class_
        ),
        "sampler": command.sampler,
        "steps": len(timesteps),
        "spacing": None
        if command.timesteps
        else command.spacing or ("fitted" if fitted else config.timestep_spacing),
        "timesteps": timesteps,
        "eta": eta,
        "order": order,
    }


def _prior(command: Command, folder: Path) -> "DataPrior | None":
    """What the start of sampling is told of the data; None for N(0, I)."""
    if command.prior == "standard":
        return None
    from ddim.core.prior import DataPrior
    from ddim.models.checkpoints import read_json

    path = folder / "prior.json" if command.prior == "data" else Path(command.prior)
    if not path.is_file():
        raise DDIMError(
            f"there is no prior at {path}; measure one with `ddim doctor {command.model} --data "
            "DATA --prior FILE.json`, "
            "and give --prior FILE.json."
        )
    return DataPrior.from_dict(read_json(path))


def _open_data(command: Command, pipe: "UnconditionalPipeline", folder: Path) -> "ImageData":
    """The images of the analytic variance: those that were asked for, or those that the model's
    card says it was trained on."""
    from ddim.data.sources import load_images
    from ddim.models.checkpoints import read_json

    card = read_json(folder / "card.json") if (folder / "card.json").is_file() else {}
    trained = card.get("config") if isinstance(card, dict) else None
    source = command.data or (trained.get("data") if isinstance(trained, dict) else None)
    if source is None:
        raise DDIMError(
            f"{command.model} does not say what it was trained on; name images for --variance "
            "analytic with --data."
        )
    channels, height, width = pipe.image_shape
    images = load_images(
        str(source), channels=channels, resolution=height if height == width else None
    )
    if tuple(images.resolution) != (height, width):
        raise DDIMError(
            f"the model makes images of {width}x{height}, and those of {source} are "
            f"{images.resolution[1]}x{images.resolution[0]} "
            "(width x height); give others as --data."
        )
    return images


def _measure_eps_mean_square(
    protocol: dict[str, Any],
    pipe: "UnconditionalPipeline",
    images: "ImageData",
    path: Path,
    *,
    batch_size: int,
) -> dict[int, float]:
    """What the analytic variance needs at the protocol's levels: from the file where that is of the
    same protocol, else measured."""
    import numpy as np

    from ddim.cli._run import IDENTITY
    from ddim.files import write_text
    from ddim.fitting.timesteps import estimate_eps_mean_square
    from ddim.models.checkpoints import read_json
    from ddim.models.images import from_uint8

    identity = json.loads(json.dumps({name: protocol.get(name) for name in IDENTITY}))
    if path.is_file() and (content := read_json(path)).get("protocol") == identity:
        return {int(t): float(value) for t, value in content["gamma"].items()}
    chosen = list(range(0, len(images), max(1, len(images) // MEASURED)))[:MEASURED]
    classes = pipe.unet.config.get("num_class_embeds")

    def batches() -> "Iterator[tuple[Denoiser, Tensor]]":
        for first in range(0, len(chosen), batch_size):
            pixels, labels = zip(
                *(images[i] for i in chosen[first : first + batch_size]), strict=True
            )
            x0 = from_uint8(np.stack([image.permute(1, 2, 0).numpy() for image in pixels])).to(
                pipe.device
            )
            yield pipe.denoiser(len(x0), class_labels=labels if classes else None), x0

    measured = estimate_eps_mean_square(
        batches(), protocol["timesteps"], schedule=pipe.noise_schedule
    )
    write_text(path, json.dumps({"gamma": measured, "protocol": identity}, indent=2) + "\n")
    return measured


def _note(
    command: Command,
    pipe: "UnconditionalPipeline",
    clip: "Clip",
    timesteps: list[int],
    *,
    assumed: bool,
) -> None:
    """Says in one line what a model's configuration does to its images, where that is not what ours
    do."""
    last = len(pipe.noise_schedule) - 1
    clips = command.clip is None and command.sampler == "ddim" and clip.kind != "none"
    fitted = timesteps in (pipe.scheduler.config.get("fitted_timesteps") or [])
    short = (
        command.spacing is None
        and command.timesteps is None
        and timesteps[0] != last
        and not fitted
    )
    if assumed:
        print(
            f"note: {command.model} comes without a scheduler; it is taken for a model of "
            f"{last + 1} linear levels that predicts epsilon."
        )
    elif clips or short:
        does = [f"clips predicted images ({clip.kind})"] * clips + [
            f"starts at level {timesteps[0]}, not at {last}"
        ] * short
        instead = ["--clip none"] * clips + ["--spacing trailing"] * short
        print(
            f"note: the model's configuration {' and '.join(does)}; {' '.join(instead)} would not."
        )


def _note_fitted(levels: tuple[int, ...] | None, protocol: dict[str, Any]) -> None:
    """Says in one line that levels out of a file were fitted to another model, or for another
    order, than they are used with."""
    if not isinstance(levels, FittedLevels):
        return
    told = levels.protocol
    names = {"weight_hash": "weights", "order": "order"}
    other = [
        f"{what} {told[key]}, not {protocol[key]}"
        for key, what in names.items()
        if key in told and told[key] != protocol[key]
    ]
    if other:
        print(
            (
                f"note: these timesteps were fitted to {told.get('model')} ({'; '.join(other)}); "
                "`ddim fit-steps` fits others."
            ),
            file=sys.stderr,
        )


def _advance(bar: Any) -> Callable[["State"], None]:
    def advance(state: "State") -> None:
        bar.update()

    return advance
