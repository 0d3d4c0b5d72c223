"""``ddim doctor``: tells what is wrong with a model's noise schedule and sampler, and what that
costs."""

import difflib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ddim.runs.requests import DoctorRequest as Request

if TYPE_CHECKING:
    from ddim.doctor.findings import Finding, Severity
    from ddim.doctor.report import Diagnosis
    from ddim.doctor.symptoms import Probe

__all__ = ["Request", "run"]

_COUNTED: dict[str, "Severity"] = {"error": "error", "warning": "warning", "note": "info"}
_COLOURS = {"error": "\x1b[31m", "warning": "\x1b[33m", "info": "\x1b[36m"}


def run(request: Request) -> int:
    """Prints the findings, writes what was asked for, and returns the exit code."""
    from ddim.cli.terminal import run_request
    from ddim.doctor.plot import plot_schedule
    from ddim.files import write_json
    from ddim.runs.diagnose import examine
    from ddim.runs.show import show_request

    examination = examine(request)
    diagnosis, probe = examination.diagnosis, examination.probe
    shown = None if request.show is None else show_request(request, examination.source, diagnosis)
    declares = examination.source.declares
    if request.json:
        _print_json({"source": request.source, "declares": declares}, diagnosis, probe)
    else:
        _report(request.source, declares, diagnosis, probe)
    said = sys.stderr if request.json else sys.stdout
    if examination.prior is not None and request.prior:
        prior = {**asdict(examination.prior), "data": request.data}
        write_json(request.prior, prior, sort_keys=True)
        use = f"ddim sample MODEL --prior {request.prior}"
        print(f"The prior is in {request.prior}; use it with: {use}", file=said)
    if examination.fix is not None:
        print(_fix(diagnosis, examination.fix), file=said)
    if request.plot is not None and not diagnosis.summary:
        print("There is no plot: this scheduler has no levels.", file=said)
    elif request.plot is not None:
        plot_schedule(diagnosis, request.plot)
        print(f"The plot is in {request.plot}.", file=said)
    if shown is not None and not diagnosis.summary:
        print("There is nothing to show: this scheduler has no levels.", file=said)
    elif shown is not None:
        run_request("show.ShowJob", shown)
        print(f"The same seeds as configured and with each fix are in {request.show}.", file=said)
    return int(diagnosis.has("error") or (request.strict and diagnosis.has("warning")))


def _print_json(source: dict[str, str], diagnosis: "Diagnosis", probe: "Probe | None") -> None:
    from ddim.doctor.findings import json_numbers

    first = {**source, "verdict": diagnosis.verdict, "python": diagnosis.python}
    content = {**first, **asdict(diagnosis), "fixed": diagnosis.fixed()}
    content["probe"] = probe and asdict(probe)
    print(json.dumps(json_numbers(content), indent=2, allow_nan=False))


def _report(source: str, declares: str, diagnosis: "Diagnosis", probe: "Probe | None") -> None:
    """Prints the verdict and the line to paste, then the findings; in colour on a terminal."""
    is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n\n".join(filter(None, (diagnosis.verdict, diagnosis.python, declares))), end="\n\n")
    if summary := diagnosis.summary:
        known = summary["brightness"]
        assumed = ", assumed" if known["assumed"] else ""
        taken = "" if known["whole_images"] else " (taken for independent of the rest of the image)"
        print(
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
        trained = {
            True: "trained",
            False: "not trained",
            None: "cannot be told whether it was trained",
        }[probe.trained_at_end]
        print(
            f"the network's answers are those of {probe.prediction_type}; at the last level it was "
            f"{trained}"
        )
    for finding in diagnosis.findings:
        colour, reset = (_COLOURS[finding.severity], "\x1b[0m") if is_coloured else ("", "")
        print(f"\n{colour}{finding.severity} {finding.code}{reset}  {finding.message}")
        fix = _fix_line(finding)
        for line in (finding.consequence, fix, finding.advice, f"See {finding.reference}."):
            if line:
                print(f"  {line}")
    counts = {
        name: sum(finding.severity == severity for finding in diagnosis.findings)
        for name, severity in _COUNTED.items()
    }
    told = [f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items()]
    print(f"\n{', '.join(told)}.")


def _keys(finding: "Finding") -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in finding.fix.items())


def _fix_line(finding: "Finding") -> str:
    retrain = " (for a network that is trained anew)" if finding.retrain else ""
    return f"Fix: {_keys(finding)}{retrain}" if finding.fix else ""


def _fix(diagnosis: "Diagnosis", path: Path) -> str:
    """Writes the corrected configuration; the lines say what changes, what gets worse by that, and
    what is left to training."""
    from ddim.files import write_json

    left = [
        f"{f.code} needs a network that is trained anew, and is left as it is: {_keys(f)}"
        for f in (diagnosis.after or diagnosis).findings
        if f.retrain and f.fix and f.severity != "info"
    ]
    if diagnosis.after is None:
        nothing = f"There is nothing to change without training; {path} is not written."
        return "\n".join([nothing, *left])
    write_json(path, diagnosis.fixed(), sort_keys=True)
    before, after = (
        json.dumps(config, indent=2, sort_keys=True).splitlines()
        for config in (diagnosis.config, diagnosis.fixed())
    )
    diff = difflib.unified_diff(before, after, "as it is", str(path), lineterm="")
    advice = [
        f"{f.code}: {f.advice}"
        for f in diagnosis.findings
        if f.fix and f.advice and not f.retrain and f.severity != "info"
    ]
    worse = [diagnosis.worse] if diagnosis.worse else []
    written = f"The corrected configuration is in {path}."
    return "\n".join([*diff, written, *worse, *advice, *left])
