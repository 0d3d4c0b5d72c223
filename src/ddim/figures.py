"""Figures: lines on axes that can be read, written whole or not at all as PNG, PDF or SVG."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddim.errors import DDIMError
from ddim.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "Point", "check_plots", "draw_lines", "plain_numbers", "save_figure"]

FORMATS = ("png", "pdf", "svg")
_MARKERS = "os^Dv<>P*X"


class Point(NamedTuple):
    """A point of a line."""

    x: float
    y: float
    spread: float | None = None
    """Half the length of its error bar; None without one."""


def check_plots() -> None:
    """Checks that matplotlib is there, before hours are spent on what plots would show."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        advice = "run: pip install 'ddim[plot]'"
        raise DDIMError(f"plots need matplotlib, which is not installed; {advice}.") from error


def save_figure(figure: "Figure", path: Path | str) -> None:
    """Writes a figure in the format that the ending of its name says.

    Equal figures are equal files: they hold no date.

    Raises:
        DDIMError: If the ending is none of FORMATS.
    """
    import matplotlib

    kind = Path(path).suffix[1:].lower()
    if kind not in FORMATS:
        endings = ", ".join(f".{name}" for name in FORMATS)
        raise DDIMError(f"the name of a plot must end in one of {endings}; got {str(path)!r}.")
    date: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with matplotlib.rc_context({"svg.hashsalt": "ddim"}), replacing(path) as partial:
        figure.savefig(partial, format=kind, dpi=150, metadata=date.get(kind))


def draw_lines(
    lines: Mapping[str, Sequence[Point]],
    *,
    across: str,
    up: str,
    level: tuple[str, float] | None = None,
) -> "Figure":
    """Draws named lines over a logarithmic axis; upwards too if all values are above 0.

    Args:
        lines: Points by name. Names without points are left out. Lines that share places are drawn
            a little beside one another, so that their error bars can be told apart.
        across: What the axis across shows.
        up: What the axis upwards shows.
        level: Name and height of a dashed line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes: Any = figure.add_subplot()
    drawn = {name: points for name, points in lines.items() if points}
    places = [point.x for points in drawn.values() for point in points]
    span = math.log10(max(places) / min(places)) if places else 0.0
    has_bars = any(p.spread for points in drawn.values() for p in points)
    apart = 0.012 * span if has_bars and len(set(places)) < len(places) else 0.0
    for number, (name, points) in enumerate(drawn.items()):
        shift = 10 ** (apart * (number - (len(drawn) - 1) / 2))
        bars = [p.spread or 0.0 for p in points] if any(p.spread for p in points) else None
        mark = {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 5, "capsize": 2}
        x, y = [p.x * shift for p in points], [p.y for p in points]
        axes.errorbar(x, y, yerr=bars, label=name, **mark)
    if level is not None:
        name, height = level
        axes.axhline(height, color="grey", linestyle="--", linewidth=1, label=name)
    heights = [p.y for points in drawn.values() for p in points]
    heights += [] if level is None else [level[1]]
    axes.set(xscale="log", xlabel=across, ylabel=up)
    if heights and min(heights) > 0:
        axes.set_yscale("log")
    _mark(axes.xaxis, *axes.get_xlim(), wanted=sorted(set(places)))
    plain_numbers(axes)
    axes.grid(alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda n: [*drawn, *names].index(names[n]))
    if names:
        axes.legend([handles[n] for n in order], [names[n] for n in order])
    return figure


def plain_numbers(axes: Any) -> None:
    """Writes the numbers along both axes in one form each: as they are, or as powers of ten where a
    logarithmic axis spans more than five of them or ends where digits are no longer read."""
    from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, NullFormatter

    for axis, scale, (low, high) in (
        (axes.xaxis, axes.get_xscale(), axes.get_xlim()),
        (axes.yaxis, axes.get_yscale(), axes.get_ylim()),
    ):
        is_wide = scale == "log" and (high > 1e5 * low or low < 1e-4 or high >= 1e6)
        if scale == "log" and axis is axes.yaxis:
            _mark(axis, low, high)
        plain = FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\u2212"))
        axis.set_major_formatter(LogFormatterMathtext() if is_wide else plain)
        axis.set_minor_formatter(NullFormatter())


def _mark(axis: Any, low: float, high: float, *, wanted: Sequence[float] = ()) -> None:
    """Sets the ticks of a logarithmic axis: the wanted ones that have room, or about three to ten
    round numbers if those are too many or too few."""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    span, chosen = math.log10(high / low), list[float]()
    for value in wanted:
        if not chosen or math.log10(value / chosen[-1]) >= 0.06 * span:
            chosen.append(value)
    if min(3, len(wanted)) <= len(chosen) <= 12 and wanted:
        axis.set_major_locator(FixedLocator(chosen))
        axis.set_minor_locator(NullLocator())
    elif span < 0.6:
        axis.set_major_locator(MaxNLocator(6))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 3 else (1,), numticks=10))
