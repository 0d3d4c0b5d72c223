"""What the pipelines share: options resolved against the scheduler's configuration, walks along a
trajectory, and codes of images."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import diffusers
import torch
from torch import Tensor

from ddim.configuration import noise_schedule
from ddim.core.denoiser import Clip, Denoiser
from ddim.core.noise import SeededNoise, check_seeds
from ddim.core.route import Route
from ddim.core.sampler import State, walk
from ddim.core.schedule import NoiseSchedule
from ddim.core.step import Eta, check_order
from ddim.core.timesteps import Spacing
from ddim.errors import DDIMError, DivergenceError
from ddim.inversion.codes import Code, EncodingMethod, check_origin, decoding_timesteps, fingerprint
from ddim.inversion.ddim import encodable_timesteps
from ddim.inversion.encoding import decode_trajectory, encode
from ddim.inversion.reversible import Reversible, ReversibleSampler, reversible_trajectory
from ddim.pipelines.networks import is_compiled, specialize, weights_of
from ddim.pipelines.routing import (
    ClipOption,
    Sampler,
    resolve_clip,
    resolve_route,
    resolve_timesteps,
)
from ddim.scheduler import DDIMScheduler

__all__ = ["HUB_OPTIONS", "Generators", "Place", "Sampling"]

HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "token",
    "use_safetensors",
    "variant",
)
"""Options of ``from_pretrained`` that say what is downloaded."""

_NEEDED = (
    "timestep_spacing",
    "steps_offset",
    "thresholding",
    "clip_sample",
    "clip_sample_range",
    "sample_max_value",
)

Generators = torch.Generator | Sequence[torch.Generator]


class Place(NamedTuple):
    """Where a network computes, and in what precision."""

    device: torch.device
    dtype: torch.dtype


class Sampling:
    """DDIM for a diffusers pipeline that has a network ``unet`` and a ``scheduler``, whose
    configuration is read at each call."""

    unet: Any
    scheduler: Any
    progress_bar: Callable[..., Any]
    _execution_device: torch.device

    def compile(self, **options: Any) -> Any:
        """Compiles the network in place, at its next call; options as ``torch.compile``. Saving and
        moving work as before.

        A network on the CPU is prepared for it first (:func:`ddim.pipelines.networks.specialize`),
        so move it before. On a GPU the mode is ``reduce-overhead``, unless a mode, a backend or its
        options are given: kernels are recorded once for a batch size, and launched together."""
        kind = self._execution_device.type
        if kind == "cpu":
            specialize(self.unet)
        elif kind == "cuda" and not {"mode", "backend", "options"} & options.keys():
            options["mode"] = "reduce-overhead"
        self.unet.compile(**options)
        return self

    def _warm_up(self, denoise: Denoiser, x: Tensor) -> None:
        """Has the network do at x what it does only in its first calls, and waits for it."""
        for _ in range(3 if x.is_cuda and is_compiled(self.unet) else 1):  # compile; record; replay
            denoise(x, 0)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    def _place(self) -> Place:
        """To be looked up once a call: diffusers walks all modules for either, which may take
        longer than a step."""
        return Place(self._execution_device, self.unet.dtype)

    @property
    def _options(self) -> Any:
        """The scheduler's configuration as it is now.

        Raises:
            DDIMError: If the scheduler was replaced by one that has not DDIM's options.
        """
        config = self.scheduler.config
        if isinstance(self.scheduler, diffusers.DDIMScheduler) or all(
            hasattr(config, name) for name in _NEEDED
        ):
            return config
        raise DDIMError(
            "this pipeline samples with DDIM, and its scheduler was replaced by a "
            f"{type(self.scheduler).__name__}; set pipe.scheduler = "
            "ddim.DDIMScheduler.from_config(pipe.scheduler.config), or use diffusers' own pipeline "
            "with that scheduler."
        )

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The levels that the scheduler's configuration describes, float64."""
        ours = isinstance(self.scheduler, DDIMScheduler)
        return self.scheduler.noise_schedule if ours else noise_schedule(vars(self._options))

    def route(
        self,
        num_inference_steps: int | None = None,
        *,
        timestep_spacing: Spacing | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float | None = None,
        encodable: bool = False,
        eta: Eta = 0.0,
        order: int | None = None,
        clip: ClipOption = None,
        sampler: Sampler = "ddim",
        analytic: bool = False,
        eps_mean_square: Mapping[int, float] | None = None,
    ) -> Route:
        """Resolves and checks the options of a call, before noise is drawn or the network called;
        :meth:`draw` walks the result.

        Arguments and errors are those of :func:`ddim.pipelines.routing.resolve_route`, by this
        pipeline's configuration."""
        return resolve_route(
            self.noise_schedule,
            self._options,
            num_inference_steps,
            own_order=self.select_order(),
            timestep_spacing=timestep_spacing,
            timesteps=timesteps,
            strength=strength,
            encodable=encodable,
            eta=eta,
            order=order,
            clip=clip,
            sampler=sampler,
            analytic=analytic,
            eps_mean_square=eps_mean_square,
        )

    def select_timesteps(
        self,
        num_inference_steps: int | None = None,
        *,
        timestep_spacing: Spacing | None = None,
        timesteps: Sequence[int] | None = None,
        order: int | None = None,
    ) -> list[int]:
        """The levels that a call with these options visits, unchecked against the others of
        :meth:`route`.

        Raises:
            DDIMError: If the options exclude each other, or are invalid.
        """
        return resolve_timesteps(
            self.noise_schedule,
            self._options,
            num_inference_steps,
            timestep_spacing=timestep_spacing,
            timesteps=timesteps,
            is_fitted=self.select_order(order) == self.select_order(),
        )

    def select_order(self, order: int | None = None) -> int:
        """The order of the solver that a call with this option uses. Default: as the scheduler's
        configuration says."""
        if order is None:  # another class's solver_order is not DDIM's
            order = self._options.solver_order if isinstance(self.scheduler, DDIMScheduler) else 1
        return check_order(order)

    def select_clip(self, clip: ClipOption = None) -> Clip:
        """How a call with this option keeps the predicted x0 in range. Default: as the scheduler's
        configuration says."""
        return resolve_clip(self._options, clip)

    @staticmethod
    def _states(
        denoise: Denoiser, x_T: Tensor, route: Route, noise: Callable[[], Tensor]
    ) -> Iterable[State]:
        """The trajectory of a route's sampler."""
        if route.sampler == "ddim":
            return walk(denoise, x_T, route, noise=noise)
        return reversible_trajectory(
            denoise,
            x_T.double(),
            route.timesteps,
            schedule=route.schedule,
            sampler=ReversibleSampler(cast(Reversible, route.sampler)),
        )

    def _walk(
        self,
        states: Iterable[State],
        x: Tensor,
        total: int,
        *,
        callback: Callable[[State], bool | None] | None,
        progress: bool,
    ) -> Tensor:
        """Runs a trajectory to its end, or until the callback stops it; the last sample, which is
        finite."""
        with self.progress_bar(total=total) if progress else contextlib.nullcontext() as bar:
            for state in states:
                x = state.x_s
                if bar is not None:
                    bar.update()
                if callback is not None and callback(state) is True:
                    x = state.x0
                    break
        if not bool(torch.isfinite(x).all()):
            raise DivergenceError(
                f"the network's prediction became NaN or infinite in {self.unet.dtype}; "
                "use float32 or bfloat16, or look whether the checkpoint and its scheduler belong "
                "together."
            )
        return x

    def _encode(
        self,
        x0: Tensor,
        timesteps: Sequence[int],
        denoiser: Callable[[slice], Denoiser],
        *,
        method: EncodingMethod,
        gamma: float,
        mixing: float,
        tolerance: float,
        max_evaluations: int,
        batch_size: int,
        labels: Tensor | None = None,
    ) -> Code:
        """The code of data [B, ...] batch by batch, under the denoiser of each batch's images."""
        if len(x0) == 0 or batch_size < 1:
            raise DDIMError(
                f"there must be images to encode, and batch_size at least 1; got {len(x0)} images, "
                f"batch_size={batch_size}."
            )
        levels, origin, parts = (
            encodable_timesteps(self.noise_schedule, timesteps),
            self._origin(),
            [],
        )
        for first in range(0, len(x0), batch_size):
            chosen = slice(first, first + batch_size)
            parts.append(
                encode(
                    denoiser(chosen),
                    x0[chosen].to(self._execution_device),
                    levels,
                    schedule=self.noise_schedule,
                    method=method,
                    gamma=gamma,
                    mixing=mixing,
                    tolerance=tolerance,
                    max_evaluations=max_evaluations,
                    labels=None if labels is None else labels[chosen],
                    origin=origin,
                )
            )
        return Code.join(parts)

    def _decode(
        self,
        code: Code,
        timesteps: Sequence[int],
        denoiser: Callable[[slice], Denoiser],
        *,
        callback: Callable[[State], bool | None] | None,
        progress: bool,
        batch_size: int,
    ) -> Tensor:
        """The data [B, ...] of a code over levels of :meth:`_decoding_timesteps`, under the
        denoiser of each batch's images."""
        finished = []
        for first in range(0, len(code), max(1, batch_size)):
            chosen = slice(first, first + max(1, batch_size))
            part = code[chosen].to(self._execution_device)
            states = decode_trajectory(
                denoiser(chosen), part, schedule=self.noise_schedule, timesteps=timesteps
            )
            finished.append(
                self._walk(
                    states, part.states[-1], len(timesteps), callback=callback, progress=progress
                )
            )
        return torch.cat(finished)

    def _decoding_timesteps(
        self,
        code: Code,
        num_inference_steps: int | None,
        *,
        timestep_spacing: Spacing | None,
        timesteps: Sequence[int] | None,
    ) -> list[int]:
        """The levels that a code is decoded over with these options: its own without any.

        Raises:
            DDIMError: If the code is empty, or of another model or other steps, before anything is
                evaluated.
        """
        if len(code) == 0:
            raise DDIMError("the code holds no images.")
        check_origin(code, self._origin())
        asked = None
        if num_inference_steps is not None or timestep_spacing is not None or timesteps is not None:
            asked = self.select_timesteps(
                num_inference_steps, timestep_spacing=timestep_spacing, timesteps=timesteps, order=1
            )
        levels = list(decoding_timesteps(code, asked, schedule=self.noise_schedule))
        self.route(timesteps=levels, order=1, clip="none")
        return levels

    def _origin(self) -> dict[str, str]:
        """What a code depends on beside its own options."""
        schedule = self.noise_schedule
        levels = torch.cat(
            [
                schedule.alphas_cumprod,
                torch.tensor([schedule.final_alpha_cumprod], dtype=torch.float64),
            ]
        )
        return {
            "dtype": str(self.unet.dtype).removeprefix("torch."),
            "network": fingerprint(weights_of(self.unet)),
            "schedule": f"{fingerprint(levels)} {self._options.prediction_type}",
        }

    def _noise(
        self,
        count: int,
        shape: Sequence[int],
        place: Place,
        *,
        seeds: Sequence[int] | None,
        generator: Generators | None,
    ) -> SeededNoise:
        """The stream of noise of that many images: of their seeds, of generators, else of seeds
        from torch's global generator."""
        if seeds is not None and generator is not None:
            raise DDIMError(
                "seeds and generator both say where noise comes from; give one of them."
            )
        if generator is not None:
            sources: Sequence[Any] = (
                [generator] * count if isinstance(generator, torch.Generator) else list(generator)
            )
        else:
            sources = check_seeds(
                torch.randint(2**63 - 1, (count,)).tolist() if seeds is None else seeds
            )
        return SeededNoise(
            sources,
            shape,
            device=place.device,
            dtype=torch.float64 if place.dtype == torch.float64 else torch.float32,
        )

    def _start(
        self,
        count: int,
        shape: Sequence[int],
        place: Place,
        *,
        seeds: Sequence[int] | None,
        generator: Generators | None,
        latents: Tensor | None,
    ) -> tuple[Tensor, SeededNoise]:
        """x_T [B, *shape], and the stream of later noise."""
        noise = self._noise(count, shape, place, seeds=seeds, generator=generator)
        if latents is None:
            return noise(), noise
        if seeds is not None:  # the x_T of a seed, with that seed, gives its image
            noise()
        return latents.to(noise.device, noise.dtype), noise
