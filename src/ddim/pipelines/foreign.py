"""An unconditional network under a scheduler of diffusers that is not DDIM's: that scheduler's own
loop."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddim.core.prediction import to_x0_eps
from ddim.core.sampler import State
from ddim.core.schedule import CLEAN
from ddim.core.step import Eta
from ddim.core.timesteps import Spacing
from ddim.errors import DDIMError

__all__ = ["check_scheduler", "foreign_states", "set_levels", "step_options", "take_levels"]


def check_scheduler(scheduler: Any, *needed: str) -> None:
    """Refuses a scheduler that walks no noise schedule of DDIM's family, lacks what is needed of
    one, or goes from data to noise."""
    kind = type(scheduler).__name__
    lacks = [name for name in ("init_noise_sigma", *needed) if not hasattr(scheduler, name)]
    if lacks or "Inverse" in kind:
        why = "walks no noise schedule of DDIM's family" if lacks else "goes from data to noise"
        raise DDIMError(
            f"a {kind} {why}, so this pipeline cannot use it; set pipe.scheduler to a "
            "ddim.DDIMScheduler, or to another scheduler of diffusers for such models."
        )


def take_levels(
    scheduler: Any, options: Mapping[str, Any]
) -> tuple[int | None, Sequence[int] | None, Spacing | None]:
    """The steps, timesteps and spacing of a call of an unconditional pipeline; a DDIMError refuses
    what is DDIM's alone."""
    check_scheduler(scheduler, "step", "alphas_cumprod")
    names = ("order", "clip", "prior", "eps_mean_square")
    refused = [name for name in names if options[name] is not None]
    refused += ["use_clipped_model_output"] if options["use_clipped_model_output"] else []
    refused += ["sampler"] if options["sampler"] != "ddim" else []
    if refused:
        raise DDIMError(
            f"a {type(scheduler).__name__} samples by its own loop, which does not know "
            f"{', '.join(refused)}; leave out one or the other."
        )
    steps, timesteps = options["num_inference_steps"], options["timesteps"]
    spacing = options["timestep_spacing"]
    if timesteps is not None and (steps, spacing) != (None, None):
        raise DDIMError(
            "timesteps say which levels are visited; leave out num_inference_steps and "
            "timestep_spacing, or timesteps."
        )
    return steps, timesteps, spacing


def set_levels(
    scheduler: Any, steps: int | None, timesteps: Sequence[int] | None, device: torch.device
) -> None:
    """Has a scheduler choose the levels of a call."""
    if timesteps is None:
        scheduler.set_timesteps(50 if steps is None else steps, device=device)
    elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=list(timesteps), device=device)
    else:
        raise DDIMError(f"a {type(scheduler).__name__} takes no timesteps; give a number of steps.")


def step_options(scheduler: Any, eta: Eta, generators: list[torch.Generator]) -> dict[str, Any]:
    """What a scheduler's step takes of a call; a DDIMError refuses an eta that it does not."""
    known = inspect.signature(scheduler.step).parameters
    required = [
        name for name, p in known.items() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    if more := required[3:]:
        raise DDIMError(
            f"the step of a {type(scheduler).__name__} needs {', '.join(more)}, which this "
            "pipeline does not have; use diffusers' own pipeline for it."
        )
    if isinstance(eta, str) or (eta != 0 and "eta" not in known):
        raise DDIMError(
            f"the step of a {type(scheduler).__name__} cannot take eta={eta!r}; leave it out, or "
            "set pipe.scheduler = ddim.DDIMScheduler.from_config(pipe.scheduler.config)."
        )
    options = {"eta": eta, "generator": generators}
    return {name: value for name, value in options.items() if name in known}


def foreign_states(
    scheduler: Any,
    network: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> Iterator[State]:
    """The state after each step of a scheduler, whose levels are set, from noise x on."""
    x = x * scheduler.init_noise_sigma
    levels = scheduler.timesteps
    numbers = [int(t) for t in levels.tolist()]  # at once: one by one would wait for a device
    alpha_bar, kind = scheduler.alphas_cumprod.cpu().double(), scheduler.config.prediction_type
    ends = zip(numbers, [*numbers[1:], CLEAN], strict=True)
    for number, (t, (left, s)) in enumerate(zip(levels, ends, strict=True)):
        x_t = scheduler.scale_model_input(x, t)  # as the network was trained
        output = network(x_t.to(dtype), t).to(x.dtype)
        known = alpha_bar[left]
        x0, eps = to_x0_eps(output, x_t, alpha_bar_t=known, prediction_type=kind)
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
        yield State(x_s=x, x0=x0, eps=eps, t=left, s=s, number=number)
