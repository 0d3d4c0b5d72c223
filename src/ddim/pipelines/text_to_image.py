"""Text to image, and image to image: checkpoints in Stable Diffusion's format, sampled by this
package's loop.

Both are diffusers' pipelines with another call, whose arguments keep diffusers' names and places.
An argument that this loop does not know, another scheduler than DDIM, and a network that is told
the guidance scale go to diffusers' own call."""

from collections.abc import Sequence
from typing import Any, Literal, Unpack

import diffusers
import torch
from diffusers.pipelines import auto_pipeline
from diffusers.utils import is_transformers_available
from torch import Tensor

from ddim.core.noise import SeededNoise
from ddim.core.route import Route
from ddim.core.schedule import add_noise
from ddim.core.step import Eta
from ddim.core.timesteps import Spacing
from ddim.errors import DDIMError
from ddim.pipelines.base import Callback, Generators, Place, Source
from ddim.pipelines.routing import ClipOption, Sampler

if not is_transformers_available():
    raise ImportError(
        "text models need transformers, which is not installed; run: pip install 'ddim[text]'."
    )

from ddim.pipelines.calls import resolved
from ddim.pipelines.latent import StepEnd, WalkOptions
from ddim.pipelines.pictures import check_size, encode_images, prepare_images
from ddim.pipelines.prompts import GUIDANCE, Guidance, Prompt, Prompts, count_groups, given_lengths
from ddim.pipelines.text_codes import TextCodes

__all__ = ["ImageToImagePipeline", "TextToImagePipeline"]


