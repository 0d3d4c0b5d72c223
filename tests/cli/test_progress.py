"""Progress is a bar on a terminal, and lines elsewhere."""

from pathlib import Path

import pytest
from tests.conftest import on_a_terminal

from ddim.cli.progress import progress_shown
from ddim.training.monitoring import Progress

STEPS = [
    Progress(5, 200, 320, 0.9, 85.0, 3660.0),
    Progress(200, 200, 12800, 0.25, 80.0, 0.0, 0.3, Path("out/previews/0000200.png")),
]


def test_lines_say_how_far_the_run_is(capsys):
    with progress_shown() as show:
        for progress in STEPS:
            show(progress)
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out == (
        "step 5/200  320 images  loss 0.9000  85.0 images/s  01:01:00 left\n"
        "step 200/200  12800 images  loss 0.2500  held out 0.3000  80.0 images/s  00:00:00 left\n"
    )


@pytest.mark.parametrize("both", [True, False])
def test_a_terminal_shows_a_bar_with_the_last_preview(monkeypatch, capsys, both):
    with on_a_terminal(monkeypatch, columns=140) as shown:
        if both:
            monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        with progress_shown() as show:
            for progress in STEPS:
                show(progress)
    assert "step 5/200, loss 0.9000, 85.0 images/s, 01:01:00 left" in shown()
    assert "100%" in shown()
    assert "left, out/previews/0000200.png" in shown()
    assert (capsys.readouterr().out == "") is both
