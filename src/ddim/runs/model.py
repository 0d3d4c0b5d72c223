"""The model of a run: what its files say before any weight is loaded, its pipeline, and what a
protocol records of it."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from ddim.core.denoiser import Clip
from ddim.core.route import Route
from ddim.errors import CheckpointError, DDIMError
from ddim.inversion.reversible import ReversibleSampler
from ddim.models.checkpoints import weight_hash
from ddim.models.facts import FoundModel, read_model
from ddim.pipelines.opening import text_pipeline
from ddim.pipelines.unconditional import UnconditionalPipeline
from ddim.runs.engine import Job

__all__ = [
    "PixelJob",
    "describe_model",
    "draw",
    "enough_memory",
    "find_device",
    "open_pixels",
    "open_text",
    "quiet_libraries",
    "sampling_evaluations",
    "short_name",
    "spacing_of",
]


def quiet_libraries(*, text: bool = False) -> None:
    """Silences the progress bars and remarks of diffusers, and with ``text`` of transformers."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    if text:
        with contextlib.suppress(ImportError):  # whatever needs it says so in a sentence
            import transformers

            transformers.utils.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()


def open_pixels(
    model: FoundModel, *, device: torch.device, dtype: str = "float32"
) -> UnconditionalPipeline:
    """The pipeline of a model without text that makes pictures.

    Raises:
        CheckpointError: If it is a text-to-image model.
        DDIMError: If its images are no pictures.
    """
    if model.is_text:
        raise CheckpointError(
            f"{model.name} makes images of prompts, and this command takes models without text; "
            f"draw with `ddim sample {model.name} --prompt TEXT`, whose folder `ddim evaluate` "
            "measures, or encode images from Python with pipe.encode."
        )
    quiet_libraries()
    pipe = UnconditionalPipeline.from_pretrained(model.folder, dtype=getattr(torch, dtype))
    if pipe.image_shape[0] not in (1, 3):
        raise DDIMError(
            f"{model.name} makes images of {pipe.image_shape[0]} channels, and a picture has 1 or "
            "3; sample it from Python."
        )
    moved: UnconditionalPipeline = pipe.to(device)
    return moved


def open_text(model: FoundModel, *, device: torch.device, dtype: str, image: bool) -> Any:
    """The pipeline of a text-to-image model; with ``image``, of image-to-image.

    Raises:
        DDIMError: If transformers is not installed.
    """
    quiet_libraries(text=True)
    kind = text_pipeline("StableDiffusionImg2ImgPipeline" if image else "StableDiffusionPipeline")
    return kind.from_pretrained(model.folder, dtype=getattr(torch, dtype)).to(device)


def describe_model(
    model: FoundModel,
    pipe: Any,
    *,
    clip: Clip,
    dtype: str = "float32",
    given_class: int | None = None,
    classes: str = "seed modulo the number of classes",
) -> dict[str, Any]:
    """The part of a protocol about the network, its classes, and how its prediction is read.

    ``given_class`` is the class of all images. Without it, ``classes`` says where the classes of a
    class-conditional model come from.
    """
    config = pipe.scheduler.config
    keys = "num_train_timesteps beta_schedule beta_start beta_end trained_betas"
    keys += " rescale_betas_zero_snr prediction_type set_alpha_to_one"
    bounds = {
        "none": {},
        "static": {"bound": clip.bound},
        "dynamic": {"ratio": clip.ratio, "max_value": clip.max_value},
    }
    return {
        "model": model.name,
        "weight_hash": weight_hash(model.folder),
        "schedule": {key: config[key] for key in keys.split()},
        "clip": {"kind": clip.kind, **bounds[clip.kind]},
        "prior": "standard",
        "prompt": None,
        "guidance_scale": None,
        "dtype": dtype,
        "class": (classes if model.classes else None) if given_class is None else given_class,
    }


def sampling_evaluations(pipe: UnconditionalPipeline, route: Route) -> int:
    """Network calls an image that a walk of this route makes."""
    if route.sampler == "ddim":
        return len(route)
    sampler = ReversibleSampler(route.sampler)  # type: ignore[arg-type]
    return sampler.evaluations(pipe.noise_schedule, route.timesteps)


