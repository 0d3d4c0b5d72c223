"""The doctor: is a sampler set up right, and what is lost if it is not?

:func:`diagnose` reads a scheduler's configuration as a dict and asks it every question of
:mod:`ddim.doctor.checks`; no network is needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ddim.configuration import fitted_lists, foreign_family, own_options
from ddim.core.checks import check_kind, wrong_argument
from ddim.core.guidance import check_rescale, check_scale
from ddim.core.step import Eta, check_eta
from ddim.core.timesteps import as_levels, select_timesteps, step_pairs
from ddim.doctor.agreement import agree
from ddim.doctor.checks import CHECKS
from ddim.doctor.findings import FAINT, Case, Finding, ModelFacts, Severity
from ddim.doctor.probing import Probe
from ddim.doctor.reading import complete, is_cogvideo, levels_of, read_keys, refusal
from ddim.doctor.symptoms import Brightness, predict_brightness, stock_timesteps
from ddim.doctor.verdict import foreign_finding, give_verdict, refusal_finding
from ddim.errors import DDIMError

__all__ = ["Diagnosis", "diagnose"]

_STEPS = 50  # the pipelines' default
# The brightness of unknown images: dark and uneven as Fashion-MNIST's, so that a leak shows.
_ASSUMED = Brightness(-0.43, 0.35, 64 * 64)


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        config: The configuration as it was given.
        findings: In the order of their codes.
        summary: What was looked at, in numbers; empty for a scheduler of another family.
        asked: Keys whose values were asked for in place of the configuration's.
        after: The diagnosis of the corrected configuration; None if nothing is corrected.
    """

    config: dict[str, Any]
    findings: tuple[Finding, ...]
    summary: dict[str, Any]
    asked: dict[str, Any] = field(default_factory=dict)
    after: "Diagnosis | None" = None

    def has(self, severity: Severity) -> bool:
        """Whether a finding has that severity."""
        return any(f.severity == severity for f in self.findings)

    def fixed(self) -> dict[str, Any]:
        """The configuration as it was asked for, with all fixes that need no training."""
        return self.after.config if self.after else self.config

    @property
    def changed(self) -> dict[str, Any]:
        """The keys that the fixes change, with their new values."""
        missing = object()
        return {k: v for k, v in self.fixed().items() if self.config.get(k, missing) != v}

    @property
    def verdict(self) -> str:
        """One sentence for a person whose pictures are dark: is it the sampler, and what helps?"""
        after = (self.after or self).summary
        goes_back = bool(self.asked) and self.after is not None and not self.changed
        return give_verdict(
            self.findings, self.summary, after, changes=bool(self.python), other_spacing=goes_back
        )

    @property
    def python(self) -> str:
        """A line to paste that mends what needs no training, in a pipeline ``pipe``; empty if there
        is nothing to mend, or this package cannot sample the configuration."""
        is_ours = bool(self.summary) and not is_cogvideo(self.summary["scheduler"])
        is_off = any(f.diffusers_only and f.severity != "info" for f in self.findings)
        if not is_ours or not (self.changed or is_off):
            return ""
        kind = "DDIM" + "Inverse" * ("Inverse" in self.summary["scheduler"])
        keys = "".join(f", {key}={value!r}" for key, value in self.changed.items())
        return f"pipe.scheduler = ddim.{kind}Scheduler.from_config(pipe.scheduler.config{keys})"

    @property
    def worse(self) -> str:
        """One sentence if the fix worsens a predicted figure: by how much, and why; else empty."""
        if self.after is None or not self.summary:
            return ""
        here, after = self.summary, self.after.summary
        figures = []
        for name, right, form in (("bias", 0, "+.3f"), ("spread", 1, ".3f")):
            old, new = (summary[f"brightness_{name}"] for summary in (here, after))
            if abs(new - right) > abs(old - right) + FAINT:  # smaller ones come from other steps
                figures.append(f"brightness {name} from {old:{form}} to {new:{form}}")
        changed = self.changed
        codes = [f.code for f in self.findings if f.fix.keys() & changed and not f.retrain]
        if not figures or not codes:
            return ""
        reason = f"what is mended is graver ({', '.join(codes)})"
        if (
            here["terminal_snr"] == 0 < after["terminal_snr"]
            and "rescale_betas_zero_snr" in changed
        ):
            why = "the weights predict epsilon, from which no image can be told there"
            reason = f"zero terminal SNR is given up, because {why}"
        return f"The fix makes what is predicted worse ({', '.join(figures)}): {reason}."

    def _corrected(self) -> dict[str, Any]:
        """The configuration after one round of fixes."""
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
    """Diagnoses a scheduler's configuration, then that with all fixes, until nothing can be fixed.

    Args:
        config: As in ``scheduler_config.json``; absent keys have the values of diffusers' DDIM.
        steps: N. Default: 50, with a finding that says so.
        spacing: Spacing to use in place of the configuration's.
        timesteps: Levels to use in place of steps and spacing.
        eta: The eta of sampling. If None, findings about eta are information.
        guidance_scale: The scale of classifier-free guidance; None if it is unknown.
        guidance_rescale: The rescale of guidance.
        model: What is known of the network.
        brightness: Brightness of the data. Default: that of dark and uneven images.
        probe: Result of :func:`ddim.doctor.probing.probe`.

    Raises:
        DDIMError: If the configuration has an unknown key or value, or an option is out of range.
    """
    _check_config(config)
    if guidance_scale is not None:
        check_scale(guidance_scale)
    check_rescale(guidance_rescale)
    check_kind("spacing", spacing, (str, type(None)), "the name of a spacing, or None")
    check_kind("model", model, ModelFacts, "a ModelFacts")
    check_kind("brightness", brightness, (Brightness, type(None)), "a Brightness, or None")
    check_kind("probe", probe, (Probe, type(None)), "a Probe, which probe(...) gives, or None")
    options: dict[str, Any] = {
        "asked": steps,
        "timesteps": timesteps,
        "eta": eta,
        "guidance_scale": guidance_scale,
        "guidance_rescale": guidance_rescale,
        "model": model,
        "brightness": brightness,
        "probe": probe,
    }
    first = last = _diagnose_once(config, spacing=spacing, **options)
    # Of another spacing than the configuration's, the configuration itself may be the mended one.
    rounds = [first.config] if first.config | first.asked == first.config else []
    while (corrected := last._corrected()) not in rounds:
        # The configuration holds the spacing that was asked for by now.
        last = _diagnose_once(corrected, spacing=None, **options)
        rounds.append(corrected)
    return first if last is first else replace(first, after=last)


