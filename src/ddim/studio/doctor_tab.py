"""The Doctor tab: what is wrong with a noise schedule, where sampling starts, and the fix."""

from pathlib import Path
from typing import Any

import gradio as gr

from ddim.errors import DDIMError
from ddim.studio.desk import Desk, Update
from ddim.studio.fields import Subject, check_seed, doctor_request
from ddim.studio.markup import figure, pictures_html, sentence, status_html
from ddim.studio.parts import Bar, lines_box, on_press, subject_of
from ddim.studio.shelf import Shelf
from ddim.studio.tasks import Examined, look_at

__all__ = ["doctor_tab"]

SOURCES = (".json", ".safetensors")


def doctor_tab(desk: Desk, shelf: Shelf, bar: Bar, *, device: str) -> None:
    """Lays the tab out, and says what its buttons do."""
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            file = gr.File(
                label="A scheduler_config.json, in place of the model above",
                type="filepath",
                file_types=list(SOURCES),
                file_count="single",
                height=140,
                elem_id="doctor-file",
            )
            steps = gr.Slider(1, 250, 50, step=1, label="Steps", elem_id="doctor-steps")
            seed = gr.Number(0, label="Seed", precision=0, elem_id="doctor-seed")
            with gr.Row():
                button = gr.Button("Examine", variant="primary", elem_id="doctor-start")
                stop = gr.Button("Stop", elem_id="doctor-stop")
        with gr.Column(scale=3, min_width=360):
            verdict = gr.HTML(elem_id="doctor-verdict")
            curve = gr.HTML(elem_id="doctor-curve")
            python = lines_box(
                "The fix, in Python", "doctor-fix", lines=2, visible=False, elem_classes="code"
            )
            status = gr.HTML(elem_id="doctor-status")
            sheet = gr.HTML(elem_id="doctor-sheet")
            with gr.Accordion("Every finding, and the corrected configuration", open=False):
                report = lines_box(
                    "Findings", "doctor-report", lines=12, max_lines=30, elem_classes="code"
                )
                fixed = lines_box(
                    "Corrected configuration",
                    "doctor-fixed",
                    lines=6,
                    max_lines=30,
                    elem_classes="code",
                )
            command = lines_box(
                "The same in a terminal",
                "doctor-command",
                lines=1,
                visible=False,
                elem_classes="code",
            )

    def make(*given: Any) -> Any:
        *subject_fields, file, steps, seed = given
        if file:
            if Path(file).suffix not in SOURCES:
                raise DDIMError(f"drop a {' or '.join(SOURCES)} file; got {Path(file).name}.")
            return look_at(doctor_request(str(file), steps=steps))
        subject: Subject = subject_of(desk, shelf, device, *subject_fields)
        shown = subject.shown(seed=check_seed(seed), count=1)
        return look_at(doctor_request(subject.model, steps=steps, **shown))

    fields = [*bar.fields, file, steps, seed]
    outputs = [verdict, curve, python, status, sheet, report, fixed, command]
    on_press(desk, "doctor", button, stop, fields=fields, outputs=outputs, make=make, show=show)


def show(update: Update) -> tuple[Any, ...]:
    """What the tab shows of a run."""
    found: Examined | None = update.result or update.part
    hidden = gr.update(visible=False)
    if found is None:
        return "", "", hidden, status_html(update), "", "", "", hidden
    about, curve = "Where sampling starts, and where it should", ""
    if found.curve is not None:
        curve = figure(found.curve, about, side=600, caption=False)
    sheet = found.sheet
    drawn, done = "", "Examined."
    if sheet is not None:
        labels = [row for row in sheet.rows if (row, sheet.columns[0]) in sheet.cells]
        cells = [sheet.cells[row, sheet.columns[0]] for row in labels]
        pictures = [cell for cell in cells if not isinstance(cell, str)]
        refused = [sentence(cell) for cell in cells if isinstance(cell, str)]
        shown = [row for row, cell in zip(labels, cells, strict=True) if not isinstance(cell, str)]
        drawn = pictures_html(pictures, shown) + "".join(refused)
    elif update.state == "finished":
        done = "Examined; there is nothing to draw before and after."
    fix = found.diagnosis.python
    return (
        sentence(found.diagnosis.verdict, kind="verdict"),
        curve,
        gr.update(visible=bool(fix), value=fix),
        status_html(update, done=done),
        drawn,
        found.report,
        found.fix,
        gr.update(visible=True, value=found.command),
    )
