"""A scheduler's configuration as the doctor reads it: complete, its levels, and whether this
package samples with it."""

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from ddim.configuration import (
    DEFAULTS,
    check_options,
    configured_timesteps,
    fitted_lists,
    noise_schedule,
)
from ddim.core.plan import make_plan
from ddim.core.schedule import NoiseSchedule
from ddim.core.step import Eta
from ddim.core.timesteps import check_timesteps
from ddim.errors import DDIMError

__all__ = [
    "OTHER_KEYS",
    "complete",
    "is_cogvideo",
    "is_inverse",
    "levels_of",
    "read_keys",
    "refusal",
]

_OTHER_KEYS = """
algorithm_type corrector_order disable_corrector eta euler_at_final final_sigmas_type flow_shift
interpolation_type lambda_min_clipped lower_order_final original_inference_steps predict_x0
predictor_order shift_terminal sigma_max sigma_min skip_prk_steps snr_shift_scale solver_order
solver_p solver_type tau_func time_shift_type timestep_scaling timestep_type use_beta_sigmas
use_dynamic_shifting use_exponential_sigmas use_flow_sigmas use_karras_sigmas use_lu_lambdas
variance_type
predict_epsilon tensor_format timestep_values
fitted_timesteps multistep_order
"""
OTHER_KEYS = frozenset(_OTHER_KEYS.split())
"""Known keys that not every scheduler of the family has: of diffusers' other schedulers, of
diffusers before 0.12, and our own."""

# The one sampler of the family whose default schedule is its own.
_COGVIDEO: dict[str, Any] = {
    **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "snr_shift_scale": 3.0,
}


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with diffusers' values for absent keys.

    Raises:
        DDIMError: If a key is unknown, or a value of the wrong kind or not finite.
    """
    for key in config:
        if key not in DEFAULTS and key not in OTHER_KEYS and not key.startswith("_"):
            close = get_close_matches(key, [*DEFAULTS, *sorted(OTHER_KEYS)], n=1)
            otherwise = "no scheduler of this family has it; remove it."
            hint = f"did you mean {close[0]!r}?" if close else otherwise
            raise DDIMError(f"the scheduler's configuration has the unknown key {key!r}; {hint}")
    full = {**DEFAULTS, **(_COGVIDEO if is_cogvideo(config.get("_class_name")) else {}), **config}
    shift = full.get("snr_shift_scale")
    if shift is not None and not (isinstance(shift, (int, float)) and 0 < shift < math.inf):
        raise DDIMError(f"snr_shift_scale must be a finite number above 0; got {shift!r}.")
    if not all(isinstance(t, int) for levels in fitted_lists(full) for t in levels):
        wanted = "a list of lists of levels, which are whole numbers"
        raise DDIMError(f"fitted_timesteps must be {wanted}; got {full['fitted_timesteps']!r}.")
    betas = full["trained_betas"]
    for i, beta in enumerate(betas if isinstance(betas, (list, tuple)) else []):
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
            raise DDIMError(f"trained_betas[{i}] must be a number from 0 to 1; got {beta!r}.")
    check_options(full)
    return full


def levels_of(config: Mapping[str, Any]) -> NoiseSchedule:
    """The levels of a complete configuration; also of CogVideoX, whose SNR is shifted before it is
    rescaled. A DDIMError refuses an unknown beta schedule, and one that adds no noise."""
    schedule = noise_schedule(config)
    shift = config.get("snr_shift_scale") if is_cogvideo(config.get("_class_name")) else None
    if shift:
        table = noise_schedule({**config, "rescale_betas_zero_snr": False}).alphas_cumprod
        table = table / (shift + (1 - shift) * table)
        betas = 1 - table / torch.cat([table.new_ones(1), table[:-1]])
        schedule = noise_schedule({**config, "trained_betas": betas})
    if float(schedule.alphas_cumprod[-1]) == 1:
        raise DDIMError("the scheduler's configuration adds no noise: all its betas are 0.")
    return schedule


def read_keys(config: Mapping[str, Any]) -> frozenset[str]:
    """The keys beyond diffusers' DDIM that are read: CogVideoX reads its shift, our scheduler
    fitted lists and the order."""
    if is_cogvideo(config["_class_name"]):
        return frozenset({"snr_shift_scale"})
    return frozenset({"fitted_timesteps", "multistep_order"})


def is_cogvideo(kind: object) -> bool:
    return str(kind).startswith("CogVideoX")


def is_inverse(config: Mapping[str, Any]) -> bool:
    """Whether the configuration's scheduler goes from data to noise."""
    return "Inverse" in config["_class_name"]


def refusal(
    config: Mapping[str, Any],
    schedule: NoiseSchedule,
    steps: int,
    timesteps: Sequence[int] | None,
    eta: Eta | None,
) -> str | None:
    """The sentence with which ``ddim.DDIMScheduler``, or its inverse, refuses a complete
    configuration, of these levels, at these steps, or at ``timesteps`` in their place; None if it
    samples."""
    total, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    try:
        own = (
            configured_timesteps(config, steps, spacing=spacing) if timesteps is None else timesteps
        )
        levels = check_timesteps(own, total)
        if levels[0] >= len(schedule):
            raise DDIMError(f"the schedule has {len(schedule)} levels; got level {levels[0]}.")
        plan = make_plan(
            schedule,
            levels,
            stride=1,
            prediction_type=config["prediction_type"],
            inverse=is_inverse(config),
            order=config.get("multistep_order") or 1,
        )
        plan.table(0.0 if eta is None else eta, False, torch.float64, torch.device("cpu"))
    except DDIMError as error:
        return str(error)
    return None
