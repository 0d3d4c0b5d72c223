"""What the commands that draw from a model share: where they compute, what a protocol says of the
model, and the batches."""

import contextlib
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ddim.errors import CheckpointError, DDIMError

if TYPE_CHECKING:
    from ddim.core.denoiser import Clip
    from ddim.pipelines.unconditional import UnconditionalPipeline

T = TypeVar("T")

__all__ = [
    "check_class",
    "check_positive",
    "describe_model",
    "draw",
    "enough_memory",
    "find_device",
    "in_batches",
    "open_model",
    "progress_bar",
    "quiet_libraries",
    "sampling_evaluations",
    "seed_label",
    "short_name",
]


def check_positive(command: object, *names: str) -> None:
    """Refuses options below 1; one that is None was not given.

    Raises:
        DDIMError: Which of them.
    """
    for name in names:
        given = getattr(command, name)
        if given is not None and given < 1:
            raise DDIMError(f"--{name.replace('_', '-')} must be at least 1; got {given}.")


def quiet_libraries(*, text: bool = False) -> None:
    """Leaves out the bars and remarks of the libraries that open models; ``text`` for transformers,
    too, where it is installed."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    if text:
        with contextlib.suppress(ImportError):  # what needs it says so in a sentence
            import transformers

            transformers.utils.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()


def open_model(
    name: str, *, device: Any, dtype: str = "float32"
) -> "tuple[UnconditionalPipeline, Path]":
    """The pipeline of a model that makes pictures, and its folder.

    Raises:
        CheckpointError: If there is no such model, or it is one of text.
        DDIMError: If its images are no pictures.
    """
    import torch

    from ddim.models.checkpoints import STABLE_DIFFUSION, find_model, read_model_index
    from ddim.pipelines.unconditional import UnconditionalPipeline

    quiet_libraries()
    folder = find_model(name)
    if read_model_index(folder).get("_class_name") in STABLE_DIFFUSION:
        raise CheckpointError(
            f"{name} makes images of prompts, and this command takes models without text; draw "
            f"with `ddim sample {name} --prompt TEXT`, "
            "whose folder `ddim evaluate` measures, or encode images from Python with pipe.encode."
        )
    pipe = UnconditionalPipeline.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    if pipe.image_shape[0] not in (1, 3):
        raise DDIMError(
            f"{name} makes images of {pipe.image_shape[0]} channels, and a picture has 1 or 3; "
            "sample it from Python."
        )
    kind = pipe.unet.config.get("class_embed_type")
    if kind is not None and not pipe.unet.config.get("num_class_embeds"):
        raise DDIMError(
            f"{name} is conditioned on {kind} embeddings, not on numbered classes; give its "
            "class_labels from Python."
        )
    return pipe, folder


def check_class(pipe: "UnconditionalPipeline", fixed: int | None, *, required: bool = False) -> int:
    """How many classes the model knows; 0 for a model without.

    Raises:
        DDIMError: If ``fixed``, the --class that was given, is none of them, or was required and
            not given.
    """
    classes = int(pipe.unet.config.get("num_class_embeds") or 0)
    if fixed is not None and not 0 <= fixed < classes:
        told = (
            f"must be from 0 to {classes - 1}"
            if classes
            else "is of no use: the model was trained without classes"
        )
        raise DDIMError(f"--class {told}; got {fixed}.")
    if fixed is None and required and classes:
        raise DDIMError(
            "the model is class-conditional: name the images' class with --class, from 0 to "
            f"{classes - 1}."
        )
    return classes


def sampling_evaluations(
    pipe: "UnconditionalPipeline", sampler: str, timesteps: Sequence[int]
) -> int:
    """Network calls an image that a sampler makes over these levels."""
    from ddim.inversion.reversible import REVERSIBLE, ReversibleSampler

    if sampler not in REVERSIBLE:
        return len(timesteps)
    return ReversibleSampler(sampler).evaluations(pipe.noise_schedule, timesteps)  # type: ignore[arg-type] # one of the three


@contextlib.contextmanager
def enough_memory(device: Any, batch_size: int) -> Iterator[None]:
    """Says what to do where the accelerator's memory ends.

    Raises:
        DDIMError: If it does.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise DDIMError(
            f"{device} has too little memory for {batch_size} images at once; give a smaller "
            "--batch-size."
        ) from None


def seed_label(
    pipe: "UnconditionalPipeline", fixed: int | None = None
) -> Callable[[int], dict[str, int]]:
    """``{"class": n}`` of a seed's image: one for all, else the seeds go round the classes; empty
    for a model without classes."""
    classes = pipe.unet.config.get("num_class_embeds")
    return lambda seed: {"class": seed % classes if fixed is None else fixed} if classes else {}


