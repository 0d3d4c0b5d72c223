"""Writes the two tables of docs/doctor.md from the checks and from tests/data/scheduler_configs:
python docs/doctor_tables.py"""

import json
from pathlib import Path

from ddim.doctor.checks import CHECKS
from ddim.doctor.report import diagnose

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "doctor.md"


def tables() -> str:
    """Codes with their questions; then what is found in well-known checkpoints at 50 steps, images
    of 64x64 being assumed."""
    rows = {
        code: f"| {code} | {check.title} | {check.reference} |" for code, check in CHECKS.items()
    }
    rows["DDIM018"] = (
        "| DDIM018 | The scheduler is not of DDIM's family. | Lipman et al. 2023; Karras et al. "
        "2022 |"
    )
    rows["DDIM024"] = (
        "| DDIM024 | `ddim.DDIMScheduler` refuses the steps, for a reason that no other check "
        "tells. | `python -m pydoc ddim.scheduler` |"
    )
    lines = [
        "| code | what is found | reference |",
        "|---|---|---|",
        *(rows[code] for code in sorted(rows)),
        "",
    ]
    lines += [
        "| checkpoint | terminal SNR | first level | brightness | spread | warnings | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "tests" / "data" / "scheduler_configs").glob("*.json")):
        diagnosis = diagnose(json.loads(path.read_text()), steps=50, eta=0.0)
        summary = diagnosis.summary
        codes = {
            s: ", ".join(f.code[4:] for f in diagnosis.findings if f.severity == s)
            for s in ("warning", "info")
        }
        figures = (
            f"{summary['terminal_snr']:.3g} | {summary['first_level']} | "
            f"{round(summary['brightness_bias'], 3) + 0.0:+.3f} | "
            f"{summary['brightness_spread']:.3f}"
            if summary
            else "- | - | - | -"
        )
        lines.append(f"| {path.stem} | {figures} | {codes['warning']} | {codes['info']} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables made anew."""
    head, _, rest = text.partition("<!-- tables -->\n")
    _, mark, tail = rest.partition("<!-- end -->")
    return f"{head}<!-- tables -->\n{tables()}\n{mark}{tail}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
