"""A table of cells (eta, steps): flat records, CSV, plots, and markdown beside the paper's."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddim.errors import OutputError, plain_words
from ddim.evaluation.protocol import METRICS, Metric, Result
from ddim.figures import Point, draw_lines, save_figure
from ddim.files import load_json, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "PAPER",
    "PLOTS",
    "Cell",
    "flat_records",
    "make_plots",
    "read_cell",
    "save_plots",
    "spread_text",
    "text_table",
    "to_csv",
    "to_markdown",
    "value_text",
    "write_cell",
]

_ETAS: tuple[float | str, ...] = (0.0, 0.2, 0.5, 1.0, "sigma-hat")
_STEPS = (10, 20, 50, 100, 1000)
_FID = {
    "CIFAR-10": (
        (13.36, 6.84, 4.67, 4.16, 4.04),
        (14.04, 7.11, 4.77, 4.25, 4.09),
        (16.66, 8.35, 5.25, 4.46, 4.29),
        (41.07, 18.36, 8.01, 5.78, 4.73),
        (367.43, 133.37, 32.72, 9.99, 3.17),
    ),
    "CelebA": (
        (17.33, 13.73, 9.17, 6.53, 3.51),
        (17.66, 14.11, 9.51, 6.79, 3.64),
        (19.86, 16.06, 11.01, 8.09, 4.28),
        (33.12, 26.03, 18.48, 13.93, 5.98),
        (299.71, 183.83, 71.71, 45.20, 3.26),
    ),
}

PAPER = {
    data: {eta: dict(zip(_STEPS, row, strict=True)) for eta, row in zip(_ETAS, rows, strict=True)}
    for data, rows in _FID.items()
}
"""FID by data set, eta and steps: Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021.
Table 1. https://arxiv.org/abs/2010.02502"""

PLOTS = ("quality-evaluations", "quality-seconds")
"""Names of the plots, without the endings of their formats."""

_NAMES = {"CIFAR-10": r"cifar10(?!0)", "CelebA": r"celeba(?!hq|maskhq|spoof)"}
"""Patterns of the names of the paper's data sets; CIFAR-100 and CelebA-HQ are other data sets."""


@dataclass(frozen=True)
class Cell:
    """One eta at one number of steps."""

    eta: float | str
    steps: int
    timesteps: tuple[int, ...]
    evaluations: int
    """Network calls an image."""
    seconds: float
    """Time to sample all images of the cell; the mean over repeats."""
    results: tuple[Result, ...]
    """Results on all images of the cell."""
    compared: tuple[Result, ...]
    """Results on as many images as every cell has, so that ratios compare equal numbers."""
    timing_rounds: int = 0
    """Number of batches whose median time gives ``seconds``, drawn in turn with those of the other
    cells; 0 if ``seconds`` is the time of all images of the cell."""

    @property
    def count(self) -> int:
        """Number of images of the cell, in each repeat."""
        return self.results[0].count

    @property
    def seconds_per_image(self) -> float:
        """Time to sample an image."""
        return self.seconds / self.count


def read_cell(path: Path) -> Cell:
    """Reads a cell's file.

    Raises:
        OutputError: If it is damaged.
    """
    try:
        content = load_json(path)
        numbers: Any = {
            key: tuple(Result(**r) for r in content.pop(key)) for key in ("results", "compared")
        }
        return Cell(timesteps=tuple(content.pop("timesteps")), **numbers, **content)
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{path} is not a cell of this program ({error}); delete it, and it is measured again."
        ) from error


def write_cell(path: Path, cell: Cell) -> None:
    """Writes a cell's file, whole or not at all."""
    write_json(path, asdict(cell))


def flat_records(cells: Sequence[Cell], *, levels: int) -> list[dict[str, Any]]:
    """One flat record a cell, in the order of eta and steps.

    ``quality_ratio`` is the first metric over that of DDPM, which is eta = 1 at all ``levels``
    steps, on equally many images; ``quality_ratio_sigma_hat`` is the same over sigma-hat at all
    steps; ``speedup`` is DDPM's seconds over the cell's. They are None if the table has no such
    cell, and a ratio also if what it is over may be 0, as a KID may.
    """
    ddpm, larger = _find(cells, 1.0, levels), _find(cells, "sigma-hat", levels)
    records = []
    for cell in _sorted(cells):
        fields = ("eta", "steps", "evaluations", "count", "seconds")
        record: dict[str, Any] = {name: getattr(cell, name) for name in fields}
        for result in cell.results:
            name = result.metric
            record |= {name: result.value, f"{name}_floor": result.floor, f"{name}_std": result.std}
        record["quality_ratio"] = _ratio(cell, ddpm)
        record["quality_ratio_sigma_hat"] = _ratio(cell, larger)
        record["speedup"] = ddpm and ddpm.seconds_per_image / cell.seconds_per_image
        records.append(record)
    return records


