"""What text-to-image and image-to-image share: the parts of a checkpoint, the guided walk of
latents, and the VAE.

:class:`StableDiffusion` is put before one of diffusers' pipelines, whose loaders, adapters,
offloading and variants it leaves as they are. Guidance wraps the network, on its raw outputs
(:mod:`ddim.core.guidance`); the state between the steps is float32 whatever the network's dtype;
each image has noise of its own seed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, Unpack, cast

import diffusers
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

from ddim.core.checks import check_kind, wrong_argument
from ddim.core.denoiser import ModelDenoiser
from ddim.core.guidance import guided
from ddim.core.noise import SeededNoise
from ddim.core.route import Route
from ddim.core.sampler import State, walk
from ddim.errors import CheckpointError, DDIMError, DivergenceError
from ddim.models.checkpoints import STABLE_DIFFUSION, load_pipeline, read_model_index
from ddim.models.export import to_diffusers
from ddim.pipelines.base import (
    Callback,
    Place,
    find_pretrained,
    name_origin,
    read_single_index,
    with_seeds,
)
from ddim.pipelines.cards import keep_card, save_card
from ddim.pipelines.coding import Coding
from ddim.pipelines.networks import acting, mark_loaded, prepare_walk
from ddim.pipelines.prompts import Conditions, Guidance, Prompt, Prompts, encode_prompts
from ddim.pipelines.recording import network_call
from ddim.pipelines.routing import ClipOption
from ddim.scheduler import as_ddim

__all__ = ["StableDiffusion", "StepEnd", "WalkOptions"]

StepEnd = Callable[..., dict[str, Any]]


class WalkOptions(TypedDict, total=False):
    """Options of a call that act during a walk and after it; their defaults are the call's."""

    cross_attention_kwargs: Mapping[str, Any] | None
    callback: Callback | None
    callback_on_step_end: StepEnd | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    progress: bool
    output_type: Literal["pil", "np", "pt", "latent"]
    return_dict: bool


