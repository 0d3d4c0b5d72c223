"""What the pipelines share: options resolved against the scheduler's configuration, walks along a
trajectory, and noise."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, Unpack, cast

import diffusers
import torch
from torch import Tensor

from ddim.bounds import LARGEST_SEED
from ddim.configuration import noise_schedule
from ddim.core.checks import check_function, check_samples, wrong_argument
from ddim.core.denoiser import Clip, Denoiser, ModelDenoiser
from ddim.core.noise import SeededNoise, check_seeds
from ddim.core.route import Route
from ddim.core.sampler import State, walk
from ddim.core.schedule import NoiseSchedule
from ddim.core.step import check_order
from ddim.core.timesteps import Spacing
from ddim.errors import CheckpointError, DDIMError, DivergenceError
from ddim.inversion.reversible import Reversible, ReversibleSampler, reversible_trajectory
from ddim.models.checkpoints import find_model, read_model_index
from ddim.models.folder import check_index
from ddim.pipelines.networks import is_compiled, mention_precision, prepare_for_compiling
from ddim.pipelines.recording import forget_recordings
from ddim.pipelines.routing import (
    ClipOption,
    RouteOptions,
    resolve_clip,
    resolve_route,
    resolve_timesteps,
)
from ddim.scheduler import DDIMScheduler

__all__ = [
    "HUB_OPTIONS",
    "LOADING_OPTIONS",
    "Callback",
    "Generators",
    "Place",
    "Sampling",
    "Source",
    "check_generators",
    "draw_seeds",
    "find_pretrained",
    "name_origin",
    "read_single_index",
    "with_seeds",
]

_HUB = "cache_dir force_download local_files_only proxies revision token use_safetensors variant"
HUB_OPTIONS = tuple(_HUB.split())
"""Options of ``from_pretrained`` that say what is downloaded."""

_LOADING = "device_map max_memory offload_folder offload_state_dict low_cpu_mem_usage"
LOADING_OPTIONS = (*_LOADING.split(), "quantization_config", "disable_mmap", "use_flashpack")
"""Options of ``from_pretrained`` that say how weights are loaded."""

Generators = torch.Generator | Sequence[torch.Generator]
Callback = Callable[[State], bool | None]


class Source(NamedTuple):
    """Where noise comes from: a seed an image, or generators. Default: torch's global one."""

    seeds: Sequence[int] | None
    generator: Generators | None


class Place(NamedTuple):
    """Where a network computes, and in what precision."""

    device: torch.device
    dtype: torch.dtype


def find_pretrained(name: str | Path, options: Mapping[str, Any]) -> Path:
    """The folder of a model, downloaded as the options of ``from_pretrained`` say; a
    CheckpointError if there is none."""
    return find_model(
        name, **{k: v for k, v in options.items() if k in HUB_OPTIONS and v is not None}
    )


def name_origin(pipe: Any, folder: Path) -> None:
    """Says in the configurations of a pipeline and of its parts which model they are of: by its
    name on the hub, or its folder's, since a path of this machine would be written into what is
    saved."""
    real, prefix = folder.resolve(), "models--"  # of a model in the hub's cache
    is_cached = real.parent.name == "snapshots" and real.parents[1].name.startswith(prefix)
    name = real.parents[1].name.removeprefix(prefix).replace("--", "/") if is_cached else real.name
    pipe.register_to_config(_name_or_path=name)
    for part in pipe.components.values():
        config = getattr(part, "config", None)
        origin = getattr(config, "_name_or_path", None)
        if isinstance(origin, str | Path) and Path(origin).is_relative_to(folder):
            shown = str(name / Path(origin).relative_to(folder))
            if hasattr(part, "register_to_config"):
                part.register_to_config(_name_or_path=shown)
            else:
                config._name_or_path = shown  # type: ignore[union-attr]


