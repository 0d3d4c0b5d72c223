"""The doctor: is a sampler set up right, and what is lost if not?

:func:`diagnose` reads a scheduler's configuration as a dict and asks it every question of :mod:`ddim.checks`; no network is needed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch

from ddim.checkpoints import noise_schedule
from ddim.checks import CHECKS, Case, Finding, Model, Severity, foreign_finding
from ddim.configuration import foreign_family
from ddim.errors import DDIMError
from ddim.prediction import prediction_row
from ddim.schedule import NoiseSchedule
from ddim.step import Eta, check_eta
from ddim.symptoms import Brightness, Probe, predict_brightness, stock_timesteps
from ddim.timesteps import select_timesteps, step_pairs

__all__ = ["Diagnosis", "complete", "diagnose", "levels_of"]

_STEPS = 50  # what the pipelines take where no number is given
_ASSUMED = (-0.43, 0.35, 64 * 64)  # the brightness of unknown images: dark and uneven as Fashion-MNIST, so that a leak shows

# Absent keys mean what they mean in diffusers' DDIM, which is what a DDIM pipeline makes of any configuration.
_DEFAULTS: dict[str, Any] = {
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
_UNUSED_KEYS = frozenset(  # of other schedulers in the family, and of ours
    (
        *("algorithm_type", "corrector_order", "disable_corrector", "eta", "euler_at_final", "final_sigmas_type", "flow_shift"),
        *("interpolation_type", "lambda_min_clipped", "lower_order_final", "original_inference_steps", "predict_x0"),
        *("predictor_order", "shift_terminal", "sigma_max", "sigma_min", "skip_prk_steps", "snr_shift_scale", "solver_order"),
        *("solver_p", "solver_type", "tau_func", "time_shift_type", "timestep_scaling", "timestep_type", "timesteps"),
        *("use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_flow_sigmas", "use_karras_sigmas"),
        *("use_lu_lambdas", "variance_type"),
    )
)


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        config: The configuration as it was given.
        findings: In the order of their codes.
        summary: What was looked at, in numbers; empty for a scheduler that is not of DDIM's family.
    """

    config: dict[str, Any]
    findings: tuple[Finding, ...]
    summary: dict[str, Any]

    def has(self, severity: Severity) -> bool:
        """Whether a finding is of that severity."""
        return any(f.severity == severity for f in self.findings)

    def fixed(self) -> dict[str, Any]:
        """The configuration with the fixes of all errors and warnings but those that need training."""
        result = dict(self.config)
        for finding in self.findings:
            if finding.severity != "info" and not finding.retrain:
                result |= finding.fix
        return result


def diagnose(
    config: Mapping[str, Any],
    *,
    steps: int | None = None,
    spacing: str | None = None,
    timesteps: Sequence[int] | None = None,
    eta: Eta | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    model: Model = Model(),  # noqa: B008 - frozen
    brightness: Brightness | None = None,
    probe: Probe | None = None,
) -> Diagnosis:
    """Looks a scheduler's configuration over.

    Args:
        config: As in ``scheduler_config.json``; absent keys mean what they mean in diffusers' DDIM.
        steps: N; None: 50, with a finding that says so.
        spacing: In place of the configuration's.
        timesteps: Levels of your own, in place of both.
        eta: What is to be sampled with; None: findings about eta are information.
        guidance_scale: Of classifier-free guidance; None: unknown.
        guidance_rescale: Its rescale.
        model: What is known of the network.
        brightness: Of the data; None: dark and uneven images are assumed.
        probe: From :func:`ddim.symptoms.probe`.

    Raises:
        DDIMError: If the configuration has an unknown key or value, or an option is out of range.
    """
    given = dict(config)
    kind = given.get("_class_name", "DDIMScheduler")
    told = None if str(kind).startswith("CogVideoX") else foreign_family({**given, "_class_name": kind})
    if told is not None:
        return Diagnosis(given, (foreign_finding(told),), {})
    full = complete({**given, "_class_name": kind, **({} if spacing is None else {"timestep_spacing": spacing})})
    schedule = levels_of(full)
    prediction_row(full["prediction_type"], schedule.alphas_cumprod[:1])  # refuses an unknown type
    if eta is not None:
        check_eta(eta)
    total, custom = len(schedule), timesteps if timesteps is not None else full.get("timesteps")
    count = min(_STEPS, total) if steps is None else steps
    levels = select_timesteps(total, min(count, total), full["timestep_spacing"], steps_offset=full["steps_offset"])
    if custom is not None:
        levels = sorted({int(t) for t in custom if 0 <= t <= total - 1}, reverse=True) or [total - 1]
    listed = custom is None and full["timestep_spacing"] in ("leading", "linspace", "trailing")
    training = None if model.training is None else complete(model.training)
    dimensions = math.prod(model.shape) if model.shape else _ASSUMED[2]
    case = Case(
        config=full,
        schedule=schedule,
        model=model,
        brightness=brightness or Brightness(*_ASSUMED[:2], dimensions),
        asked=steps,
        custom=custom,
        levels=levels,
        stock=stock_timesteps(total, len(levels), full["timestep_spacing"], steps_offset=full["steps_offset"]) if listed else None,
        eta=eta,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        probe=probe,
        training=training,
        training_schedule=None if training is None else levels_of(training),
    )
    return Diagnosis(given, tuple(found for check in CHECKS.values() if (found := check(case))), _summary(case, assumed=brightness is None))


