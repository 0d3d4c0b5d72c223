"""What a scheduler's configuration says: its defaults, levels, timesteps, clipping and family,
whether its values can be used, and what was given in it.

A configuration is a mapping, as in ``scheduler_config.json`` or as ``vars`` of a scheduler's
``config``. Absent keys mean what they mean in diffusers."""

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddim.bounds import MOST_LEVELS
from ddim.core.denoiser import Clip
from ddim.core.prediction import PREDICTION_TYPES
from ddim.core.schedule import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from ddim.core.step import ORDERS
from ddim.core.timesteps import SPACINGS, Spacing, check_timesteps, select_timesteps
from ddim.errors import DDIMError

__all__ = [
    "DEFAULTS",
    "LEVEL_OPTIONS",
    "PIXEL_MODEL",
    "check_keys",
    "check_levels",
    "check_options",
    "configured_betas",
    "configured_timesteps",
    "did_you_mean",
    "fitted_lists",
    "fitted_timesteps",
    "foreign_family",
    "given_options",
    "noise_schedule",
    "own_options",
    "select_clip",
    "spelled_betas",
    "unknown_options",
    "without_own_defaults",
]

DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}
"""What absent keys mean in diffusers' DDIM, as which a DDIM pipeline reads any configuration."""

LEVEL_OPTIONS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
"""The options that name a schedule of betas."""

PIXEL_MODEL: dict[str, Any] = {
    **{name: DEFAULTS[name] for name in (*LEVEL_OPTIONS, "prediction_type")},
    "clip_sample": False,
    "timestep_spacing": "trailing",
}
"""DDPM's levels as this project samples them: what is assumed of a network without a scheduler, and
what training and conversion begin with."""

_NATIVE = ("linear", "scaled_linear", "squaredcos_cap_v2")  # schedules that diffusers' DDIM knows

# Schedulers that are configured by betas over discrete levels: what DDIM can walk.
_FAMILY_NAMES = (
    "DDIM DDIMInverse DDIMParallel DDPM DDPMParallel PNDM LMSDiscrete EulerDiscrete "
    "EulerAncestralDiscrete HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete DPMSolverMultistep "
    "DPMSolverMultistepInverse DPMSolverSinglestep DPMSolverSDE DEISMultistep UniPCMultistep "
    "SASolver LCM TCD RePaint"
)
_FAMILY = frozenset(f"{name}Scheduler" for name in _FAMILY_NAMES.split())


def foreign_family(config: Mapping[str, Any]) -> str | None:
    """Says, as the end of a sentence, what a scheduler is that DDIM cannot follow; None for DDIM's
    family. The options tell it too: without a ``_class_name``, as in memory, or beside the name of
    a scheduler that serves several families."""
    kind = None if config.get("_class_name") is None else str(config["_class_name"])
    name = kind or "scheduler"
    in_memory = "_use_default_values" in config  # where diffusers lists every option
    marks = ("shift", "sigma_data", "sigma_min", "beta_max")
    others = [] if "beta_schedule" in config else [mark for mark in marks if mark in config]
    is_flow = (
        "Flow" in (kind or "")
        or config.get("prediction_type") == "flow_prediction"
        or config.get("use_flow_sigmas")
    )
    if is_flow or (kind is None and "shift" in others):
        return (
            f"a {name} of a flow-matching model, which learns straight paths between noise and "
            "data; DDIM needs a model trained on a noise schedule (DDPM, DDIM, Stable Diffusion 1 "
            "and 2, ...), so use diffusers' own pipeline for this one."
        )
    is_bare = in_memory and "beta_start" not in config
    is_other = others or "snr_shift_scale" in config or is_bare
    if is_other if kind is None else kind not in _FAMILY:
        why = "has no noise schedule of discrete betas for DDIM to follow"
        return f"a {name}, which {why}; use diffusers' own pipeline for it."
    if (option := _continuous_levels(config)) is not None:
        return (
            f"a {name} of a model of continuous noise levels ({option}), whose network is not told "
            "the timesteps that DDIM visits; use diffusers' own pipeline for it."
        )
    return None


