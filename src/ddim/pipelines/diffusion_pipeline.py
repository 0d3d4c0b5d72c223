"""The one opener of all checkpoints: each as the pipeline that fits it."""

from pathlib import Path
from typing import Any, Protocol, Self

import diffusers

from ddim.errors import DDIMError
from ddim.models.checkpoints import (
    STABLE_DIFFUSION,
    is_unconditional,
    load_pipeline,
    read_model_index,
)
from ddim.pipelines.base import find_pretrained
from ddim.pipelines.unconditional import UnconditionalPipeline
from ddim.scheduler import as_ddim

__all__ = ["DiffusionPipeline", "Pipeline", "text_pipeline"]


class Pipeline(Protocol):
    """What every opened pipeline has; the rest depends on its kind."""

    scheduler: Any

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Makes images."""

    def to(self, *args: Any, **options: Any) -> Self:
        """Moves the parts to a device or a dtype, and returns the pipeline."""

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes the pipeline to a folder."""

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of the pipeline's own kind."""


class DiffusionPipeline:
    """Opens any checkpoint of the DDIM family as the pipeline that fits it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Pipeline:
        """Opens a model.

        Args:
            pretrained_model_name_or_path: An embedded model's name, a folder in diffusers format,
                or a hub id.
            **options: Those of :meth:`UnconditionalPipeline.from_pretrained`, or of diffusers' for
                other kinds of checkpoints.

        Returns:
            An :class:`UnconditionalPipeline` for a network and a scheduler; a
            ``TextToImagePipeline`` or ``ImageToImagePipeline``
            (:mod:`ddim.pipelines.text_to_image`) for Stable Diffusion's format; else diffusers' own
            pipeline with a :class:`ddim.scheduler.DDIMScheduler` in it, unless ``scheduler=`` was
            given.

        Raises:
            CheckpointError: If the model cannot be found or opened, or its scheduler is not of the
                DDIM family (flow matching).
        """
        folder = find_pretrained(pretrained_model_name_or_path, options)
        index = read_model_index(folder)
        kind = index.get("_class_name")
        if is_unconditional(index):
            pipe: Pipeline = UnconditionalPipeline.from_pretrained(folder, **options)
        elif kind in STABLE_DIFFUSION and options.get("custom_pipeline") is None:
            pipe = text_pipeline(kind).from_pretrained(folder, **options)
        else:
            pipe = load_pipeline(diffusers.DiffusionPipeline.from_pretrained, folder, **options)
            if options.get("scheduler") is None:
                pipe.scheduler = as_ddim(pipe.scheduler)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe


def text_pipeline(kind: str) -> Any:
    """Our pipeline for one of :data:`ddim.models.checkpoints.STABLE_DIFFUSION`; a DDIMError if
    transformers is not installed."""
    try:
        from ddim.pipelines.text_to_image import ImageToImagePipeline, TextToImagePipeline
    except ImportError as error:
        raise DDIMError(str(error)) from error
    is_image = kind in ("StableDiffusionImg2ImgPipeline", "ImageToImagePipeline")
    return ImageToImagePipeline if is_image else TextToImagePipeline
