"""``ddim flaws``: measures what each fix of "Common Diffusion Noise Schedules and Sample Steps are
Flawed" does."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddim.cli._model import check_positive, find_device, quiet_libraries
from ddim.errors import DDIMError, OutputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from ddim.data.fashion_text import Combination
    from ddim.evaluation.flaws import Setting

__all__ = ["Command", "defaults", "run"]

SHOWN = 4
"""Images of each background in the sheet."""


@dataclass(frozen=True)
class Command:
    """Measures what each fix of "Common Diffusion Noise Schedules and Sample Steps are Flawed" does
    to the images of `fashion-text`.

    Three models of one VAE and text encoder are compared, which differ in their training alone.
    One that is not named is trained first, into OUT/models. What is measured is kept: the same
    command goes on from there."""

    epsilon: str | None = None
    """The model without fixes: epsilon prediction, no zero terminal SNR."""
    v: str | None = None
    """The model of v-prediction, without zero terminal SNR."""
    zero_snr: str | None = None
    """The model of v-prediction with zero terminal SNR."""
    base: str = "fashion-text"
    """For training: the model whose VAE, text encoder and shape of network the others get."""
    train_images: int = 150_000
    """For training: length of a run, in images seen."""
    steps: int = 25
    """DDIM steps."""
    count: int = 64
    """Images of each background, and at each guidance."""
    guidance_scale: float = 3.0
    """Guidance at which brightness is measured."""
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0)
    """Guidance at which saturated values are counted."""
    guidance_rescale: float = 0.7
    """How far guidance is rescaled, where it is."""
    unconditional: int = 512
    """Images without a caption, for the statistics of brightness."""
    seed: int = 0
    """Seed of the first image; the same seeds in every setting."""
    batch_size: int = 64
    """Images drawn together."""
    out: str = "out/flaws"
    """Folder for the table, the plot, the sheet and run.json."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Trains what is missing, measures what is missing, and writes the table, the plot and the
    sheet."""
    began = time.perf_counter()
    check_positive(command, "train_images", "steps", "count", "unconditional", "batch_size")
    if not command.guidance or min(command.guidance, default=0) < 1 or command.guidance_scale < 1:
        raise DDIMError(
            "--guidance and --guidance-scale must be at least 1, which is off; got "
            f"{command.guidance}, {command.guidance_scale}."
        )
    if not 0 < command.guidance_rescale <= 1:
        raise DDIMError(
            "--guidance-rescale must lie in (0, 1], to be compared with 0; got "
            f"{command.guidance_rescale}."
        )

    from ddim.evaluation.report import check_plots
    from ddim.files import locked

    check_plots()
    out = Path(command.out)
    with locked(out):
        _measure(command, out, began)
    print(f"The table is {out / 'flaws.md'}, beside flaws.png and sheet.png.")


def _measure(command: Command, out: Path, began: float) -> None:
    """Everything that is missing in the folder, cell by cell, and what all cells come to."""
    from ddim.cli._run import RunRecord, check_protocol, read_run, versions, write_run
    from ddim.evaluation.flaws import plot_flaws, to_markdown
    from ddim.files import replacing, write_text
    from ddim.models.images import save_png

    bench = Bench(command, _folders(command, out))
    cells = out / "cells"
    check_protocol(out, bench.protocol, empty=not any(cells.glob("*")))
    cells.mkdir(exist_ok=True)

    def write(records: list[dict[str, Any]]) -> None:
        execution = {"device": str(bench.device), "batch_size": command.batch_size}
        seconds, evaluations = bench.seconds, bench.evaluations
        write_run(
            out,
            RunRecord(
                bench.protocol,
                records,
                seconds,
                time.perf_counter() - began,
                evaluations,
                execution,
                versions(),
            ),
        )

    work = bench.work()
    missing = [name for name in work if not (cells / f"{name}.json").exists()]
    if missing or read_run(out) is None:
        write(_read(cells, work))  # so that what an interrupted run leaves is known for what it is
    for done, name in enumerate(missing, start=1):
        records, strip = work[name]()
        if strip is not None:
            save_png(strip, cells / f"{name}.png")
        write_text(cells / f"{name}.json", json.dumps(records, indent=2, allow_nan=False) + "\n")
        print(f"{name}: {_brief(records)}; {done} of {len(missing)}", flush=True)
        write(_read(cells, work))
    records = _read(cells, work)
    write_text(out / "flaws.md", to_markdown(records, protocol=bench.told))
    with replacing(out / "flaws.png") as unfinished:
        plot_flaws(records).savefig(unfinished, format="png", dpi=150)
    _save_sheet(bench, cells, out / "sheet.png")


def _folders(command: Command, out: Path) -> dict[str, Path]:
    """The folder of each model; those that were not named are trained here, or were before."""
    from ddim.models.checkpoints import find_model

    given = {"epsilon": command.epsilon, "v": command.v, "zero-snr": command.zero_snr}
    folders = {name: find_model(model) for name, model in given.items() if model is not None}
    for name in given:
        if name not in folders:
            folders[name] = out / "models" / name
            _train(command, name, folders[name])
    return {name: folders[name] for name in given}


def _train(command: Command, name: str, folder: Path) -> None:
    """Trains one of the three, or goes on with it; one that is finished stays."""
    from ddim.evaluation.flaws import TRAININGS
    from ddim.models.checkpoints import read_json
    from ddim.training.config import PRESETS, TrainConfig
    from ddim.training.trainer import train

    training = TRAININGS[name]
    options: dict[str, Any] = PRESETS["fashion-text"].options | {
        "base": command.base,
        "images": command.train_images,
        "prediction_type": training.prediction_type,
        "rescale_betas_zero_snr": training.zero_snr,
        "out": str(folder),
    }
    if (folder / "model_index.json").is_file() and read_json(folder / "card.json")["config"][
        "images"
    ] == command.train_images:
        return
    print(f"Training {name} ({training.told}) into {folder}.", flush=True)
    result = train(
        TrainConfig(**options),
        on_progress=lambda p: print(f"step {p.step}/{p.steps}  loss {p.loss:.4f}", flush=True),
    )
    if not result.finished:
        raise DDIMError(
            f"the training of {name} was stopped at step {result.step}; the same command goes on "
            "from there."
        )


class Bench:
    """The three models, the prompts, and the real images that they are compared with."""

    def __init__(self, command: Command, folders: dict[str, Path]) -> None:
        from ddim.core.noise import check_seeds
        from ddim.evaluation.classifier import load_classifier
        from ddim.evaluation.flaws import TRAININGS
        from ddim.models.checkpoints import weight_hash

        self.command = command
        self.device = find_device(command.device)
        self.pipes: dict[str, Any] = {}
        for name, folder in folders.items():
            self.pipes[name] = pipe = _open(folder, self.device)
            config, training = pipe.scheduler.config, TRAININGS[name]
            found = (config.prediction_type, bool(config.rescale_betas_zero_snr))
            if found != (training.prediction_type, training.zero_snr):
                raise DDIMError(
                    f"{folder} is to be the model of {training.told}, and its scheduler says "
                    f"{found[0]}, "
                    f"{'zero SNR' if found[1] else 'leaky'}; give the folders in their places."
                )
        first = next(iter(self.pipes.values()))
        for part in ("vae", "text_encoder"):
            for name, pipe in self.pipes.items():
                if not _same_weights(getattr(first, part), getattr(pipe, part)):
                    raise DDIMError(
                        f"the {part} of {folders[name]} is not that of {folders['epsilon']}; twins "
                        "differ in their training alone."
                    )
        self.classifier = load_classifier()[0]
        check_seeds([command.seed, command.seed + max(command.count, command.unconditional) - 1])
        self.seconds, self.evaluations = 0.0, 0
        self.hashes = {name: weight_hash(folder) for name, folder in folders.items()}
        self.protocol = {
            "command": "flaws",
            "model": {name: folder.name for name, folder in folders.items()},
            "weight_hash": self.hashes,
            "sampler": "ddim",
            "eta": 0.0,
            "order": 1,
            "timesteps": command.steps,
            "prompt": "fashion-text",
            "guidance_scale": [command.guidance_scale, command.guidance_rescale, *command.guidance],
            "dtype": "float32",
            "count": command.count,
            "long_count": command.unconditional,
            "seed": command.seed,
        }

    @property
    def told(self) -> str:
        """What was done, in sentences."""
        command = self.command
        weights = ", ".join(f"{name} {code}" for name, code in self.hashes.items())
        return (
            f"DDIM, eta 0, {command.steps} steps, float32, weights {weights}; {command.count} "
            "images of each background at guidance "
            f"{command.guidance_scale:g}, and at each guidance {command.count} on grey "
            f"backgrounds, {command.unconditional} without a "
            f"caption; seeds from {command.seed} on, the same in every setting."
        )

    def work(
        self,
    ) -> dict[str, Callable[[], tuple[list[dict[str, Any]], "NDArray[np.uint8] | None"]]]:
        """What there is to measure, by the names of its cells."""
        from ddim.evaluation.flaws import settings, twins

        rescale = self.command.guidance_rescale
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
        self, setting: "Setting", prompts: Sequence[str], *, guidance_scale: float
    ) -> "tuple[Tensor, Tensor]":
        """Latents, and images in [0, 1], of the prompts; the n-th image has the n-th seed."""
        import torch

        pipe, began = self.pipes[setting.model], time.perf_counter()
        latents, images = [], []
        for first in range(0, len(prompts), self.command.batch_size):
            part = list(prompts[first : first + self.command.batch_size])
            drawn = pipe(
                part,
                num_inference_steps=self.command.steps,
                timestep_spacing=setting.spacing,
                guidance_scale=guidance_scale,
                guidance_rescale=setting.guidance_rescale,
                seeds=range(self.command.seed + first, self.command.seed + first + len(part)),
                output_type="latent",
                progress=False,
            ).images
            latents.append(drawn.float().cpu())
            images.append(self.decode(drawn))
        self.seconds += time.perf_counter() - began
        self.evaluations += self.command.steps * (2 if guidance_scale > 1 else 1)
        return torch.cat(latents), torch.cat(images)

    def decode(self, latents: "Tensor") -> "Tensor":
        """Images in [0, 1], on the CPU."""
        import torch

        vae = self.pipes["epsilon"].vae
        with torch.no_grad():
            pixels: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return (pixels.float().cpu() / 2 + 0.5).clamp(0, 1)

    def backgrounds(self, setting: "Setting") -> tuple[list[dict[str, Any]], "NDArray[np.uint8]"]:
        """The brightness of each background, and the garments on it."""
        import numpy as np
        import torch

        from ddim.data.fashion_text import BACKGROUNDS, extract_garments, hues
        from ddim.evaluation.fashion_text import Asked, judge
        from ddim.evaluation.flaws import background_records
        from ddim.models.images import make_grid, to_uint8

        judged, shown = {}, []
        for background in BACKGROUNDS:
            asked = _prompts(self.command.count, (background,))
            _, images = self.draw(
                setting, [c.caption for c in asked], guidance_scale=self.command.guidance_scale
            )
            wanted = [Asked(*c.numbers) for c in asked]
            garments = torch.from_numpy(
                extract_garments(images.permute(0, 2, 3, 1).numpy())
            ).float()
            judged[background] = judge(
                images, garments, wanted, palette=list(hues().values()), classifier=self.classifier
            )
            shown.append(to_uint8(images[:SHOWN] * 2 - 1))
        strip = make_grid(np.concatenate(shown), columns=SHOWN * len(BACKGROUNDS), padding=0)
        return background_records(
            setting, judged, {name: level / 255 for name, level in BACKGROUNDS.items()}
        ), strip

    def saturation(self, setting: "Setting") -> tuple[list[dict[str, Any]], None]:
        """Values that are 0 or 1 in images none of whose real counterparts has any."""
        from ddim.evaluation.flaws import saturation_record

        asked = _prompts(self.command.count, ("dark gray", "gray", "light gray"))
        records = []
        for scale in self.command.guidance:
            _, images = self.draw(setting, [c.caption for c in asked], guidance_scale=scale)
            records.append(saturation_record(setting, images, guidance_scale=scale, real=0.0))
        return records, None

    def unconditional(self, setting: "Setting") -> tuple[list[dict[str, Any]], None]:
        """The brightness of samples without a caption, beside the data's."""
        from ddim.evaluation.flaws import unconditional_records

        pipe = self.pipes[setting.model]
        latents, images = self.draw(setting, [""] * self.command.unconditional, guidance_scale=1.0)
        real_latents, real_images = self.real
        records = unconditional_records(
            setting,
            latents=latents,
            images=images,
            real_latents=real_latents,
            real_images=real_images,
            schedule=pipe.noise_schedule,
            first=pipe.select_timesteps(self.command.steps, timestep_spacing=setting.spacing)[0],
        )
        return records, None

    @cached_property
    def real(self) -> "tuple[Tensor, Tensor]":
        """Latents and images in [0, 1] of the data."""
        import torch

        from ddim.data.sources import load_images

        data = load_images("fashion-text", split="test")
        images = torch.stack([data[i][0] for i in range(len(data))]).float() / 255
        vae = self.pipes["epsilon"].vae
        with torch.no_grad():
            parts = [
                vae.encode((part * 2 - 1).to(self.device)).latent_dist.mean.cpu()
                for part in torch.split(images, 250)
            ]
        return torch.cat(parts) * vae.config.scaling_factor, images