def spacing_of(pipe: Any, timesteps: Sequence[int]) -> str:
    """How the configuration spaces these levels: ``fitted``, or its spacing."""
    config = pipe.scheduler.config
    is_fitted = list(timesteps) in (config.get("fitted_timesteps") or [])
    return "fitted" if is_fitted else str(config.timestep_spacing)


@contextlib.contextmanager
def enough_memory(device: torch.device, batch_size: int) -> Iterator[None]:
    """Says what to do where the accelerator's memory ends.

    Raises:
        DDIMError: If it does.
    """
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
    """Makes images batch by batch.

    Args:
        items: One for each image, such as seeds.
        make: Returns the images of a batch of items.
        batch_size: Images of a batch.
        fill: Whether a short last batch is filled up, and the surplus dropped: a compiled network
            is compiled for one size.

    Yields:
        The items of a batch, their images, and the seconds that they took.
    """
    size = min(batch_size, len(items))
    for first in range(0, len(items), max(1, size)):
        batch = list(items[first : first + size])
        began = time.perf_counter()
        images = make(batch + batch[-1:] * (size - len(batch)) if fill else batch)
        yield batch, images[: len(batch)], time.perf_counter() - began


def find_device(name: str) -> torch.device:
    """The device of that name. From now on float32 is computed in float32 on it.

    Raises:
        DDIMError: If there is none.
    """
    # By default torch lets GPUs convolve float32 numbers in TF32, which has 10 bits of mantissa:
    # the images of a seed would differ from those of a CPU.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if name == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return found or torch.device("cpu")
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
        raise DDIMError(
            f"--device {name} cannot be used here ({reason}); try auto or cpu."
        ) from None
    return device


def short_name(path: str) -> str:
    """A short name for results about a model or a file."""
    return re.sub(r"[^\w.-]+", "-", Path(path).name) or "model"


class PixelJob(Job):
    """A job on a model without text, which :meth:`open` finds and opens."""

    device: torch.device
    model: FoundModel
    pipe: UnconditionalPipeline

    def open(self) -> None:
        """Opens the model of the request, in its precision, on its device.

        Raises:
            CheckpointError: If there is no such model, or it is a text-to-image model.
            DDIMError: If its images are no pictures, or there is no such device.
        """
        request = self.request
        self.device, self.model = find_device(request.device), read_model(request.model)
        dtype = getattr(request, "dtype", "float32")
        self.pipe = open_pixels(self.model, device=self.device, dtype=dtype)

    def describe(self, *, clip: Clip, classes: str | None = None) -> dict[str, Any]:
        """:func:`describe_model` of the opened model, with the request's precision and class."""
        of_request = {"dtype": getattr(self.request, "dtype", "float32")}
        of_request |= {} if classes is None else {"classes": classes}
        label = getattr(self.request, "class_", None)
        return describe_model(self.model, self.pipe, clip=clip, given_class=label, **of_request)

    def out(self, command: str) -> Path:
        """The folder of the request, or the default one of a command."""
        return Path(self.request.out or f"out/{command}-{short_name(self.request.model)}")

    def warm_up(self, count: int) -> None:
        """Evaluates the network once on a batch, compiled first if the request asks for that."""
        is_compiled = getattr(self.request, "compile", False)
        pipe = self.pipe.compile() if is_compiled else self.pipe
        pipe.warm_up(min(self.request.batch_size, count))

    def draw(
        self, route: Route, seeds: Sequence[int], *, batch_size: int, **options: Any
    ) -> Iterator[tuple[list[int], Any, float]]:
        """Draws the images of seeds, as :func:`draw` yields them; ``options`` are further ones of
        the pipeline's ``draw``."""

        def make(batch: list[int]) -> Any:
            return self.pipe.draw(
                route,
                seeds=batch,
                class_labels=self.model.labels_of(batch),
                progress=False,
                callback=self.control.step,
                **options,
            ).images

        fill = getattr(self.request, "compile", False)
        return draw(seeds, make, batch_size=batch_size, fill=fill)
