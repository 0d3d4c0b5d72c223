"""The Draw tab: pictures that grow step by step, and the lines that make them again."""

from typing import Any

import gradio as gr

from ddim.studio.desk import Desk, Update
from ddim.studio.fields import AS_CONFIGURED, MOST_PICTURES, sample_request
from ddim.studio.markup import pictures_html, status_html
from ddim.studio.parts import Bar, lines_box, on_press, subject_of
from ddim.studio.shelf import Shelf
from ddim.studio.tasks import Drawn, draw

__all__ = ["draw_tab"]

SPACINGS = [AS_CONFIGURED, "trailing", "leading", "linspace", "quadratic"]


def draw_tab(desk: Desk, shelf: Shelf, bar: Bar, *, device: str) -> None:
    """Lays the tab out, and says what its buttons do."""
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            seed = gr.Number(0, label="Seed", precision=0, elem_id="draw-seed")
            count = gr.Slider(
                1,
                MOST_PICTURES,
                4,
                step=1,
                label="Pictures",
                elem_id="draw-count",
                info="The seeds that follow one another.",
            )
            steps = gr.Slider(1, 250, 50, step=1, label="Steps", elem_id="draw-steps")
            eta = gr.Slider(
                0,
                1,
                0,
                step=0.05,
                label="Eta",
                elem_id="draw-eta",
                info="0 draws no noise between the steps; 1 is DDPM.",
            )
            with gr.Row():
                order = gr.Dropdown(
                    [AS_CONFIGURED, "1", "2"],
                    label="Order",
                    info="Of the solver.",
                    filterable=False,
                    elem_id="draw-order",
                )
                spacing = gr.Dropdown(
                    SPACINGS,
                    label="Spacing",
                    info="Of the levels.",
                    filterable=False,
                    elem_id="draw-spacing",
                )
            with gr.Row():
                button = gr.Button("Draw", variant="primary", elem_id="draw-start")
                stop = gr.Button("Stop", elem_id="draw-stop")
        with gr.Column(scale=3, min_width=360):
            status = gr.HTML(elem_id="draw-status")
            picture = gr.HTML(elem_id="draw-pictures")
            download = gr.DownloadButton(
                "Download pictures and run.json", visible=False, elem_id="draw-download"
            )
            with gr.Column(visible=False, elem_id="draw-lines") as lines:
                command = lines_box("The same in a terminal", "draw-command", lines=1, max_lines=4)
                python = lines_box("The same in Python", "draw-python", lines=10, max_lines=16)

    def make(*given: Any) -> Any:
        *subject, seed, count, steps, eta, order, spacing = given
        fields = {"seed": seed, "count": count, "steps": steps, "eta": eta, "spacing": spacing}
        fields["order"] = int(order) if order in ("1", "2") else order
        return draw(sample_request(subject_of(desk, shelf, device, *subject), **fields))

    fields = [*bar.fields, seed, count, steps, eta, order, spacing]
    outputs = [status, picture, command, python, lines, download]
    on_press(desk, "draw", button, stop, fields=fields, outputs=outputs, make=make, show=show)


def show(update: Update) -> tuple[Any, ...]:
    """What the tab shows of a run."""
    drawn: Drawn | None = update.result or update.part
    if drawn is None:
        return status_html(update), "", "", "", gr.update(visible=False), gr.update(visible=False)
    archive = None if drawn.archive is None else str(drawn.archive)
    pictures = pictures_html(update.previews, drawn.labels) if update.previews else gr.skip()
    return (
        status_html(update, done=f"{_many(len(drawn.labels))} drawn."),
        pictures,
        drawn.command,
        drawn.python,
        gr.update(visible=True),
        gr.update(visible=archive is not None, value=archive),
    )


def _many(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