class StableDiffusion(Coding):
    """What both pipelines share; the class after it in the order of resolution is diffusers'."""

    _exported: type
    """The class of diffusers that is written into a saved folder."""
    _other: tuple[str, frozenset[str]]
    """The other of both pipelines, and the arguments that only its call takes."""

    # Of diffusers' pipeline:
    config: Any
    components: dict[str, Any]
    vae: Any
    tokenizer: Any
    image_processor: Any
    vae_scale_factor: int
    safety_checker: Any
    run_safety_checker: Callable[..., Any]
    set_progress_bar_config: Callable[..., None]
    _callback_tensor_inputs: list[str]

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ) -> None:
        what = "a network, such as diffusers' UNet2DConditionModel"
        check_kind("unet", unet, (torch.nn.Module, type(None)), what)
        for name, part, method in (
            ("vae", vae, "decode"),
            ("text_encoder", text_encoder, "forward"),
            ("tokenizer", tokenizer, "__call__"),
            ("safety_checker", safety_checker, "forward"),
            ("feature_extractor", feature_extractor, "__call__"),
            ("image_encoder", image_encoder, "forward"),
        ):
            if part is not None and not hasattr(part, method):
                raise wrong_argument(name, f"be a {name} of a pipeline, or None", part)
        ours = as_ddim(scheduler)
        # Only leading knows an offset, and diffusers would warn of 0 all the same.
        if ours.config.timestep_spacing != "leading":
            ours.register_to_config(steps_offset=1)
        others = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        parts = (vae, text_encoder, tokenizer, unet, ours, *others)
        super().__init__(*parts)  # type: ignore[call-arg]

    # diffusers reads them, to tell which parts of one pipeline go into another.
    __init__.__annotations__.update(diffusers.StableDiffusionPipeline.__init__.__annotations__)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Opens a checkpoint in Stable Diffusion's format.

        Args:
            pretrained_model_name_or_path: An embedded model's name, a folder in diffusers format,
                or a hub id.
            **options: diffusers' ones, such as dtype (or torch_dtype), variant, and parts by name.

        Raises:
            CheckpointError: If the model cannot be found or opened, is of another kind, or lacks a
                part.
        """
        folder = find_pretrained(pretrained_model_name_or_path, options)
        index = read_model_index(folder, given=options)
        if (kind := index.get("_class_name")) not in STABLE_DIFFUSION:
            raise CheckpointError(
                f"{folder} is a {kind}, not in Stable Diffusion's format; open it with "
                "ddim.DiffusionPipeline."
            )
        load = super().from_pretrained  # type: ignore[misc]
        pipe: Any = load_pipeline(load, folder, index, **options)
        loaded = (getattr(pipe, name, None) for name in ("unet", "vae") if name not in options)
        mark_loaded(*(part for part in loaded if part is not None))
        name_origin(pipe, folder)
        keep_card(pipe, folder, options)
        return cast(Self, pipe)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | Path, **options: Any) -> Self:
        """Opens a checkpoint in one file; arguments as of diffusers' method. A CheckpointError
        refuses a ``config`` that names code."""
        link = str(pretrained_model_link_or_path)
        if options.get("config") is not None:
            read_single_index(link, options)
        return cast(Self, super().from_single_file(link, **options))  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes a folder that plain diffusers opens as its own pipeline, with the card of the
        model that was opened, unless its weights were changed; options as diffusers'
        ``save_pretrained``. A DDIMError refuses a configuration that diffusers does not know."""
        parts = {**self.components, "scheduler": None}  # one that diffusers is given it would edit
        plain = self._exported(**parts, requires_safety_checker=False)
        plain.register_modules(scheduler=to_diffusers(self.scheduler))
        plain.register_to_config(requires_safety_checker=self.config.requires_safety_checker)
        save_card(self, save_directory)
        plain.save_pretrained(save_directory, **options)

    @property
    def guidance_rescale(self) -> float:
        """The rescale of the running call, for callbacks."""
        return self._guidance_rescale

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures that the network was trained on; a DDIMError if its
        configuration has no size, or the checkpoint no VAE."""
        _, height, width = self.latent_shape
        self._require("vae")
        factor = self.vae_scale_factor
        return int(self.vae.config.out_channels), height * factor, width * factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents that the network was trained on; a DDIMError if its
        configuration has no size."""
        size = self.unet.config.sample_size
        if size is None:
            raise DDIMError(
                "the network's configuration has no sample_size; give height and width."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.unet.config.in_channels), int(height), int(width)

    @torch.no_grad()
    def conditions(
        self, prompt: Prompt, negative_prompt: Prompt | None = None, *, guidance_scale: float = 7.5
    ) -> Conditions:
        """What :meth:`denoiser` is told of the images of prompts, one of each; guidance off needs
        no negative prompts."""
        prompts = Prompts(prompt, negative_prompt)
        return encode_prompts(self, prompts, self._place(), prompts.count, guidance_scale)

    def denoiser(
        self,
        conditions: Conditions,
        *,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_batched: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        clip: ClipOption = None,
    ) -> ModelDenoiser:
        """What a call with these options samples with, on latents: (x_t, t) -> (x0, eps) for the
        images of the conditions. A DDIMError refuses another kind of network, and guidance away
        from nothing."""
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_batched)
        network = self._guided(conditions, guidance, cross_attention_kwargs)
        return self._model(network, clip, self.unet.dtype)

    def _guided(
        self,
        conditions: Conditions,
        guidance: Guidance,
        cross_attention_kwargs: Mapping[str, Any] | None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        unet = self.unet
        if unet.config.in_channels != unet.config.out_channels:
            raise DDIMError(
                f"the network takes {unet.config.in_channels} channels and returns "
                f"{unet.config.out_channels}: it is one for inpainting, depth or the like; open "
                "the checkpoint with ddim.DiffusionPipeline, which takes the pipeline it names."
            )
        if unet.config.encoder_hid_dim_type is not None:
            raise DDIMError(
                "the network has an IP-adapter, which wants an image: give a call ip_adapter_image "
                "or ip_adapter_image_embeds, or take the adapter off with unload_ip_adapter()."
            )
        options: dict[str, Any] = {}
        if cross_attention_kwargs is not None:
            options["cross_attention_kwargs"] = cross_attention_kwargs
        predict = network_call(unet, records=self._records, **options)
        return guided(predict, *conditions, **vars(guidance))

    @torch.no_grad()
    def warm_up(self, batch_size: int = 1, *, guidance_scale: float = 7.5) -> None:
        """Evaluates the network and drops the result, so that allocations and a compilation
        happen here."""
        width = self.unet.config.cross_attention_dim
        place = self._place()
        empty = torch.zeros(batch_size, 1, width, device=place.device, dtype=place.dtype)
        length = self.tokenizer.model_max_length if self.tokenizer is not None else 77
        conditions = Conditions(*[empty.expand(-1, length, -1)] * 2)
        x = torch.zeros(batch_size, *self.latent_shape, device=place.device)
        self._warm_up(self.denoiser(conditions, guidance_scale=guidance_scale, clip="none"), x)

    def _draw(
        self,
        route: Route,
        x: Tensor,
        noise: SeededNoise,
        prompts: Prompts,
        guidance: Guidance,
        place: Place,
        **options: Unpack[WalkOptions],
    ) -> Any:
        """Walks latents along a route to clean data, and finishes them."""
        on_step_end = options.get("callback_on_step_end")
        attention = options.get("cross_attention_kwargs")
        self._clip_skip, self._cross_attention_kwargs = prompts.clip_skip, attention
        self._guidance_scale, self._guidance_rescale = guidance.scale, guidance.rescale
        self._interrupt, self._num_timesteps = False, len(route)
        scales = guidance.scale, (attention or {}).get("scale")
        conditions = encode_prompts(self, prompts, place, len(x), *scales)
        if on_step_end is None:
            network = self._guided(conditions, guidance, attention)
            states = self._states(self._model(network, route.clip, place.dtype), x, route, noise)
        else:
            names = options.get("callback_on_step_end_tensor_inputs", ("latents",))
            names = self._check_step_end(on_step_end, names, route)
            how = (conditions, place.dtype, guidance.batched, on_step_end, names)
            states = self._steered(route, x, noise, *how)
        callback, progress = options.get("callback"), options.get("progress", True)
        x = self._walk(states, x, len(route), callback, progress)
        output_type = options.get("output_type", "pil")
        finished = self._finish(x, output_type, options.get("return_dict", True))
        return with_seeds(finished, noise.seeds)

    def _check_step_end(
        self, on_step_end: StepEnd, inputs: Sequence[str], route: Route
    ) -> Sequence[str]:
        """The tensors that diffusers' callback is given, unless it asks for what there is not."""
        if route.sampler != "ddim":
            raise DDIMError(
                f"callback_on_step_end may change latents, and {route.sampler} looks two steps "
                "back; use callback with it."
            )
        inputs = getattr(on_step_end, "tensor_inputs", inputs)  # of diffusers' PipelineCallback
        name, known = "callback_on_step_end_tensor_inputs", self._callback_tensor_inputs
        if unknown := sorted(set(inputs) - set(known)):
            raise DDIMError(f"{name} must be of {known}; got {unknown}.")
        return inputs

    def _steered(
        self,
        route: Route,
        x: Tensor,
        noise: Callable[[], Tensor],
        conditions: Conditions,
        dtype: torch.dtype,
        batched: bool,
        on_step_end: StepEnd,
        inputs: Sequence[str],
    ) -> Iterator[State]:
        """The trajectory with diffusers' callback, which may replace latents and embeddings, change
        the guidance, or interrupt."""

        def guide() -> Callable[[Tensor, Tensor], Tensor]:
            guidance = Guidance(self._guidance_scale, self._guidance_rescale, batched)
            return self._guided(conditions, guidance, self._cross_attention_kwargs)

        network, state = guide(), None
        denoise = self._model(lambda x_t, t: network(x_t, t), route.clip, dtype)
        for number, t in enumerate(route.timesteps):
            step = route[number : number + 1]
            (state,) = walk(denoise, x, step, noise=noise, previous=state)
            cond, uncond = conditions
            both = cond if uncond is None else torch.cat([uncond, cond])
            held = {"latents": state.x_s, "prompt_embeds": both, "negative_prompt_embeds": uncond}
            before = self._guidance_scale, self._guidance_rescale
            given = {name: held[name] for name in inputs}
            changed = on_step_end(self, number, torch.tensor(t), given) or {}
            x = changed.get("latents", state.x_s).to(state.x_s.dtype)
            state = state._replace(x_s=x)
            embeds = changed.get("prompt_embeds", both)
            if embeds is not both or before != (self._guidance_scale, self._guidance_rescale):
                halves = embeds.chunk(2) if len(embeds) == 2 * len(x) else (None, embeds)
                conditions = Conditions(halves[1], halves[0])
                network = guide()
            yield state
            if self._interrupt:
                return

    def _finish(self, latents: Tensor, output_type: str, return_dict: bool) -> Any:
        """Pictures of finished latents."""
        images, flags = latents, None
        if output_type != "latent":
            images = self._pictures(latents)
            if self.safety_checker is not None:
                images, flags = self.run_safety_checker(images, *self._place())
            # A blacked-out picture is in [0, 1] already.
            safe = [not flag for flag in flags] if flags else [True] * len(images)
            images = self.image_processor.postprocess(
                images, output_type=output_type, do_denormalize=safe
            )
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flags
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flags)

    def _pictures(self, latents: Tensor) -> Tensor:
        """The VAE's pictures of latents, float32, about [-1, 1]."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        prepare_walk(self.vae)
        with acting(self.vae):
            decoded: Tensor = self.vae.decode(scaled, return_dict=False)[0].float()
        if not bool(torch.isfinite(decoded).all()):
            raise DivergenceError(
                f"the VAE's picture became NaN or infinite in {self.vae.dtype}; keep the VAE in "
                "float32: pipe.vae.to(torch.float32)."
            )
        return decoded

    def _require(self, *names: str) -> None:
        if missing := [name for name in names if getattr(self, name, None) is None]:
            raise CheckpointError(
                f"the checkpoint has no {' and no '.join(missing)}; open one that has, or give it "
                "to from_pretrained."
            )

    def _check_output_type(self, output_type: str) -> None:
        if not isinstance(output_type, str) or output_type not in ("pil", "np", "pt", "latent"):
            raise wrong_argument("output_type", "be pil, np, pt or latent", output_type)
        self._require("unet", *[] if output_type == "latent" else ["vae"])
