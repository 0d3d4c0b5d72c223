"""The progress of a training run: a bar on a terminal, lines elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ddim.cli.terminal import bar_size, duration, say
from ddim.errors import printable

if TYPE_CHECKING:
    from ddim.training.monitoring import Progress

__all__ = ["progress_shown"]


@contextlib.contextmanager
def progress_shown() -> Iterator[Callable[["Progress"], None]]:
    """Shows how far a run is: on standard error as a bar, if that is a terminal; on standard output
    as lines, unless both go to the terminal."""
    bar: tqdm[Any] | None = None
    has_bar = sys.stderr.isatty()
    has_lines = not (has_bar and sys.stdout.isatty())

    def show(progress: "Progress") -> None:
        nonlocal bar
        if has_lines:
            say(_line(progress))
        if not has_bar:
            return
        if bar is None:
            form = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix}"
            bar = tqdm(total=progress.steps, bar_format=form, **bar_size())
        bar.set_postfix_str(_postfix(progress), refresh=False)
        bar.n = progress.step
        bar.refresh()

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def _line(progress: "Progress") -> str:
    held = progress.validation_loss
    told = "" if held is None else f"  held out {held:.4f}"
    return (
        f"step {progress.step}/{progress.steps}  {progress.images} images  loss "
        f"{progress.loss:.4f}{told}  {progress.images_per_second:.1f} images/s  "
        f"{duration(progress.seconds_left)} left"
    )


def _postfix(progress: "Progress") -> str:
    parts = [
        f"loss {progress.loss:.4f}",
        f"{progress.images_per_second:.1f} images/s",
        f"{duration(progress.seconds_left)} left",
    ]
    if progress.preview is not None:
        parts.append(printable(progress.preview))
    return ", ".join(parts)
