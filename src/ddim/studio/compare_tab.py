"""The Compare tab: one seed in a labelled sheet, which fills while it is drawn."""

from typing import Any

import gradio as gr

from ddim.studio.desk import Desk, Update
from ddim.studio.fields import check_seed, doctor_request, read_list, solver_cells, step_cells
from ddim.studio.markup import sheet_html, status_html
from ddim.studio.parts import QUIET, Bar, on_press, subject_of
from ddim.studio.shelf import Shelf
from ddim.studio.tasks import Sheet, compare, fixes

__all__ = ["compare_tab"]

KINDS = {"Steps and eta": "steps", "Solvers": "solvers", "Each fix of the doctor": "fixes"}


def compare_tab(desk: Desk, shelf: Shelf, bar: Bar, *, device: str) -> None:
    """Lays the tab out, and says what its buttons do."""
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            kind = gr.Radio(
                list(KINDS), value="Steps and eta", label="Compare", elem_id="compare-kind"
            )
            seed = gr.Number(0, label="Seed", precision=0, elem_id="compare-seed")
            steps = gr.Textbox(
                "5, 10, 20",
                label="Steps",
                max_length=200,
                elem_id="compare-steps",
                info="Numbers, separated by commas: the columns.",
            )
            etas = gr.Textbox(
                "0, 0.5, 1",
                label="Etas",
                max_length=200,
                elem_id="compare-etas",
                info="Numbers, separated by commas: the rows.",
            )
            with gr.Row():
                button = gr.Button("Compare", variant="primary", elem_id="compare-start")
                stop = gr.Button("Stop", elem_id="compare-stop")
        with gr.Column(scale=3, min_width=360):
            status = gr.HTML(elem_id="compare-status")
            sheet = gr.HTML(elem_id="compare-sheet")
            download = gr.DownloadButton(
                "Download the sheet, its pictures and records",
                visible=False,
                elem_id="compare-download",
            )

    def make(*given: Any) -> Any:
        *subject_fields, kind, seed, steps, etas = given
        asked, subject = KINDS.get(kind), subject_of(desk, shelf, device, *subject_fields)
        if asked == "fixes":
            return _fixes(subject, seed, steps)
        if asked == "solvers":
            return compare(solver_cells(subject, seed=seed, steps=steps))
        return compare(step_cells(subject, seed=seed, steps=steps, etas=etas))

    kind.change(lambda kind: gr.update(visible=KINDS.get(kind) == "steps"), kind, etas, **QUIET)
    fields, outputs = [*bar.fields, kind, seed, steps, etas], [status, sheet, download]
    on_press(desk, "compare", button, stop, fields=fields, outputs=outputs, make=make, show=show)


def _fixes(subject: Any, seed: object, steps: object) -> Any:
    """The sheet of the doctor's fixes, at the first number of steps."""
    first = read_list("the numbers of steps", steps, int)[:1]
    number = check_seed(seed)
    shown = subject.shown(seed=number, count=1)
    request = doctor_request(subject.model, steps=first[0] if first else None, **shown)
    return fixes(request, f"Seed {number} as configured, and with each fix")


def show(update: Update) -> tuple[Any, ...]:
    """What the tab shows of a run."""
    sheet: Sheet | None = update.result or update.part
    if sheet is None or not sheet.rows:
        return status_html(update), "", gr.update(visible=False)
    archive = None if sheet.archive is None else str(sheet.archive)
    html = sheet_html(sheet.rows, sheet.columns, sheet.cells, title=sheet.title)
    done = f"{sheet.told} drawn."
    status = status_html(update, what=f"{sheet.told} drawn; step", done=done)
    return status, html, gr.update(visible=archive is not None, value=archive)