def describe_model(
    name: str,
    pipe: "UnconditionalPipeline",
    folder: Path,
    *,
    clip: "Clip",
    dtype: str = "float32",
    fixed: int | None = None,
    classes: str = "seed modulo the number of classes",
) -> dict[str, Any]:
    """The part of a protocol that says which network is sampled, for which classes, and how its
    prediction is read.

    ``fixed`` is the class of all images; without it, ``classes`` says where those of a
    class-conditional model come from."""
    from ddim.models.checkpoints import weight_hash

    config = pipe.scheduler.config
    names = (
        "num_train_timesteps",
        "beta_schedule",
        "beta_start",
        "beta_end",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    each = classes if pipe.unet.config.get("num_class_embeds") else None
    bounds = {
        "none": {},
        "static": {"bound": clip.bound},
        "dynamic": {"ratio": clip.ratio, "max_value": clip.max_value},
    }
    return {
        "model": name,
        "weight_hash": weight_hash(folder),
        "schedule": {key: config[key] for key in (*names, "prediction_type", "set_alpha_to_one")},
        "clip": {"kind": clip.kind, **bounds[clip.kind]},
        "prior": "standard",
        "prompt": None,
        "guidance_scale": None,
        "dtype": dtype,
        "class": each if fixed is None else fixed,
    }


def draw(
    pipe: "UnconditionalPipeline",
    seeds: Sequence[int],
    *,
    batch_size: int,
    fill: bool,
    label: Callable[[int], dict[str, int]],
    **options: Any,
) -> Iterator[tuple[list[int], Any, float]]:
    """Draws batch by batch: the seeds, their images of the ``output_type`` asked for, and the
    seconds that took.

    Args:
        pipe: The model.
        seeds: One an image.
        batch_size: Images drawn together.
        fill: Whether a short last batch is filled up, and the surplus dropped: a compiled network
            is compiled for one size.
        label: ``{"class": n}`` of a seed's image, or an empty dictionary for a model without
            classes.
        **options: Of the pipeline's call.
    """

    def make(batch: list[int]) -> Any:
        labels = [number for s in batch for number in label(s).values()]
        return pipe(seeds=batch, class_labels=labels or None, progress=False, **options).images

    return in_batches(seeds, make, batch_size=batch_size, fill=fill)


def in_batches(
    items: Sequence[T], make: Callable[[list[T]], Any], *, batch_size: int, fill: bool
) -> Iterator[tuple[list[T], Any, float]]:
    """Makes the images of items batch by batch: the items, their images, and the seconds that took;
    arguments as :func:`draw`."""
    size = min(batch_size, len(items))
    for first in range(0, len(items), max(1, size)):
        batch = list(items[first : first + size])
        began = time.perf_counter()
        pictures = make(batch + batch[-1:] * (size - len(batch)) if fill else batch)
        yield batch, pictures[: len(batch)], time.perf_counter() - began


@contextlib.contextmanager
def progress_bar(pipe: Any, total: int | None) -> Iterator[Any]:
    """A bar on the terminal that standard error is, or None where it is none; ``total`` is None
    where nobody knows it."""
    if not sys.stderr.isatty():
        yield None
        return
    with contextlib.suppress(OSError):
        if (
            os.get_terminal_size(sys.stderr.fileno()).columns == 0
        ):  # as below `script`; tqdm would draw a bar of no width
            pipe.set_progress_bar_config(ncols=80)
    with pipe.progress_bar(itertools.count() if total is None else None, total=total) as bar:
        yield bar


def find_device(name: str) -> Any:
    """The device of that name; float32 means float32 there from now on.

    Raises:
        DDIMError: If there is none.
    """
    import torch

    # Torch lets GPUs convolve float32 numbers in TF32, of 10 bits: images of a seed would be other
    # ones than a CPU's.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if name == "auto":
        return (
            torch.accelerator.current_accelerator()
            if torch.accelerator.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DDIMError(
            f"--device must be auto, or one that torch knows such as cpu or cuda; got {name!r}."
        ) from None
    try:
        torch.empty(
            1, device=device
        ).cpu()  # a device that holds no numbers, such as meta, is of no use either
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DDIMError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0].rstrip('.')}); try "
            "auto or cpu."
        ) from None
    return device


def short_name(path: str) -> str:
    """A folder's name for results about a model or a file."""
    return re.sub(r"[^\w.-]+", "-", Path(path).name) or "model"
