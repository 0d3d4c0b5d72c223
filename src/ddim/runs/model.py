"""The model of a run: what its files say before any weight is loaded, its pipeline, and what a
protocol records of it."""

import contextlib
import importlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch

from ddim.configuration import fitted_lists
from ddim.core.denoiser import Clip
from ddim.core.route import Route
from ddim.errors import CheckpointError, DDIMError
from ddim.inversion.reversible import ReversibleSampler
from ddim.models.checkpoints import check_finite, outline_network, read_scheduler_config
from ddim.models.facts import FoundModel, read_model
from ddim.pipelines.diffusion_pipeline import text_pipeline
from ddim.pipelines.network_calls import NetworkCalls
from ddim.pipelines.unconditional import UnconditionalPipeline
from ddim.runs.engine import Job
from ddim.runs.record import protocol_hash
from ddim.runs.shards import local_rank

__all__ = ["ModelJob", "PixelJob", "draw", "enough_memory", "find_device"]
__all__ += ["open_finite", "quiet_libraries", "sampling_evaluations", "short_name", "spacing_of"]


def quiet_libraries(*, text: bool = False) -> None:
    """Silences the progress bars and remarks of diffusers, and with ``text`` of transformers."""
    libraries: list[Any] = [diffusers]
    if text:
        with contextlib.suppress(ImportError):  # whatever needs it says so in a sentence
            libraries.append(importlib.import_module("transformers"))
    for library in libraries:
        library.utils.logging.set_verbosity(logging.CRITICAL)  # errors are raised, and told once
        library.utils.logging.disable_progress_bar()


def _outline(model: FoundModel) -> UnconditionalPipeline:
    """A pipeline of the model's scheduler, whose network has no weights; of a text model it has no
    network at all."""
    quiet_libraries(text=model.is_text)
    config = read_scheduler_config(model.folder)
    if model.is_text:
        return UnconditionalPipeline(torch.nn.Identity(), config)
    pipe = UnconditionalPipeline(outline_network(model.folder), config)
    if (channels := pipe.image_shape[0]) not in (1, 3):
        raise DDIMError(
            f"{model.name} makes images of {channels} channels, and a picture has 1 or 3; sample "
            "it from Python."
        )
    return pipe


def sampling_evaluations(pipe: UnconditionalPipeline, route: Route) -> int:
    """Network calls an image that a walk of this route makes."""
    if route.sampler == "ddim":
        return len(route)
    sampler = ReversibleSampler(route.sampler)  # type: ignore[arg-type]
    return sampler.evaluations(pipe.noise_schedule, route.timesteps)


def spacing_of(pipe: Any, timesteps: Sequence[int]) -> str:
    """How the configuration spaces these levels: ``fitted``, or its spacing."""
    config = pipe.scheduler.config
    is_fitted = list(timesteps) in fitted_lists(config)
    return "fitted" if is_fitted else str(config.timestep_spacing)


@contextlib.contextmanager
def enough_memory(device: torch.device, batch_size: int) -> Iterator[None]:
    """Turns the end of the accelerator's memory into a DDIMError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise DDIMError(
            f"{device} has too little memory for {batch_size} images at once; give a smaller "
            "--batch-size."
        ) from None


def draw(
    items: Sequence[Any], make: Callable[[list[Any]], Any], *, batch_size: int, fill: bool
) -> Iterator[tuple[list[Any], Any, float]]:
    """Makes the images of items, such as seeds, batch by batch: yields the items of a batch, their
    images, and the seconds that they took.

    With ``fill`` a short last batch is filled up, and the surplus dropped, since a compiled network
    is compiled for one size.
    """
    size = min(batch_size, len(items))
    for first in range(0, len(items), max(1, size)):
        batch = list(items[first : first + size])
        began = time.perf_counter()
        images = make(batch + batch[-1:] * (size - len(batch)) if fill else batch)
        yield batch, images[: len(batch)], time.perf_counter() - began


def find_device(name: str) -> torch.device:
    """The device of that name, or a DDIMError. From now on float32 is computed in float32 on it."""
    # By default torch lets GPUs convolve float32 numbers in TF32, which has 10 bits of mantissa:
    # the images of a seed would differ from those of a CPU.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        place, count = local_rank(), torch.accelerator.device_count()
        if found.type == "cpu" or place is None or count < 2:
            return found
        return torch.device(found.type, place % count)  # one of several processes of a machine
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DDIMError(
            f"--device must be auto, or one that torch knows such as cpu or cuda; got {name!r}."
        ) from None
    try:
        torch.empty(1, device=device).cpu()  # a device without numbers, such as meta, is no use
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        message = f"--device {name} cannot be used here ({reason}); try auto or cpu."
        raise DDIMError(message) from None
    return device


def short_name(path: str) -> str:
    """A short name for results about a model or a file; of a checkpoint, the model's beside it."""
    here = Path(path)
    is_checkpoint = here.parent.name == "checkpoints" and here.name.isdigit()
    names = (here.parents[1].name, here.name) if is_checkpoint else (here.name,)
    return re.sub(r"[^\w.-]+", "-", "-".join(filter(None, names))) or "model"