def _check_config(config: Any) -> None:
    """Refuses what is no configuration."""
    if not isinstance(config, Mapping):
        has_one = hasattr(config, "config")
        advice = "Give its .config" if has_one else "json.loads(...) makes one of a file's text"
        raise wrong_argument("config", "be a scheduler's configuration (a dict)", config, advice)


def _diagnose_once(config: Mapping[str, Any], *, spacing: str | None, **options: Any) -> Diagnosis:
    """One diagnosis, without a correction."""
    given = dict(own_options(config))
    kind = given.get("_class_name", "DDIMScheduler")
    if not isinstance(kind, str) or "Scheduler" not in kind:
        what = f"this is the configuration of a {kind}, and not of a scheduler"
        raise DDIMError(f"{what}; give a scheduler_config.json.")
    reason = None if is_cogvideo(kind) else foreign_family({**given, "_class_name": kind})
    if reason is not None:
        return Diagnosis(given, (foreign_finding(kind, reason),), {})
    replaced = {} if spacing is None else {"timestep_spacing": spacing}
    full = {**given, "_class_name": kind, **replaced}
    case = _make_case(full, use_fitted=spacing is None, **options)

    def look(fix: Mapping[str, Any]) -> tuple[str | None, set[str]]:
        """With a fix: how this package refuses to sample, and the codes of errors."""
        try:
            fixed = _make_case({**full, **fix}, use_fitted=spacing is None, **options)
        except DDIMError as error:
            return str(error), set()
        # Those two are never errors, and walk all steps or look at every number of them.
        checks = (check for code, check in CHECKS.items() if code not in ("DDIM004", "DDIM020"))
        found = filter(None, (check(fixed) for check in checks))
        return fixed.refusal, {f.code for f in found if f.severity == "error"}

    found = [finding for check in CHECKS.values() if (finding := check(case))]
    findings = agree(found, look, case.refusal)
    is_told = any(f.severity == "error" and not f.diffusers_only for f in findings)
    if case.refusal is not None and not is_told:
        findings.append(refusal_finding(case.refusal))
    summary = _summary(case, assumed=options["brightness"] is None)
    return Diagnosis(given, tuple(findings), summary, replaced)