def _continuous_levels(config: Mapping[str, Any]) -> str | None:
    """The option that tells a model of continuous noise levels: their kind, or a range of sigmas
    that its betas do not have; None for other models. What is a class's default tells nothing."""
    unset = config.get("_use_default_values", ())
    config = {name: value for name, value in config.items() if name not in unset}
    if config.get("timestep_type") == "continuous":
        return "timestep_type continuous"
    if config.get("sigma_data") is not None:
        return f"sigma_data {config['sigma_data']}"
    given = {n: config[n] for n in ("sigma_min", "sigma_max") if _is_number(config.get(n))}
    if not given or not all(_is_number(config.get(n, 0.0)) for n in ("beta_start", "beta_end")):
        return None
    alpha_bar = (1 - configured_betas(config)).cumprod(0)
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    lowest, highest = 0.9 * float(sigmas[0]), 1.1 * float(sigmas[-1])
    outside = [f"{name} {value}" for name, value in given.items() if not lowest <= value <= highest]
    return outside[0] if outside else None


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) < sys.float_info.max  # a whole number may be larger than floats


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_betas(value: Any, fits: Callable[[Any], bool] = _is_fraction) -> bool:
    is_list = isinstance(value, (list, tuple)) and 0 < len(value) <= MOST_LEVELS
    return value is None or (is_list and all(map(fits, value)))


_Rule = tuple[str, Callable[[Any], bool]]
_SWITCH: _Rule = ("true or false", lambda value: isinstance(value, bool))
_FRACTION: _Rule = ("a number from 0 to 1", _is_fraction)
_POSITIVE: _Rule = ("a number above 0", lambda value: _is_number(value) and value > 0)
_COUNT = f"a whole number from 1 to {MOST_LEVELS}"
_RULES: dict[str, _Rule] = {
    "_class_name": ("the name of a scheduler", lambda value: isinstance(value, str)),
    "num_train_timesteps": (_COUNT, lambda value: _is_whole(value) and 1 <= value <= MOST_LEVELS),
    **dict.fromkeys(("beta_start", "beta_end", "dynamic_thresholding_ratio"), _FRACTION),
    "beta_schedule": ("a name, such as linear", lambda value: isinstance(value, str)),
    "trained_betas": ("null or a list of numbers from 0 to 1", _is_betas),
    **dict.fromkeys(("clip_sample", "thresholding", "set_alpha_to_one"), _SWITCH),
    "rescale_betas_zero_snr": _SWITCH,
    "steps_offset": ("a whole number", _is_whole),
    **dict.fromkeys(("clip_sample_range", "sample_max_value"), _POSITIVE),
    "prediction_type": (f"one of {', '.join(PREDICTION_TYPES)}", PREDICTION_TYPES.__contains__),
    "timestep_spacing": (f"one of {', '.join(SPACINGS)}", SPACINGS.__contains__),
    "multistep_order": ("1 or 2", lambda value: _is_whole(value) and value in ORDERS),
}


_ANY_NUMBER: _Rule = ("a finite number", _is_number)
_OF_DIFFUSERS: dict[str, _Rule] = {  # what its schedulers take in memory, sound or not
    **dict.fromkeys(("beta_start", "beta_end", "dynamic_thresholding_ratio"), _ANY_NUMBER),
    "trained_betas": ("null or a list of finite numbers", lambda b: _is_betas(b, _is_number)),
}