def open_finite(opened: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    """The pipeline of class ``opened`` in a folder; a CheckpointError names a weight of it that is
    no finite number."""
    pipe = opened.from_pretrained(folder, dtype=dtype)
    for part in ("unet", "vae", "text_encoder"):
        if isinstance(network := getattr(pipe, part, None), torch.nn.Module):
            check_finite(name, dict(network.named_parameters()))
    return pipe


class ModelJob(Job):
    """A job on a model, which :meth:`find` finds.

    Attributes:
        command: The command, which names the default folder and stands in the protocol.
        classes: Where the classes of a class-conditional model come from, for the protocol.
        device: Where the network is.
        model: What the model's files say.
        plan: A pipeline of its scheduler without weights, for all that options are checked with.
        pipe: Its pipeline. The weights are loaded when it is first asked for.
        has_picture: Whether the pipeline is the one for image-to-image.
    """

    command: str
    classes = "seed modulo the number of classes"
    device: torch.device
    model: FoundModel
    has_picture = False

    def find(self) -> None:
        """Finds the device, and reads what the model's files say; where there is no such model or
        device, a DDIMError says so."""
        self.device = find_device(self.request.device)
        quiet_libraries()  # of a hub that cannot be reached, one sentence says so
        self.model = read_model(self.request.model)

    @cached_property
    def plan(self) -> UnconditionalPipeline:
        return _outline(self.model)

    @cached_property
    def pipe(self) -> Any:
        dtype, parts = self._option("dtype", "float32"), tuple(self.model.hashes().values())
        key = (self.model.folder, *parts, dtype, str(self.device), self.has_picture)
        return self.control.keep(key, self._open)

    def _open(self) -> Any:
        dtype = getattr(torch, self._option("dtype", "float32"))
        opened: Any = UnconditionalPipeline
        quiet_libraries(text=self.model.is_text)
        if self.model.is_text:
            to_begin_at = "StableDiffusionImg2ImgPipeline"
            opened = text_pipeline(to_begin_at if self.has_picture else "StableDiffusionPipeline")
        return open_finite(opened, self.model.folder, self.model.name, dtype).to(self.device)

    def prepare(self) -> None:
        self.pipe  # noqa: B018 - loads the weights

    @property
    def label(self) -> int | None:
        """The class that is asked for, by its number or its name; None without one."""
        return self.model.find_class(self._option("class_", None))

    def _option(self, name: str, default: Any) -> Any:
        return getattr(self.request, name, default)

    def describe(self, *, clip: Clip) -> dict[str, Any]:
        """The part of a protocol about the network, its classes, and how its prediction is read."""
        config, label = self.plan.scheduler.config, self.label
        picture = self._option("picture", "png")
        keys = "num_train_timesteps beta_schedule beta_start beta_end trained_betas"
        keys += " rescale_betas_zero_snr prediction_type set_alpha_to_one"
        bounds = {
            "none": {},
            "static": {"bound": clip.bound},
            "dynamic": {"ratio": clip.ratio, "max_value": clip.max_value},
        }
        has_classes, drawn = self.model.classes and not self.model.is_text, self.classes
        if drawn == ModelJob.classes and self.model.empty:
            drawn = f"{drawn}, without empty ones"
        return {
            "command": self.command,
            "model": self.model.name,
            **self.model.hashes(),
            "schedule": {key: config[key] for key in keys.split()},
            "clip": {"kind": clip.kind, **bounds[clip.kind]},
            "prior": "standard",
            "prompt": None,
            "guidance_scale": None,
            "dtype": self._option("dtype", "float32"),
            "picture": None if picture == "png" else picture,
            "class": (drawn if has_classes else None) if label is None else label,
        }

    def executed(self, *options: str) -> dict[str, Any]:
        """The execution that a record keeps: the device, and some options of the request."""
        return {name: getattr(self.request, name) for name in options} | {
            "device": str(self.device)
        }

    def out(self) -> Path:
        """The folder of the request, or the default one of the protocol."""
        name = f"{self.command}-{short_name(self.request.model)}-{protocol_hash(self.protocol)}"
        return Path(self.request.out or f"out/{name}")

    def note_all(self, notes: Iterable[str]) -> None:
        """Tells a person, such as what was left out of data, and assumed of them."""
        for note in notes:
            self.control.note(note)

    def counted(self) -> NetworkCalls:
        """Counts network calls while it is held, each of them a step of the run."""
        return NetworkCalls(self.pipe.unet, self.control.step)

    def warm_up(self, count: int, **options: Any) -> None:
        """Evaluates the network once on a batch, compiled first if the request asks for that."""
        pipe = self.pipe.compile() if self._option("compile", False) else self.pipe
        pipe.warm_up(min(self.request.batch_size, count), **options)


class PixelJob(ModelJob):
    """A job on a model without text."""

    def find(self) -> None:
        """Finds the model.

        Raises:
            CheckpointError: If there is no such model, or it is a text-to-image model.
            DDIMError: If its images are no pictures, or there is no such device.
        """
        super().find()
        if self.model.is_text:
            raise CheckpointError(
                f"{self.model.name} makes images of prompts, and this command takes models without "
                f"text; draw with `ddim sample {self.model.name} --prompt TEXT`, whose folder "
                "`ddim evaluate` measures, or encode images from Python with pipe.encode."
            )

    def asked_levels(self, steps: int | None) -> list[int]:
        """The levels that the spacing gives a first-order walk of so many steps."""
        spacing: Any = self.request.spacing
        return self.plan.select_timesteps(steps, timestep_spacing=spacing, order=1)

    def checked_levels(self, steps: int | None, *, encodable: bool) -> list[int]:
        """Those levels, once it is known that the walk can be made; ``encodable`` moves a level of
        zero SNR to the one below, if the model can sample from the level itself."""
        walk: dict[str, Any] = {"timestep_spacing": self.request.spacing, "order": 1}
        route = self.plan.route(steps, **walk, clip="none")
        if encodable:
            route = self.plan.route(steps, **walk, clip="none", encodable=True)
        return route.timesteps

    def deterministic(self, timesteps: object, **more: Any) -> dict[str, Any]:
        """The protocol of walks without noise and clipping; ``more`` are its other keys."""
        described = self.describe(clip=self.plan.select_clip("none"))
        return {**described, "timesteps": timesteps, "eta": 0.0, **more}

    def note_levels(self, asked: Sequence[int], used: Sequence[int]) -> None:
        """Says where codes lie, if that is not the first level that was asked for."""
        if used[0] != asked[0]:
            self.control.note(
                f"level {asked[0]} has zero SNR and holds nothing of an image; the codes lie at "
                f"level {used[0]}."
            )

    def draw(
        self, route: Route, seeds: Sequence[int], *, batch_size: int, **options: Any
    ) -> Iterator[tuple[list[int], Any, float]]:
        """Draws the images of seeds, as :func:`draw` yields them; ``options`` are further ones of
        the pipeline's ``draw``."""
        options |= {"progress": False, "callback": self.control.step}

        def make(batch: list[int]) -> Any:
            labels = self.model.labels_of(batch)
            return self.pipe.draw(route, seeds=batch, class_labels=labels, **options).images

        fill = self._option("compile", False)
        return draw(seeds, make, batch_size=batch_size, fill=fill)
