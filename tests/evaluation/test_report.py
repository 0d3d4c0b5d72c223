"""Tables: ratios compare equal numbers of images, and the paper's numbers stand beside ours as what
they are."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ddim.evaluation.protocol import Result
from ddim.evaluation.report import (
    PAPER,
    Cell,
    flat_records,
    make_plots,
    save_plots,
    spread_text,
    text_table,
    to_csv,
    to_markdown,
    value_text,
)


def cell(eta, steps, value, *, seconds=1.0, count=200, compared=None):
    def result(v, n):
        return (Result("fd-fashion", "fashion", v, 1.5, 0.25, n, n),)

    return Cell(
        eta,
        steps,
        tuple(range(steps))[::-1],
        steps,
        seconds,
        result(value, count),
        result(compared or value, 50),
    )


@pytest.fixture
def cells():
    return [
        cell("sigma-hat", 100, 2.0, seconds=50, count=50),
        cell(1.0, 100, 3.0, seconds=50, count=50, compared=4.0),
        cell(0.0, 10, 9.0, seconds=20, compared=6.0),
        cell(1.0, 10, 30.0, seconds=20, compared=20.0),
        cell(0.0, 20, 5.0, seconds=40),
        cell(1.0, 20, 4.5, seconds=40),
    ]


def markdown(cells, reference="fashion-mnist"):
    return to_markdown(
        cells, levels=100, title="A table", protocol="As it was done.", reference=reference
    )


def test_records_are_sorted_and_compare_equal_numbers(cells):
    records = flat_records(cells, levels=100)
    assert [(r["eta"], r["steps"]) for r in records] == [
        (0, 10),
        (0, 20),
        (1, 10),
        (1, 20),
        (1, 100),
        ("sigma-hat", 100),
    ]
    first = records[0]
    assert (first["fd-fashion"], first["fd-fashion_floor"], first["fd-fashion_std"]) == (
        9.0,
        1.5,
        0.25,
    )
    assert (first["evaluations"], first["count"], first["seconds"]) == (10, 200, 20)
    assert first["quality_ratio"] == 6.0 / 4.0
    assert first["quality_ratio_sigma_hat"] == 6.0 / 2.0
    assert first["speedup"] == (50 / 50) / (20 / 200)
    assert records[4]["quality_ratio"] == records[4]["speedup"] == 1


def test_without_ddpm_there_are_no_ratios(cells):
    records = flat_records(cells, levels=1000)
    assert {
        r[key] for r in records for key in ("quality_ratio", "quality_ratio_sigma_hat", "speedup")
    } == {None}
    assert "Against DDPM" not in to_markdown(
        cells, levels=1000, title="", protocol="", reference="x"
    )
    assert "Against DDPM of 100 steps" in markdown(cells)


def test_csv_reads_back(cells):
    records = flat_records(cells, levels=100)
    rows = list(csv.DictReader(io.StringIO(to_csv(records))))
    assert [float(r["fd-fashion"]) for r in rows] == [r["fd-fashion"] for r in records]


def test_markdown_says_counts_floors_and_where_the_paper_agrees(cells):
    text = markdown(cells)
    assert text.startswith("# A table\n\nAs it was done.\n")
    assert (
        "Lower is better; real images against real ones: 1.5 on 200 images and 1.5 on 50 images."
        in text
    )
    assert "| 1         | 30.00 ± 0.25 | 4.50 ± 0.25 | 3.00 ± 0.25 (50 images) |" in text
    assert "for orientation: other data, so compare orders, not values" in text
    assert "- S=10: as the paper." in text
    assert "- S=20: here 1 < 0; in the paper 0 < 1." in text
    assert "| sigma-hat | 367.43 | 133.37 | 32.72 | 9.99  | 3.17   |" in text
    assert "FID of CIFAR-10 in the paper" in markdown(cells, "uoft-cs/cifar10")
    assert "the data of this table" in markdown(cells, "uoft-cs/cifar10")
    assert "FID of CelebA in the paper" in markdown(cells, "./celeba-64")
    for other in ("uoft-cs/cifar100", "celeba-hq", "CelebAMask-HQ"):
        assert "for orientation: other data" in markdown(cells, other)


def test_floors_that_differ_by_rounding_are_told_once(cells):
    other = replace(cells[2], results=(replace(cells[2].results[0], floor=1.5 + 1e-9),))
    assert "real ones: 1.5 on 200 images and 1.5 on 50 images." in markdown(
        [*cells, replace(other, steps=50)]
    )


def test_the_order_of_eta_is_by_all_images_where_they_are_equally_many():
    full, part = cell(0.0, 10, 9.0, compared=21.0), cell(1.0, 10, 30.0, compared=20.0)
    assert "- S=10: as the paper." in markdown([full, part])
    fewer = cell(
        1.0, 10, 8.0, count=50, compared=22.0
    )  # of few images, a distance is another number
    assert "- S=10: as the paper." in markdown([full, fewer])


def test_markdown_says_how_the_time_was_taken(cells):
    assert "## Seconds an image\n\nOf all images of a cell, each when it was measured" in markdown(
        cells
    )
    in_turn = [replace(c, timing_rounds=3) for c in cells]
    assert "Batches of all cells drawn in turn, the median of 3 each." in markdown(in_turn)
    assert "Not all of them taken in turn: they do not compare." in markdown(
        [*in_turn[:-1], cells[-1]]
    )


def test_the_papers_table_is_the_papers():
    assert PAPER["CIFAR-10"][0.0] == {10: 13.36, 20: 6.84, 50: 4.67, 100: 4.16, 1000: 4.04}
    assert PAPER["CelebA"]["sigma-hat"][1000] == 3.26
    assert all(
        list(row.values()) == sorted(row.values(), reverse=True)
        for table in PAPER.values()
        for row in table.values()
    )


def test_plots_are_pictures_with_something_in_them(cells, tmp_path):
    save_plots(cells, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "quality-evaluations.png",
        "quality-seconds.png",
    ]
    for path in tmp_path.iterdir():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[:2] == (660, 960)
        assert (np.ptp(pixels, axis=2) > 100).sum() > 500  # coloured lines


def test_plots_take_the_most_images_that_all_cells_have(cells):
    assert make_plots(cells)["quality-seconds"].axes[0].get_ylabel() == "fd-fashion, 50 images"
    equal = [c for c in cells if c.count == 200]
    figure = make_plots(equal)["quality-evaluations"]
    assert figure.axes[0].get_ylabel() == "fd-fashion, 200 images"
    heights = [list(c.lines[0].get_ydata()) for c in figure.axes[0].containers]
    assert heights == [[9.0, 5.0], [30.0, 4.5]]


def test_a_ratio_over_what_may_be_zero_is_left_out(cells):
    def changed(**keys):
        result = {"results": 0, "compared": 0}
        return [
            replace(c, **{k: (replace(getattr(c, k)[0], **keys),) for k in result}) for c in cells
        ]

    for other in (changed(metric="kid-fashion"), changed(std=50.0)):
        records = flat_records(other, levels=100)
        assert {r["quality_ratio"] for r in records} == {None}
        assert records[0]["speedup"] == (50 / 50) / (20 / 200)
        text = markdown(other)
        assert "| eta       | steps | times faster than eta 1 |" in text


@pytest.mark.parametrize(
    ("value", "std", "text"),
    [
        (269.4, 71.2, "269 ± 71"),
        (174.1, 110.3, "174 ± 110"),
        (0.29961, 0.0034, "0.2996 ± 0.0034"),
        (9.0, 0.1, "9.00 ± 0.10"),
        (-0.0003395, 0.002, "-0.0003 ± 0.0020"),
        (0.5, 0.0, "0.5 ± 0.0"),
        (0.123456, 2e-6, "0.1235 ± 2.0e-06"),
        (3.14159, None, "3.142"),
    ],
)
def test_a_value_is_written_to_the_last_digit_of_its_spread(value, std, text):
    result = Result("fd-fashion", "fashion", value, 1.5, std, 10, 10)
    spread = "" if std is None else f" ± {spread_text(result)}"
    assert f"{value_text(result)}{spread}" == text


def test_text_tables_are_straight():
    assert text_table([["a", "bcd"], ["12", "3"]]) == "| a  | bcd |\n|----|-----|\n| 12 | 3   |\n"
