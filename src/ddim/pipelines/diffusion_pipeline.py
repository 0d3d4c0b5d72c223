"""The one opener of all checkpoints: each as the pipeline that fits it."""

import re
from abc import ABCMeta
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import diffusers
from torch import nn

from ddim.errors import CheckpointError, DDIMError, first_line, shown_cause
from ddim.models.checkpoints import (
    STABLE_DIFFUSION,
    is_unconditional,
    load_pipeline,
    read_model_index,
)
from ddim.pipelines.adopted import Adopted, adopt, adopted, read_as_written, replace_schedulers
from ddim.pipelines.base import Sampling, find_pretrained, name_origin, read_single_index
from ddim.pipelines.unconditional import UnconditionalPipeline

__all__ = ["DiffusionPipeline", "text_pipeline"]


class DiffusionPipeline(diffusers.DiffusionPipeline, metaclass=ABCMeta):  # type: ignore[misc]
    """Opens any checkpoint of the DDIM family as the pipeline that fits it.

    Each method returns an :class:`UnconditionalPipeline` for a network and a scheduler; a
    ``TextToImagePipeline`` or ``ImageToImagePipeline`` (:mod:`ddim.pipelines.text_to_image`) for
    Stable Diffusion's format; else diffusers' own pipeline with our schedulers in it, whose call
    takes ``seeds``, ``timestep_spacing`` and ``order`` too. All are instances of this class."""

    if TYPE_CHECKING:  # what every opened pipeline has; the rest depends on its kind
        scheduler: Any

        def __call__(self, *args: Any, **options: Any) -> Any:
            """Makes images."""

        def to(self, *args: Any, **options: Any) -> Self:
            """Moves the parts to a device or a dtype, and returns the pipeline."""

        def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
            """Writes the pipeline to a folder."""

        def __getattr__(self, name: str) -> Any:
            """Any other attribute of the pipeline's own kind."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Opens a model.

        Args:
            pretrained_model_name_or_path: An embedded model's name, a folder in diffusers format,
                or a hub id.
            **options: diffusers' ones: dtype (or torch_dtype), variant, device_map, parts by name.
                A ``scheduler`` that is given stays as it is in a pipeline of diffusers. Code that
                comes with a model is run only where ``trust_remote_code=True`` says so.

        Raises:
            CheckpointError: If the model cannot be found or opened, or its scheduler is not of the
                DDIM family (flow matching).
        """
        folder = find_pretrained(pretrained_model_name_or_path, options)
        index = read_model_index(folder, given=options)
        kind = index.get("_class_name")
        is_custom = options.get("custom_pipeline") is not None or not isinstance(kind, str | None)
        library = (index.get("unet") or ["diffusers"])[0]
        is_foreign = library != "diffusers" and "unet" not in options
        pipe: Any
        if cls is not DiffusionPipeline:  # a user's own pipeline
            pipe = load_pipeline(super().from_pretrained, folder, index, **options)
            replace_schedulers(pipe, options)
        elif is_unconditional(index) and not is_custom and not is_foreign:
            options.pop("trust_remote_code", None)
            return cast(Self, UnconditionalPipeline.from_pretrained(folder, **options))
        elif kind in STABLE_DIFFUSION and not is_custom:
            return cast(Self, text_pipeline(kind).from_pretrained(folder, **options))
        else:
            if not is_custom:
                _kind_of(index)  # refuses what is no pipeline of diffusers
            load = diffusers.DiffusionPipeline.from_pretrained
            pipe = load_pipeline(load, folder, index, **options)
            replace_schedulers(adopt(pipe), options)
            read_as_written(pipe, options)
        name_origin(pipe, folder)
        return cast(Self, pipe)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | Path, **options: Any) -> Self:
        """Opens a checkpoint in one file, as diffusers' pipelines do.

        Args:
            pretrained_model_link_or_path: The file, or its address on the hub.
            **options: diffusers' ones. ``config`` is a folder in diffusers format, or a hub id, of
                a model of the same kind; without it, diffusers asks the hub for one.

        Raises:
            CheckpointError: If the file cannot be opened.
        """
        link = str(pretrained_model_link_or_path)
        try:
            pipe = _kind_of(read_single_index(link, options)).from_single_file(link, **options)
        except CheckpointError:
            raise
        except Exception as error:  # the libraries that read such files have errors of their own
            raise CheckpointError(
                f"{link} cannot be opened as a checkpoint in one file ({first_line(error)}); give "
                "config=, a folder in diffusers format of a model of the same kind."
            ) from shown_cause(error)
        if not isinstance(pipe, Sampling):
            replace_schedulers(pipe, options)
        return pipe  # type: ignore[no-any-return]

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Self:
        """A pipeline that shares the parts of another.

        Args:
            pipeline: Any pipeline, ours or diffusers'.
            **options: Parts in place of its own, such as a ``controlnet``, which makes it
                diffusers' pipeline with one; or ``dtype``, by default the widest of the
                pipeline's.

        Raises:
            DDIMError: If there is no such pipeline.
        """
        if cls is not DiffusionPipeline:
            return super().from_pipe(pipeline, **options)  # type: ignore[no-any-return]
        name = getattr(pipeline, "_exported", type(pipeline)).__name__
        if options.get("controlnet") is not None and "ControlNet" not in name:
            name = re.sub(r"^StableDiffusion(XL)?", r"\g<0>ControlNet", name)
            if "ControlNet" not in name:
                raise DDIMError(
                    f"a {name} has no form with a controlnet; give a Stable Diffusion pipeline."
                )
        if not {"dtype", "torch_dtype"} & options.keys():  # diffusers' default is float32
            parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
            options["dtype"] = max((part.dtype for part in parts), key=attrgetter("itemsize"))
        kind = _kind_of({**pipeline.config, "_class_name": name})
        if kind is UnconditionalPipeline:  # whose network may be of any class
            options = {"unet": pipeline.unet, **options}
        pipe = kind.from_pipe(pipeline, **options)
        if not isinstance(pipe, Sampling):
            replace_schedulers(pipe, options)
        return pipe  # type: ignore[no-any-return]

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any
    ) -> Any:
        """A pipeline of the kind that the configuration of a saved one says (``load_config``), made
        of parts that are given by name; a DDIMError if one is missing."""
        if cls is not DiffusionPipeline or not isinstance(config, Mapping):
            return super().from_config(config, return_unused_kwargs, **options)
        parts = {k for k, v in config.items() if isinstance(v, (list, tuple)) and v[:1] != [None]}
        missing = sorted(name for name in parts - set(options) if name[0] != "_")
        if config.get("_class_name") is None or missing:
            lacking = f"the parts {', '.join(missing)}" if missing else "the class of the pipeline"
            raise DDIMError(
                f"from_config does not know {lacking}; give the configuration of load_config and "
                "all parts by name, or use from_pipe or from_pretrained."
            )
        return _kind_of(config).from_config(config, return_unused_kwargs, **options)


# Every pipeline of ours, and of diffusers with our call, is an instance.
DiffusionPipeline.register(Sampling)
DiffusionPipeline.register(Adopted)


def _kind_of(index: Mapping[str, Any]) -> Any:
    """The class of pipeline for an index (:func:`ddim.models.checkpoints.read_model_index`)."""
    name = str(index.get("_class_name"))
    if is_unconditional(index):
        return UnconditionalPipeline
    if name in STABLE_DIFFUSION:
        return text_pipeline(name)
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise CheckpointError(f"diffusers has no pipeline {name}; update it, or open another.")
    return adopted(kind)


def text_pipeline(kind: str) -> Any:
    """Our pipeline for one of :data:`ddim.models.checkpoints.STABLE_DIFFUSION`; a DDIMError if
    transformers is not installed."""
    try:
        from ddim.pipelines.text_to_image import ImageToImagePipeline, TextToImagePipeline
    except ImportError as error:
        raise DDIMError(str(error)) from error
    is_image = kind in ("StableDiffusionImg2ImgPipeline", "ImageToImagePipeline")
    return ImageToImagePipeline if is_image else TextToImagePipeline