def _open(folder: Path, device: "torch.device") -> Any:
    """The text model of a folder.

    Raises:
        DDIMError: If it is none, or cannot be opened.
    """
    from ddim.models.checkpoints import is_unconditional, read_model_index
    from ddim.pipelines.unconditional import DiffusionPipeline

    quiet_libraries(text=True)
    if is_unconditional(read_model_index(folder)):
        raise DDIMError(
            f"{folder} is a model without text, and the fixes are measured by prompts; name models "
            "trained on fashion-text."
        )
    return DiffusionPipeline.from_pretrained(folder).to(device)


def _same_weights(a: Any, b: Any) -> bool:
    """Whether two networks hold the same numbers under the same names."""
    import torch

    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def _prompts(count: int, backgrounds: Sequence[str]) -> "list[Combination]":
    """That many captions on these backgrounds: all colours and garments in turn."""
    from ddim.data.fashion_text import COLOURS, GARMENTS, Combination

    def nth(i: int) -> Combination:
        rest, colour = divmod(i, len(COLOURS))
        # the garment moves on once more a round, so that colours and garments do not go in step
        return Combination(
            list(COLOURS)[colour],
            GARMENTS[(i + rest) % len(GARMENTS)],
            backgrounds[i % len(backgrounds)],
        )

    return [nth(i) for i in range(count)]


