"""Figures: every axis has numbers that can be read, and what is drawn is told apart and named."""

import itertools
import sys

import pytest

from ddim.errors import DDIMError
from ddim.figures import FORMATS, Point, check_plots, draw_lines, save_figure


def labels(figure, axis):
    """The boxes of the numbers along an axis that lie inside of its view, and their texts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    low, high = sorted(axis.get_view_interval())
    shown = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
    inside = [text for place, text in shown if low <= place <= high and text.get_text()]
    return [text.get_window_extent() for text in inside], [text.get_text() for text in inside]


@pytest.mark.parametrize(
    ("steps", "heights"),
    [
        ((10, 20, 50, 100, 1000), (3, 700)),
        ((10, 11, 12, 500), (0.9, 1.1)),
        ((50, 60), (-400, 9000)),
        (tuple(range(5, 45, 2)), (1e-32, 0.5)),
        ((7,), (2, 2)),
        ((5, 10, 20, 50), (3e-6, 0.01)),
        ((5, 10, 20, 50), (3, 5e6)),
    ],
)
def test_numbers_along_the_axes_are_enough_and_do_not_overlap(steps, heights):
    low, high = heights
    rise = (high - low) / max(1, len(steps) - 1)
    lines = {"a": [Point(x, low + n * rise) for n, x in enumerate(steps)]}
    (axes,) = draw_lines(lines, across="steps", up="height").axes
    for axis, least in ((axes.xaxis, min(3, len(steps))), (axes.yaxis, 3)):
        boxes, texts = labels(axes.figure, axis)
        assert least <= len(texts) <= 12
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
        powers = [text for text in texts if "mathdefault" in text]
        assert len(powers) in (0, len(texts))  # one form
        assert not [text for text in texts if "e" in text.removeprefix(r"$\mathdefault")]


def test_error_bars_at_one_place_stand_beside_one_another_and_the_legend_says_what_is_drawn():
    lines = {name: [Point(10, 1.0, 0.5), Point(20, 2.0, 0.5)] for name in "abc"}
    (axes,) = draw_lines({**lines, "none": []}, across="", up="", level=("real", 0.5)).axes
    assert [text.get_text() for text in axes.get_legend().texts] == ["a", "b", "c", "real"]
    places = [container.lines[0].get_xdata()[0] for container in axes.containers]
    pixels = [axes.transData.transform((x, 1.0))[0] for x in places]
    assert min(b - a for a, b in itertools.pairwise(pixels)) > 4
    assert places[1] == 10
    looks = {container.lines[0].get_marker() for container in axes.containers}
    assert len(looks) == 3


def test_lines_without_spread_have_no_bars_and_stand_in_place():
    lines = {name: [Point(10, 1.0), Point(20, 2.0)] for name in "ab"}
    (axes,) = draw_lines(lines, across="", up="").axes
    assert not any(container.has_yerr for container in axes.containers)
    assert [list(c.lines[0].get_xdata()) for c in axes.containers] == [[10, 20], [10, 20]]


def test_nothing_to_draw_is_an_empty_figure():
    (axes,) = draw_lines({"a": []}, across="x", up="y").axes
    assert axes.get_legend() is None


@pytest.mark.parametrize("kind", FORMATS)
def test_equal_figures_are_equal_files_in_each_format(kind, tmp_path):
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    for name in "ab":
        figure = draw_lines({"a": [Point(1, 2), Point(2, 3)]}, across="x", up="y")
        save_figure(figure, tmp_path / f"{name}.{kind}")
    first = (tmp_path / f"a.{kind}").read_bytes()
    assert first.startswith(starts[kind])
    assert first == (tmp_path / f"b.{kind}").read_bytes()
    with pytest.raises(DDIMError, match=r"must end in one of \.png, \.pdf, \.svg; got '.*x\.jpg'"):
        save_figure(figure, tmp_path / "x.jpg")


def test_missing_matplotlib_is_told_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        DDIMError,
        match=r"plots need matplotlib, which is not installed; run: pip install 'ddim\[plot\]'",
    ):
        check_plots()
