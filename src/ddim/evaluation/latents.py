"""Tables and plots of codes: how images come back, and how far trajectories are apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddim.errors import plain_words
from ddim.evaluation.report import text_table
from ddim.figures import Point, draw_lines, save_figure

__all__ = ["plot_errors", "reconstruction_table", "trajectory_table"]

Row = dict[str, Any]

_PAPER = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}
"""Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Table 2: DDIM on CIFAR-10's test
images. https://arxiv.org/abs/2010.02502"""


def reconstruction_table(rows: Sequence[Row], *, title: str, setting: str) -> str:
    """A Markdown document of rows ``method, steps, mse, mse_max, evaluations, rms``, beside the
    paper's Table 2; ``setting`` says in sentences how they were measured."""
    head = "method|steps|mse|largest|evaluations a step|RMS of the code|paper (DDIM, CIFAR-10)"
    table = [head.split("|")]
    for r in rows:
        is_known = r["method"] == "ddim" and r["steps"] in _PAPER
        paper = f"{_PAPER[r['steps']]:g}" if is_known else ""
        diverged = r["mse"] is None
        errors = ["diverged", ""] if diverged else [f"{r['mse']:.2e}", f"{r['mse_max']:.2e}"]
        rms = "" if diverged else f"{r['rms']:.2f}"
        calls = f"{r['evaluations'] / r['steps']:.2f}"
        table.append([r["method"], str(r["steps"]), *errors, calls, rms, paper])
    return f"# {plain_words(title)}: images from their codes\n\n{setting}\n\n{text_table(table)}"


def trajectory_table(rows: Sequence[Row], *, title: str, setting: str) -> str:
    """A Markdown document of rows ``sampler, steps, mse, mse_error, evaluations``."""
    table = [["sampler", "steps", "mse", "standard error", "evaluations"]]
    for r in rows:
        spread = "" if r["mse_error"] is None else f"{r['mse_error']:.1e}"
        numbers = [f"{r['mse']:.2e}", spread, str(r["evaluations"])]
        table.append([r["sampler"], str(r["steps"]), *numbers])
    head = f"# {plain_words(title)}: one latent under other trajectories"
    return f"{head}\n\n{setting}\n\n{text_table(table)}"


def plot_errors(
    rows: Sequence[Row], paths: Sequence[Path], *, name: str, along: str, across: str, up: str
) -> None:
    """Plots ``mse`` over the key ``along``, a line for each value of the key ``name``."""
    lines: dict[str, list[Point]] = {}
    for r in rows:
        # The reference itself, and what diverged, have no place on a logarithmic axis.
        point = Point(r[along], r["mse"], r.get("mse_error")) if r["mse"] else None
        lines.setdefault(r[name], []).extend([] if point is None else [point])
    figure = draw_lines(lines, across=across, up=up)
    for path in paths:
        save_figure(figure, path)
