"""What text-to-image and image-to-image share: the parts of a checkpoint, the guided walk of
latents, and the VAE.

:class:`StableDiffusion` is put before one of diffusers' pipelines, whose loaders, adapters,
offloading and variants it leaves as they are. Guidance wraps the network, on its raw outputs
(:mod:`ddim.core.guidance`); the state between the steps is float32 whatever the network's dtype;
each image has noise of its own seed."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

from ddim.core.denoiser import ModelDenoiser
from ddim.core.guidance import check_rescale, guided, is_guided
from ddim.core.noise import make_generators
from ddim.core.route import Route
from ddim.core.sampler import State, walk
from ddim.errors import CheckpointError, DDIMError, DivergenceError
from ddim.models.checkpoints import STABLE_DIFFUSION, find_model, load_pipeline, read_model_index
from ddim.models.export import to_diffusers
from ddim.pipelines.base import HUB_OPTIONS, Sampling
from ddim.pipelines.networks import kept, lay_out
from ddim.pipelines.routing import ClipOption
from ddim.pipelines.text_inputs import (
    Conditions,
    count_images,
    encode_prompts,
    given_lengths,
    number_of_prompts,
    warn_of_no_guidance,
)
from ddim.scheduler import as_ddim

__all__ = ["Callback", "Prompt", "StableDiffusion", "StepEnd"]

Prompt = str | Sequence[str]
Callback = Callable[[State], bool | None]
StepEnd = Callable[..., dict[str, Any]]


class StableDiffusion(Sampling):
    """What both pipelines share; the class after it in the order of resolution is diffusers'
    pipeline."""

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
    maybe_free_model_hooks: Callable[[], None]
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
        ours = as_ddim(scheduler)
        if (
            ours.config.timestep_spacing != "leading"
        ):  # the only one that knows an offset: diffusers would warn of 0 all the same
            ours.register_to_config(steps_offset=1)
        super().__init__(  # type: ignore[call-arg]
            vae,
            text_encoder,
            tokenizer,
            unet,
            ours,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )

    # diffusers reads them, to tell which parts of one pipeline go into another.
    __init__.__annotations__.update(diffusers.StableDiffusionPipeline.__init__.__annotations__)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """Opens a checkpoint in Stable Diffusion's format.

        Args:
            pretrained_model_name_or_path: An embedded model's name, a folder in diffusers format,
                or a hub id.
            **options: Of diffusers' ``from_pretrained``: dtype (or torch_dtype), variant, the parts
                by their names, ...

        Raises:
            CheckpointError: If the model cannot be found or opened, is of another kind, or lacks a
                part.
        """
        folder = find_model(
            pretrained_model_name_or_path, **{k: options[k] for k in HUB_OPTIONS if k in options}
        )
        kind = read_model_index(folder).get("_class_name")
        if kind not in STABLE_DIFFUSION:
            raise CheckpointError(
                f"{folder} is a {kind}, not in Stable Diffusion's format; open it with "
                "ddim.DiffusionPipeline."
            )
        pipe = load_pipeline(super().from_pretrained, folder, **options)  # type: ignore[misc]
        lay_out(*(getattr(pipe, name) for name in ("unet", "vae") if name not in options))
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes a folder that plain diffusers opens as its own pipeline; options as diffusers'
        ``save_pretrained``.

        Raises:
            DDIMError: If the scheduler's configuration says what diffusers does not know.
        """
        parts = {**self.components, "scheduler": None}  # one that diffusers is given it would edit
        plain = self._exported(**parts, requires_safety_checker=False)
        plain.register_modules(scheduler=to_diffusers(self.scheduler))
        plain.register_to_config(requires_safety_checker=self.config.requires_safety_checker)
        plain.save_pretrained(save_directory, **options)

    @property
    def guidance_rescale(self) -> float:
        """Of the running call, for callbacks."""
        return self._guidance_rescale

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures that the network was trained on.

        Raises:
            DDIMError: If the network's configuration has no size, or the checkpoint no VAE.
        """
        _, height, width = self.latent_shape
        self._require("vae")
        return (
            int(self.vae.config.out_channels),
            height * self.vae_scale_factor,
            width * self.vae_scale_factor,
        )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents that the network was trained on.

        Raises:
            DDIMError: If the network's configuration has no size.
        """
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
        count = number_of_prompts(prompt, None)
        return encode_prompts(
            self,
            prompt,
            negative_prompt,
            place=self._place(),
            scale=guidance_scale,
            groups=count,
            each=1,
        )

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
        images of the conditions.

        Raises:
            DDIMError: If the network is not of this kind, or guidance lacks what it leads away
                from.
        """
        network = self._guided(
            conditions, guidance_scale, guidance_rescale, guidance_batched, cross_attention_kwargs
        )
        return self._model(network, clip, self.unet.dtype)

    def _model(
        self, network: Callable[[Tensor, Tensor], Tensor], clip: ClipOption, dtype: torch.dtype
    ) -> ModelDenoiser:
        return ModelDenoiser(
            network,
            self.noise_schedule,
            self._options.prediction_type,
            self.select_clip(clip),
            dtype,
        )

    def _guided(
        self,
        conditions: Conditions,
        scale: float,
        rescale: float,
        batched: bool,
        cross_attention_kwargs: Mapping[str, Any] | None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        unet = self.unet
        if unet.config.in_channels != unet.config.out_channels:
            raise DDIMError(
                f"the network takes {unet.config.in_channels} channels and returns "
                f"{unet.config.out_channels}: it is one for inpainting, "
                "depth or the like; open the checkpoint with ddim.DiffusionPipeline, which takes "
                "the pipeline that it names."
            )
        if unet.config.encoder_hid_dim_type is not None:
            raise DDIMError(
                "the network has an IP-adapter, which wants an image: give a call ip_adapter_image "
                "or ip_adapter_image_embeds, or take the "
                "adapter off with unload_ip_adapter()."
            )
        options = {"return_dict": False} | (
            {}
            if cross_attention_kwargs is None
            else {"cross_attention_kwargs": cross_attention_kwargs}
        )

        def predict(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            # One layout at every step: a compiled network is compiled again for each new one, and
            # states inherit theirs from outputs.
            return kept(unet(x_t.contiguous(), t, condition, **options)[0], unet)

        return guided(predict, *conditions, scale=scale, rescale=rescale, batched=batched)

    @torch.no_grad()
    def warm_up(self, batch_size: int = 1, *, guidance_scale: float = 7.5) -> None:
        """Evaluates the network and drops the result: allocations, and a compilation if there is
        one, happen here."""
        width = self.unet.config.cross_attention_dim
        place = self._place()
        empty = torch.zeros(batch_size, 1, width, device=place.device, dtype=place.dtype)
        length = self.tokenizer.model_max_length if self.tokenizer is not None else 77
        conditions = Conditions(*[empty.expand(-1, length, -1)] * 2)
        x = torch.zeros(batch_size, *self.latent_shape, device=place.device)
        self._warm_up(self.denoiser(conditions, guidance_scale=guidance_scale, clip="none"), x)

    # --- the call

    def _why_elsewhere(self, others: Mapping[str, Any]) -> str | None:
        """What sends a call to diffusers' own loop: an argument, or a part, that this one does not
        know; None: it is sampled here."""
        self._require("unet", "scheduler")
        if not hasattr(self.scheduler, "init_noise_sigma"):
            raise DDIMError(
                f"a {type(self.scheduler).__name__} walks no noise schedule of DDIM's family, so "
                "this pipeline cannot use it; "
                "set pipe.scheduler to a ddim.DDIMScheduler, or to another scheduler of diffusers "
                "for such models."
            )
        if others:
            unknown = sorted(
                set(others)
                - {*inspect.signature(self._exported.__call__).parameters, "callback_steps"}
            )
            if unknown:
                name, its_own = self._other
                hint = (
                    f"; {name} takes it, and {name}(**pipe.components) is one of the same parts"
                    if unknown[0] in its_own
                    else ""
                )
                raise TypeError(
                    f"{type(self).__name__} got an unexpected keyword argument {unknown[0]!r}{hint}"
                )
            return next(iter(others))
        if not isinstance(self.scheduler, diffusers.DDIMScheduler):
            return f"a {type(self.scheduler).__name__}"
        return (
            "a network that is told the guidance scale"
            if self.unet.config.time_cond_proj_dim is not None
            else None
        )

    @staticmethod
    def _refuse_elsewhere(reason: str, **ours: Any) -> None:
        """Refuses what diffusers' own loop does not know."""
        given = [name for name, value in ours.items() if value is not None]
        if given:
            raise DDIMError(
                f"{reason} is sampled by diffusers' own loop, which does not know "
                f"{', '.join(given)}; leave out one or the other."
            )

    @contextlib.contextmanager
    def _elsewhere(
        self,
        options: dict[str, Any],
        *,
        rescale: float,
        seeds: Sequence[int] | None,
        callback: Callable[..., Any] | None,
        progress: bool,
    ) -> Iterator[dict[str, Any]]:
        """Checks what diffusers' own call would not, and yields the arguments of that call; while
        held, its bar is shown as asked."""
        prompts = number_of_prompts(options["prompt"], options["prompt_embeds"])
        lengths = given_lengths(
            seeds=seeds, generator=options["generator"], latents=options.get("latents")
        )
        self._check_output_type(options["output_type"])
        check_rescale(rescale)
        away = (
            options["negative_prompt"] is not None or options["negative_prompt_embeds"] is not None
        )
        if away and not is_guided(options["guidance_scale"]):
            warn_of_no_guidance(options["guidance_scale"], stacklevel=6)
        given = options | {
            "num_inference_steps": options["num_inference_steps"] or 50,
            "num_images_per_prompt": count_images(
                prompts, None, options["num_images_per_prompt"], lengths
            )[1],
            "callback_on_step_end_tensor_inputs": list(
                options["callback_on_step_end_tensor_inputs"]
            ),
            **({} if seeds is None else {"generator": make_generators(seeds)}),
            **({} if callback is None else {"callback": callback}),
        }
        before = dict(getattr(self, "_progress_bar_config", {}))
        if not progress:
            self.set_progress_bar_config(**{**before, "disable": True})
        try:
            yield given
        finally:
            self.set_progress_bar_config(**before)

    def _sample(
        self,
        route: Route,
        x: Tensor,
        conditions: Conditions,
        noise: Callable[[], Tensor],
        dtype: torch.dtype,
        *,
        scale: float,
        rescale: float,
        batched: bool,
        cross_attention_kwargs: Mapping[str, Any] | None,
        callback: Callback | None,
        on_step_end: StepEnd | None,
        inputs: Sequence[str],
        progress: bool,
    ) -> Tensor:
        """Walks latents along a route to clean data."""
        self._guidance_scale, self._guidance_rescale, self._interrupt = scale, rescale, False
        self._cross_attention_kwargs, self._num_timesteps = cross_attention_kwargs, len(route)
        if on_step_end is None:
            network = self._guided(conditions, scale, rescale, batched, cross_attention_kwargs)
            states = self._states(self._model(network, route.clip, dtype), x, route, noise)
        else:
            if route.sampler != "ddim":
                raise DDIMError(
                    f"callback_on_step_end may change latents, and {route.sampler} looks two steps "
                    "back; use callback with it."
                )
            inputs = getattr(on_step_end, "tensor_inputs", inputs)  # of diffusers' PipelineCallback
            unknown = sorted(set(inputs) - set(self._callback_tensor_inputs))
            if unknown:
                raise DDIMError(
                    "callback_on_step_end_tensor_inputs must be of "
                    f"{self._callback_tensor_inputs}; got {unknown}."
                )
            states = self._steered(
                route, x, conditions, noise, dtype, batched, on_step_end=on_step_end, inputs=inputs
            )
        return self._walk(states, x, len(route), callback=callback, progress=progress)

    def _steered(
        self,
        route: Route,
        x: Tensor,
        conditions: Conditions,
        noise: Callable[[], Tensor],
        dtype: torch.dtype,
        batched: bool,
        *,
        on_step_end: StepEnd,
        inputs: Sequence[str],
    ) -> Iterator[State]:
        """The trajectory with diffusers' callback, which may replace latents and embeddings, change
        the guidance, or interrupt."""

        def guide() -> Callable[[Tensor, Tensor], Tensor]:
            return self._guided(
                conditions,
                self._guidance_scale,
                self._guidance_rescale,
                batched,
                self._cross_attention_kwargs,
            )

        network, state = guide(), None
        denoise = self._model(lambda x_t, t: network(x_t, t), route.clip, dtype)
        for number, t in enumerate(route.timesteps):
            step = route[number : number + 1]
            (state,) = walk(denoise, x, step, noise=noise, previous=state)
            cond, uncond = conditions
            both = cond if uncond is None else torch.cat([uncond, cond])
            held = {
                "latents": state.x_s,
                "prompt_embeds": both,
                "negative_prompt_embeds": uncond,
            }
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
        images: Any = latents if output_type == "latent" else self._pictures(latents)
        flags = None
        if output_type != "latent":
            if self.safety_checker is not None:
                images, flags = self.run_safety_checker(images, *self._place())
            safe = (
                [not flag for flag in flags] if flags else [True] * len(images)
            )  # a blacked-out picture is in [0, 1] already
            images = self.image_processor.postprocess(
                images, output_type=output_type, do_denormalize=safe
            )
        self.maybe_free_model_hooks()
        return (
            StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flags)
            if return_dict
            else (images, flags)
        )

    def _pictures(self, latents: Tensor) -> Tensor:
        """The VAE's pictures of latents, float32, about [-1, 1]."""
        decoded: Tensor = self.vae.decode(
            (latents / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False
        )[0].float()
        if not bool(torch.isfinite(decoded).all()):
            raise DivergenceError(
                f"the VAE's picture became NaN or infinite in {self.vae.dtype}; keep the VAE in "
                "float32: pipe.vae.to(torch.float32)."
            )
        return decoded

    def _require(self, *names: str) -> None:
        missing = [name for name in names if getattr(self, name, None) is None]
        if missing:
            raise CheckpointError(
                f"the checkpoint has no {' and no '.join(missing)}; open one that has, or give it "
                "to from_pretrained."
            )

    def _check_output_type(self, output_type: str) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise DDIMError(f"output_type must be pil, np, pt or latent; got {output_type!r}.")
        self._require("unet", *[] if output_type == "latent" else ["vae"])