def check_options(config: Mapping[str, Any], *, as_diffusers: bool = False) -> None:
    """Refuses invalid values of DDIM's options, as a file may hold them, with a DDIMError;
    ``as_diffusers`` lets pass betas that are no schedule, as its schedulers in memory do."""
    for name, (what, fits) in (_RULES | _OF_DIFFUSERS if as_diffusers else _RULES).items():
        if name in config and not fits(value := config[name]):
            text = "null" if value is None else repr(value)
            short = text if len(text) <= 80 else f"{text[:77]}..."
            known = {"prediction_type": PREDICTION_TYPES, "timestep_spacing": SPACINGS}
            hint = did_you_mean(value, known.get(name, ()))
            raise DDIMError(f"{name} must be {what}; got {short}{hint or '.'}")
    total = config.get("num_train_timesteps", DEFAULTS["num_train_timesteps"])
    if not 0 <= (offset := config.get("steps_offset", 0)) <= total:
        raise DDIMError(
            f"steps_offset must lie in [0, {total}], the levels of num_train_timesteps; got "
            f"{offset}."
        )
    fitted_lists(config)


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuses a key that is an option mistyped by a letter, with a DDIMError; other keys that are
    unknown may be those of another scheduler."""
    for key in config:
        close = [] if key in DEFAULTS else difflib.get_close_matches(key, DEFAULTS, 1, 0.9)
        if close:
            raise DDIMError(f"there is no option {key!r}; did you mean {close[0]!r}?")


def check_levels(config: Mapping[str, Any]) -> None:
    """Refuses ``trained_betas`` without all of the levels that timesteps are chosen of, with a
    DDIMError; diffusers' schedulers in memory accept them, and fail at a step."""
    betas = config.get("trained_betas")
    total = config.get("num_train_timesteps", DEFAULTS["num_train_timesteps"])
    if betas is not None and len(betas) < total:
        raise DDIMError(
            f"trained_betas has {len(betas)} levels, and num_train_timesteps says {total}: levels "
            f"that are not there would be visited; set num_train_timesteps to {len(betas)}."
        )


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """The end of a sentence that proposes the name that was meant; empty if there is none."""
    names = list(known) if isinstance(given, str) and given else []
    begun = [name for name in names if name.startswith(str(given))]
    near = begun or difflib.get_close_matches(str(given), names, 1, 0.55)
    return f"; did you mean {near[0]!r}?" if near else ""


def configured_betas(config: Mapping[str, Any]) -> Tensor:
    """The betas that a configuration gives or names, before any rescale; shape [T], float64."""
    config = {**DEFAULTS, **config}
    if config["trained_betas"] is not None:
        return torch.as_tensor(np.asarray(config["trained_betas"]), dtype=torch.float64)
    kind, total = config["beta_schedule"], config["num_train_timesteps"]
    return make_betas(kind, total, beta_start=config["beta_start"], beta_end=config["beta_end"])


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The levels that a configuration describes, float64; a DDIMError refuses an unknown beta
    schedule, and betas outside [0, 1]."""
    betas = configured_betas(config)
    betas = rescale_zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas
    return NoiseSchedule.from_betas(betas, set_alpha_to_one=config.get("set_alpha_to_one", True))


def spelled_betas(config: Mapping[str, Any]) -> list[float] | None:
    """``trained_betas`` for diffusers' DDIM: the given ones, or those of a schedule that it does
    not know by name; None for one that it knows."""
    betas: list[float] = configured_betas(config).tolist()
    is_given = config.get("trained_betas") is not None
    return betas if is_given or config.get("beta_schedule", "linear") not in _NATIVE else None


def without_own_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys of this package that say what is so without them, since
    diffusers warns of a key that it does not know."""
    own = {"multistep_order": 1, "fitted_timesteps": None}
    return {k: v for k, v in config.items() if not (k in own and v == own[k])}


def fitted_lists(config: Mapping[str, Any]) -> list[list[int]]:
    """The lists in ``config["fitted_timesteps"]``; that of N levels is visited in N steps."""
    lists = config.get("fitted_timesteps") or []
    kinds = (list, tuple)
    if not isinstance(lists, kinds) or not all(isinstance(levels, kinds) for levels in lists):
        wanted = "a list of lists of levels, such as [[999, 500], [999, 700, 300]]"
        raise DDIMError(f"fitted_timesteps must be {wanted}; got {lists!r}.")
    return [list(levels) for levels in lists]


