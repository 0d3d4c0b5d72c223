"""The doctor: is a sampler set up right, and what is lost if not?

:func:`diagnose` reads a scheduler's configuration as a dict and asks it every question of
:mod:`ddim.doctor.checks`; no network is needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import torch

from ddim.configuration import DEFAULTS, check_options, fitted_lists, foreign_family, noise_schedule
from ddim.core.schedule import NoiseSchedule
from ddim.core.step import Eta, check_eta
from ddim.core.timesteps import select_timesteps, step_pairs
from ddim.doctor.checks import (
    CHECKS,
    FAINT,
    OTHER_KEYS,
    Case,
    Finding,
    ModelFacts,
    Severity,
    foreign_finding,
)
from ddim.doctor.symptoms import Brightness, Probe, predict_brightness, stock_timesteps
from ddim.errors import DDIMError

__all__ = ["Diagnosis", "complete", "diagnose", "levels_of"]

_STEPS = 50  # what the pipelines take where no number is given
_ASSUMED = (
    -0.43,
    0.35,
    64 * 64,
)  # the brightness of unknown images: dark and uneven as Fashion-MNIST, so that a leak shows

# Of the one sampler of the family whose schedule is its own.
_COGVIDEO: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "snr_shift_scale": 3.0,
}


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        config: The configuration as it was given.
        findings: In the order of their codes.
        summary: What was looked at, in numbers; empty for a scheduler that is not of DDIM's family.
        asked: Keys whose values were asked for in place of the configuration's.
        after: The diagnosis of the corrected configuration; None where nothing is corrected.
    """

    config: dict[str, Any]
    findings: tuple[Finding, ...]
    summary: dict[str, Any]
    asked: dict[str, Any] = field(default_factory=dict)
    after: "Diagnosis | None" = None

    def has(self, severity: Severity) -> bool:
        """Whether a finding is of that severity."""
        return any(f.severity == severity for f in self.findings)

    def fixed(self) -> dict[str, Any]:
        """The configuration as it was asked for, with all fixes but those that need training, and
        the fixes of what these bring about."""
        return self.after.config if self.after else self.config

    @property
    def worse(self) -> str:
        """One sentence where the fix worsens a predicted figure: by how much, and why; else
        empty."""
        if self.after is None or not self.summary:
            return ""
        told = []
        for key, name, right in (
            ("brightness_bias", "brightness bias", 0.0),
            ("brightness_spread", "brightness spread", 1.0),
        ):
            before, after = self.summary[key], self.after.summary[key]
            if (
                abs(after - right) > abs(before - right) + FAINT
            ):  # less is what fewer or other steps make of it
                told.append(
                    f"{name} from {before:+.3f} to {after:+.3f}"
                    if right == 0
                    else f"{name} from {before:.3f} to {after:.3f}"
                )
        changed = {key for key, value in self.after.config.items() if self.config.get(key) != value}
        codes = [f.code for f in self.findings if f.fix.keys() & changed and not f.retrain]
        if not told or not codes:
            return ""
        reason = f"what is mended is graver ({', '.join(codes)})"
        if (
            self.summary["terminal_snr"] == 0 < self.after.summary["terminal_snr"]
            and "rescale_betas_zero_snr" in changed
        ):
            reason = (
                "zero terminal SNR is given up, because the weights predict epsilon, from which no "
                "image can be told there"
            )
        return f"The fix makes what is predicted worse ({', '.join(told)}): {reason}."

    def _corrected(self) -> dict[str, Any]:
        """One round of fixes."""
        result = self.config | self.asked
        for finding in self.findings:
            if not finding.retrain:
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
    model: ModelFacts = ModelFacts(),  # noqa: B008 - frozen
    brightness: Brightness | None = None,
    probe: Probe | None = None,
) -> Diagnosis:
    """Looks a scheduler's configuration over, and what its fixes make of it, until there is nothing
    more to fix.

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
        probe: From :func:`ddim.doctor.symptoms.probe`.

    Raises:
        DDIMError: If the configuration has an unknown key or value, or an option is out of range.
    """
    options: dict[str, Any] = {
        "steps": steps,
        "timesteps": timesteps,
        "eta": eta,
        "guidance_scale": guidance_scale,
        "guidance_rescale": guidance_rescale,
        "model": model,
        "brightness": brightness,
        "probe": probe,
    }
    first = last = _look(config, spacing=spacing, **options)
    rounds = [first.config]
    while (corrected := last._corrected()) not in rounds:
        last = _look(corrected, spacing=None, **options)  # the spacing that was asked for is in it
        rounds.append(corrected)
    return first if last is first else replace(first, after=last)