class TextToImagePipeline(TextCodes, diffusers.StableDiffusionPipeline):  # type: ignore[misc]
    """Images of prompts, with DDIM: diffusers' ``StableDiffusionPipeline`` with this package's
    loop.

    Args:
        vae: AutoencoderKL, or one of its kind.
        text_encoder: CLIPTextModel.
        tokenizer: CLIPTokenizer.
        unet: UNet2DConditionModel.
        scheduler: Any scheduler of the DDIM family, or its configuration; replaced by a
            :class:`ddim.scheduler.DDIMScheduler`.
        safety_checker: As in diffusers.
        feature_extractor: As in diffusers.
        image_encoder: As in diffusers.
        requires_safety_checker: As in diffusers.
    """

    _exported = diffusers.StableDiffusionPipeline
    _other = ("ImageToImagePipeline", frozenset({"image", "strength"}))

    @torch.no_grad()
    @resolved
    def __call__(
        self,
        prompt: Prompt | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Prompt | None = None,
        num_images_per_prompt: int | None = None,
        eta: Eta = 0.0,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seeds: Sequence[int] | None = None,
        timestep_spacing: Spacing | None = None,
        order: int | None = None,
        clip: ClipOption = None,
        sampler: Sampler = "ddim",
        guidance_batched: bool = True,
        callback: Callback | None = None,
        progress: bool = True,
        **others: Any,
    ) -> Any:
        """Makes images of prompts.

        Args:
            prompt: One text, or a list.
            height: In pixels. Default: what the network was trained on.
            width: In pixels. Default: what the network was trained on.
            num_inference_steps: N. Default: 50.
            timesteps: The levels themselves, falling, in place of N and a spacing.
            sigmas: For diffusers' own call alone.
            guidance_scale: How far the prediction is led away from the negative prompt
                (:func:`ddim.core.guidance.guide`); 1 or less is off.
            negative_prompt: One text for all, or one a prompt. Default: the empty text.
            num_images_per_prompt: K. Default: as many as seeds, generators or latents ask for, else
                1. Image k of prompt p is number p K + k.
            eta: 0 deterministic, 1 DDPM, ``"sigma-hat"`` the paper's larger noise.
            generator: One an image; or one for all, drawn from image by image in turn, so that with
                eta > 0 an image depends on the size of its batch.
            latents: x_T, [B, C, h, w], in place of drawn noise.
            prompt_embeds: [P, L, D], in place of prompts.
            negative_prompt_embeds: [P, L, D], in place of negative prompts.
            ip_adapter_image: For diffusers' own call alone.
            ip_adapter_image_embeds: For diffusers' own call alone.
            output_type: ``pil``; float32 in [0, 1] as ``np`` [B, H, W, C] or ``pt`` [B, C, H, W];
                or ``latent``, as the network knows them.
            return_dict: Whether to return an object with ``images``, ``nsfw_content_detected`` and
                the images' ``seeds``, drawn or given, or a tuple of the first two.
            cross_attention_kwargs: For the network's attention, such as ``scale`` of LoRA weights.
            guidance_rescale: How far guided predictions get the spread of unguided ones, in [0, 1].
            clip_skip: Layers of the text encoder that are left out at its end.
            callback_on_step_end: diffusers' callback ``(pipe, number, t, tensors)``, which may
                return other tensors, change the pipe's ``_guidance_scale``, set its ``_interrupt``.
            callback_on_step_end_tensor_inputs: Which tensors it is given.
            seeds: One an image; the image of a seed and a prompt does not depend on the others.
                Gives x_T and all later noise.
            timestep_spacing: Which levels are visited. Default: as the configuration says.
            order: 1 DDIM, 2 its multistep. Default: as the configuration says.
            clip: What happens to the predicted latents. Default: as the configuration says.
            sampler: ``ddim``, or an exactly invertible one: ``o-belm``, ``bdia``, ``edict`` (eta 0,
                no clipping).
            guidance_batched: Whether the two predictions of guidance are one batch of the network,
                or one after the other: slower, in half of the memory.
            callback: Called with the latents' state after each step; True stops, with its ``x0``.
            progress: Whether to show a progress bar.
            **others: What diffusers' call takes beyond these: the call is then diffusers' own.

        Raises:
            DDIMError: If options exclude each other or do not fit the checkpoint, or a prediction
                is not finite.
            TypeError: If an argument is neither ours nor diffusers'.
        """

    @torch.no_grad()
    def draw(
        self,
        route: Route,
        prompts: Prompts,
        guidance: Guidance = GUIDANCE,
        *,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        num_images_per_prompt: int | None = None,
        seeds: Sequence[int] | None = None,
        generator: Generators | None = None,
        **options: Unpack[WalkOptions],
    ) -> Any:
        """Makes images of prompts along a route of :meth:`route`; the arguments mean what they mean
        in a call."""
        self._check_output_type(options.get("output_type", "pil"))
        source = Source(seeds, generator)
        lengths = given_lengths(source, latents)
        groups, each = count_groups(prompts.count, None, num_images_per_prompt, lengths)
        shape, place = self._latent_shape(height, width, latents), self._place()
        x, noise = self._start(groups * each, shape, place, source, latents)
        return self._draw(route, x, noise, prompts, guidance, place, **options)

    def _latent_shape(
        self, height: int | None, width: int | None, latents: Tensor | None
    ) -> tuple[int, ...]:
        """(C, h, w) of the latents of a call."""
        factor, channels = self.vae_scale_factor, int(self.unet.config.in_channels)
        if height is None or width is None:
            shape = self.latent_shape if latents is None else latents.shape
            own = [side * factor for side in shape[-2:]]
            height, width = own[0] if height is None else height, own[1] if width is None else width
        height, width = check_size(height, width, factor)
        shape = (channels, height // factor, width // factor)
        if latents is not None and (latents.ndim != 4 or tuple(latents.shape[1:]) != shape):
            wanted = ", ".join(map(str, shape))
            raise DDIMError(f"latents must have shape [B, {wanted}]; got {list(latents.shape)}.")
        return shape


class ImageToImagePipeline(
    TextCodes,
    diffusers.StableDiffusionImg2ImgPipeline,  # type: ignore[misc]
):
    """Images of prompts that begin at given images, with DDIM: diffusers'
    ``StableDiffusionImg2ImgPipeline`` with this package's loop.

    Its parts are those of :class:`TextToImagePipeline`: ``ImageToImagePipeline(**pipe.components)``
    shares them."""

    _exported = diffusers.StableDiffusionImg2ImgPipeline
    _other = ("TextToImagePipeline", frozenset({"height", "width", "latents"}))

    @torch.no_grad()
    @resolved
    def __call__(
        self,
        prompt: Prompt | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Prompt | None = None,
        num_images_per_prompt: int | None = None,
        eta: Eta = 0.0,
        generator: Generators | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        guidance_rescale: float = 0.0,
        seeds: Sequence[int] | None = None,
        timestep_spacing: Spacing | None = None,
        order: int | None = None,
        clip: ClipOption = None,
        sampler: Sampler = "ddim",
        guidance_batched: bool = True,
        callback: Callback | None = None,
        progress: bool = True,
        **others: Any,
    ) -> Any:
        """Makes images of prompts out of images: noised to a level, and sampled from there.

        Args:
            prompt: One text, or a list.
            image: One, or one a prompt; or several for one prompt. Pillow images, bytes, arrays and
                tensors in [0, 1], or latents, of any one size that the VAE takes.
            strength: In (0, 1]: how many of the N steps are walked, int(N strength) of them, from
                their first level. 1 keeps nothing of the image where that level has no signal.
            num_inference_steps: N. Default: 50.
            timesteps: The levels themselves, falling, in place of N and a spacing.
            sigmas: For diffusers' own call alone.
            guidance_scale: How far predictions are led from the negative prompt; 1 or less is off.
            negative_prompt: One text for all, or one a prompt. Default: the empty text.
            num_images_per_prompt: K. Default: as many as seeds or generators ask for, else 1.
            eta: 0 deterministic, 1 DDPM, ``"sigma-hat"`` the paper's larger noise.
            generator: One an image, or one for all.
            prompt_embeds: [P, L, D], in place of prompts.
            negative_prompt_embeds: [P, L, D], in place of negative prompts.
            ip_adapter_image: For diffusers' own call alone.
            ip_adapter_image_embeds: For diffusers' own call alone.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            return_dict: Whether to return an object, or a tuple.
            cross_attention_kwargs: For the network's attention, such as ``scale`` of LoRA weights.
            clip_skip: Layers of the text encoder that are left out at its end.
            callback_on_step_end: diffusers' callback ``(pipe, number, t, tensors)``.
            callback_on_step_end_tensor_inputs: Which tensors it is given.
            guidance_rescale: How far guided predictions get the spread of unguided ones, in [0, 1].
            seeds: One an image: gives the VAE's own noise, the first level's, and all later noise.
            timestep_spacing: Which levels are visited. Default: as the configuration says.
            order: 1 DDIM, 2 its multistep. Default: as the configuration says.
            clip: What happens to the predicted latents. Default: as the configuration says.
            sampler: ``ddim``, or an exactly invertible one: ``o-belm``, ``bdia``, ``edict``.
            guidance_batched: Whether the two predictions of guidance are one batch of the network.
            callback: Called with the state of the latents after each step; returning True stops.
            progress: Whether to show a progress bar.
            **others: What diffusers' call takes beyond these: the call is then diffusers' own.

        Raises:
            DDIMError: If options exclude each other or do not fit the checkpoint or the images, or
                a prediction is not finite.
            TypeError: If an argument is neither ours nor diffusers'.
        """

    @torch.no_grad()
    def draw(
        self,
        route: Route,
        prompts: Prompts,
        guidance: Guidance = GUIDANCE,
        *,
        image: Any,
        num_images_per_prompt: int | None = None,
        seeds: Sequence[int] | None = None,
        generator: Generators | None = None,
        **options: Unpack[WalkOptions],
    ) -> Any:
        """Makes images of prompts out of images, from the first level of a route of :meth:`route`
        on; the arguments mean what they mean in a call."""
        self._check_output_type(options.get("output_type", "pil"))
        self._require("vae")
        images = prepare_images(self, image)
        place, source = self._place(), Source(seeds, generator)
        lengths = given_lengths(source)
        groups, each = count_groups(prompts.count, len(images), num_images_per_prompt, lengths)
        x0, noise = self._first_latents(images, groups * each, place, source)
        x = add_noise(route.schedule, x0, noise(), route.timesteps[0])
        return self._draw(route, x, noise, prompts, guidance, place, **options)

    def _first_latents(
        self, given: Tensor, count: int, place: Place, source: Source
    ) -> tuple[Tensor, SeededNoise]:
        """Clean latents [B, C, h, w] of images, drawn from the VAE's posterior, and the stream of
        later noise."""
        is_latent = given.shape[1] != self.vae.config.in_channels
        mean, std = (given.float(), None) if is_latent else encode_images(self, given, place.device)
        shape, mean = mean.shape[1:], mean.to(place.device)
        noise = self._noise(count, shape, place, source)

        def for_all(values: Tensor) -> Tensor:
            return values.repeat_interleave(count // len(given), 0).to(noise.dtype)

        if std is None:
            return for_all(mean), noise
        if isinstance(source.generator, torch.Generator):
            # As diffusers draws from one: for each image that is given, not for each that is made.
            drawn = self._noise(len(given), shape, place, source)()
            return for_all(mean + std * drawn), noise
        return for_all(mean) + for_all(std) * noise(), noise


# What diffusers' AutoPipelineForText2Image and its siblings are asked for by from_pipe: the
# pipelines under one key do one another's tasks.
auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["ddim"] = TextToImagePipeline
auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["ddim"] = ImageToImagePipeline
auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING["ddim"] = diffusers.StableDiffusionInpaintPipeline