def fitted_timesteps(
    config: Mapping[str, Any], num_inference_steps: int | None
) -> list[int] | None:
    """The fitted list of that many levels, which must fall; None if there is none."""
    lists = fitted_lists(config)
    found = next((levels for levels in lists if len(levels) == num_inference_steps), None)
    total = config.get("num_train_timesteps", DEFAULTS["num_train_timesteps"])
    return None if found is None else check_timesteps(found, total)


def configured_timesteps(
    config: Mapping[str, Any],
    num_inference_steps: int,
    *,
    total: int | None = None,
    spacing: Spacing | None = None,
    use_fitted: bool = True,
) -> list[int]:
    """The levels that N steps visit: fitted ones if ``use_fitted``, else those of the spacing.

    A ``spacing`` takes the place of the configuration's, and of its fitted lists; ``total`` that of
    ``num_train_timesteps``.

    Raises:
        DDIMError: If N is not a whole number in 1..T, the spacing is unknown, or the fitted lists
            cannot be used.
    """
    config = {**DEFAULTS, **config}
    if use_fitted and spacing is None and (fitted := fitted_timesteps(config, num_inference_steps)):
        return fitted
    return select_timesteps(
        config["num_train_timesteps"] if total is None else total,
        num_inference_steps,
        config["timestep_spacing"] if spacing is None else spacing,
        steps_offset=config["steps_offset"],
    )


def select_clip(
    config: Mapping[str, Any], kind: Literal["none", "static", "dynamic"] | None = None
) -> Clip:
    """How the predicted x0 is kept in range. Default kind: the configuration's."""
    config = {**DEFAULTS, **config}
    if kind is None:
        is_static = config["clip_sample"]
        kind = "dynamic" if config["thresholding"] else "static" if is_static else "none"
    ratio, largest = config["dynamic_thresholding_ratio"], config["sample_max_value"]
    return Clip(kind, config["clip_sample_range"], ratio, max(1.0, largest))


def own_options(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration with our options under their names of today: files of ours used to say
    ``solver_order``, which other multisteps read, for ``multistep_order``. What diffusers lists as
    another class's defaults counts as given where it describes the model: LCM's betas, say."""
    if (unset := config.get("_use_default_values")) is not None:
        model = {*LEVEL_OPTIONS, "prediction_type", "clip_sample"} & set(config)
        own = {name for name in model if config[name] != DEFAULTS[name]}
        config = {**config, "_use_default_values": [name for name in unset if name not in own]}
    names = ("DDIMScheduler", "DDIMInverseScheduler")
    is_ours = config.get("_class_name") in names and "solver_type" not in config
    if not is_ours or "solver_order" not in config:
        return config
    others = {name: value for name, value in config.items() if name != "solver_order"}
    return {"multistep_order": config["solver_order"], **others}


def given_options(config: Mapping[str, Any], scheduler: type) -> dict[str, Any]:
    """The configuration of a scheduler of that class, in which only what is at its default counts
    as not given: diffusers' list of what another class does not take over also holds options that
    were given by position or changed later."""
    if "_use_default_values" not in config:
        return dict(config)
    defaults = inspect.signature(scheduler).parameters

    def is_unset(name: str) -> bool:
        if name not in defaults:
            return True
        value, default = config.get(name), defaults[name].default
        return value is default or (type(value) is type(default) and bool(value == default))

    return {**config, "_use_default_values": [*filter(is_unset, config["_use_default_values"])]}


def unknown_options(
    names: Iterable[str], scheduler: type, family: Callable[[], Iterable[type]]
) -> list[str]:
    """A sentence for each name that is no option of a scheduler, nor of any in its family."""
    own = [name for name in inspect.signature(scheduler).parameters if name != "kwargs"]
    strange = [name for name in names if name not in own]
    if not strange:
        return []
    others = {name for kind in family() for name in inspect.signature(kind).parameters}
    sentences = []
    for name in (name for name in strange if name not in others):
        hint = did_you_mean(name, own) or "."
        sentences.append(f"{scheduler.__name__} has no option {name!r} and ignores it{hint}")
    return sentences
