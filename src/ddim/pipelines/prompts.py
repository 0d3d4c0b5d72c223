"""What a text-to-image pipeline is asked for: prompts, their embeddings, guidance, and how many
images.

These functions take one of diffusers' Stable Diffusion pipelines, for its tokenizer, text encoder
and adapters."""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddim.bounds import MOST_IMAGES
from ddim.core.checks import shown
from ddim.core.guidance import check_rescale, check_scale, is_guided
from ddim.core.noise import check_seeds
from ddim.errors import CheckpointError, DDIMError
from ddim.pipelines.base import Place, Source, check_generators

__all__ = [
    "GUIDANCE",
    "Conditions",
    "Guidance",
    "Prompt",
    "PromptWarning",
    "Prompts",
    "count_groups",
    "encode_prompts",
    "given_lengths",
    "warn_of_no_guidance",
]

Prompt = str | Sequence[str]

_encoding = threading.RLock()
"""Held while prompts are encoded: a call of a tokenizer sets its padding for all threads."""

_INSIDE = ("ddim.", "torch.", "contextlib")
"""Where a warning's frame is not the user's."""


class Conditions(NamedTuple):
    """What the network is told of each image, and what guidance, if it is on, leads away from:
    embeddings [B, L, D]."""

    cond: Tensor
    uncond: Tensor | None


class PromptWarning(UserWarning):
    """A prompt of which not all was used."""


@dataclass(frozen=True)
class Guidance:
    """How far predictions are led away from the negative prompt.

    Attributes:
        scale: 1 or less is off (:func:`ddim.core.guidance.guide`).
        rescale: How far guided predictions are brought back to the standard deviation of unguided
            ones, in [0, 1].
        batched: Whether both predictions are one batch of the network, or one after the other:
            slower, in half of the memory.

    Raises:
        DDIMError: If scale or rescale is invalid.
    """

    scale: float = 7.5
    rescale: float = 0.0
    batched: bool = True

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_rescale(self.rescale)


