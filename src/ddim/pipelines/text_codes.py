"""Codes of real images under prompts: encoded with one, brought back with it, or edited with
another."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddim.core.denoiser import ModelDenoiser
from ddim.core.timesteps import Spacing
from ddim.errors import DDIMError
from ddim.inversion.codes import Code, EncodingMethod, check_code
from ddim.models.images import from_pictures, picture_size
from ddim.pipelines.latent import Callback, Prompt, StableDiffusion
from ddim.pipelines.text_inputs import (
    Conditions,
    check_size,
    encode_images,
    encode_prompts,
    number_of_prompts,
)

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
        method: EncodingMethod = "o-belm",
        timestep_spacing: Spacing | None = None,
        timesteps: Sequence[int] | None = None,
        resize: bool = False,
        gamma: float = 1.0,
        mixing: float = 0.93,
        tolerance: float = 1e-5,
        max_evaluations: int = 60,
        batch_size: int = 16,
    ) -> Code:
        """Finds the latents at the first level of images under a prompt; :meth:`decode` brings them
        back, or edits under another one.

        What comes back is the VAE's picture of the image: the VAE itself loses something, its code
        nothing more.

        Args:
            images: Pillow images, bytes [B, H, W, C] or [H, W, C], or a tensor in [-1, 1], [B, C,
                H, W].
            prompt: What the images show: one text for all, or one an image; the better it fits, the
                nearer to noise the code.
            num_inference_steps: N; None: 50.
            negative_prompt: As in a call.
            guidance_scale: 1 by default, unlike a call: guidance stretches the difference of two
                predictions w times and with it every error of a step, so guided codes of few steps
                lie far from noise, and ``fixed-point`` may find none.
            guidance_rescale: As in a call.
            prompt_embeds: As in a call.
            negative_prompt_embeds: As in a call.
            clip_skip: As in a call.
            guidance_batched: As in a call.
            method: As in :meth:`ddim.pipelines.unconditional.UnconditionalPipeline.encode`, and so
                are the following.
            timestep_spacing: As in a call.
            timesteps: As in a call.
            resize: Whether images of another size than the network's are resized (shorter side) and
                cut; otherwise any size is taken that the VAE takes.
            gamma: Of ``bdia``.
            mixing: Of ``edict``.
            tolerance: Of ``fixed-point``.
            max_evaluations: Of ``fixed-point``.
            batch_size: Images encoded together.

        Returns:
            The code of the latents, on the CPU.

        Raises:
            DDIMError: If images, prompts or options do not fit, or the method diverges.
        """
        self._require("vae", "unet")
        _refuse_number("encode", "images", prompt)
        place, sides = self._place(), self.image_shape[1:] if resize else picture_size(images)
        if 0 in sides:
            raise DDIMError("there are no images to encode.")
        check_size(*sides, self.vae_scale_factor)
        pictures = from_pictures(images, (int(self.vae.config.in_channels), *sides), resize=resize)
        levels = self.select_timesteps(
            num_inference_steps, timestep_spacing=timestep_spacing, timesteps=timesteps, order=1
        )
        size = max(1, batch_size)
        chunks = [
            encode_images(self, pictures[i : i + size], place.device).mean
            for i in range(0, len(pictures), size)
        ]
        x0 = torch.cat(chunks) if chunks else pictures
        denoiser = self._denoisers(
            len(x0),
            prompt,
            negative_prompt,
            guidance_scale,
            guidance_rescale,
            prompt_embeds,
            negative_prompt_embeds,
            clip_skip,
            guidance_batched,
        )
        code = self._encode(
            x0,
            levels,
            denoiser,
            method=method,
            gamma=gamma,
            mixing=mixing,
            tolerance=tolerance,
            max_evaluations=max_evaluations,
            batch_size=batch_size,
        )
        self.maybe_free_model_hooks()
        return code

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
        """Brings the images of a code back under the prompt that they were encoded with, or edits
        them under another one.

        Args:
            code: From :meth:`encode`, of this model.
            prompt: One text for all, or one an image.
            num_inference_steps: Other steps than the code's, which only a code of ``fixed-point``
                or ``ddim`` takes; None: the code's.
            negative_prompt: As in a call.
            guidance_scale: The encoder's to come back; more than that follows another prompt more
                closely.
            guidance_rescale: As in a call.
            prompt_embeds: As in a call.
            negative_prompt_embeds: As in a call.
            clip_skip: As in a call.
            guidance_batched: As in a call.
            timestep_spacing: Of those other steps.
            timesteps: Those.
            callback: As in a call.
            progress: As in a call.
            batch_size: Images decoded together.
            output_type: As in a call.

        Returns:
            The images: a list of Pillow images, an array [B, H, W, C], a tensor [B, C, H, W] in [0,
            1], or latents.

        Raises:
            DDIMError: If the code is of another model, or of other steps, or does not fit.
        """
        self._check_output_type(output_type)
        check_code(code)
        _refuse_number("decode", "code", prompt)
        channels = int(self.unet.config.in_channels)
        if code.x_T.ndim != 4 or code.x_T.shape[1] != channels:
            raise DDIMError(
                f"the model's latents have shape [B, {channels}, h, w]; the code's have "
                f"{list(code.x_T.shape)}."
            )
        levels = self._decoding_timesteps(
            code, num_inference_steps, timestep_spacing=timestep_spacing, timesteps=timesteps
        )
        denoiser = self._denoisers(
            len(code),
            prompt,
            negative_prompt,
            guidance_scale,
            guidance_rescale,
            prompt_embeds,
            negative_prompt_embeds,
            clip_skip,
            guidance_batched,
        )
        x = self._decode(
            code, levels, denoiser, callback=callback, progress=progress, batch_size=batch_size
        )
        return self._finish(x.float(), output_type, return_dict=True).images

    def _denoisers(
        self,
        count: int,
        prompt: Prompt | None,
        negative_prompt: Prompt | None,
        scale: float,
        rescale: float,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        clip_skip: int | None,
        batched: bool,
    ) -> Callable[[slice], ModelDenoiser]:
        """The denoiser of some of ``count`` images, without clipping, which cannot be undone."""
        prompts = number_of_prompts(prompt, prompt_embeds)
        if prompts not in (1, count):
            raise DDIMError(
                f"there are {prompts} prompts and {count} images; give one prompt for all, or one "
                "an image."
            )
        cond, uncond = encode_prompts(
            self,
            prompt,
            negative_prompt,
            place=self._place(),
            scale=scale,
            groups=count,
            each=1,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
        )

        def denoiser(chosen: slice) -> ModelDenoiser:
            conditions = Conditions(cond[chosen], None if uncond is None else uncond[chosen])
            return self.denoiser(
                conditions,
                guidance_scale=scale,
                guidance_rescale=rescale,
                guidance_batched=batched,
                clip="none",
            )

        return denoiser


def _refuse_number(name: str, first: str, prompt: Any) -> None:
    if isinstance(prompt, (int, np.integer)):
        raise DDIMError(
            f"a text model's {name} takes a prompt before the number of steps, {name}({first}, "
            f"prompt=..., num_inference_steps={prompt}); "
            f"got the prompt {prompt!r}."
        )
