"""The Latent space tab: between two pictures, in a square of four, and under another prompt."""

from typing import Any

import gradio as gr
from PIL import Image

from ddim.studio.desk import Desk, Update
from ddim.studio.fields import check_picture, edit_request, interpolate_request
from ddim.studio.markup import figure, pictures_html, status_html, strip_html
from ddim.studio.parts import QUIET, Bar, lines_box, on_press, subject_of
from ddim.studio.shelf import Shelf
from ddim.studio.tasks import Edited, Walked, edit, walk_between

__all__ = ["latent_tab"]

KINDS = {"Between two": "path", "A square of four": "grid", "Edit under another prompt": "edit"}
CORNERS = ("First", "Last", "Bottom left", "Bottom right")


def latent_tab(desk: Desk, shelf: Shelf, bar: Bar, *, device: str) -> None:
    """Lays the tab out, and says what its buttons do."""
    frames = gr.State([], time_to_live=3600)
    seeds, images = [], []
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            kind = gr.Radio(list(KINDS), value="Between two", label="Show", elem_id="latent-kind")
            to = gr.Textbox(
                "a blue sneaker on a black background",
                label="It becomes",
                max_length=2000,
                visible=False,
                elem_id="latent-to",
                info="The prompt above says what the picture shows.",
            )
            ends = []
            for number, corner in enumerate(CORNERS):
                with gr.Row(visible=number < 2) as end_row:
                    seeds.append(
                        gr.Number(
                            (3, 17, 5, 8)[number],
                            label=f"{corner}: seed",
                            precision=0,
                            min_width=120,
                            elem_id=f"latent-seed-{number}",
                        )
                    )
                    images.append(
                        gr.Image(
                            label=f"{corner}: or a picture",
                            type="filepath",
                            image_mode=None,
                            sources=["upload"],
                            height=120,
                            buttons=[],
                            min_width=140,
                            elem_id=f"latent-image-{number}",
                        )
                    )
                ends.append(end_row)
            count = gr.Slider(
                3, 31, 11, step=1, label="Pictures of the path", elem_id="latent-count"
            )
            steps = gr.Slider(2, 250, 20, step=1, label="Steps", elem_id="latent-steps")
            with gr.Row():
                button = gr.Button("Walk", variant="primary", elem_id="latent-start")
                stop = gr.Button("Stop", elem_id="latent-stop")
        with gr.Column(scale=3, min_width=360):
            status = gr.HTML(elem_id="latent-status")
            here = gr.HTML(elem_id="latent-here")
            slider = gr.Slider(
                1,
                11,
                1,
                step=1,
                label="From the first to the last",
                visible=False,
                elem_id="latent-slider",
            )
            whole = gr.HTML(elem_id="latent-whole")
            download = gr.DownloadButton(
                "Download pictures and run.json", visible=False, elem_id="latent-download"
            )
            command = lines_box(
                "The same in a terminal",
                "latent-command",
                lines=1,
                max_lines=4,
                visible=False,
                elem_classes="code",
            )

    def make(*given: Any) -> Any:
        *subject_fields, kind, to, count, steps = given[:8]
        ends, pictures = given[8:12], given[12:16]
        subject = subject_of(desk, shelf, device, *subject_fields)
        for path in pictures:
            check_picture(path)
        if KINDS.get(kind) == "edit":
            image = pictures[0] or None
            return edit(edit_request(subject, to=to, seed=ends[0], image=image, steps=steps))
        is_grid = KINDS.get(kind) == "grid"
        few = pictures if is_grid else pictures[:2]
        options = {"count": count, "steps": steps, "grid": is_grid}
        return walk_between(interpolate_request(subject, seeds=ends, images=few, **options))

    def fit(kind: str) -> list[Any]:
        is_grid, is_edit = KINDS.get(kind) == "grid", KINDS.get(kind) == "edit"
        rows = [gr.update(visible=n < (1 if is_edit else 4 if is_grid else 2)) for n in range(4)]
        many = gr.update(
            visible=not is_edit,
            maximum=9 if is_grid else 31,
            value=5 if is_grid else 11,
            label="Pictures of a side" if is_grid else "Pictures of the path",
        )
        return [*rows, gr.update(visible=is_edit), many]

    def turn(pictures: list[Image.Image], place: float) -> str:
        at = int(place)
        return at_place(pictures, at) if 1 <= at <= len(pictures) else ""

    kind.change(fit, kind, [*ends, to, count], **QUIET)
    fields = [*bar.fields, kind, to, count, steps, *seeds, *images]
    outputs = [status, here, slider, frames, whole, download, command]
    on_press(desk, "latent", button, stop, fields=fields, outputs=outputs, make=make, show=show)
    slider.input(turn, [frames, slider], here, trigger_mode="always_last", **QUIET)


def at_place(pictures: Any, place: int) -> str:
    """The picture where the slider is."""
    return figure(pictures[place - 1], f"{place} of {len(pictures)}", side=256)


def show(update: Update) -> tuple[Any, ...]:
    """What the tab shows of a run: the path with its slider, the square, or the edit."""
    found: Walked | Edited | None = update.result or update.part
    done = "Done." if not isinstance(found, Walked) else "Done; the slider walks along the path."
    if isinstance(found, Walked) and found.is_grid:
        done = "Done; the four corners are the ends."
    status = status_html(update, done=done)
    hidden = gr.update(visible=False)
    if found is None:
        return status, "", hidden, [], "", hidden, hidden
    line = gr.update(visible=True, value=found.command)
    if not found.pictures:
        grown = pictures_html(update.previews, ["predicted"] * len(update.previews))
        return status, grown if update.previews else "", hidden, [], "", hidden, line
    file = gr.update(visible=True, value=str(found.archive))
    if isinstance(found, Edited):
        return status, pictures_html(found.pictures, found.labels), hidden, [], "", file, line
    whole = strip_html(found.pictures, columns=found.columns, is_grid=found.is_grid)
    if found.is_grid:
        return status, "", hidden, [], whole, file, line
    middle = (len(found.pictures) + 1) // 2
    slider = gr.update(visible=True, maximum=len(found.pictures), value=middle)
    here = at_place(found.pictures, middle)
    return status, here, slider, list(found.pictures), whole, file, line
