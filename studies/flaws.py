"""Measures what each fix of "Common Diffusion Noise Schedules and Sample Steps are Flawed" does to
the images of ``fashion-text``, for the page docs/flaws.md.

    python studies/flaws.py --epsilon MODEL --v MODEL --zero-snr MODEL --out out/flaws

The settings, their records, the tables and the plot are in ``flaws_report.py``."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
import tyro
from numpy.typing import NDArray
from torch import Tensor

from ddim import DiffusionPipeline
from ddim.core.noise import check_seeds
from ddim.data.fashion_text import (
    BACKGROUNDS,
    COLOURS,
    GARMENTS,
    Combination,
    extract_garments,
    hues,
)
from ddim.data.sources import load_images
from ddim.errors import DDIMError, OutputError
from ddim.evaluation.classifier import load_classifier
from ddim.files import locked, write_text
from ddim.models.checkpoints import find_model, is_unconditional, read_model_index, weight_hash
from ddim.models.folder import read_json
from ddim.models.images import load_image, make_grid, save_picture, to_uint8
from ddim.runs.model import find_device
from ddim.runs.record import RunRecord, check_protocol, read_run, versions, write_run
from fashion_judge import Asked, judge
from flaws_report import (
    TRAININGS,
    Setting,
    background_records,
    draw_sheet,
    plot_flaws,
    saturation_record,
    save_figure,
    settings,
    to_markdown,
    twins,
    unconditional_records,
)

SHOWN = 4
"""Images of each background in the sheet."""

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """Measures what each fix of "Common Diffusion Noise Schedules and Sample Steps are Flawed" does
    to the images of `fashion-text`.

    Compares three models that share a VAE and a text encoder and differ in their training alone. A
    model that is not named is trained first, into OUT/models. Finished measurements are kept: the
    same command resumes from them."""

    epsilon: str | None = None
    """The model without fixes: epsilon prediction, no zero terminal SNR."""
    v: str | None = None
    """The model of v-prediction, without zero terminal SNR."""
    zero_snr: str | None = None
    """The model of v-prediction with zero terminal SNR."""
    base: str = "fashion-text"
    """For training: the model that gives the VAE, the text encoder and the network's shape."""
    train_images: int = 150_000
    """For training: the length of a run, in images seen."""
    steps: int = 25
    """DDIM steps."""
    count: int = 64
    """Images of each background, and at each guidance."""
    guidance_scale: float = 3.0
    """Guidance at which brightness is measured."""
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0)
    """Guidance at which saturated values are counted."""
    guidance_rescale: float = 0.7
    """The rescale of guidance that is compared with none."""
    unconditional: int = 512
    """Images without a caption, for the statistics of brightness."""
    seed: int = 0
    """Seed of the first image; every setting uses the same seeds."""
    batch_size: int = 64
    """Images drawn together."""
    out: str = "out/flaws"
    """Folder for the table, the plot, the sheet and run.json."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator if there is one."""

    def check(self) -> None:
        """Raises DDIMError if a number is out of range."""
        for name in ("train_images", "steps", "count", "unconditional", "batch_size"):
            if (given := getattr(self, name)) < 1:
                raise DDIMError(f"--{name.replace('_', '-')} must be at least 1; got {given}.")
        if min(self.guidance, default=0) < 1 or self.guidance_scale < 1:
            raise DDIMError(
                "--guidance and --guidance-scale must be at least 1, which means no guidance; got "
                f"{self.guidance}, {self.guidance_scale}."
            )
        if not 0 < self.guidance_rescale <= 1:
            raise DDIMError(
                "--guidance-rescale must lie in (0, 1], to be compared with 0; got "
                f"{self.guidance_rescale}."
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and measures what is missing, and writes the tables, the plot and the sheet.

    Returns:
        0; 2 for bad input; 130 if the user interrupts.
    """
    began = time.perf_counter()
    options = tyro.cli(Options, args=arguments)
    out = Path(options.out)
    try:
        options.check()
        with locked(out):
            measure(options, out, began)
    except DDIMError as error:
        print(f"flaws: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flaws: interrupted; the same command resumes from what is there.", file=sys.stderr)
        return 130
    print(f"The tables are in {out / 'flaws.md'}, beside flaws.png and sheet.png.")
    return 0


def measure(options: Options, out: Path, began: float) -> None:
    """Measures the cells that the folder lacks, and writes what all cells amount to."""
    bench = Bench(options, find_models(options, out))
    cells = out / "cells"
    before = read_run(out)
    if before is not None and (any(cells.glob("*")) or before.protocol.get("command") != "flaws"):
        check_protocol(out, before.protocol, bench.protocol)
    cells.mkdir(exist_ok=True)
    work = bench.work()

    def write() -> None:
        execution = {"device": str(bench.device), "batch_size": options.batch_size}
        record = RunRecord(
            protocol=bench.protocol,
            results=read_cells(cells, work),
            seconds=bench.seconds,
            seconds_total=time.perf_counter() - began,
            evaluations=bench.evaluations,
            execution=execution,
            versions=versions(),
        )
        write_run(out, record)

    missing = [name for name in work if not (cells / f"{name}.json").exists()]
    if missing or read_run(out) is None:
        write()  # so that the folder of an interrupted run says what it holds
    for done, name in enumerate(missing, start=1):
        records, strip = work[name]()
        if strip is not None:
            save_picture(strip, cells / f"{name}.png")
        write_text(cells / f"{name}.json", json.dumps(records, indent=2, allow_nan=False) + "\n")
        print(f"{name}: {summarise_cell(records)}; {done} of {len(missing)}", flush=True)
        write()
    records = read_cells(cells, work)
    write_text(out / "flaws.md", to_markdown(records, protocol=bench.protocol_text))
    save_figure(plot_flaws(records), out / "flaws.png")
    rows = settings(options.guidance_rescale)
    strips = [load_image(cells / f"backgrounds-{setting.name}.png") for setting in rows]
    save_figure(draw_sheet(rows, strips), out / "sheet.png")


def find_models(options: Options, out: Path) -> dict[str, Path]:
    """The folder of each model; a model that was not named is trained into OUT/models."""
    given = {"epsilon": options.epsilon, "v": options.v, "zero-snr": options.zero_snr}
    # Names that do not exist are refused before hours of training.
    folders = {name: find_model(model) for name, model in given.items() if model is not None}
    for name in given:
        if name not in folders:
            folders[name] = out / "models" / name
            train_model(options, name, folders[name])
    return {name: folders[name] for name in given}


def train_model(options: Options, name: str, folder: Path) -> None:
    """Trains one of the three models, or resumes its training; a finished one is left as it is."""
    from ddim.training.config import PRESETS, TrainConfig
    from ddim.training.trainer import train

    if (folder / "model_index.json").is_file():
        trained: int = read_json(folder / "card.json")["config"]["images"]
        if trained == options.train_images:
            return
    training = TRAININGS[name]
    config: dict[str, Any] = PRESETS["fashion-text"].options | {
        "base": options.base,
        "images": options.train_images,
        "prediction_type": training.prediction_type,
        "rescale_betas_zero_snr": training.zero_snr,
        "out": str(folder),
    }
    print(f"Training {name} ({training.label}) into {folder}.", flush=True)
    result = train(
        TrainConfig(**config),
        on_progress=lambda p: print(f"step {p.step}/{p.steps}  loss {p.loss:.4f}", flush=True),
    )
    if not result.finished:
        raise DDIMError(
            f"the training of {name} stopped at step {result.step}; the same command resumes it."
        )


class Bench:
    """The three models, the prompts, and the real images that they are compared with."""

    def __init__(self, options: Options, folders: dict[str, Path]) -> None:
        self.options = options
        self.device = find_device(options.device)
        self.pipes = {name: open_model(path, self.device) for name, path in folders.items()}
        check_models(self.pipes, folders)
        self.classifier = load_classifier()[0]
        check_seeds([options.seed, options.seed + max(options.count, options.unconditional) - 1])
        self.seconds, self.evaluations = 0.0, 0
        self.hashes = {name: weight_hash(folder) for name, folder in folders.items()}
        self.protocol = {
            "command": "flaws",
            "model": {name: folder.name for name, folder in folders.items()},
            "weight_hash": self.hashes,
            "sampler": "ddim",
            "eta": 0.0,
            "order": 1,
            "timesteps": options.steps,
            "prompt": "fashion-text",
            "guidance_scale": [options.guidance_scale, options.guidance_rescale, *options.guidance],
            "dtype": "float32",
            "count": options.count,
            "long_count": options.unconditional,
            "seed": options.seed,
        }

    @property
    def protocol_text(self) -> str:
        """The protocol in sentences."""
        options = self.options
        weights = ", ".join(f"{name} {code}" for name, code in self.hashes.items())
        return (
            f"DDIM, eta 0, {options.steps} steps, float32, weights {weights}; {options.count} "
            f"images of each background at guidance {options.guidance_scale:g}, and at each "
            f"guidance {options.count} on grey backgrounds, {options.unconditional} without a "
            f"caption; seeds from {options.seed} on, the same in every setting."
        )

    def work(self) -> dict[str, Callable[[], tuple[Records, NDArray[np.uint8] | None]]]:
        """The measurements, by the names of their cells."""
        rescale = self.options.guidance_rescale
        work: dict[str, Any] = {
            f"backgrounds-{s.name}": partial(self.backgrounds, s) for s in settings(rescale)
        }
        work |= {f"saturation-{s.name}": partial(self.saturation, s) for s in twins(rescale)}
        return work | {
            f"unconditional-{s.name}": partial(self.unconditional, s)
            for s in settings(rescale)
            if not s.guidance_rescale
        }

    def draw(
        self, setting: Setting, prompts: Sequence[str], *, guidance_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Latents, and images in [0, 1], of the prompts; the n-th image has the n-th seed."""
        pipe, began = self.pipes[setting.model], time.perf_counter()
        latents, images = [], []
        for first in range(0, len(prompts), self.options.batch_size):
            part = list(prompts[first : first + self.options.batch_size])
            drawn = pipe(
                part,
                num_inference_steps=self.options.steps,
                timestep_spacing=setting.spacing,
                guidance_scale=guidance_scale,
                guidance_rescale=setting.guidance_rescale,
                seeds=range(self.options.seed + first, self.options.seed + first + len(part)),
                output_type="latent",
                progress=False,
            ).images
            latents.append(drawn.float().cpu())
            images.append(self.decode(drawn))
        self.seconds += time.perf_counter() - began
        self.evaluations += self.options.steps * (2 if guidance_scale > 1 else 1)
        return torch.cat(latents), torch.cat(images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], on the CPU."""
        vae = self.pipes["epsilon"].vae
        pixels: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return (pixels.float().cpu() / 2 + 0.5).clamp(0, 1)

    def backgrounds(self, setting: Setting) -> tuple[Records, NDArray[np.uint8]]:
        """Measures the brightness of each background, and the garments on it."""
        judged, shown = {}, []
        for background in BACKGROUNDS:
            prompts = make_prompts(self.options.count, (background,))
            captions = [prompt.caption for prompt in prompts]
            _, images = self.draw(setting, captions, guidance_scale=self.options.guidance_scale)
            garments = extract_garments(images.permute(0, 2, 3, 1).numpy())
            judged[background] = judge(
                images,
                torch.from_numpy(garments).float(),
                [Asked(*prompt.numbers) for prompt in prompts],
                palette=list(hues().values()),
                classifier=self.classifier,
            )
            shown.append(to_uint8(images[:SHOWN] * 2 - 1))
        strip = make_grid(np.concatenate(shown), columns=SHOWN * len(BACKGROUNDS), padding=0)
        requested = {name: level / 255 for name, level in BACKGROUNDS.items()}
        return background_records(setting, judged, requested), strip

    def saturation(self, setting: Setting) -> tuple[Records, None]:
        """Counts values that are 0 or 1 in images whose real counterparts have none."""
        prompts = make_prompts(self.options.count, ("dark gray", "gray", "light gray"))
        records = []
        for scale in self.options.guidance:
            _, images = self.draw(setting, [p.caption for p in prompts], guidance_scale=scale)
            records.append(saturation_record(setting, images, guidance_scale=scale, real=0.0))
        return records, None

    def unconditional(self, setting: Setting) -> tuple[Records, None]:
        """Measures the brightness of samples without a caption, beside the data's."""
        pipe = self.pipes[setting.model]
        latents, images = self.draw(setting, [""] * self.options.unconditional, guidance_scale=1.0)
        real_latents, real_images = self.real
        records = unconditional_records(
            setting,
            latents=latents,
            images=images,
            real_latents=real_latents,
            real_images=real_images,
            schedule=pipe.noise_schedule,
            first=pipe.select_timesteps(self.options.steps, timestep_spacing=setting.spacing)[0],
        )
        return records, None

    @cached_property
    def real(self) -> tuple[Tensor, Tensor]:
        """Latents, and images in [0, 1], of the data."""
        data = load_images("fashion-text", split="test")
        images = torch.stack([data[i][0] for i in range(len(data))]).float() / 255
        vae = self.pipes["epsilon"].vae
        with torch.no_grad():
            parts = [
                vae.encode((part * 2 - 1).to(self.device)).latent_dist.mean.cpu()
                for part in torch.split(images, 250)
            ]
        return torch.cat(parts) * vae.config.scaling_factor, images


def open_model(folder: Path, device: torch.device) -> Any:
    """The pipeline of a text model in a folder."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if is_unconditional(read_model_index(folder)):
        raise DDIMError(
            f"{folder} is a model without text, and the fixes are measured by prompts; name models "
            "trained on fashion-text."
        )
    return DiffusionPipeline.from_pretrained(folder).to(device)


def check_models(pipes: dict[str, Any], folders: dict[str, Path]) -> None:
    """Raises DDIMError if a model's training is not the one its place asks for, or if the models
    do not share VAE and text encoder."""
    for name, pipe in pipes.items():
        config, training = pipe.scheduler.config, TRAININGS[name]
        found = (config.prediction_type, bool(config.rescale_betas_zero_snr))
        if found != (training.prediction_type, training.zero_snr):
            raise DDIMError(
                f"{folders[name]} should be the model of {training.label}, but its scheduler says "
                f"{found[0]}, {'zero SNR' if found[1] else 'leaky'}; give each folder in its place."
            )
    for part in ("vae", "text_encoder"):
        expected = getattr(pipes["epsilon"], part).state_dict()
        for name, pipe in pipes.items():
            weights = getattr(pipe, part).state_dict()
            if weights.keys() != expected.keys() or not all(
                torch.equal(weights[key], expected[key]) for key in expected
            ):
                raise DDIMError(
                    f"the {part} of {folders[name]} is not that of {folders['epsilon']}; the three "
                    "models must differ in their training alone."
                )


def make_prompts(count: int, backgrounds: Sequence[str]) -> list[Combination]:
    """That many captions on these backgrounds, with all colours and garments in turn."""

    def nth(i: int) -> Combination:
        rest, colour = divmod(i, len(COLOURS))
        # One garment further in each round, so that colours and garments do not go in step.
        garment = GARMENTS[(i + rest) % len(GARMENTS)]
        return Combination(list(COLOURS)[colour], garment, backgrounds[i % len(backgrounds)])

    return [nth(i) for i in range(count)]


def read_cells(cells: Path, names: Iterable[str]) -> Records:
    """The records of all finished cells, in the order of the names."""
    records: Records = []
    for path in (cells / f"{name}.json" for name in names):
        try:
            records += json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError) as error:
            raise OutputError(
                f"{path} is not a cell of this study ({error}); delete it to measure it again."
            ) from error
    return records


def summarise_cell(records: Records) -> str:
    """The figures of a cell in a few words."""
    measured = records[0]["measured"]
    if measured == "background":
        return ", ".join(f"{r['background']} {r['brightness']:.3f}" for r in records)
    if measured == "saturation":
        shares = ((r["guidance_scale"], 100 * r["saturated"]) for r in records)
        return ", ".join(f"w {scale:g}: {share:.1f} %" for scale, share in shares)
    return ", ".join(f"{r['of']} {r['mean']:+.3f} ± {r['std']:.3f}" for r in records)


if __name__ == "__main__":
    sys.exit(main())
