"""The studio's own HTML: pictures within the page, labelled sheets, and how far a run is. All that
comes from a visitor or a file is escaped."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from PIL import Image

from ddim.errors import plural, printable
from ddim.studio.desk import Update

__all__ = [
    "data_uri",
    "figure",
    "pictures_html",
    "sentence",
    "sheet_html",
    "status_html",
    "strip_html",
    "text",
]

_SHOWN = 320
"""Pictures are enlarged to about so many pixels, and larger ones are shown as they are."""


def text(value: object) -> str:
    """A text within the page."""
    return escape(printable(value))


def data_uri(picture: Image.Image) -> str:
    """A picture as an address that holds it, so that no file is served."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def figure(picture: Image.Image, label: str, *, side: int = _SHOWN, caption: bool = True) -> str:
    """A picture with its label, ``side`` pixels wide at least; small ones keep square pixels."""
    width = max(side, min(picture.width, 768)) if side >= _SHOWN else side
    kind = "pixels" if picture.width < 128 else "smooth"
    image = (
        f'<img class="{kind}" src="{data_uri(picture)}" alt="{text(label)}" '
        f'style="width:{width}px">'
    )
    under = f"<figcaption>{text(label)}</figcaption>" if caption else ""
    return f'<figure style="width:{width}px">{image}{under}</figure>'


def pictures_html(pictures: Sequence[Image.Image], labels: Sequence[str]) -> str:
    """Pictures side by side, each with its label."""
    side = {1: _SHOWN, 2: 240, 3: 168, 4: 240}.get(len(pictures), 128)
    shown = zip(pictures, labels, strict=True)
    return (
        f'<div class="pictures">{"".join(figure(p, label, side=side) for p, label in shown)}</div>'
    )


def sheet_html(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], Image.Image | str],
    *,
    title: str,
) -> str:
    """A labelled sheet: each cell holds a picture, the sentence that refuses it, or nothing yet."""
    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)

    def cell(row: str, column: str) -> str:
        found = cells.get((row, column))
        if found is None:
            return '<td><span class="empty" title="not drawn yet"></span></td>'
        if isinstance(found, str):
            return f'<td class="refused">{text(found)}</td>'
        return f"<td>{figure(found, f'{row}, {column}', side=112, caption=False)}</td>"

    body = "".join(
        f'<tr><th scope="row">{text(row)}</th>{"".join(cell(row, c) for c in columns)}</tr>'
        for row in rows
    )
    caption = f"<caption>{text(title)}</caption>"
    table = f"<table>{caption}<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="sheet" tabindex="0" role="region" aria-label="{text(title)}">{table}</div>'


def strip_html(pictures: Sequence[Image.Image], *, columns: int, is_grid: bool) -> str:
    """All pictures of a path in a row, or of a square in rows; each has its place as its label."""
    size = 88 if is_grid else 44
    shown = "".join(
        figure(p, f"row {n // columns + 1}, column {n % columns + 1}", side=size, caption=False)
        if is_grid
        else figure(p, f"{n + 1} of {len(pictures)}", side=size, caption=False)
        for n, p in enumerate(pictures)
    )
    style = f"display:grid;grid-template-columns:repeat({columns},max-content);gap:3px"
    within = style if is_grid else "display:flex;flex-wrap:wrap;gap:3px"
    return f'<div style="{within}">{shown}</div>'


def sentence(message: str, *, kind: str = "error") -> str:
    """A sentence to the person, such as what was wrong."""
    return (
        f'<p class="{kind}" role="{"alert" if kind == "error" else "status"}">{text(message)}</p>'
    )


def status_html(update: Update, *, what: str = "step", done: str = "Done.") -> str:
    """How far a run is, in words and as a bar, and its notes."""
    if update.state == "failed":
        return sentence(_capital(update.error or "the run failed.")) + _notes(update.notes)
    words, bar = done, ""
    if update.state == "waiting":
        before = update.before
        many = f"{plural(before, 'run')} before yours" if before else "next"
        words = f"In the queue: {many}."
    elif update.state == "running":
        words = "Loading the model ..."
        if update.done:
            of = f" of {update.total}" if update.total else ""
            left = "" if update.left is None else f", {_seconds(update.left)} left"
            words = f"{_capital(what)} {update.done}{of}{left}"
        if update.total:
            bar = (
                f'<progress aria-label="steps walked" max="{update.total}" '
                f'value="{update.done}"></progress>'
            )
    elif update.state == "stopped":
        at = f" after {update.done} of {update.total} steps" if update.done and update.total else ""
        words = f"Stopped{at}."
    return f'<div class="status" role="status">{text(words)}{bar}</div>{_notes(update.notes)}'


def _notes(notes: Iterable[str]) -> str:
    told = "".join(f"<li>{text(_capital(note))}</li>" for note in dict.fromkeys(notes))
    return f'<ul class="notes">{told}</ul>' if told else ""


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _seconds(left: float) -> str:
    if left >= 90:
        return f"{left / 60:.0f} min"
    return f"{left:.0f} s" if left >= 1 else "less than 1 s"
