"""What a scheduler's configuration says: of which family it is, whether its values can be used, and
what was given in it."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ddim.core.prediction import PREDICTION_TYPES
from ddim.core.schedule import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from ddim.core.timesteps import SPACINGS
from ddim.errors import DDIMError

__all__ = ["check_options", "foreign_family", "given_options", "noise_schedule", "unknown_options"]

# Schedulers that are configured by betas over discrete levels: what DDIM can walk.
_FAMILY = frozenset(
    f"{name}Scheduler"
    for name in (
        *(
            "DDIM",
            "DDIMInverse",
            "DDIMParallel",
            "DDPM",
            "DDPMParallel",
            "PNDM",
            "LMSDiscrete",
            "EulerDiscrete",
            "EulerAncestralDiscrete",
        ),
        *(
            "HeunDiscrete",
            "KDPM2Discrete",
            "KDPM2AncestralDiscrete",
            "DPMSolverMultistep",
            "DPMSolverMultistepInverse",
        ),
        *(
            "DPMSolverSinglestep",
            "DPMSolverSDE",
            "DEISMultistep",
            "UniPCMultistep",
            "SASolver",
            "LCM",
            "TCD",
            "RePaint",
        ),
    )
)


def foreign_family(config: Mapping[str, Any]) -> str | None:
    """What a scheduler is that DDIM cannot follow, as the end of a sentence; None for the family of
    DDIM.

    A scheduler in memory has no ``_class_name`` in its configuration: then the options tell.
    """
    kind = None if config.get("_class_name") is None else str(config["_class_name"])
    other = (
        ()
        if "beta_schedule" in config
        else tuple(
            name for name in ("shift", "sigma_data", "sigma_min", "beta_max") if name in config
        )
    )
    flow = (
        "Flow" in (kind or "")
        or config.get("prediction_type") == "flow_prediction"
        or config.get("use_flow_sigmas")
    )
    if flow or (kind is None and "shift" in other):
        return (
            f"a {kind or 'scheduler'} of a flow-matching model, which learns straight paths "
            "between noise and data; DDIM needs a model "
            "trained on a noise schedule (DDPM, DDIM, Stable Diffusion 1 and 2, ...), so use "
            "diffusers' own pipeline for this one."
        )
    if (kind is None and (other or "snr_shift_scale" in config)) or (
        kind is not None and kind not in _FAMILY
    ):
        return (
            f"a {kind or 'scheduler'}, which has no noise schedule of discrete betas for DDIM to "
            "follow; "
            "use diffusers' own pipeline for it."
        )
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_fraction(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1  # type: ignore[operator]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_Rule = tuple[str, Callable[[Any], bool]]
_SWITCH: _Rule = ("true or false", lambda value: isinstance(value, bool))
_RULES: dict[str, _Rule] = {
    "_class_name": ("the name of a scheduler", lambda value: isinstance(value, str)),
    "num_train_timesteps": (
        "a whole number from 1 to 1000000",
        lambda value: _is_whole(value) and 1 <= value <= 1_000_000,
    ),
    "beta_start": ("a number from 0 to 1", _is_fraction),
    "beta_end": ("a number from 0 to 1", _is_fraction),
    "beta_schedule": ("a name, such as linear", lambda value: isinstance(value, str)),
    "trained_betas": (
        "null or a list of numbers from 0 to 1",
        lambda value: (
            value is None
            or (
                isinstance(value, (list, tuple))
                and len(value) > 0
                and all(map(_is_fraction, value))
            )
        ),
    ),
    "clip_sample": _SWITCH,
    "thresholding": _SWITCH,
    "set_alpha_to_one": _SWITCH,
    "rescale_betas_zero_snr": _SWITCH,
    "steps_offset": ("a whole number", _is_whole),
    "clip_sample_range": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "sample_max_value": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "dynamic_thresholding_ratio": ("a number from 0 to 1", _is_fraction),
    "prediction_type": (f"one of {', '.join(PREDICTION_TYPES)}", PREDICTION_TYPES.__contains__),
    "timestep_spacing": (f"one of {', '.join(SPACINGS)}", SPACINGS.__contains__),
}


def check_options(config: Mapping[str, Any]) -> None:
    """Refuses values that cannot be meant, as a file may hold them; keys that are absent, or not
    DDIM's, are not looked at.

    Raises:
        DDIMError: Which option, what it must be, and what it is.
    """
    for name, (what, fits) in _RULES.items():
        if name in config and not fits(config[name]):
            raise DDIMError(f"{name} must be {what}; got {_brief(config[name])}.")


def _brief(value: object) -> str:
    told = "null" if value is None else repr(value)
    return told if len(told) <= 80 else f"{told[:77]}..."


def noise_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The levels that a scheduler's configuration describes, float64; absent keys mean what they
    mean in diffusers.

    Raises:
        DDIMError: If the beta schedule is unknown.
    """
    trained = config.get("trained_betas")
    betas = (
        make_betas(
            config.get("beta_schedule", "linear"),
            config.get("num_train_timesteps", 1000),
            beta_start=config.get("beta_start", 1e-4),
            beta_end=config.get("beta_end", 0.02),
        )
        if trained is None
        else torch.as_tensor(trained, dtype=torch.float64)
    )
    betas = rescale_zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas
    return NoiseSchedule.from_betas(betas, set_alpha_to_one=config.get("set_alpha_to_one", True))


def given_options(config: Mapping[str, Any], scheduler: type) -> dict[str, Any]:
    """The configuration of a scheduler of that class, in which only what is at its default counts
    as not given.

    diffusers keeps a list of options that were not given, and leaves them out when another class
    takes the configuration over. Options that were given by position, or changed later, are in that
    list too."""
    if "_use_default_values" not in config:
        return dict(config)
    defaults = inspect.signature(scheduler).parameters
    unset = [
        name
        for name in config["_use_default_values"]
        if name not in defaults or _is(config.get(name), defaults[name].default)
    ]
    return {**config, "_use_default_values": unset}


def unknown_options(
    names: Iterable[str], scheduler: type, family: Callable[[], Iterable[type]]
) -> dict[str, str | None]:
    """Names that are options neither of a scheduler nor of any in its family, each with the nearest
    option that it has, if one is near."""
    own = [name for name in inspect.signature(scheduler).parameters if name != "kwargs"]
    strange = [name for name in names if name not in own]
    if not strange:
        return {}
    others = {name for kind in family() for name in inspect.signature(kind).parameters}
    return {
        name: next(iter(difflib.get_close_matches(name, own, 1)), None)
        for name in strange
        if name not in others
    }


def _is(value: object, default: object) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))
