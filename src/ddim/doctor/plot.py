"""A picture of a schedule: its log-SNR, the visited levels and the steps between them."""

from pathlib import Path
from typing import Any, get_args

import torch

from ddim.core.timesteps import Spacing, select_timesteps
from ddim.doctor.reading import complete, levels_of
from ddim.doctor.report import Diagnosis
from ddim.figures import plain_numbers, save_figure

__all__ = ["plot_schedule", "plot_start"]


def plot_schedule(diagnosis: Diagnosis, path: Path | str) -> None:
    """Draws the schedule, and for each spacing the visited levels and the steps in log-SNR."""
    from matplotlib.figure import Figure

    config = complete(diagnosis.config)
    schedule, steps = levels_of(config), diagnosis.summary["steps"]
    log_snr = schedule.log_snr(torch.arange(len(schedule)))
    is_zero = bool(log_snr.isinf().any())
    log_snr[log_snr.isinf()] = torch.nan  # zero terminal SNR has no place on this axis
    figure = Figure(figsize=(12, 4), layout="constrained")
    curve, visited, sizes = figure.subplots(1, 3)
    curve.plot(log_snr, color="black")
    zero = "\n(SNR 0 at the last level)" if is_zero else ""
    curve.set(title=f"schedule{zero}", xlabel="level", ylabel="log-SNR")
    spacings: tuple[Spacing, ...] = get_args(Spacing)
    used = diagnosis.summary["timestep_spacing"]
    for row, (spacing, mark) in enumerate(zip(spacings, "osv^", strict=True)):
        offset = config["steps_offset"]
        levels = torch.tensor(select_timesteps(len(schedule), steps, spacing, steps_offset=offset))
        visited.plot(levels, torch.full((steps,), row), "|", markersize=12)
        # Steps of several spacings may lie on one another; the markers show through.
        look: dict[str, Any] = {"marker": mark, "markersize": 4, "fillstyle": "none"}
        gains = log_snr[levels[1:]] - log_snr[levels[:-1]]
        sizes.plot(levels[1:], gains, linewidth=1, label=spacing, **look)
    for axes in (curve, visited, sizes):
        plain_numbers(axes)
    named = [f"{name}\n(configured)" if name == used else name for name in spacings]
    title, ticks = f"levels of {steps} steps", range(len(spacings))
    visited.set(title=title, xlabel="level", yticks=ticks, yticklabels=named)
    infinite = "\n(that out of SNR 0 is infinite)" if is_zero else ""
    title = f"step sizes{infinite}"
    sizes.set(title=title, xlabel="level that is reached", ylabel="gain of log-SNR")
    sizes.legend()
    save_figure(figure, path)


def plot_start(diagnosis: Diagnosis, path: Path | str) -> None:
    """Draws log-SNR over the levels, the levels that sampling visits, and where it starts beside
    where it should: the last level, at an SNR of 0."""
    from matplotlib.figure import Figure

    config = complete(diagnosis.config | diagnosis.asked)
    schedule, summary = levels_of(config), diagnosis.summary
    log_snr = schedule.log_snr(torch.arange(len(schedule)))
    shown, last, first = log_snr.clone(), len(schedule) - 1, int(summary["first_level"])
    finite = log_snr[log_snr.isfinite()]
    low, high = float(finite.min()), float(finite.max())
    floor = min(low, -10.0) - 4.0  # stands for SNR 0, which has no place on this axis
    shown[shown.isinf()] = floor
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes: Any = figure.add_subplot()
    axes.plot(shown, color="black", linewidth=1.5)
    offset, spacing = config["steps_offset"], summary["timestep_spacing"]
    if spacing in get_args(Spacing):
        asked: Any = spacing
        levels = select_timesteps(len(schedule), summary["steps"], asked, steps_offset=offset)
        axes.plot(levels, shown[levels], "o", color="tab:blue", markersize=4, label="your steps")
    is_right = first == last and summary["terminal_snr"] == 0
    start = (first, float(shown[first]))
    right = (last, floor)
    at = f"level {first}" + ("" if log_snr[first].isinf() else f", log-SNR {start[1]:.1f}")
    arrow = {"arrowstyle": "->", "color": "black"}
    words = f"you start here,\nas you should:\n{at}" if is_right else f"you start here:\n{at}"
    axes.plot(*start, "s", color="tab:green" if is_right else "tab:red", markersize=9)
    place = {"textcoords": "axes fraction", "ha": "center", "va": "center", "arrowprops": arrow}
    axes.annotate(words, start, (0.66, 0.72), **place)
    if not is_right:
        axes.plot(*right, "*", color="tab:green", markersize=15)
        axes.annotate(f"you should start there:\nlevel {last}, SNR 0", right, (0.52, 0.14), **place)
    axes.set(xlabel="level", ylabel="log-SNR", ylim=(floor - 1.5, high + 1.5))
    axes.set_xlim(-0.02 * last, 1.04 * last)
    plain_numbers(axes)
    axes.grid(alpha=0.3)
    save_figure(figure, path)
