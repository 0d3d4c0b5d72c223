"""Images of an unconditional or class-conditional network: diffusers' ``DDIMPipeline`` on this
package's core."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import ImagePipelineOutput
from torch import Tensor

from ddim.bounds import MOST_IMAGES
from ddim.core.checks import check_choice, check_kind, check_whole
from ddim.core.denoiser import ModelDenoiser
from ddim.core.noise import SeededNoise
from ddim.core.prior import DataPrior
from ddim.core.route import Route
from ddim.core.step import Eta
from ddim.core.timesteps import Spacing
from ddim.errors import CheckpointError, DDIMError
from ddim.inversion.codes import Code, EncodingMethod, check_code, default_method
from ddim.inversion.encoding import Encoder
from ddim.models.checkpoints import (
    is_unconditional,
    load_network,
    load_pipeline,
    read_model_index,
    read_scheduler_config,
)
from ddim.models.export import to_diffusers
from ddim.models.images import from_pictures, to_pil, to_uint8
from ddim.pipelines.base import (
    HUB_OPTIONS,
    LOADING_OPTIONS,
    Callback,
    Generators,
    Source,
    find_pretrained,
    name_origin,
    with_seeds,
)
from ddim.pipelines.cards import keep_card, save_card
from ddim.pipelines.coding import Coding
from ddim.pipelines.foreign import foreign_states, set_levels, step_options, take_levels
from ddim.pipelines.inputs import (
    Labels,
    as_labels,
    as_network,
    check_latents,
    check_network,
    count_images,
    read_image_shape,
    takes_labels,
)
from ddim.pipelines.networks import mark_loaded, mention_precision
from ddim.pipelines.routing import ClipOption, Sampler, reconfigured
from ddim.scheduler import as_ddim

__all__ = ["UnconditionalPipeline"]

Dtypes = torch.dtype | dict[str, torch.dtype] | None


class UnconditionalPipeline(Coding, diffusers.DiffusionPipeline):  # type: ignore[misc]
    """Images from noise, with DDIM: an unconditional or class-conditional network and its
    scheduler.

    What diffusers' pipelines do is inherited: ``.to``, offloading, ``set_progress_bar_config``. The
    state is float32 whatever the network's dtype, and the scheduler's configuration is read at each
    call.

    Args:
        unet: A network called as ``unet(x, t, class_labels)``; ``UNet2DModel`` as a rule.
        scheduler: Any scheduler of the DDIM family, or its configuration; replaced by a
            :class:`ddim.scheduler.DDIMScheduler`.

    Raises:
        DDIMError: If ``unet`` is no network, or the scheduler is of another family.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: torch.nn.Module, scheduler: Any) -> None:
        super().__init__()
        check_kind("unet", unet, torch.nn.Module, "a network, such as diffusers' UNet2DModel")
        self.register_modules(unet=unet, scheduler=as_ddim(scheduler))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: Dtypes = None,
        torch_dtype: Dtypes = None,
        unet: torch.nn.Module | None = None,
        scheduler: Any = None,
        variant: str | None = None,
        **options: Any,
    ) -> "UnconditionalPipeline":
        """Opens an unconditional model.

        Args:
            pretrained_model_name_or_path: An embedded model's name, a folder in diffusers format, a
                network's own folder, or a hub id.
            dtype: The network's, or a dictionary with it as ``unet`` or ``default``. Default:
                float32.
            torch_dtype: The same, under its older name.
            unet: A network to take in place of the checkpoint's.
            scheduler: A scheduler to take in place of the checkpoint's.
            variant: The weight files', such as ``fp16``.
            **options: What is downloaded (:data:`ddim.pipelines.base.HUB_OPTIONS`), and how it is
                loaded (:data:`ddim.pipelines.base.LOADING_OPTIONS`), such as ``device_map``.

        Raises:
            CheckpointError: If the model cannot be found or opened, or is of another kind.
        """
        if unknown := sorted(set(options) - {*HUB_OPTIONS, *LOADING_OPTIONS}):
            method = "UnconditionalPipeline.from_pretrained()"
            raise TypeError(f"{method} got an unexpected keyword argument {unknown[0]!r}")
        folder = find_pretrained(pretrained_model_name_or_path, {**options, "variant": variant})
        parts = {"unet": unet, "scheduler": scheduler}
        given = {name: part for name, part in parts.items() if part is not None}
        index = read_model_index(folder, given=given)
        if not is_unconditional(index):
            raise CheckpointError(
                f"{folder} is a {index.get('_class_name')}, which needs more than a network and a "
                "scheduler; open it with ddim.DiffusionPipeline.from_pretrained."
            )
        config = read_scheduler_config(folder) if scheduler is None else scheduler
        dtype = dtype or torch_dtype
        if isinstance(dtype, dict):
            dtype = dtype.get("unet", dtype.get("default"))
        if loading := {name: options[name] for name in LOADING_OPTIONS if name in options}:
            parts = {"scheduler": as_ddim(config), **({} if unet is None else {"unet": unet})}
            loading |= {"dtype": dtype, "variant": variant, **parts}
            pipe = load_pipeline(super().from_pretrained, folder, index, **loading)
        else:
            network = unet or load_network(folder, dtype=dtype, variant=variant)
            pipe = cls(network, config)
        if unet is None:
            mark_loaded(pipe.unet)
        name_origin(pipe, folder)
        keep_card(pipe, folder, given)
        return pipe  # type: ignore[no-any-return]

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes a ``DDIMPipeline`` that plain diffusers opens, with the card and the prior of the
        model that was opened, unless its weights were changed; options as diffusers'."""
        plain = diffusers.DDIMPipeline(unet=self.unet, scheduler=to_diffusers(self.scheduler))
        save_card(self, save_directory)
        plain.save_pretrained(save_directory, **options)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the network was trained on."""
        return read_image_shape(self.unet)

    def denoiser(
        self, batch_size: int, *, class_labels: Labels = None, clip: ClipOption = None
    ) -> ModelDenoiser:
        """What a call with these options samples with: (x_t, t) -> (x0, eps) for a batch of that
        size. A DDIMError refuses labels that do not fit, and another kind of network."""
        batch_size = check_whole("batch_size", batch_size, least=1, most=MOST_IMAGES)
        labels = self._labels(class_labels, batch_size)
        network = as_network(self.unet, labels, records=self._records)
        return self._model(network, clip, self.unet.dtype)

    @torch.no_grad()
    def warm_up(self, batch_size: int = 1) -> None:
        """Evaluates the network once, so that allocations and a compilation happen here."""
        x = torch.zeros((batch_size, *self.image_shape), device=self._execution_device)
        labels = self._labels(0 if takes_labels(self.unet) else None, batch_size)
        network = as_network(self.unet, labels, records=self._records)
        level = torch.zeros(len(x), dtype=torch.int64)
        self._warm_up(lambda x, _: network(x.to(self.unet.dtype), level.to(x.device)), x)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        *,
        eta: Eta = 0.0,
        order: int | None = None,
        eps_mean_square: Mapping[int, float] | None = None,
        timestep_spacing: Spacing | None = None,
        timesteps: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prior: DataPrior | None = None,
        class_labels: Labels = None,
        clip: ClipOption = None,
        sampler: Sampler = "ddim",
        callback: Callback | None = None,
        progress: bool = True,
        use_clipped_model_output: bool | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Makes images.

        Args:
            batch_size: Default: as many as there are seeds, generators, latents or labels, else 1.
            num_inference_steps: N. Default: 50.
            eta: 0 deterministic, 1 DDPM, ``"sigma-hat"`` the paper's larger noise.
            order: 1 DDIM, 2 its multistep: a smaller error at the same cost, at eta = 0. Default:
                as the scheduler's configuration says.
            eps_mean_square: For the analytic variance, which draws noise at eta = 0 too
                (:func:`ddim.fitting.timesteps.estimate_eps_mean_square`). Default: eta's variance.
            timestep_spacing: Which levels are visited. Default: as the configuration says.
            timesteps: The levels themselves, falling, in place of N and a spacing.
            seeds: One an image; the image of a seed does not depend on the others. Gives x_T and
                all later noise.
            generator: One an image; or one for all, drawn from image by image in turn, so that with
                eta > 0 an image depends on the size of its batch. Default: torch's global one.
            latents: x_T, [B, C, H, W], of any size that the network takes. The x_T of a seed, given
                with that seed, gives its image.
            prior: What is known of the data's brightness, for a schedule that starts above zero
                SNR. Default: x_T is N(0, I).
            class_labels: One for all or one an image, of a class-conditional network.
            clip: What happens to the predicted x0. Default: as the configuration says. Where it is
                on, eps is derived again from the clipped x0 (diffusers' default does not do so).
            sampler: ``ddim``; or ``o-belm``, ``bdia`` or ``edict``, which are exactly invertible.
            callback: Called with the state after each step; True stops, with its ``x0``.
            progress: Whether to show a progress bar.
            use_clipped_model_output: As in diffusers; True is what happens here in any case.
            output_type: ``pil``, or float32 in [0, 1]: ``np`` [B, H, W, C] or ``pt`` [B, C, H, W].
            return_dict: Whether to return an object with ``images``, and with their ``seeds``,
                drawn or given, unless generators were; or a tuple of images.

        Raises:
            DDIMError: If options do not fit each other or the network, or its output is not finite.

        Where another scheduler than DDIM's was put into the pipeline, its own loop makes the
        images, without what is DDIM's alone: order, sampler, clip, prior and eps_mean_square.
        """
        options = {name: value for name, value in locals().items() if name != "self"}
        if not isinstance(self.scheduler, diffusers.DDIMScheduler):
            return self._draw_elsewhere(options)
        rederives = options.pop("use_clipped_model_output")
        if rederives is False and self.select_clip(clip).kind != "none":
            raise DDIMError(
                "this pipeline derives eps again from the clipped x0, and use_clipped_model_output "
                "is False; leave it out, or turn clipping off with clip='none'."
            )
        route = self._take_route(options)
        return self.draw(route, **options)

    @torch.no_grad()
    def draw(
        self,
        route: Route,
        *,
        batch_size: int | None = None,
        seeds: Sequence[int] | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prior: DataPrior | None = None,
        class_labels: Labels = None,
        callback: Callback | None = None,
        progress: bool = True,
        output_type: Literal["pil", "np", "pt"] = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Makes images along a route of :meth:`route`; other arguments are those of a call."""
        given = {"seeds": seeds, "generator": generator, "latents": latents}
        self._check_output_type(output_type)
        count, x, noise = self._prepare(batch_size, class_labels, **given)
        denoise = self.denoiser(count, class_labels=class_labels, clip=route.clip)
        if prior is not None:
            check_kind("prior", prior, DataPrior, "a DataPrior, which fit_prior gives")
            if latents is not None:
                raise DDIMError(
                    "latents are x_T, and a prior changes what x_T is drawn from; leave out one."
                )
            x = prior.start(x, route.schedule.alpha_bar(route.timesteps[0]))
        states = self._states(denoise, x, route, noise)
        x = self._walk(states, x, len(route), callback, progress)
        return self._output(x, noise, output_type, return_dict)

    def _prepare(
        self, batch_size: int | None, class_labels: Labels, **given: Any
    ) -> tuple[int, Tensor, SeededNoise]:
        """How many images a call makes, their x_T, and the stream of later noise."""
        latents = given["latents"]
        count = count_images(batch_size, **given, class_labels=class_labels)
        self._labels(class_labels, count)
        check_network(self.unet)
        if latents is not None:
            check_latents(self.unet, latents)
        shape = self.image_shape if latents is None else latents.shape[1:]
        source = Source(given["seeds"], given["generator"])
        return count, *self._start(count, shape, self._place(), source, latents)

    def _draw_elsewhere(self, options: dict[str, Any]) -> Any:
        """Makes images by the loop of a scheduler that is not DDIM's."""
        mention_precision(self)
        self._check_output_type(options["output_type"])
        steps, timesteps, spacing = take_levels(self.scheduler, options)
        names = ("batch_size", "class_labels", "seeds", "generator", "latents")
        count, x, noise = self._prepare(**{name: options[name] for name in names})
        labels, place = self._labels(options["class_labels"], count), self._place()
        given = step_options(self.scheduler, options["eta"], noise.generators)
        with reconfigured([self.scheduler], spacing, None):
            set_levels(self.scheduler, steps, timesteps, place.device)
        network = as_network(self.unet, labels, records=self._records)
        total = len(self.scheduler.timesteps)
        states = foreign_states(self.scheduler, network, x, place.dtype, given)
        x = self._walk(states, x, total, options["callback"], options["progress"])
        return self._output(x, noise, options["output_type"], options["return_dict"])

    def _output(self, x: Tensor, noise: SeededNoise, output_type: str, return_dict: bool) -> Any:
        self.maybe_free_model_hooks()
        images = self._finish(x, output_type)
        output = ImagePipelineOutput(images=images) if return_dict else (images,)
        return with_seeds(output, noise.seeds)

    @torch.no_grad()
    def encode(
        self,
        images: Any,
        num_inference_steps: int | None = None,
        *,
        method: EncodingMethod | None = None,
        timestep_spacing: Spacing | None = None,
        timesteps: Sequence[int] | None = None,
        class_labels: Labels = None,
        resize: bool = False,
        gamma: float = 1.0,
        mixing: float = 0.93,
        tolerance: float = 1e-5,
        max_evaluations: int = 60,
        batch_size: int = 64,
    ) -> Code:
        """Finds the latents of images, with clipping off; :meth:`decode` brings the images back.

        Args:
            images: Pillow images, bytes [B, H, W, C] or [H, W, C], or a tensor in [-1, 1], [B, C,
                H, W].
            num_inference_steps: N. Default: 50.
            method: Default: ``o-belm``; ``bdia`` at zero terminal SNR, where codes of ``o-belm``
                are no noise. Those two and ``edict`` come back exactly, ``fixed-point`` to its
                tolerance, ``ddim`` (the paper's) nearly. Encode and decode in float32: a network in
                half precision may round otherwise on the way back.
            timestep_spacing: Default: as the scheduler's configuration says.
            timesteps: The levels themselves, in place of N and a spacing. A level of zero SNR is
                moved to the one below, since a sample holds nothing of an image there.
            class_labels: One for all or one an image; kept in the code.
            resize: Whether images of another size are resized and cut, rather than refused.
            gamma: For ``bdia``; see :class:`ddim.inversion.encoding.Encoder`.
            mixing: For ``edict``.
            tolerance: For ``fixed-point``.
            max_evaluations: For ``fixed-point``.
            batch_size: Images encoded together.

        Returns:
            The code, on the CPU.

        Raises:
            DDIMError: If images or options do not fit the network, or the method diverges.
        """
        method = default_method(self.noise_schedule) if method is None else method
        encoder = Encoder(method, gamma, mixing, tolerance, max_evaluations)
        x0 = from_pictures(images, self.image_shape, resize=resize)
        levels = self._encodable_timesteps(num_inference_steps, timestep_spacing, timesteps)
        labels = self._labels(class_labels, len(x0))

        def denoiser(chosen: slice) -> ModelDenoiser:  # clipping cannot be undone
            part = None if labels is None else labels[chosen]
            return self.denoiser(len(x0[chosen]), class_labels=part, clip="none")

        return self._encode(x0, levels, denoiser, encoder, batch_size, labels)

    @torch.no_grad()
    def decode(
        self,
        code: Code,
        num_inference_steps: int | None = None,
        *,
        timestep_spacing: Spacing | None = None,
        timesteps: Sequence[int] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        batch_size: int = 64,
        output_type: Literal["pil", "np", "pt"] = "pil",
    ) -> Any:
        """Brings the images of a code back.

        Args:
            code: From :meth:`encode`, of this model.
            num_inference_steps: Other steps than the code's, which only a code of ``fixed-point``
                or ``ddim`` takes; they begin at the code's own first level. Default: the code's.
            timestep_spacing: How those other steps are spaced.
            timesteps: Those other steps themselves.
            callback: Called with the state after each step.
            progress: Whether to show a progress bar.
            batch_size: Images decoded together.
            output_type: ``pil``, ``np`` or ``pt``.

        Returns:
            Pillow images, an array [B, H, W, C], or a tensor [B, C, H, W] in [0, 1].

        Raises:
            DDIMError: If the code is of another model, or of other steps, or does not fit.
        """
        self._check_output_type(output_type)
        levels = self.decoding_timesteps(
            code, num_inference_steps, timestep_spacing=timestep_spacing, timesteps=timesteps
        )

        def denoiser(chosen: slice) -> ModelDenoiser:
            part = code[chosen]
            return self.denoiser(len(part), class_labels=part.labels, clip="none")

        x = self._decode(code, levels, denoiser, callback, progress, batch_size)
        self.maybe_free_model_hooks()
        return self._finish(x, output_type)

    def decoding_timesteps(
        self,
        code: Code,
        num_inference_steps: int | None = None,
        *,
        timestep_spacing: Spacing | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> list[int]:
        """The levels that :meth:`decode` visits with these options, once it is known that the code
        fits this model and them; its DDIMErrors come here, before anything is evaluated."""
        check_code(code)
        own, shape = list(self.image_shape), list(code.x_T.shape[1:])
        if shape != own:
            raise DDIMError(f"the model's latents have shape {own}; the code's have {shape}.")
        levels = self._decoding_timesteps(code, num_inference_steps, timestep_spacing, timesteps)
        if code.labels is None and takes_labels(self.unet):
            raise DDIMError(
                "the network is class-conditional, and the code has no classes; encode with "
                "class_labels (--class)."
            )
        self._labels(code.labels, len(code))
        return levels

    def _labels(self, class_labels: Labels, count: int) -> Tensor | None:
        return as_labels(self.unet, class_labels, count, self._execution_device)

    def _check_output_type(self, output_type: str) -> None:
        check_choice("output_type", output_type, ("pil", "np", "pt"))
        channels = int(self.unet.config.in_channels)
        if output_type == "pil" and channels not in (1, 3):
            raise DDIMError(
                f"the network makes images of {channels} channels, and a picture has 1 or 3; use "
                "output_type='np' or 'pt'."
            )

    @staticmethod
    def _finish(x: Tensor, output_type: str) -> Any:
        """Finished images of a state [B, C, H, W]: clamped, in [0, 1], or pictures."""
        if output_type == "pil":
            return to_pil(to_uint8(x))
        images = (x.float() / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
