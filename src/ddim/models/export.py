"""Schedulers and pipelines as plain diffusers ones, whose files load without this package."""

import copy
import warnings
from typing import Any, TypeVar

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddim.configuration import spelled_betas, without_own_defaults
from ddim.core.schedule import CLEAN
from ddim.core.timesteps import step_pairs
from ddim.errors import DDIMError
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler

__all__ = ["to_diffusers"]

_Converted = TypeVar("_Converted")
_OURS = (DDIMScheduler, DDIMInverseScheduler)


def to_diffusers(obj: _Converted) -> _Converted:
    """Returns the same scheduler, or the same pipeline, with diffusers' own class: its files load
    without this package.

    Sigmoid and laplace betas are exported as ``trained_betas``. ``multistep_order`` and
    ``fitted_timesteps`` stay in the configuration, and diffusers, whose DDIM is of order 1, passes
    over them. Timesteps are not part of a configuration: set them again. Where diffusers would then
    step to other levels (``linspace``, and ``trailing`` where N does not divide T), a warning says
    so.

    Args:
        obj: One of our schedulers, or a pipeline that holds one; other schedulers are returned as
            they are. Models are shared, and the given pipeline keeps its scheduler.

    Raises:
        DDIMError: If the spacing is quadratic, which diffusers does not know, or ``obj`` is neither
            scheduler nor pipeline.
    """
    if isinstance(obj, _OURS):
        exported_scheduler: _Converted = _export(obj)
        return exported_scheduler
    if isinstance(obj, diffusers.DiffusionPipeline):
        parts = {name: part for name, part in obj.components.items() if isinstance(part, _OURS)}
        exported = copy.copy(obj)
        exported.register_modules(**{name: _export(part) for name, part in parts.items()})
        return exported
    if isinstance(obj, SchedulerMixin):
        return obj
    raise DDIMError(
        f"only a scheduler or a pipeline can be converted to diffusers; got {type(obj).__name__}."
    )


def _export(scheduler: DDIMScheduler | DDIMInverseScheduler) -> Any:
    config, spacing = dict(scheduler.config), scheduler.config.timestep_spacing
    is_inverse = isinstance(scheduler, DDIMInverseScheduler)
    known = ("leading", "trailing") if is_inverse else ("leading", "linspace", "trailing")
    if spacing not in known:
        advice = f"set timestep_spacing to one of {', '.join(known)} before the export"
        raise DDIMError(f"diffusers has no {spacing!r} timesteps for this scheduler; {advice}.")
    tables = scheduler._read_levels()
    if not torch.equal(tables.schedule.alphas_cumprod, tables.exact.alphas_cumprod):
        lost = "is not part of the configuration, and is not exported"
        warnings.warn(f"The replaced alphas_cumprod {lost}.", stacklevel=3)
    if config["trained_betas"] is None and (betas := spelled_betas(config)) is not None:
        config |= {"trained_betas": betas, "beta_schedule": "linear"}
    config = without_own_defaults(config)
    config["_use_default_values"] = []
    cls = diffusers.DDIMInverseScheduler if is_inverse else diffusers.DDIMScheduler
    if scheduler.num_inference_steps is not None:
        _warn_of_other_steps(scheduler, cls.from_config(config))
    return cls.from_config(config)


def _warn_of_other_steps(scheduler: DDIMScheduler | DDIMInverseScheduler, stock: Any) -> None:
    count: int = scheduler.num_inference_steps  # type: ignore[assignment]
    stock.set_timesteps(count)
    levels, stride = scheduler.timesteps.tolist(), len(scheduler) // count
    falling = levels[::-1] if isinstance(scheduler, DDIMInverseScheduler) else levels
    if stock.timesteps.tolist() != levels:
        lost = "are not part of the configuration, and diffusers would choose others"
        warnings.warn(f"The timesteps that are set {lost}.", stacklevel=4)
    elif any(max(t - stride, CLEAN) != s for t, s in step_pairs(falling)):
        warnings.warn(
            f"diffusers steps to t - {stride} whatever the next timestep is, so at {count} steps "
            f"with {scheduler.config.timestep_spacing!r} spacing it gives other images.",
            stacklevel=4,
        )
