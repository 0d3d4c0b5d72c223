"""``ddim doctor``: tells what is wrong with a model's noise schedule and sampler, and what that
costs."""

import json
import os
import re
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from ddim.runs.requests import DoctorRequest as Request

if TYPE_CHECKING:
    from ddim.doctor.probing import Probe
    from ddim.doctor.report import Diagnosis

__all__ = ["Request", "run"]

_COLOURS = {"error": "\x1b[31m", "warning": "\x1b[33m", "info": "\x1b[36m"}


def run(request: Request) -> int:
    """Prints the findings, writes what was asked for, and returns the exit code."""
    from ddim.cli.terminal import run_request, say
    from ddim.doctor.plot import plot_schedule
    from ddim.doctor.text import fix_text, report_text
    from ddim.files import write_json
    from ddim.runs.diagnose import examine

    examination = examine(request)
    diagnosis, probe = examination.diagnosis, examination.probe
    shown = None
    if request.show is not None:
        from ddim.runs.show import show_request  # with all of diffusers, which takes seconds

        shown = show_request(request, examination.source, diagnosis)
    declares = examination.source.declares
    if request.json:
        _print_json({"source": request.source, "declares": declares}, diagnosis, probe)
    else:
        is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        report = report_text(request.source, declares, diagnosis, probe)
        say(report, paint=_coloured if is_coloured else str)
    for note in examination.notes:
        say(note, to_error=request.json)
    if examination.prior is not None and request.prior:
        prior = {**asdict(examination.prior), "data": request.data}
        write_json(request.prior, prior, sort_keys=True)
        use = f"ddim sample MODEL --prior {request.prior}"
        say(f"The prior is in {request.prior}; use it with: {use}", to_error=request.json)
    if examination.fix is not None:
        if diagnosis.after is not None:
            examination.fix.parent.mkdir(exist_ok=True)
            write_json(examination.fix, diagnosis.fixed(), sort_keys=True)
        say(fix_text(diagnosis, str(examination.fix)), to_error=request.json)
    if request.plot is not None and not diagnosis.summary:
        say("There is no plot: this scheduler has no levels.", to_error=request.json)
    elif request.plot is not None:
        plot_schedule(diagnosis, request.plot)
        say(f"The plot is in {request.plot}.", to_error=request.json)
    if shown is not None and not diagnosis.summary:
        say("There is nothing to show: this scheduler has no levels.", to_error=request.json)
    elif shown is not None:
        run_request("show.ShowJob", shown)
        drawn = f"The same seeds as configured and with each fix are in {request.show}."
        say(drawn, to_error=request.json)
    return int(diagnosis.has("error") or (request.strict and diagnosis.has("warning")))


def _coloured(report: str) -> str:
    """A report whose findings begin in the colour of their severity."""
    heads = r"(?m)^(error|warning|info) DDIM\d+(?=  )"
    return re.sub(heads, lambda head: f"{_COLOURS[head[1]]}{head[0]}\x1b[0m", report)


def _print_json(source: dict[str, str], diagnosis: "Diagnosis", probe: "Probe | None") -> None:
    from ddim.doctor.findings import json_numbers

    first = {**source, "verdict": diagnosis.verdict, "python": diagnosis.python}
    content = {**first, **asdict(diagnosis), "fixed": diagnosis.fixed()}
    content["probe"] = probe and asdict(probe)
    print(json.dumps(json_numbers(content), indent=2, allow_nan=False))
