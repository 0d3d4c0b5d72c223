"""What the tabs share: the bar that says what is drawn, and runs that are shown as they go on."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gradio as gr

from ddim.errors import DDIMError
from ddim.models.facts import FoundModel, read_model
from ddim.studio.desk import Desk, Ticket, Update
from ddim.studio.fields import Subject
from ddim.studio.markup import sentence
from ddim.studio.opening import open_model
from ddim.studio.shelf import Shelf

__all__ = ["Bar", "QUIET", "Show", "lines_box", "make_bar", "on_press", "subject_of"]

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Options of every event: the page has words of its own for progress, and no other interface."""
EACH = "each seed its own"
PROMPT = "a red sneaker on a black background"

Show = Callable[[Update], tuple[Any, ...]]


class Bar(NamedTuple):
    """The fields above the tabs."""

    model: gr.Dropdown
    prompt: gr.Textbox
    class_: gr.Dropdown
    guidance: gr.Slider
    about: gr.HTML

    @property
    def fields(self) -> list[Any]:
        """The fields that say what is drawn, in the order of :func:`subject_of`."""
        return [self.model, self.prompt, self.class_, self.guidance]


def make_bar(desk: Desk, shelf: Shelf) -> Bar:
    """Lays the bar out; fields that the model does not know are hidden."""
    with gr.Row(elem_classes="bar"):
        model = gr.Dropdown(
            shelf.names(),
            value=shelf.first,
            label="Model",
            scale=2,
            elem_id="model",
            filterable=False,
        )
        prompt = gr.Textbox(
            label="Prompt", scale=3, max_length=2000, visible=False, elem_id="prompt"
        )
        class_ = gr.Dropdown(
            [EACH], value=EACH, label="Class", visible=False, scale=1, elem_id="class"
        )
        guidance = gr.Slider(
            1, 15, value=3, step=0.5, label="Guidance", visible=False, scale=1, elem_id="guidance"
        )
    about = gr.HTML(elem_id="about")
    return Bar(model, prompt, class_, guidance, about)


def fit_bar(desk: Desk, shelf: Shelf, name: object) -> tuple[Any, ...]:
    """What the bar shows for a model: prompt, class, guidance, and a sentence about it."""
    hidden = gr.update(visible=False, value="")
    try:
        found = read_model(open_model(shelf.find(name), shelf, desk.folder).folder)
    except DDIMError as error:
        return (hidden, *no_class(), sentence(str(error)))
    if found.is_text:
        scale = card_scale(found)
        prompt = gr.update(visible=True, value=PROMPT)
        return (
            prompt,
            gr.update(visible=False, value=EACH, choices=[EACH]),
            gr.update(visible=True, value=scale),
            sentence("This model makes pictures of prompts.", kind="about"),
        )
    told = "This model draws pictures without being told of what."
    if not found.classes:
        return (hidden, *no_class(), sentence(told, kind="about"))
    names = [*found.class_names] or [str(number) for number in range(found.classes)]
    told = f"This model draws pictures of {found.classes} classes."
    class_ = gr.update(visible=True, choices=[EACH, *names], value=EACH)
    return (hidden, class_, gr.update(visible=False), sentence(told, kind="about"))


def no_class() -> tuple[Any, Any]:
    """Class and guidance, hidden."""
    return gr.update(visible=False, value=EACH, choices=[EACH]), gr.update(visible=False)


def card_scale(found: FoundModel) -> float:
    """The guidance that a model's card names; 7.5 without one."""
    from ddim.models.checkpoints import read_guidance

    return float(read_guidance(found.folder).get("guidance_scale", 7.5))


def subject_of(
    desk: Desk, shelf: Shelf, device: str, model: object, prompt: str, class_: str, guidance: float
) -> Subject:
    """What the bar says; the prompt and the guidance of a model without text are not given."""
    opened = open_model(shelf.find(model), shelf, desk.folder)
    is_text = read_model(opened.folder).is_text
    asked = "" if class_ in (None, EACH) else str(class_)
    if not is_text:
        return Subject(opened.folder, "", asked, None, device)
    return Subject(opened.folder, prompt or "", "", guidance, device)


def lines_box(label: str, elem_id: str, **options: Any) -> gr.Textbox:
    """Lines to copy."""
    return gr.Textbox(label=label, buttons=["copy"], interactive=False, elem_id=elem_id, **options)


def on_press(
    desk: Desk,
    tab: str,
    button: gr.Button,
    stop: gr.Button,
    *,
    fields: list[Any],
    outputs: list[Any],
    make: Callable[..., Callable[[Ticket], Any]],
    show: Show,
) -> None:
    """Says what a tab's two buttons do.

    Args:
        desk: Where runs are queued; a visitor has one for each tab.
        tab: Its name.
        button: Begins a run of what ``make`` returns for the values of the fields.
        stop: Ends that run.
        fields: The fields.
        outputs: What ``show`` fills; the button is added.
        make: Takes the values of the fields; may raise a DDIMError.
        show: What the tab shows of a run.
    """

    def start(visit: gr.Request, *given: Any) -> Iterator[Any]:
        yield from live(desk, f"{visit.session_hash}/{tab}", lambda: make(*given), show)

    def end(visit: gr.Request) -> None:
        desk.stop(f"{visit.session_hash}/{tab}")

    button.click(start, fields, [*outputs, button], **QUIET)
    stop.click(end, **QUIET)


def live(
    desk: Desk, visitor: str, make: Callable[[], Callable[[Ticket], Any]], show: Show
) -> Iterator[Any]:
    """Queues a run for a visitor, and yields what ``show`` makes of each of its updates, and last
    what becomes of the button that began it. An error in the fields is shown as that of a run."""
    try:
        ticket = desk.submit(visitor, make())
    except DDIMError as error:
        yield *show(Update("failed", error=str(error))), gr.update(interactive=True)
        return
    try:
        for update in ticket.updates():
            yield *show(update), gr.update(interactive=update.is_last)
    finally:  # also where the visitor has gone
        ticket.close()