def _look(
    config: Mapping[str, Any],
    *,
    steps: int | None,
    spacing: str | None,
    timesteps: Sequence[int] | None,
    eta: Eta | None,
    guidance_scale: float | None,
    guidance_rescale: float,
    model: ModelFacts,
    brightness: Brightness | None,
    probe: Probe | None,
) -> Diagnosis:
    """One diagnosis; arguments as :func:`diagnose`."""
    given = dict(config)
    kind = given.get("_class_name", "DDIMScheduler")
    if not isinstance(kind, str) or "Scheduler" not in kind:
        raise DDIMError(
            f"this is the configuration of a {kind}, and not of a scheduler; give a "
            "scheduler_config.json."
        )
    told = None if _is_cogvideo(kind) else foreign_family({**given, "_class_name": kind})
    if told is not None:
        return Diagnosis(given, (foreign_finding(kind, told),), {})
    asked = {} if spacing is None else {"timestep_spacing": spacing}
    full = complete({**given, "_class_name": kind, **asked})
    schedule = levels_of(full)
    if eta is not None:
        check_eta(eta)
    total, count = len(schedule), _STEPS if steps is None else steps
    count = (
        min(count, total) if steps is None or isinstance(count, int) and count > total else count
    )
    levels = select_timesteps(
        total, count, full["timestep_spacing"], steps_offset=full["steps_offset"]
    )
    custom = timesteps
    if timesteps is None and spacing is None:
        custom = next((fitted for fitted in fitted_lists(full) if len(fitted) == count), None)
    if custom is not None:
        if not all(isinstance(t, int) for t in custom):
            raise DDIMError(f"timesteps must be whole numbers; got {list(custom)}.")
        levels = sorted({t for t in custom if 0 <= t < total}, reverse=True) or [total - 1]
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
        read=_read_keys(full),
        levels=levels,
        stock=stock_timesteps(
            total, len(levels), full["timestep_spacing"], steps_offset=full["steps_offset"]
        )
        if listed
        else None,
        eta=eta,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        probe=probe,
        training=training,
        training_schedule=None if training is None else levels_of(training),
    )
    findings = tuple(found for check in CHECKS.values() if (found := check(case)))
    return Diagnosis(given, findings, _summary(case, assumed=brightness is None), asked)


def _summary(case: Case, *, assumed: bool) -> dict[str, Any]:
    bias, factor = predict_brightness(case.schedule, step_pairs(case.levels), case.brightness)
    return {
        "scheduler": case.config["_class_name"],
        "levels": len(case.schedule),
        "beta_schedule": "trained_betas"
        if case.config["trained_betas"] is not None
        else case.config["beta_schedule"],
        "prediction_type": case.config["prediction_type"],
        "terminal_snr": float(case.schedule.snr(case.last)),
        "steps": case.steps,
        "timestep_spacing": "custom"
        if case.custom is not None
        else case.config["timestep_spacing"],
        "first_level": case.levels[0],
        "last_level": case.levels[-1],
        "brightness": {
            "mean": case.brightness.mean,
            "std": case.brightness.std,
            "dimensions": case.brightness.dimensions,
            "assumed": assumed,
            "whole_images": case.brightness.measured is not None,
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
        if key not in DEFAULTS and key not in OTHER_KEYS and not key.startswith("_"):
            close = get_close_matches(key, [*DEFAULTS, *sorted(OTHER_KEYS)], n=1)
            hint = (
                f"did you mean {close[0]!r}?"
                if close
                else "no scheduler of this family has it; remove it."
            )
            raise DDIMError(f"the scheduler's configuration has the unknown key {key!r}; {hint}")
    full = {**DEFAULTS, **(_COGVIDEO if _is_cogvideo(config.get("_class_name")) else {}), **config}
    shift = full.get("snr_shift_scale")
    if shift is not None and not (isinstance(shift, (int, float)) and 0 < shift < math.inf):
        raise DDIMError(f"snr_shift_scale must be a finite number above 0; got {shift!r}.")
    if not all(isinstance(t, int) for levels in fitted_lists(full) for t in levels):
        raise DDIMError(
            "fitted_timesteps must be a list of lists of levels, which are whole numbers; got "
            f"{full['fitted_timesteps']!r}."
        )
    betas = full["trained_betas"]
    named = (
        {f"trained_betas[{i}]": beta for i, beta in enumerate(betas)}
        if isinstance(betas, (list, tuple))
        else {}
    )
    for key, beta in {
        **named,
        "beta_start": full["beta_start"],
        "beta_end": full["beta_end"],
    }.items():
        if (
            isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta <= 1
        ):  # NaN is in no range
            raise DDIMError(f"{key} must be a number from 0 to 1; got {beta!r}.")
    check_options(full)
    return full


def levels_of(config: Mapping[str, Any]) -> NoiseSchedule:
    """The levels of a complete configuration; also those of CogVideoX, whose SNR is shifted before
    it is rescaled.

    Raises:
        DDIMError: If the beta schedule is unknown, or adds no noise.
    """
    schedule = noise_schedule(config)
    shift = config.get("snr_shift_scale") if _is_cogvideo(config.get("_class_name")) else None
    if shift:
        table = noise_schedule({**config, "rescale_betas_zero_snr": False}).alphas_cumprod
        table = table / (shift + (1 - shift) * table)
        schedule = noise_schedule(
            {**config, "trained_betas": 1 - table / torch.cat([table.new_ones(1), table[:-1]])}
        )
    if float(schedule.alphas_cumprod[-1]) == 1:
        raise DDIMError("the scheduler's configuration adds no noise: all its betas are 0.")
    return schedule


def _read_keys(config: Mapping[str, Any]) -> frozenset[str]:
    """Which keys of other schedulers are read: by CogVideoX its shift, else by ours the order,
    unless it is another solver's, and fits."""
    if _is_cogvideo(config["_class_name"]):
        return frozenset({"snr_shift_scale"})
    another = "solver_type" in config and config["_class_name"] != "DDIMScheduler"
    return frozenset({"fitted_timesteps"} if another else {"fitted_timesteps", "solver_order"})


def _is_cogvideo(kind: object) -> bool:
    return str(kind).startswith("CogVideoX")