def read_single_index(link: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The index of the model whose ``config`` a checkpoint in one file is opened with.

    Raises:
        CheckpointError: If it names code that is not run, or the checkpoint is no regular file.
    """
    if (path := Path(link)).exists() and not path.is_file():
        raise CheckpointError(f"{link} is no regular file, so no checkpoint in one file.")
    if (config := options.get("config")) is None:
        from diffusers.loaders import single_file_utils as files

        found = files.fetch_diffusers_config(files.load_single_file_checkpoint(link))
        config = found["pretrained_model_name_or_path"]
    if (folder := Path(config)).is_dir():
        return read_model_index(folder, given=options)
    index: dict[str, Any] = diffusers.DiffusionPipeline.load_config(config)
    check_index(index, str(config), given=options)
    return index


def check_generators(generator: Any) -> None:
    """Refuses what is neither a generator nor a list of them, nor None."""
    listed = generator if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(g, torch.Generator) for g in listed):
        wanted = "be a torch.Generator, or a list of one an image"
        raise wrong_argument("generator", wanted, generator, "A number goes into seeds=[...]")


def draw_seeds(count: int) -> list[int]:
    """Seeds from torch's global generator, of the 32 bits that its other generators keep."""
    drawn: list[int] = torch.randint(LARGEST_SEED + 1, (count,)).tolist()
    return drawn


def with_seeds(output: Any, seeds: Sequence[int] | None) -> Any:
    """The output of a call, whose attribute ``seeds`` says the images' own, drawn or given; None
    where generators were given. A tuple stays as it is."""
    if not isinstance(output, tuple):
        output.seeds = None if seeds is None else list(seeds)
    return output


class Sampling:
    """DDIM for a diffusers pipeline that has a network ``unet`` and a ``scheduler``, whose
    configuration is read at each call."""

    unet: Any
    scheduler: Any
    progress_bar: Callable[..., Any]
    maybe_free_model_hooks: Callable[[], None]
    _execution_device: torch.device
    _records = True

    def record_kernels(self, active: bool = True) -> Self:
        """Says whether the network's calls are recorded on a CUDA device, and replayed. Default:
        they are.

        A small batch waits there for its kernels to be launched one by one; a recording launches
        them together. It is made at the first call for a batch size, in a fraction of a second, and
        compared with that call; it is dropped when weights, layers or settings change. At most four
        are kept of a network, in at most a quarter of the device's memory. What cannot be
        recorded (hooks, offloaded weights, layers of other libraries) is computed as ever, and the
        log says so once."""
        self._records = active
        if not active:
            forget_recordings(self.unet)
        return self

    def to(self, *args: Any, **options: Any) -> Self:
        """As diffusers'; what was recorded where the network was is freed."""
        forget_recordings(getattr(self, "unet", None))
        return cast(Self, super().to(*args, **options))  # type: ignore[misc]

    def compile(self, **options: Any) -> Self:
        """Compiles the network in place, at its next call; options as ``torch.compile``. Saving and
        moving work as before.

        On the CPU, ``ddim.pipelines.networks.prepare_for_compiling`` prepares the network
        first, so move it before. On a GPU the mode is ``reduce-overhead``, unless a mode, a backend
        or its options are given: kernels are recorded once for a batch size, and launched together.
        """
        kind = self._execution_device.type
        if kind == "cpu":
            prepare_for_compiling(self.unet)
        elif kind == "cuda" and not {"mode", "backend", "options"} & options.keys():
            options["mode"] = "reduce-overhead"
        self.unet.compile(**options)
        return self

    def _warm_up(self, denoise: Callable[[Tensor, int], Any], x: Tensor) -> None:
        """Has the network do at x what it does only in its first calls, and waits for it."""
        for _ in range(3 if x.is_cuda and is_compiled(self.unet) else 1):  # compile; record; replay
            denoise(x, 0)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    def _place(self) -> Place:
        """To be looked up once a call: diffusers walks all modules for it, longer than a step."""
        return Place(self._execution_device, self.unet.dtype)

    @property
    def _options(self) -> Any:
        """The scheduler's configuration as it is now; a DDIMError refuses another than DDIM's,
        whose options may have the same names and mean something else."""
        if isinstance(self.scheduler, diffusers.DDIMScheduler):
            return self.scheduler.config
        name = type(self.scheduler).__name__
        raise DDIMError(
            f"this is DDIM's alone, and the pipeline's scheduler was replaced by a {name}; set "
            "pipe.scheduler = ddim.DDIMScheduler.from_config(pipe.scheduler.config), or use "
            "diffusers' own pipeline with that scheduler."
        )

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The levels that the scheduler's configuration describes, float64."""
        ours = isinstance(self.scheduler, DDIMScheduler)
        return self.scheduler.noise_schedule if ours else noise_schedule(vars(self._options))

    def route(
        self, num_inference_steps: int | None = None, **options: Unpack[RouteOptions]
    ) -> Route:
        """Resolves and checks the options of a call, before noise is drawn or the network called;
        ``draw`` walks the result.

        Options and errors are those of :func:`ddim.pipelines.routing.resolve_route`."""
        schedule, config, order = self.noise_schedule, self._options, self.select_order()
        return resolve_route(schedule, config, num_inference_steps, own_order=order, **options)

    def _take_route(self, options: dict[str, Any]) -> Route:
        """Takes what makes a route out of the arguments of a call, and resolves it."""
        names = ("num_inference_steps", *RouteOptions.__annotations__)
        return self.route(**{name: options.pop(name) for name in names if name in options})

    def select_timesteps(
        self,
        num_inference_steps: int | None = None,
        *,
        timestep_spacing: Spacing | None = None,
        timesteps: Sequence[int] | None = None,
        order: int | None = None,
    ) -> list[int]:
        """The levels that a call with these options visits, unchecked against the others of
        :meth:`route`; a DDIMError if they exclude each other, or are invalid."""
        is_fitted = self.select_order(order) == self.select_order()
        options = (num_inference_steps, timestep_spacing, timesteps, is_fitted)
        return resolve_timesteps(self.noise_schedule, self._options, *options)

    def select_order(self, order: int | None = None) -> int:
        """The order of the solver that a call uses. Default: as the configuration says."""
        if order is None:  # other schedulers have no such option
            ours = isinstance(self.scheduler, DDIMScheduler)
            order = self._options.multistep_order if ours else 1
        return check_order(order)

    def select_clip(self, clip: ClipOption = None) -> Clip:
        """How a call keeps the predicted x0 in range. Default: as the configuration says."""
        return resolve_clip(self._options, clip)

    def _model(
        self, network: Callable[[Tensor, Tensor], Tensor], clip: ClipOption, dtype: torch.dtype
    ) -> ModelDenoiser:
        mention_precision(self)
        kind, clip = self._options.prediction_type, self.select_clip(clip)
        return ModelDenoiser(network, self.noise_schedule, kind, clip, dtype)

    @staticmethod
    def _states(
        denoise: Denoiser, x_T: Tensor, route: Route, noise: Callable[[], Tensor]
    ) -> Iterable[State]:
        """The trajectory of a route's sampler."""
        if route.sampler == "ddim":
            return walk(denoise, x_T, route, noise=noise)
        sampler, schedule = ReversibleSampler(cast(Reversible, route.sampler)), route.schedule
        start, levels = x_T.double(), route.timesteps
        return reversible_trajectory(denoise, start, levels, schedule=schedule, sampler=sampler)

    def _walk(
        self, states: Iterable[State], x: Tensor, total: int, callback: Callback | None, bar: bool
    ) -> Tensor:
        """Runs a trajectory to its end, or until the callback stops it; the last sample, which is
        finite."""
        if callback is not None:
            check_function("callback", callback, "a function of the State after a step")
        with self.progress_bar(total=total) if bar else contextlib.nullcontext() as shown:
            for state in states:
                x = state.x_s
                if shown is not None:
                    shown.update()
                if callback is not None and callback(state) is True:
                    x = state.x0
                    break
        if not bool(torch.isfinite(x).all()):
            raise DivergenceError(
                f"the network's prediction became NaN or infinite in {self.unet.dtype}; use float32"
                " or bfloat16, or look whether the checkpoint and its scheduler belong together."
            )
        return x

    def _noise(self, count: int, shape: Sequence[int], place: Place, source: Source) -> SeededNoise:
        """The stream of noise of that many images."""
        seeds, generator = source
        if seeds is not None and generator is not None:
            raise DDIMError(
                "seeds and generator both say where noise comes from; give one of them."
            )
        check_generators(generator)
        if isinstance(generator, torch.Generator):
            generator = [generator] * count
        if generator is None:
            sources: Sequence[Any] = check_seeds(draw_seeds(count) if seeds is None else seeds)
        else:
            sources = list(generator)
        dtype = torch.float64 if place.dtype == torch.float64 else torch.float32
        return SeededNoise(sources, shape, device=place.device, dtype=dtype)

    def _start(
        self, count: int, shape: Sequence[int], place: Place, source: Source, latents: Tensor | None
    ) -> tuple[Tensor, SeededNoise]:
        """x_T [B, *shape], and the stream of later noise."""
        noise = self._noise(count, shape, place, source)
        if latents is None:
            return noise(), noise
        check_samples(latents=latents)
        if source.generator is None:  # the x_T of a seed, with that seed, gives its image
            noise()
        return latents.to(noise.device, noise.dtype), noise