def _summary(case: Case, *, assumed: bool) -> dict[str, Any]:
    bias, factor = predict_brightness(case.schedule, step_pairs(case.levels), case.brightness)
    return {
        "scheduler": case.config["_class_name"],
        "levels": len(case.schedule),
        "beta_schedule": "trained_betas" if case.config["trained_betas"] is not None else case.config["beta_schedule"],
        "prediction_type": case.config["prediction_type"],
        "terminal_snr": case.terminal / (1 - case.terminal),
        "steps": case.steps,
        "timestep_spacing": "custom" if case.custom is not None else case.config["timestep_spacing"],
        "first_level": case.levels[0],
        "last_level": case.levels[-1],
        "brightness": {
            "mean": case.brightness.mean,
            "std": case.brightness.std,
            "dimensions": case.brightness.dimensions,
            "assumed": assumed,
        },
        "brightness_bias": bias,
        "brightness_spread": factor,
    }


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with diffusers' values for absent keys.

    Raises:
        DDIMError: If a key is unknown, or a value of the wrong kind or not finite.
    """
    for key in config:
        if key not in _DEFAULTS and key not in _UNUSED_KEYS and not key.startswith("_"):
            close = get_close_matches(key, _DEFAULTS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "no scheduler of this family has it; remove it."
            raise DDIMError(f"the scheduler's configuration has the unknown key {key!r}; {hint}")
    full = {**_DEFAULTS, **config}
    for key, default in _DEFAULTS.items():
        value = full[key]
        if default is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        fits = (
            number
            if isinstance(default, float)
            else isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool)
        )
        if not fits:
            kind = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a word"}[type(default)]
            raise DDIMError(f"{key} must be {kind}; got {value!r}.")
    betas = full["trained_betas"]
    named = {"beta_start": full["beta_start"], "beta_end": full["beta_end"]}
    if betas is not None:
        if not isinstance(betas, (list, tuple)) or not betas:
            raise DDIMError(f"trained_betas must be a list of numbers, or null; got {type(betas).__name__}.")
        named = {f"trained_betas[{i}]": beta for i, beta in enumerate(betas)}
    for key, beta in named.items():
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:  # NaN is in no range
            raise DDIMError(f"{key} must lie in [0, 1]; got {beta!r}.")
    return full


def levels_of(config: Mapping[str, Any]) -> NoiseSchedule:
    """The levels of a complete configuration; also those of CogVideoX, whose SNR is shifted before it is rescaled."""
    shift = config.get("snr_shift_scale")
    if not shift:
        return noise_schedule(config)
    table = noise_schedule({**config, "rescale_betas_zero_snr": False}).alphas_cumprod
    table = table / (shift + (1 - shift) * table)
    return noise_schedule({**config, "trained_betas": 1 - table / torch.cat([torch.ones(1, dtype=table.dtype), table[:-1]])})
