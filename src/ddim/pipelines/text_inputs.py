"""What goes into a text-to-image pipeline: prompts as embeddings, images as latents, and how many
of each.

These functions take one of diffusers' Stable Diffusion pipelines, for its tokenizer, text encoder,
VAE and adapters."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddim.core.guidance import is_guided
from ddim.core.noise import check_seeds
from ddim.errors import CheckpointError, DDIMError
from ddim.models.images import convert_mode, to_pil
from ddim.pipelines.base import Generators, Place

__all__ = [
    "Conditions",
    "Posterior",
    "PromptWarning",
    "check_size",
    "count_images",
    "encode_images",
    "encode_prompts",
    "given_lengths",
    "number_of_prompts",
    "prepare_images",
    "warn_of_no_guidance",
]


class Conditions(NamedTuple):
    """What the network is told of each image: embeddings [B, L, D]."""

    cond: Tensor
    uncond: Tensor | None
    """What it is guided away from; None where guidance is off."""


class PromptWarning(UserWarning):
    """A prompt of which not all was used."""


class Posterior(NamedTuple):
    """A VAE's latents of images, scaled as the network knows them: Gaussian, [B, C, h, w] each,
    float32."""

    mean: Tensor
    std: Tensor


def number_of_prompts(prompt: str | Sequence[str] | None, prompt_embeds: Tensor | None) -> int:
    """How many prompts there are.

    Raises:
        DDIMError: If there is none, or both texts and embeddings, or something else than texts.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise DDIMError(
            "give either prompt or prompt_embeds, one of the two; got "
            f"{'neither' if prompt is None else 'both'}."
        )
    if prompt_embeds is not None:
        return len(prompt_embeds)
    if isinstance(prompt, str):
        return 1
    _check_texts("prompt", prompt)
    return len(prompt)  # type: ignore[arg-type]


def _check_texts(name: str, texts: object) -> None:
    """Refuses what is no list of texts."""
    if (
        not isinstance(texts, (list, tuple))
        or not texts
        or not all(isinstance(text, str) for text in texts)
    ):
        raise DDIMError(f"{name} must be a text, or a list of at least one; got {texts!r}.")


def _check_embeds(pipe: Any, name: str, embeds: object) -> None:
    """Refuses what is no batch of embeddings for the network of a pipeline."""
    if embeds is None:
        return
    width = pipe.unet.config.cross_attention_dim
    fits = (
        isinstance(embeds, Tensor)
        and embeds.ndim == 3
        and (not isinstance(width, int) or embeds.shape[2] == width)
    )
    if not fits:
        told = (
            f"shape {list(embeds.shape)}" if isinstance(embeds, Tensor) else type(embeds).__name__
        )
        raise DDIMError(
            f"{name} must be a tensor [P, L, {width}], one row of tokens a prompt; got {told}."
        )


