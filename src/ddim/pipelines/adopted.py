"""Pipelines that stay diffusers' own, with our schedulers and with what acts of our calls."""

import difflib
import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers

from ddim.configuration import given_options
from ddim.core.noise import check_seeds, make_generators
from ddim.errors import DDIMError
from ddim.pipelines.networks import mention_precision
from ddim.pipelines.routing import RouteOptions, reconfigured
from ddim.scheduler import DDIMInverseScheduler, as_ddim

__all__ = ["Adopted", "adopt", "adopted", "read_as_written", "replace_schedulers"]

_ACTING = ("seeds", "timestep_spacing", "order")
_REFUSED = {*RouteOptions.__annotations__, "prior", "callback", "progress", "guidance_batched"}
_ONE_EACH = ("prompt", "prompt_embeds", "class_labels", "image_embeds", "image")
"""Arguments of diffusers' calls that say how many groups of images are made."""


class Adopted:
    """A pipeline of diffusers, of the class ``_exported``, that :func:`adopt` gave our call."""

    _exported: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._exported,), self.__dict__


def adopt(pipe: Any) -> Any:
    """Gives a pipeline of diffusers, in place, a call that takes ``seeds``, ``timestep_spacing``
    and ``order`` beside its own arguments, and refuses what it does not know."""
    if not isinstance(pipe, Adopted):
        pipe.__class__ = adopted(type(pipe))  # type: ignore[arg-type]
    return pipe


def replace_schedulers(pipe: Any, given: Mapping[str, Any]) -> None:
    """Puts our schedulers in place of those that a checkpoint names: the sampler, and with it the
    inverse that belongs to it; not in place of those that the user gave."""
    if given.get("scheduler") is not None:
        return
    pipe.scheduler = as_ddim(pipe.scheduler)
    inverse = getattr(pipe, "inverse_scheduler", None)
    if inverse is not None and given.get("inverse_scheduler") is None:
        options = given_options(inverse.config, type(inverse))
        named = {**options, "_class_name": type(inverse).__name__}
        pipe.inverse_scheduler = DDIMInverseScheduler.from_config(named)


def read_as_written(pipe: Any, given: Mapping[str, Any]) -> None:
    """Gives options that a checkpoint's files lack the meaning that they had when such files were
    written, where diffusers' default is another today.

    LDMPipeline decoded latents as they are until the scale of its VQ model became an option, of
    0.18215 by default. Elsewhere pipelines scaled by that number from the beginning."""
    codebook: Any = getattr(pipe, "vqvae", None)
    if not isinstance(pipe, diffusers.LDMPipeline) or "vqvae" in given:
        return
    if "scaling_factor" in codebook.config.get("_use_default_values", ()):
        codebook.register_to_config(scaling_factor=1.0)


@functools.cache
def adopted(kind: type[Any]) -> type:
    """The class of a pipeline of that class with our call; its name stays, which files hold."""
    theirs = kind.__call__

    @functools.wraps(theirs)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        known = inspect.signature(theirs).parameters
        ours = {name: options.pop(name, None) for name in _ACTING if name not in known}
        _check_names(kind, options)
        given = inspect.signature(theirs).bind(self, *args, **options).arguments
        spacing, order = ours.get("timestep_spacing"), ours.get("order")
        if spacing is not None and any(given.get(n) is not None for n in ("timesteps", "sigmas")):
            raise DDIMError("timesteps say which levels are visited; leave out timestep_spacing.")
        if ours.get("seeds") is not None:
            options |= _seeded(kind, known, given, ours["seeds"])
        mention_precision(self)
        names = [name for name in ("scheduler", "inverse_scheduler") if hasattr(self, name)]
        with reconfigured([getattr(self, name) for name in names], spacing, order):
            return theirs(self, *args, **options)

    body: dict[str, Any] = {
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "_exported": kind,
    }
    if any("__call__" in vars(base) for base in kind.__mro__):  # some have other methods only
        body["__call__"] = call
    return type(kind.__name__, (Adopted, kind), body)


def _blank(kind: type) -> Any:
    """A pipeline without its parts, which ``pickle`` and ``copy`` fill."""
    made: Any = adopted(kind)
    return made.__new__(made)


@functools.cache
def _taken(kind: type[Any]) -> frozenset[str] | None:
    """The keywords that a call takes; None where it passes unknown ones on."""
    parameters = inspect.signature(kind.__call__).parameters.values()
    names = frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if rest is None:
        return names
    try:
        source = inspect.getsource(kind.__call__)
    except OSError:
        return None
    if len(re.findall(rf"\*\*{rest}\b", source)) > 1:
        return None
    return names | set(re.findall(rf"\b{rest}\.(?:pop|get)\(\s*[\"'](\w+)", source))


def _check_names(kind: type, options: Mapping[str, Any]) -> None:
    """Refuses keywords that diffusers' call would pass over, or not understand."""
    taken = _taken(kind)
    unknown = [] if taken is None else [name for name in options if name not in taken]
    if refused := [name for name in unknown if name in _REFUSED]:
        raise DDIMError(
            f"a {kind.__name__} is sampled by diffusers' own loop, which does not know "
            f"{', '.join(refused)}; leave it out."
        )
    if unknown:
        close = difflib.get_close_matches(unknown[0], [*(taken or ()), *_ACTING], 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{kind.__name__} got an unexpected keyword argument {unknown[0]!r}{hint}")


def _seeded(
    kind: type, known: Mapping[str, Any], given: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    """The arguments of diffusers' call that draw one image a seed."""
    count = len(check_seeds(seeds))
    if "generator" not in known or count == 0:
        why = "there are none" if count == 0 else f"a {kind.__name__} takes no generator"
        raise DDIMError(f"seeds must be one an image, and {why}; leave out seeds.")
    if given.get("generator") is not None:
        raise DDIMError("seeds and generator both say where noise comes from; give one of them.")
    groups = next((_length(given[n]) for n in _ONE_EACH if given.get(n) is not None), None)
    each = next((n for n in known if re.fullmatch(r"num_\w+_per_prompt", n)), None)
    sized = "batch_size" if groups is None and "batch_size" in known else each
    groups = 1 if groups is None else groups
    wanted = count // groups if sized else 1
    asked = wanted if sized is None else given.get(sized, wanted)
    if groups * asked != count or asked < 1:
        made = f"a multiple of {groups}" if sized and sized not in given else f"{groups * asked}"
        raise DDIMError(f"there must be a seed an image, {made} of them; got {count} seeds.")
    return {"generator": make_generators(seeds), **({sized: asked} if sized else {})}


def _length(value: Any) -> int:
    """How many there are of something that is one or a list."""
    is_many = hasattr(value, "__len__") and not isinstance(value, (str, dict))
    return len(value) if is_many else 1
