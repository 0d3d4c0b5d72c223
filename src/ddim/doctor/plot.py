"""A picture of a schedule: its log-SNR, the visited levels and the steps between them."""

from pathlib import Path
from typing import Any, get_args

import torch

from ddim.core.timesteps import Spacing, select_timesteps
from ddim.doctor.reading import complete, levels_of
from ddim.doctor.report import Diagnosis
from ddim.figures import plain_numbers, save_figure

__all__ = ["plot_schedule"]


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
