"""The words of a diagnosis: the report for a person, and what a corrected configuration changes."""

import difflib
import json
import os
from collections.abc import Mapping
from typing import Any

from ddim.doctor.findings import Finding, Severity
from ddim.doctor.probing import Probe
from ddim.doctor.report import Diagnosis
from ddim.errors import plural

__all__ = ["fix_rows", "fix_text", "report_text"]

_COUNTED: dict[str, Severity] = {"error": "error", "warning": "warning", "note": "info"}
_TRAINED = {True: "trained", False: "not trained", None: "perhaps trained, which cannot be told"}
_NOISE = {True: ", with pure noise", False: ", with the schedule's leak", None: ""}


def report_text(source: str, declares: str, diagnosis: Diagnosis, probe: Probe | None) -> str:
    """The verdict and the line to paste, then the findings and their numbers."""
    python = diagnosis.python and f"import ddim\n{diagnosis.python}"
    parts = ["\n\n".join(filter(None, (diagnosis.verdict, python, declares))) + "\n"]
    if summary := diagnosis.summary:
        known = summary["brightness"]
        assumed = ", which is assumed; --data PICTURES measures yours" if known["assumed"] else ""
        taken = "" if known["whole_images"] else " (taken for independent of the rest of the image)"
        parts.append(
            f"{source}: {summary['scheduler']}, {summary['levels']} levels "
            f"({summary['beta_schedule']}), {summary['prediction_type']}, "
            f"terminal SNR {summary['terminal_snr']:.4g}\n"
            f"{summary['steps']} steps, {summary['timestep_spacing']}: levels "
            f"{summary['first_level']} to {summary['last_level']}\n"
            f"predicted for images of brightness {known['mean']:.2f} +- {known['std']:.2f} "
            f"({known['dimensions']} numbers each{assumed}): brightness off by "
            f"{summary['brightness_bias']:+.3f}, spread {summary['brightness_spread']:.3f} of "
            f"theirs{taken}"
        )
    if probe is not None:
        kind = probe.prediction_type or "no known type"
        trained = f"{_TRAINED[probe.trained_at_end]}{_NOISE[probe.zero_terminal_snr]}"
        answers = f"the network's answers are those of {kind}; at the last level it was {trained}"
        parts.append(answers)
    for finding in diagnosis.findings:
        parts.append(f"\n{finding.severity} {finding.code}  {finding.message}")
        lines = (finding.consequence, _fix_line(finding), finding.advice, finding.reference)
        parts += [f"  {line}" for line in (*lines[:3], f"See {lines[3]}.") if line]
    counts = {
        name: sum(finding.severity == severity for finding in diagnosis.findings)
        for name, severity in _COUNTED.items()
    }
    listed = [plural(count, name) for name, count in counts.items()]
    return "\n".join([*parts, f"\n{', '.join(listed)}."])


def _keys(finding: Finding) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in finding.fix.items())


def _fix_line(finding: Finding) -> str:
    retrain = " (for a network that is trained anew)" if finding.retrain else ""
    return f"Fix: {_keys(finding)}{retrain}" if finding.fix else ""


def fix_text(diagnosis: Diagnosis, name: str) -> str:
    """What the corrected configuration in the file ``name`` changes, what gets worse by that, and
    what is left to training."""
    left = [
        f"{f.code} needs a network that is trained anew, and is left as it is: {_keys(f)}"
        for f in (diagnosis.after or diagnosis).findings
        if f.retrain and f.fix and f.severity != "info"
    ]
    if diagnosis.after is None:
        nothing = f"There is nothing to change without training; {name} is not written."
        return "\n".join([nothing, *left])
    before, after = (
        json.dumps(config, indent=2, sort_keys=True).splitlines()
        for config in (diagnosis.config, diagnosis.fixed())
    )
    diff = difflib.unified_diff(before, after, "as it is", name, lineterm="")
    advice = [
        f"{f.code}: {f.advice}"
        for f in diagnosis.findings
        if f.fix and f.advice and not f.retrain and f.severity != "info"
    ]
    worse = [diagnosis.worse] if diagnosis.worse else []
    folder, file = os.path.split(name)
    use = "put it in the place of the model's scheduler/scheduler_config.json"
    if file == "scheduler_config.json":
        use = f'open it with ddim.DDIMScheduler.from_pretrained("{folder or "."}"), or {use}'
    written = f"The corrected configuration is in {name}: {use}."
    return "\n".join([*diff, written, *worse, *advice, *left])


def fix_rows(diagnosis: Diagnosis) -> dict[str, dict[str, Any]]:
    """Labels for images as configured, with each fix that needs no training, and with all of them;
    and the keys that each changes."""
    rows: dict[str, dict[str, Any]] = {"as it is configured": {}}
    codes: dict[str, list[str]] = {}
    for finding in diagnosis.findings:
        if finding.fix and not finding.retrain:
            codes.setdefault(json.dumps(finding.fix), []).append(finding.code)
    for fix, found in codes.items():
        rows[f"{_listed(json.loads(fix))} ({', '.join(found)})"] = json.loads(fix)
    every = diagnosis.changed
    if every and every not in rows.values():
        rows[f"all fixes: {_listed(every)}"] = every
    return rows


def _listed(fix: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in fix.items())
