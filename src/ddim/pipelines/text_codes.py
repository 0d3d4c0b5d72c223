"""Codes of real images under prompts: encoded with one, brought back with it, or edited with
another."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddim.bounds import MOST_IMAGES
from ddim.core.checks import check_whole
from ddim.core.denoiser import ModelDenoiser
from ddim.core.timesteps import Spacing
from ddim.errors import DDIMError
from ddim.inversion.codes import Code, EncodingMethod, check_code, default_method
from ddim.inversion.encoding import Encoder
from ddim.models.images import from_pictures, picture_size
from ddim.pipelines.base import Callback
from ddim.pipelines.latent import StableDiffusion
from ddim.pipelines.pictures import check_size, encode_images
from ddim.pipelines.prompts import Conditions, Guidance, Prompt, Prompts, encode_prompts

__all__ = ["TextCodes"]


class TextCodes(StableDiffusion):
    """A Stable Diffusion pipeline that encodes and decodes images, through its VAE."""

    @torch.no_grad()
    def encode(
        self,
        images: Any,
        prompt: Prompt | None = None,
        num_inference_steps: int | None = None,
        *,
        negative_prompt: Prompt | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        guidance_batched: bool = True,
        method: EncodingMethod | None = None,
        timestep_spacing: Spacing | None = None,
        timesteps: Sequence[int] | None = None,
        resize: bool = False,
        gamma: float = 1.0,
        mixing: float = 0.93,
        tolerance: float = 1e-5,
        max_evaluations: int = 60,
        batch_size: int = 16,
    ) -> Code:
        """Finds the latents at the first level of images under a prompt; :meth:`decode` brings back
        the VAE's picture of them, which its code keeps, or edits them under another prompt.

        Args:
            images: Pillow images, bytes [B, H, W, C] or [H, W, C], or a tensor in [-1, 1], [B, C,
                H, W].
            prompt: One text for all, or one an image; the better it fits, the nearer the code is to
                noise.
            num_inference_steps: N. Default: 50.
            negative_prompt: One text for all, or one an image. Default: the empty text.
            guidance_scale: 1 by default, unlike a call: guidance enlarges every error of a step, so
                guided codes of few steps lie far from noise, and ``fixed-point`` may find none.
            guidance_rescale: How far guided predictions get the spread of unguided ones, in [0, 1].
            prompt_embeds: [P, L, D], in place of prompts.
            negative_prompt_embeds: [P, L, D], in place of negative prompts.
            clip_skip: Layers of the text encoder that are left out at its end.
            guidance_batched: Whether the two predictions of guidance are one batch of the network.
            method: One of the table in :mod:`ddim.inversion.encoding`. Default: ``o-belm``;
                ``bdia`` at zero terminal SNR.
            timestep_spacing: Default: as the scheduler's configuration says.
            timesteps: The levels themselves, in place of N and a spacing.
            resize: Whether images are resized (shorter side) and cut to the network's size;
                otherwise any size is taken that the VAE takes.
            gamma: For ``bdia``.
            mixing: For ``edict``.
            tolerance: For ``fixed-point``.
            max_evaluations: For ``fixed-point``.
            batch_size: Images encoded together.

        Returns:
            The code of the latents, on the CPU.

        Raises:
            DDIMError: If images, prompts or options do not fit, or the method diverges.
        """
        self._require("vae", "unet")
        _refuse_number("encode", "images", prompt)
        place, sides = self._place(), self.image_shape[1:] if resize else picture_size(images)
        pictures = from_pictures(images, (int(self.vae.config.in_channels), *sides), resize=resize)
        if len(pictures) == 0:
            raise DDIMError("there are no images to encode.")
        check_size(*sides, self.vae_scale_factor)
        method = default_method(self.noise_schedule) if method is None else method
        encoder = Encoder(method, gamma, mixing, tolerance, max_evaluations)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_batched)
        prompts = Prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, clip_skip)
        levels = self._encodable_timesteps(num_inference_steps, timestep_spacing, timesteps)
        chunks = torch.split(
            pictures, check_whole("batch_size", batch_size, least=1, most=MOST_IMAGES)
        )
        x0 = torch.cat([encode_images(self, chunk, place.device).mean for chunk in chunks])
        denoiser = self._denoisers(len(x0), prompts, guidance)
        return self._encode(x0, levels, denoiser, encoder, batch_size)

    @torch.no_grad()
    def decode(
        self,
        code: Code,
        prompt: Prompt | None = None,
        num_inference_steps: int | None = None,
        *,
        negative_prompt: Prompt | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        guidance_batched: bool = True,
        timestep_spacing: Spacing | None = None,
        timesteps: Sequence[int] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        batch_size: int = 16,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
    ) -> Any:
        """Brings the images of a code back under their own prompt, or edits them under another.

        Args:
            code: From :meth:`encode`, of this model.
            prompt: One text for all, or one an image.
            num_inference_steps: Other steps than the code's, which only a code of ``fixed-point``
                or ``ddim`` takes. Default: the code's.
            negative_prompt: One text for all, or one an image. Default: the empty text.
            guidance_scale: The encoder's to come back; more follows another prompt more closely.
            guidance_rescale: How far guided predictions get the spread of unguided ones, in [0, 1].
            prompt_embeds: [P, L, D], in place of prompts.
            negative_prompt_embeds: [P, L, D], in place of negative prompts.
            clip_skip: Layers of the text encoder that are left out at its end.
            guidance_batched: Whether the two predictions of guidance are one batch of the network.
            timestep_spacing: How those other steps are spaced.
            timesteps: Those other steps themselves.
            callback: Called with the state of the latents after each step.
            progress: Whether to show a progress bar.
            batch_size: Images decoded together.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.

        Returns:
            Pillow images, an array [B, H, W, C] or tensor [B, C, H, W] in [0, 1], or latents.

        Raises:
            DDIMError: If the code is of another model, or of other steps, or does not fit.
        """
        self._check_output_type(output_type)
        check_code(code)
        _refuse_number("decode", "code", prompt)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_batched)
        prompts = Prompts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, clip_skip)
        channels, shape = int(self.unet.config.in_channels), list(code.x_T.shape)
        if len(shape) != 4 or shape[1] != channels:
            wanted = f"[B, {channels}, h, w]"
            raise DDIMError(f"the model's latents have shape {wanted}; the code's have {shape}.")
        levels = self._decoding_timesteps(code, num_inference_steps, timestep_spacing, timesteps)
        denoiser = self._denoisers(len(code), prompts, guidance)
        x = self._decode(code, levels, denoiser, callback, progress, batch_size)
        return self._finish(x.float(), output_type, return_dict=True).images

    def _denoisers(
        self, count: int, prompts: Prompts, guidance: Guidance
    ) -> Callable[[slice], ModelDenoiser]:
        """The denoiser of some of ``count`` images, without clipping, which cannot be undone."""
        if prompts.count not in (1, count):
            many = f"there are {prompts.count} prompts and {count} images"
            raise DDIMError(f"{many}; give one prompt for all, or one an image.")
        place = self._place()
        cond, uncond = encode_prompts(self, prompts, place, count, guidance.scale)

        def denoiser(chosen: slice) -> ModelDenoiser:
            part = Conditions(cond[chosen], None if uncond is None else uncond[chosen])
            return self._model(self._guided(part, guidance, None), "none", place.dtype)

        return denoiser


def _refuse_number(name: str, first: str, prompt: Any) -> None:
    if isinstance(prompt, (int, np.integer)):
        raise DDIMError(
            f"a text model's {name} takes a prompt before the number of steps, {name}({first}, "
            f"prompt=..., num_inference_steps={prompt}); got the prompt {prompt!r}."
        )