def _read(cells: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """The records of all finished cells, in the order of the names."""
    records: list[dict[str, Any]] = []
    for name in names:
        path = cells / f"{name}.json"
        try:
            records += json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError) as error:
            raise OutputError(
                f"{path} is not a cell of this program ({error}); delete it, and it is measured "
                "again."
            ) from error
    return records


def _brief(records: Sequence[dict[str, Any]]) -> str:
    """What a cell came to, in a few words."""
    first = records[0]
    if first["measured"] == "background":
        return ", ".join(f"{r['background']} {r['brightness']:.3f}" for r in records)
    if first["measured"] == "saturation":
        return ", ".join(
            f"w {r['guidance_scale']:g}: {100 * r['saturated']:.1f} %" for r in records
        )
    return ", ".join(f"{r['of']} {r['mean']:+.3f} ± {r['std']:.3f}" for r in records)


def _save_sheet(bench: Bench, cells: Path, path: Path) -> None:
    """The first images of each background, a row a setting, with the settings' names above them."""
    from matplotlib.figure import Figure

    from ddim.evaluation.flaws import settings
    from ddim.files import replacing
    from ddim.models.images import load_image

    strips = [
        (s, load_image(cells / f"backgrounds-{s.name}.png"))
        for s in settings(bench.command.guidance_rescale)
    ]
    height, width = strips[0][1].shape[:2]
    figure = Figure(figsize=(width / 48, len(strips) * (height / 48 + 0.3)), layout="constrained")
    for axes, (setting, strip) in zip(figure.subplots(len(strips), 1), strips, strict=True):
        axes.imshow(strip, interpolation="nearest")
        axes.set_title(setting.told, loc="left", fontsize="small", pad=2)
        axes.set(xticks=[], yticks=[])
        for side in axes.spines.values():
            side.set_visible(False)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150)