def _make_case(
    config: Mapping[str, Any],
    *,
    use_fitted: bool,
    asked: int | None,
    timesteps: Sequence[int] | None,
    eta: Eta | None,
    model: ModelFacts,
    brightness: Brightness | None,
    probe: Probe | None,
    **used: Any,
) -> Case:
    """What the checks look at; ``used`` are further fields of :class:`Case`."""
    full = complete(config)
    schedule = levels_of(full)
    if eta is not None:
        check_eta(eta)
    custom, levels, stock = _visited(
        full, len(schedule), asked=asked, timesteps=timesteps, use_fitted=use_fitted
    )
    training = None if model.training is None else complete(model.training)
    if probe is not None and probe.zero_terminal_snr:
        told = {"rescale_betas_zero_snr": True, "prediction_type": probe.prediction_type}
        training = {**(training or full), **told}
    assumed = replace(_ASSUMED, dimensions=math.prod(model.shape or (_ASSUMED.dimensions,)))
    return Case(
        config=full,
        schedule=schedule,
        model=model,
        brightness=brightness or assumed,
        asked=asked,
        custom=custom,
        read=read_keys(full),
        levels=levels,
        stock=stock,
        eta=eta,
        probe=probe,
        training=training,
        training_schedule=None if training is None else levels_of(training),
        refusal=refusal(full, schedule, len(levels) if asked is None else asked, custom, eta),
        **used,
    )


def _visited(
    config: Mapping[str, Any],
    total: int,
    *,
    asked: int | None,
    timesteps: Sequence[int] | None,
    use_fitted: bool,
) -> tuple[Sequence[int] | None, list[int], list[int] | None]:
    """The list of timesteps in place of a spacing, if there is one; the levels that this package
    visits; and those that plain diffusers visits, if it can."""
    count = min(_STEPS, total) if asked is None else asked
    if isinstance(count, int):
        count = min(count, total)
    spacing, offset = config["timestep_spacing"], config["steps_offset"]
    levels = select_timesteps(total, count, spacing, steps_offset=offset)
    custom = timesteps
    if timesteps is None and use_fitted:
        custom = next((fitted for fitted in fitted_lists(config) if len(fitted) == count), None)
    if custom is not None:
        custom = as_levels(custom)
        levels = sorted({t for t in custom if 0 <= t < total}, reverse=True) or [total - 1]
    elif spacing != "quadratic":
        return None, levels, stock_timesteps(total, len(levels), spacing, steps_offset=offset)
    return custom, levels, None


def _summary(case: Case, *, assumed: bool) -> dict[str, Any]:
    bias, factor = predict_brightness(case.schedule, step_pairs(case.levels), case.brightness)
    config, has_betas = case.config, case.config["trained_betas"] is not None
    return {
        "scheduler": config["_class_name"],
        "levels": len(case.schedule),
        "beta_schedule": "trained_betas" if has_betas else config["beta_schedule"],
        "prediction_type": config["prediction_type"],
        "terminal_snr": float(case.schedule.snr(case.last)),
        "steps": case.steps,
        "timestep_spacing": config["timestep_spacing"] if case.custom is None else "custom",
        "first_level": case.levels[0],
        "last_level": case.levels[-1],
        "brightness": {
            **{name: getattr(case.brightness, name) for name in ("mean", "std", "dimensions")},
            "assumed": assumed,
            "whole_images": case.brightness.measured is not None,
        },
        "brightness_bias": bias,
        "brightness_spread": factor,
    }