GUIDANCE = Guidance()
"""The guidance of a call that says none."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """What images are to show, as texts or as embeddings.

    Attributes:
        prompt: One text, or a list.
        negative_prompt: One text for all, or one a prompt. Default: the empty text.
        prompt_embeds: [P, L, D], in place of prompts.
        negative_prompt_embeds: [P, L, D], in place of negative prompts.
        clip_skip: Layers of the text encoder that are left out at its end.

    Raises:
        DDIMError: If there is no prompt, or both texts and embeddings, or something else than
            texts.
    """

    prompt: Prompt | None = None
    negative_prompt: Prompt | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    clip_skip: int | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise DDIMError(
                "give either prompt or prompt_embeds, one of the two; got "
                f"{'neither' if self.prompt is None else 'both'}."
            )
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise DDIMError("give either negative_prompt or negative_prompt_embeds, not both.")
        for name in ("prompt", "negative_prompt"):
            _check_texts(name, getattr(self, name))

    @property
    def count(self) -> int:
        """How many prompts there are."""
        if self.prompt_embeds is not None:
            return len(self.prompt_embeds)
        return 1 if isinstance(self.prompt, str) else len(self.prompt or ())

    def texts(self) -> list[str] | None:
        """The prompts; None where embeddings stand in their place."""
        return _listed(self.prompt, 1)

    def negative_texts(self) -> list[str] | None:
        """One negative prompt a prompt; None where there is none. A DDIMError if there are more or
        fewer of them or their embeddings, or embeddings of both kinds differ in shape."""
        count, embeds = self.count, self.negative_prompt_embeds
        texts = _listed(self.negative_prompt, count)
        for name, given in (("negative_prompt", texts), ("negative_prompt_embeds", embeds)):
            if given is not None and len(given) != count:
                raise DDIMError(
                    f"there are {count} prompts, and {name} has {len(given)}; give one text for "
                    "all, or one for each prompt."
                )
        shapes = [list(e.shape) for e in (self.prompt_embeds, embeds) if e is not None]
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            raise DDIMError(
                "prompt_embeds and negative_prompt_embeds must have one shape; got "
                f"{shapes[0]} and {shapes[1]}."
            )
        return texts


def _listed(texts: Prompt | None, count: int) -> list[str] | None:
    if isinstance(texts, str):
        return [texts] * count
    return None if texts is None else list(texts)


def _check_texts(name: str, texts: object) -> None:
    """Refuses what is neither a text nor a list of texts."""
    if texts is None or isinstance(texts, str):
        return
    listed = texts if isinstance(texts, (list, tuple)) else []
    if not listed or not all(isinstance(text, str) for text in listed):
        raise DDIMError(f"{name} must be a text, or a list of at least one; got {shown(texts)}.")


def _check_embeds(pipe: Any, name: str, embeds: object) -> None:
    """Refuses what is no batch of embeddings for the network of a pipeline."""
    if embeds is None:
        return
    width = pipe.unet.config.cross_attention_dim
    shape = list(embeds.shape) if isinstance(embeds, Tensor) else None
    if shape is None or len(shape) != 3 or (isinstance(width, int) and shape[2] != width):
        found = type(embeds).__name__ if shape is None else f"shape {shape}"
        raise DDIMError(
            f"{name} must be a tensor [P, L, {width}], one row of tokens a prompt; got {found}."
        )


def count_groups(
    prompts: int, images: int | None, per_prompt: int | None, lengths: Mapping[str, int]
) -> tuple[int, int]:
    """Settles how many (prompt, image) groups there are, one prompt or image standing for all, and
    how many images are made of each; a DDIMError if the numbers do not go together.

    Args:
        prompts: How many there are.
        images: How many images are given; None without image-to-image.
        per_prompt: How many are made of each. Default: as many as ``lengths`` ask for, else one.
        lengths: How many seeds, generators and latents there are, one for each made image.
    """
    groups = max(prompts, images or 1)
    if prompts not in (1, groups) or (images or 1) not in (1, groups):
        many = f"there are {prompts} prompts and {images} images"
        raise DDIMError(f"{many}; give as many of both, or one of either.")
    is_whole = isinstance(per_prompt, (int, np.integer)) and not isinstance(per_prompt, bool)
    if per_prompt is not None and not (is_whole and 1 <= per_prompt <= MOST_IMAGES):
        least = (
            f"at least 1 and at most {MOST_IMAGES}" if is_whole and per_prompt > 1 else "at least 1"
        )
        raise DDIMError(
            f"num_images_per_prompt must be a whole number of {least}; got {shown(per_prompt)}."
        )
    listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
    asked = next(iter(lengths.values()), groups)
    each = (asked // groups if asked % groups == 0 else 0) if per_prompt is None else per_prompt
    if each == 0 or any(length != groups * each for length in lengths.values()):
        exact = f"{groups} x {each} = {groups * each}"
        made = f"a multiple of {groups}" if per_prompt is None else exact
        raise DDIMError(
            f"the lists have other lengths than there are images to make ({made}): {listed}; give "
            "one of each an image."
        )
    return groups, int(each)


def given_lengths(source: Source, latents: Tensor | None = None) -> dict[str, int]:
    """How many there are of what is given one an image, for :func:`count_groups`; a DDIMError
    refuses seeds that are no list of seeds, and latents that are no tensor."""
    listed: dict[str, Any] = {**source._asdict(), "latents": latents}
    if source.seeds is not None:
        listed["seeds"] = check_seeds(source.seeds)
    check_generators(source.generator)
    if isinstance(source.generator, torch.Generator):
        del listed["generator"]
    if latents is not None and not isinstance(latents, Tensor):
        raise DDIMError(f"latents must be a tensor [B, C, h, w]; got {type(latents).__name__}.")
    return {name: len(value) for name, value in listed.items() if value is not None}


def encode_prompts(
    pipe: Any,
    prompts: Prompts,
    place: Place,
    count: int,
    scale: float,
    lora_scale: float | None = None,
) -> Conditions:
    """Embeds prompts, and what guidance leads away from, for ``count`` images: for as many of each.

    Warns of a prompt that is longer than the text encoder reads, with what was cut off, and of a
    negative prompt without guidance.

    Raises:
        DDIMError: If the lists are of unequal length, or embeddings do not fit the network.
        CheckpointError: If the checkpoint has no text encoder or tokenizer, and they are needed.
    """
    on = is_guided(scale)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        _check_embeds(pipe, name, getattr(prompts, name))
    negative = (prompts.negative_prompt, prompts.negative_prompt_embeds)
    if not on and any(value is not None for value in negative):
        warn_of_no_guidance(scale)
        prompts = replace(prompts, negative_prompt=None, negative_prompt_embeds=None)
    texts, negative_texts = prompts.texts(), prompts.negative_texts()
    if texts is not None or (on and prompts.negative_prompt_embeds is None):
        for name in ("tokenizer", "text_encoder"):
            if getattr(pipe, name, None) is None:
                raise CheckpointError(
                    f"the checkpoint has no {name}; open one that has, or give prompt_embeds and "
                    "negative_prompt_embeds."
                )
    if prompts.clip_skip is not None and pipe.text_encoder is not None:
        _check_clip_skip(pipe.text_encoder, prompts.clip_skip)
    with _encoding:
        cut = texts is not None and _warn_of_cuts(pipe, [*texts, *(negative_texts or [])])
        with _silenced(type(pipe).encode_prompt.__module__) if cut else contextlib.nullcontext():
            cond, uncond = pipe.encode_prompt(
                texts,
                place.device,
                count // prompts.count,
                on,
                negative_texts,
                prompt_embeds=prompts.prompt_embeds,
                negative_prompt_embeds=prompts.negative_prompt_embeds,
                lora_scale=lora_scale,
                clip_skip=prompts.clip_skip,
            )
    return Conditions(cond.to(place.dtype), uncond.to(place.dtype) if on else None)


def _check_clip_skip(text_encoder: Any, clip_skip: int) -> None:
    """Refuses more layers than the text encoder has, and lets diffusers find its last norm."""
    layers = int(text_encoder.config.num_hidden_layers)
    is_whole = isinstance(clip_skip, int) and not isinstance(clip_skip, bool)
    if not is_whole or not 0 <= clip_skip <= layers:
        raise DDIMError(
            f"clip_skip must be a whole number from 0 to {layers}, the layers of the text "
            f"encoder; got {shown(clip_skip)}."
        )
    if not hasattr(text_encoder, "text_model"):
        # Where diffusers looks for the last norm; transformers 5 has it in the encoder itself.
        # No submodule: it would hold itself.
        text_encoder.__dict__["text_model"] = text_encoder


def warn_of_no_guidance(scale: float) -> None:
    _warn(
        f"the negative prompt is ignored: guidance is off at guidance_scale={scale}; a scale above "
        "1 turns it on."
    )


def _warn(message: str) -> None:
    """Warns at the line of the user's that led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, PromptWarning, stacklevel=level)


def _warn_of_cuts(pipe: Any, texts: Sequence[str]) -> bool:
    """Warns of each text of more tokens than the text encoder reads; whether there was one."""
    tokenizer, cut = pipe.tokenizer, False
    for text in dict.fromkeys(texts):
        converted = pipe.maybe_convert_prompt(text, tokenizer)
        tokens = tokenizer(converted, truncation=False, verbose=False).input_ids
        room = tokenizer.model_max_length
        if len(tokens) > room:
            cut = True
            lost = tokenizer.decode(tokens[room - 1 : -1]).strip()
            _warn(
                f"a prompt has {len(tokens) - 2} tokens and the text encoder reads {room - 2}; "
                f"this was cut off: {lost!r}."
            )
    return cut


@contextlib.contextmanager
def _silenced(name: str) -> Iterator[None]:
    """While held, a logger says only errors: diffusers would tell of a cut prompt once more."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