def to_csv(records: Sequence[dict[str, Any]]) -> str:
    """Records of the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """A markdown table of rows, the first of them the head, whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *lines = (
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([head, rule, *lines]) + "\n"


def to_markdown(
    cells: Sequence[Cell], *, levels: int, title: str, protocol: str, reference: str
) -> str:
    """The table as a document: each metric by eta and steps, time, ratios to DDPM of ``levels``
    steps, and the paper's numbers. ``protocol`` says what was done, in sentences; the document says
    if ``reference``, the data that was compared with, is a data set of the paper's."""
    parts = [f"# {plain_words(title)}\n", f"{protocol}\n"]
    most = max(cell.count for cell in cells)
    for i, result in enumerate(cells[0].results):
        better = "Higher" if _metric(result.metric).higher_is_better else "Lower"
        # Rounded, since machines differ in the last digits.
        floors = {(c.results[i].floor_count, _number(c.results[i].floor)) for c in cells}
        ordered = sorted(floors, reverse=True)
        listed = " and ".join(f"{floor} on {count} images" for count, floor in ordered)
        parts += [
            f"## {result.metric}\n",
            f"{better} is better; real images against real ones: {listed}.\n",
            _by_steps(cells, lambda cell, i=i: _result_text(cell, cell.results[i], most=most)),
        ]
    parts += [
        "## Seconds an image\n",
        f"{_timing_text(cells)}\n",
        _by_steps(cells, lambda cell: _number(cell.seconds_per_image)),
        *_against_ddpm(cells, levels),
        *_beside_paper(cells, reference),
    ]
    return "\n".join(parts)


def _timing_text(cells: Sequence[Cell]) -> str:
    """How the seconds were measured, and whether they can be compared."""
    rounds = {c.timing_rounds for c in cells}
    if rounds == {0}:
        where = "on a machine that does other work, or on several, they do not compare"
        return f"Of all images of a cell, each when it was measured: {where}."
    if len(rounds) > 1:
        advice = "`--timing-rounds` takes all of them again"
        return f"Not all of them taken in turn: they do not compare. {advice}."
    return f"Batches of all cells drawn in turn, the median of {rounds.pop()} each."


def _against_ddpm(cells: Sequence[Cell], levels: int) -> list[str]:
    """The section of ratios to DDPM; nothing if the table has no cell of DDPM."""
    if _find(cells, 1.0, levels) is None and _find(cells, "sigma-hat", levels) is None:
        return []
    quality = cells[0].compared[0]
    records = flat_records(cells, levels=levels)
    heads = {
        "quality_ratio": f"{quality.metric} / eta 1",
        "quality_ratio_sigma_hat": f"{quality.metric} / sigma-hat",
        "speedup": "times faster than eta 1",
    }
    heads = {key: text for key, text in heads.items() if any(r[key] is not None for r in records)}
    rows = [["eta", "steps", *heads.values()]]
    for r in records:
        rows.append([_eta(r["eta"]), str(r["steps"]), *(_number(r[key]) for key in heads)])
    return [
        f"## Against DDPM of {levels} steps\n",
        f"All on {quality.count} images of the same seeds; eta 1 and sigma-hat are DDPM.\n",
        text_table(rows),
    ]


def _beside_paper(cells: Sequence[Cell], reference: str) -> list[str]:
    """The paper's table, and at which steps its order of etas is reproduced."""
    name = "".join(c for c in reference.lower() if c.isalnum())
    own = next((data for data, pattern in _NAMES.items() if re.search(pattern, name)), None)
    data = own or "CIFAR-10"
    other = "for orientation: other data, so compare orders, not values."
    relation = "the data of this table." if own else other
    rows = [["eta", *(f"S={s}" for s in PAPER[data][0.0])]]
    rows += [[_eta(eta), *(f"{v:.2f}" for v in row.values())] for eta, row in PAPER[data].items()]
    parts = [
        "## The paper's numbers\n",
        f"FID of {data} in the paper (Table 1; Inception features, 50,000 images, its own "
        f"network), {relation}\n",
        text_table(rows),
    ]
    orders = [_order_text(cells, s, PAPER[data]) for s in sorted({c.steps for c in cells})]
    if any(orders):
        metric = cells[0].compared[0].metric
        parts += [f"The order of eta by {metric}, best first:\n", "".join(orders)]
    return parts


def _order_text(
    cells: Sequence[Cell], steps: int, paper: Mapping[float | str, Mapping[int, float]]
) -> str:
    """A line that compares the order of two or more etas at these steps with the paper's."""
    column = [c for c in cells if c.steps == steps and c.eta in paper]
    there = {c.eta: paper[c.eta][steps] for c in column if steps in paper[c.eta]}
    if len(there) < 2:
        return ""
    results = dict(zip((c.eta for c in column), _comparable(column), strict=True))
    sign = -1 if _metric(cells[0].compared[0].metric).higher_is_better else 1
    here = {eta: sign * result.value for eta, result in results.items()}
    ours, theirs = (
        " < ".join(_eta(e) for e in sorted(values, key=values.__getitem__))
        for values in (here, there)
    )
    verdict = "as the paper" if ours == theirs else f"here {ours}; in the paper {theirs}"
    return f"- S={steps}: {verdict}.\n"


def _comparable(cells: Sequence[Cell]) -> list[Result]:
    """The first result of each cell on equally many images: on all that were drawn if every cell
    has as many, since they tell more than the first of them."""
    is_equal = len({cell.count for cell in cells}) == 1
    return [(cell.results if is_equal else cell.compared)[0] for cell in cells]


def make_plots(cells: Sequence[Cell]) -> dict[str, "Figure"]:
    """Quality against network evaluations and against seconds, a line an eta, by name; all on
    equally many images, and on all of them if every cell has as many."""
    results = dict(zip(((c.eta, c.steps) for c in cells), _comparable(cells), strict=True))
    first = next(iter(results.values()))

    def plot(x: Callable[[Cell], float], across: str) -> "Figure":
        lines: dict[str, list[Point]] = {}
        for cell in _sorted(cells):
            found = results[cell.eta, cell.steps]
            name = r"$\hat\sigma$" if cell.eta == "sigma-hat" else rf"$\eta$ = {_eta(cell.eta)}"
            lines.setdefault(name, []).append(Point(x(cell), found.value, found.std))
        up = f"{first.metric}, {first.count} images"
        level = ("real images", first.floor)
        in_order = {name: sorted(points) for name, points in lines.items()}
        return draw_lines(in_order, across=across, up=up, level=level)

    by_calls = plot(lambda cell: cell.evaluations, "network evaluations an image")
    by_time = plot(lambda cell: cell.seconds_per_image, "seconds an image")
    return dict(zip(PLOTS, (by_calls, by_time), strict=True))


def save_plots(cells: Sequence[Cell], folder: Path, formats: Sequence[str] = ("png",)) -> None:
    """Writes the plots in some formats, each whole or not at all."""
    for name, figure in make_plots(cells).items():
        for kind in formats:
            save_figure(figure, folder / f"{name}.{kind}")


def _find(cells: Sequence[Cell], eta: float | str, steps: int) -> Cell | None:
    return next((c for c in cells if c.eta == eta and c.steps == steps), None)


def _metric(name: str) -> Metric:
    return METRICS[name.partition("-")[0]]


def _ratio(cell: Cell, other: Cell | None) -> float | None:
    """The first metric of a cell over that of another; None if there is no other, or if its metric
    may be 0: a KID, which is unbiased, or a value within its spread of 0."""
    if other is None:
        return None
    below = other.compared[0]
    may_be_zero = below.metric.startswith("kid-") or abs(below.value) <= (below.std or 0.0)
    return None if may_be_zero else cell.compared[0].value / below.value


def _sorted(cells: Sequence[Cell]) -> list[Cell]:
    """By eta, sigma-hat last, then by steps."""
    return sorted(cells, key=lambda c: (isinstance(c.eta, str), c.eta, c.steps))


def _by_steps(cells: Sequence[Cell], text: Any) -> str:
    """A table of the cells' texts, a row an eta and a column a number of steps."""
    steps = sorted({c.steps for c in cells})
    rows = [["eta", *(f"S={s}" for s in steps)]]
    for eta in dict.fromkeys(c.eta for c in _sorted(cells)):
        found = [_find(cells, eta, s) for s in steps]
        rows.append([_eta(eta), *("" if c is None else text(c) for c in found)])
    return text_table(rows)


def _result_text(cell: Cell, result: Result, *, most: int) -> str:
    spread = f" ± {spread_text(result)}" if result.std is not None else ""
    fewer = f" ({result.count} images)" if cell.count < most else ""
    return f"{value_text(result)}{spread}{fewer}"


def spread_text(result: Result) -> str:
    """Two digits of a result's spread; empty if it has none."""
    if result.std is None:
        return ""
    return f"{result.std:#.2g}".rstrip(".") if result.std < 99.5 else f"{result.std:.0f}"


def value_text(result: Result) -> str:
    """A result's value, to the last digit of its spread; four digits if it has none."""
    spread = spread_text(result)
    if not result.std or "e" in spread:
        return _number(result.value)
    return f"{result.value:.{len(spread.partition('.')[2])}f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _eta(eta: float | str) -> str:
    return eta if isinstance(eta, str) else f"{eta:g}"
