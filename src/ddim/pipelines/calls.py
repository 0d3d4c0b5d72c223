"""The body of both text pipelines' calls: what is asked is resolved and drawn by this package's
loop, or goes to diffusers' own."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ParamSpec

import diffusers

from ddim.core.guidance import check_rescale, is_guided
from ddim.core.noise import make_generators
from ddim.core.timesteps import truncate_timesteps
from ddim.errors import DDIMError
from ddim.pipelines.base import Source, draw_seeds, with_seeds
from ddim.pipelines.foreign import check_scheduler
from ddim.pipelines.networks import mention_precision
from ddim.pipelines.pictures import prepare_images
from ddim.pipelines.prompts import (
    Guidance,
    Prompts,
    count_groups,
    given_lengths,
    warn_of_no_guidance,
)

__all__ = ["resolved"]

P = ParamSpec("P")

_PROMPTS = [field.name for field in fields(Prompts)]
_GUIDANCE = ("scale", "rescale", "batched")
_THEIRS = ("sigmas", "ip_adapter_image", "ip_adapter_image_embeds")
"""Named arguments that only diffusers' own call knows."""


def resolved(call: Callable[P, Any]) -> Callable[P, Any]:
    """Gives a call, which says its arguments and nothing else, its body.

    The arguments become a route, prompts and guidance, along which the pipeline draws. A call with
    an argument, or of a pipeline with a part, that our loop does not know goes to diffusers' own;
    there our arguments act too, or are refused."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def body(*args: P.args, **kwargs: P.kwargs) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        pipe, others = given.pop("self"), given.pop("others")
        others |= {name: given[name] for name in _THEIRS if given[name] is not None}
        reason = _why_elsewhere(pipe, others)
        if reason is None:
            return _draw(pipe, given)
        defaults = {name: p.default for name, p in signature.parameters.items()}
        return _draw_elsewhere(pipe, given, others, reason, defaults)

    return body


def _draw(pipe: Any, given: dict[str, Any]) -> Any:
    """Resolves the arguments of a call, and draws."""
    for name in _THEIRS:
        del given[name]
    pipe._check_output_type(given["output_type"])
    route = pipe._take_route(given)
    prompts = Prompts(**{name: given.pop(name) for name in _PROMPTS})
    guidance = Guidance(**{name: given.pop(f"guidance_{name}") for name in _GUIDANCE})
    return pipe.draw(route, prompts, guidance, **given)


def _draw_elsewhere(
    pipe: Any, given: dict[str, Any], others: dict[str, Any], reason: str, defaults: dict[str, Any]
) -> Any:
    """Calls diffusers' own loop, or refuses arguments of ours that have no meaning there."""
    mention_precision(pipe)
    theirs = pipe._exported.__call__
    known = inspect.signature(theirs).parameters
    ours = {name: given.pop(name) for name in list(given) if name not in known}
    translated = {name: ours.pop(name) for name in ("seeds", "progress")}
    if "callback_steps" in others:  # the older callback of diffusers
        translated["callback"] = ours.pop("callback")
    if refused := [name for name, value in ours.items() if value != defaults[name]]:
        raise DDIMError(
            f"{reason} is sampled by diffusers' own loop, which does not know "
            f"{', '.join(refused)}; leave out one or the other."
        )
    with _arguments(pipe, given | others, **translated) as (arguments, seeds):
        return with_seeds(theirs(pipe, **arguments), seeds)


def _why_elsewhere(pipe: Any, others: Mapping[str, Any]) -> str | None:
    """The argument or the part, if any, that our loop does not know: diffusers' own does."""
    pipe._require("unet", "scheduler")
    check_scheduler(pipe.scheduler)
    if others:
        known = {*inspect.signature(pipe._exported.__call__).parameters, "callback_steps"}
        if (unknown := min(set(others) - known, default=None)) is None:
            return next(iter(others))
        name, its_own = pipe._other
        hint = f"; {name} takes it, and {name}(**pipe.components) is one of the same parts"
        raise TypeError(
            f"{type(pipe).__name__} got an unexpected keyword argument {unknown!r}"
            f"{hint if unknown in its_own else ''}"
        )
    if not isinstance(pipe.scheduler, diffusers.DDIMScheduler):
        return f"a {type(pipe.scheduler).__name__}"
    if pipe.unet.config.time_cond_proj_dim is not None:
        return "a network that is told the guidance scale"
    return None


@contextmanager
def _arguments(
    pipe: Any, options: dict[str, Any], *, seeds: Any, progress: bool, callback: Any = None
) -> Iterator[tuple[dict[str, Any], list[int] | None]]:
    """Checks what diffusers' own call would not, and yields the arguments of that call and the
    images' seeds; while held, its bar is shown as asked."""
    if "strength" in options:  # image to image, where diffusers would cut off in silence
        prepare_images(pipe, options["image"])
        steps, levels = options["num_inference_steps"] or 50, options["timesteps"]
        truncate_timesteps(range(steps) if levels is None else levels, options["strength"])
    prompts = Prompts(options["prompt"], prompt_embeds=options["prompt_embeds"])
    lengths = given_lengths(Source(seeds, options["generator"]), options.get("latents"))
    pipe._check_output_type(options["output_type"])
    check_rescale(options.get("guidance_rescale", 0.0))
    away = [options[name] for name in ("negative_prompt", "negative_prompt_embeds")]
    if any(value is not None for value in away) and not is_guided(options["guidance_scale"]):
        warn_of_no_guidance(options["guidance_scale"])
    per_prompt = options["num_images_per_prompt"]
    groups, each = count_groups(prompts.count, None, per_prompt, lengths)
    if seeds is None and options["generator"] is None:
        seeds = draw_seeds(groups * each)
    changed = {
        "num_inference_steps": options["num_inference_steps"] or 50,
        "num_images_per_prompt": each,
        "callback_on_step_end_tensor_inputs": list(options["callback_on_step_end_tensor_inputs"]),
        **({} if seeds is None else {"generator": make_generators(seeds)}),
        **({} if callback is None else {"callback": callback}),
    }
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    if not progress:
        pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield options | changed, seeds
    finally:
        pipe.set_progress_bar_config(**before)