def count_images(
    prompts: int, images: int | None, per_prompt: int | None, lengths: Mapping[str, int]
) -> tuple[int, int]:
    """Settles how many images a call makes.

    Args:
        prompts: How many there are.
        images: How many images are given; None: this is not image-to-image.
        per_prompt: How many are made of each; None: as many as ``lengths`` ask for, else one.
        lengths: Of what is given one a made image: seeds, generators, latents.

    Returns:
        The number of (prompt, image) groups, one prompt or image standing for all; and of images
        made of each group.

    Raises:
        DDIMError: If they do not go together.
    """
    groups = max(prompts, images or 1)
    if prompts not in (1, groups) or (images or 1) not in (1, groups):
        raise DDIMError(
            f"there are {prompts} prompts and {images} images; give as many of both, or one of "
            "either."
        )
    if per_prompt is not None and (
        isinstance(per_prompt, bool)
        or not isinstance(per_prompt, (int, np.integer))
        or per_prompt < 1
    ):
        raise DDIMError(
            f"num_images_per_prompt must be a whole number of at least 1; got {per_prompt!r}."
        )
    told = ", ".join(f"{name}: {length}" for name, length in lengths.items())
    asked = next(iter(lengths.values()), groups)
    each = (asked // groups if asked % groups == 0 else 0) if per_prompt is None else per_prompt
    if each == 0 or any(length != groups * each for length in lengths.values()):
        made = (
            f"a multiple of {groups}"
            if per_prompt is None
            else f"{groups} x {each} = {groups * each}"
        )
        raise DDIMError(
            f"the lists have other lengths than there are images to make ({made}): {told}; give "
            "one of each an image."
        )
    return groups, int(each)


def given_lengths(
    *, seeds: Sequence[int] | None, generator: Generators | None, latents: Tensor | None = None
) -> dict[str, int]:
    """How many there are of what is given one an image, for :func:`count_images`.

    Raises:
        DDIMError: If the seeds are no list of seeds, or the latents no tensor.
    """
    each = None if isinstance(generator, torch.Generator) else generator
    drawn = None if seeds is None else check_seeds(seeds)
    if latents is not None and not isinstance(latents, Tensor):
        raise DDIMError(f"latents must be a tensor [B, C, h, w]; got {type(latents).__name__}.")
    listed: Mapping[str, Any] = {"seeds": drawn, "generator": each, "latents": latents}
    return {name: len(value) for name, value in listed.items() if value is not None}


def encode_prompts(
    pipe: Any,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    *,
    place: Place,
    scale: float,
    groups: int,
    each: int,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    lora_scale: float | None = None,
    clip_skip: int | None = None,
) -> Conditions:
    """Embeds prompts, and what guidance leads away from, once for each of ``groups * each`` images.

    Warns of a prompt that is longer than the text encoder reads, with what was cut off, and of a
    negative prompt without guidance.

    Raises:
        DDIMError: If the lists are of unequal length.
        CheckpointError: If the checkpoint has no text encoder or tokenizer, and they are needed.
    """
    prompts, on = number_of_prompts(prompt, prompt_embeds), is_guided(scale)
    texts = [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)
    for name, embeds in (
        ("prompt_embeds", prompt_embeds),
        ("negative_prompt_embeds", negative_prompt_embeds),
    ):
        _check_embeds(pipe, name, embeds)
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        _check_texts("negative_prompt", negative_prompt)
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise DDIMError("give either negative_prompt or negative_prompt_embeds, not both.")
    if not on and (negative_prompt is not None or negative_prompt_embeds is not None):
        warn_of_no_guidance(scale, stacklevel=5)
        negative_prompt = negative_prompt_embeds = None
    away = (
        [negative_prompt] * prompts
        if isinstance(negative_prompt, str)
        else None
        if negative_prompt is None
        else list(negative_prompt)
    )
    for name, length in (
        ("negative_prompt", away),
        ("negative_prompt_embeds", negative_prompt_embeds),
    ):
        if length is not None and len(length) != prompts:
            raise DDIMError(
                f"there are {prompts} prompts, and {name} has {len(length)}; give one text for "
                "all, or one for each prompt."
            )
    if (
        prompt_embeds is not None
        and negative_prompt_embeds is not None
        and prompt_embeds.shape != negative_prompt_embeds.shape
    ):
        raise DDIMError(
            "prompt_embeds and negative_prompt_embeds must have one shape; got "
            f"{list(prompt_embeds.shape)} and "
            f"{list(negative_prompt_embeds.shape)}."
        )
    if texts is not None or (on and negative_prompt_embeds is None):
        for name in ("tokenizer", "text_encoder"):
            if getattr(pipe, name, None) is None:
                raise CheckpointError(
                    f"the checkpoint has no {name}; open one that has, or give prompt_embeds and "
                    "negative_prompt_embeds."
                )
    if clip_skip is not None and pipe.text_encoder is not None:
        layers = int(pipe.text_encoder.config.num_hidden_layers)
        if (
            isinstance(clip_skip, bool)
            or not isinstance(clip_skip, int)
            or not 0 <= clip_skip <= layers
        ):
            raise DDIMError(
                f"clip_skip must be a whole number from 0 to {layers}, the layers of the text "
                f"encoder; got {clip_skip!r}."
            )
        if not hasattr(pipe.text_encoder, "text_model"):
            # Where diffusers looks for the last norm; transformers 5 has it in the encoder itself.
            # No submodule: it would hold itself.
            pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder
    cut = texts is not None and _warn_of_cuts(pipe, [*texts, *(away or [])])
    with _silenced(type(pipe).encode_prompt.__module__) if cut else contextlib.nullcontext():
        cond, uncond = pipe.encode_prompt(
            texts,
            place.device,
            groups * each // prompts,
            on,
            away,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=lora_scale,
            clip_skip=clip_skip,
        )
    return Conditions(cond.to(place.dtype), uncond.to(place.dtype) if on else None)


def warn_of_no_guidance(scale: float, *, stacklevel: int) -> None:
    """Warns of a negative prompt where nothing is led away from it."""
    told = (
        f"the negative prompt is ignored: guidance is off at guidance_scale={scale}; a scale above "
        "1 turns it on."
    )
    warnings.warn(told, PromptWarning, stacklevel=stacklevel)


def _warn_of_cuts(pipe: Any, texts: Sequence[str]) -> bool:
    """Warns of each text that has more tokens than the text encoder reads; whether there was
    one."""
    tokenizer, cut = pipe.tokenizer, False
    for text in dict.fromkeys(texts):
        tokens = tokenizer(
            pipe.maybe_convert_prompt(text, tokenizer), truncation=False, verbose=False
        ).input_ids
        room = tokenizer.model_max_length
        if len(tokens) > room:
            cut = True
            lost = tokenizer.decode(tokens[room - 1 : -1]).strip()
            warnings.warn(
                (
                    f"a prompt has {len(tokens) - 2} tokens and the text encoder reads {room - 2}; "
                    f"this was cut off: {lost!r}."
                ),
                PromptWarning,
                stacklevel=5,
            )
    return cut


@contextlib.contextmanager
def _silenced(name: str) -> Iterator[None]:
    """While held, a logger says nothing below an error: diffusers would tell of a cut prompt a
    second time."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def check_size(height: int, width: int, factor: int) -> None:
    """Refuses a picture size that has no whole number of latents.

    Raises:
        DDIMError: With the nearest size that has; or if it is no size, such as an image in the
            place of the height.
    """
    for name, side in (("height", height), ("width", width)):
        if isinstance(side, bool) or not isinstance(side, (int, np.integer)):
            told = f"{name} must be a whole number of pixels; got {type(side).__name__}"
            raise DDIMError(
                f"{told}. Images to begin at are for ImageToImagePipeline(**pipe.components)."
            )
    if height < factor or width < factor or height % factor or width % factor:
        near = "x".join(str(max(1, round(side / factor)) * factor) for side in (width, height))
        raise DDIMError(
            f"width and height must be multiples of {factor}, the VAE's factor; got "
            f"{width}x{height} (width x height), and {near} would do."
        )


def prepare_images(pipe: Any, images: Any) -> Tensor:
    """Turns pictures into a tensor [I, C, H, W] in [-1, 1]; latents [I, c, h, w], which have the
    network's channels, stay as they are.

    Args:
        pipe: The pipeline, for the size of its latents and its VAE's channels.
        images: One or a list of Pillow images, of bytes [H, W, C], or of arrays [H, W, C] or
            tensors [C, H, W] in [0, 1]; a batch.

    Raises:
        DDIMError: If there is none, sizes differ or have no whole number of latents, or the values
            lie elsewhere.
    """
    listed = list(images) if isinstance(images, (list, tuple)) else [images]
    if not listed or not all(
        isinstance(image, (Image.Image, np.ndarray, Tensor)) for image in listed
    ):
        told = "an empty list" if not listed else type(listed[0]).__name__
        raise DDIMError(
            f"image must be a picture, an array or a tensor, or a list of them; got {told}."
        )
    channels, latent = int(pipe.vae.config.in_channels), int(pipe.unet.config.in_channels)
    for image in listed:
        _check_shape(image, channels, latent)
    if isinstance(listed[0], Tensor) and listed[0].shape[-3] == latent != channels:
        return torch.cat([image if image.ndim == 4 else image[None] for image in listed])
    listed = [
        picture
        for image in listed
        for picture in (_pictures(image) if _is_bytes(image) else [image])
    ]
    if isinstance(listed[0], Image.Image):
        sizes = {(image.height, image.width) for image in listed}
        listed = [convert_mode(image, channels) for image in listed]
    else:
        sizes = {
            tuple(image.shape[-3:-1] if isinstance(image, np.ndarray) else image.shape[-2:])
            for image in listed
        }
        if any(float(abs(image).max()) > 1 + 1e-3 for image in listed):
            raise DDIMError(
                "arrays and tensors of images must lie in [0, 1]; bytes go in as uint8 arrays, or "
                "as pictures."
            )
    if len(sizes) > 1:
        raise DDIMError(
            "images of one call must have one size; got "
            f"{', '.join(f'{w}x{h}' for h, w in sorted(sizes))} (width x height)."
        )
    check_size(*sizes.pop(), pipe.vae_scale_factor)
    prepared: Tensor = pipe.image_processor.preprocess(listed if len(listed) > 1 else listed[0])
    return prepared


def _check_shape(image: Image.Image | NDArray[Any] | Tensor, channels: int, latent: int) -> None:
    """Refuses arrays and tensors that are no images of the VAE's channels, nor latents."""
    if isinstance(image, Image.Image):
        return
    if isinstance(image, Tensor):
        fits = image.ndim in (3, 4) and image.shape[-3] in (channels, latent)
        wanted = (
            f"a tensor must have shape [C, H, W] or [B, C, H, W] with {channels} channels, or "
            f"{latent} for latents"
        )
    elif _is_bytes(image):
        fits = image.ndim == 2 or (image.ndim in (3, 4) and image.shape[-1] in (1, 3, 4))
        wanted = (
            "an array of bytes must have shape [H, W], [H, W, C] or [B, H, W, C] with 1, 3 or 4 "
            "channels"
        )
    else:
        fits = image.ndim in (3, 4) and image.shape[-1] == channels
        wanted = f"an array must have shape [H, W, C] or [B, H, W, C] with {channels} channels"
    if not fits or 0 in image.shape:
        raise DDIMError(f"the image has a wrong shape: {wanted}; got {list(image.shape)}.")


def _is_bytes(image: Any) -> TypeGuard[NDArray[np.uint8]]:
    return isinstance(image, np.ndarray) and image.dtype == np.uint8


def _pictures(image: NDArray[np.uint8]) -> list[Image.Image]:
    return to_pil(
        image[None, ..., None] if image.ndim == 2 else image.reshape(-1, *image.shape[-3:])
    )


@torch.no_grad()
def encode_images(pipe: Any, x: Tensor, device: torch.device) -> Posterior:
    """The VAE's latents of pictures [I, C, H, W] in [-1, 1], computed on a device."""
    vae = pipe.vae
    found = vae.encode(x.to(device, vae.dtype))
    scale = vae.config.scaling_factor
    if hasattr(found, "latent_dist"):
        return Posterior(
            found.latent_dist.mean.float() * scale, found.latent_dist.std.float() * scale
        )
    return Posterior(
        found.latents.float() * scale, torch.zeros_like(found.latents, dtype=torch.float32)
    )
