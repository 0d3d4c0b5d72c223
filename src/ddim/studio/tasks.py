"""What the desk does for each tab: a request, run by the engine of the commands, and what the page
shows of it. Each function gives the work of a :class:`~ddim.studio.desk.Ticket`."""

import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ddim.doctor.plot import plot_start
from ddim.doctor.report import Diagnosis
from ddim.doctor.text import fix_rows, fix_text, report_text
from ddim.errors import DDIMError
from ddim.models.images import from_pil, label_rows, open_picture, save_picture, to_pil
from ddim.runs.diagnose import examine
from ddim.runs.edit import EditJob
from ddim.runs.engine import Event, execute
from ddim.runs.interpolate import InterpolateJob
from ddim.runs.requests import DoctorRequest, EditRequest, InterpolateRequest, SampleRequest
from ddim.runs.sample import SampleJob
from ddim.runs.show import ShowJob, ShowRequest, show_request
from ddim.studio.desk import Ticket
from ddim.studio.fields import Cells, command_line
from ddim.studio.opening import made_from
from ddim.studio.python_lines import python_lines

__all__ = ["Drawn", "Edited", "Examined", "Sheet", "Walked"]
__all__ += ["compare", "draw", "edit", "fixes", "look_at", "walk_between"]

Work = Callable[[Ticket], Any]


@dataclass(frozen=True)
class Drawn:
    """The pictures of the Draw tab, the lines that make them again, and the file to keep."""

    command: str
    python: str
    labels: tuple[str, ...]
    pictures: tuple[Image.Image, ...] = ()
    archive: Path | None = None


def draw(request: SampleRequest) -> Work:
    """The pictures of a request of ``ddim sample``; its words and lines are reported at once."""

    def work(ticket: Ticket) -> Drawn:
        asked = replace(request, out=str(ticket.folder / "run"))
        job = SampleJob(asked, ticket.control())
        labels = tuple(f"seed {request.seed + n}" for n in range(request.count))
        made = made_from(request.model)
        lines = python_lines(job, model=request.model if made is None else made.folder)
        if made is not None:
            lines = f"# once, in a shell: {made.command}\n{lines}"
        drawn = Drawn(_command("sample", request), lines, labels)
        ticket.report(drawn)
        outcome = execute(job)
        if not outcome.finished:
            return drawn
        files = [job.folder / row["file"] for row in outcome.record.results]
        pictures = tuple(open_picture(path) for path in files)
        ticket.update(previews=pictures)
        archive = _archive(ticket.folder / "pictures.zip", job.folder)
        return replace(drawn, pictures=pictures, archive=archive)

    return work


@dataclass(frozen=True)
class Sheet:
    """A labelled sheet, as far as it is drawn."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], Image.Image | str] = field(default_factory=dict)
    archive: Path | None = None

    @property
    def told(self) -> str:
        """How much of it is there."""
        return f"{len(self.cells)} of {len(self.rows) * len(self.columns)} pictures"


def compare(cells: Cells) -> Work:
    """A sheet whose cells are requests of ``ddim sample``; it fills while they are drawn."""

    def work(ticket: Ticket) -> Sheet:
        sheet = Sheet(cells.title, cells.rows, cells.columns)
        ticket.report(sheet)
        folders: list[Path] = []
        for place, request in cells.requests.items():
            folder = ticket.folder / f"sheet/{_name(place[0])}-{_name(place[1])}"
            found: Image.Image | str
            try:
                job = SampleJob(replace(request, out=str(folder)), ticket.control())
                outcome = execute(job)
                if not outcome.finished:
                    return sheet
                found = open_picture(folder / outcome.record.results[0]["file"])
                folders.append(folder)
            except DDIMError as error:
                found = str(error)
            sheet = replace(sheet, cells={**sheet.cells, place: found})
            ticket.report(sheet)
        return _keep(ticket, sheet)

    return work


def fixes(request: DoctorRequest, title: str) -> Work:
    """A sheet of the same seeds as a model is configured, and with each fix of the doctor."""

    def work(ticket: Ticket) -> Sheet:
        asked = replace(request, show=str(ticket.folder / "doctor.png"))
        examination = examine(asked)
        shown = show_request(asked, examination.source, examination.diagnosis)
        return _keep(ticket, _show(ticket, shown, title, ticket.report))

    return work


def _show(
    ticket: Ticket, request: ShowRequest, title: str, report: Callable[[Sheet], None]
) -> Sheet:
    """Fills a sheet with the rows of ``ddim doctor --show``, and reports it as it fills."""
    out = ticket.folder / "sheet" / "doctor.png"
    out.parent.mkdir()
    columns = tuple(f"seed {request.seed + n}" for n in range(request.count))
    sheet, reported = Sheet(title, tuple(request.rows), columns), -1
    control = ticket.control()
    job = ShowJob(replace(request, out=str(out)), control)
    emit = control.emit

    def listen(event: Event) -> None:
        nonlocal reported
        emit(event)
        if len(job.drawn) != reported:
            reported = len(job.drawn)
            report(_filled(sheet, job))

    control.emit = listen
    execute(job)
    report(sheet := _filled(sheet, job))
    return sheet


def _filled(sheet: Sheet, job: ShowJob) -> Sheet:
    cells: dict[tuple[str, str], Image.Image | str] = {}
    for row, (images, refusal) in job.drawn.items():
        pictures: Iterable[Image.Image | str]
        pictures = [refusal.removeprefix(" - refused: ")] * len(sheet.columns)
        if images is not None:
            pictures = to_pil(images)
        cells |= {(row, c): p for c, p in zip(sheet.columns, pictures, strict=True)}
    return replace(sheet, cells=cells)


def _keep(ticket: Ticket, sheet: Sheet) -> Sheet:
    """The sheet with its file: the pictures with their records, and one labelled picture."""
    drawn = [p for p in sheet.cells.values() if not isinstance(p, str)]
    if not drawn:
        return sheet
    folder = ticket.folder / "sheet"
    save_picture(_labelled(sheet, drawn[0].size), folder / "sheet.png")
    return replace(sheet, archive=_archive(ticket.folder / "sheet.zip", folder))


def _labelled(sheet: Sheet, size: tuple[int, int]) -> Any:
    def pixels(cell: Image.Image | str | None) -> Image.Image:
        return (
            cell.convert("RGB") if isinstance(cell, Image.Image) else Image.new("RGB", size, "#888")
        )

    images = from_pil(pixels(sheet.cells.get((r, c))) for r in sheet.rows for c in sheet.columns)
    scale = max(1, 96 // size[0])
    return label_rows(images, list(sheet.rows), columns=list(sheet.columns), scale=scale)


@dataclass(frozen=True)
class Edited:
    """A picture before, out of its code, and under the other prompt; and the file to keep."""

    command: str
    labels: tuple[str, ...]
    pictures: tuple[Image.Image, ...] = ()
    archive: Path | None = None


def edit(request: EditRequest) -> Work:
    """The pictures of a request of ``ddim edit``."""

    def work(ticket: Ticket) -> Edited:
        name = request.image and Path(request.image).name
        labels = ("before", "out of its code again", request.to)
        edited = Edited(_command("edit", replace(request, image=name)), labels)
        ticket.report(edited)
        job = EditJob(replace(request, out=str(ticket.folder / "run")), ticket.control())
        if not execute(job).finished:
            return edited
        pictures = tuple(open_picture(job.folder / file) for file in job.items)
        archive = _archive(ticket.folder / "edit.zip", job.folder)
        return replace(edited, pictures=pictures, archive=archive)

    return work


@dataclass(frozen=True)
class Walked:
    """The pictures between two ends, or of a square row by row; and the file to keep."""

    command: str
    columns: int
    is_grid: bool
    pictures: tuple[Image.Image, ...] = ()
    archive: Path | None = None


def walk_between(request: InterpolateRequest) -> Work:
    """The pictures of a request of ``ddim interpolate``."""

    def work(ticket: Ticket) -> Walked:
        names = request.images and tuple(Path(path).name for path in request.images)
        walked = Walked(
            _command("interpolate", replace(request, images=names)), request.count, request.grid
        )
        ticket.report(walked)
        job = InterpolateJob(replace(request, out=str(ticket.folder / "run")), ticket.control())
        if not execute(job).finished:
            return walked
        archive = _archive(ticket.folder / "path.zip", job.folder)
        return replace(walked, pictures=tuple(to_pil(job.pictures)), archive=archive)

    return work


@dataclass(frozen=True)
class Examined:
    """What the doctor says: the findings with the verdict, the curve, the fix, and the same seed
    before and after it."""

    diagnosis: Diagnosis
    report: str
    fix: str
    command: str
    curve: Image.Image | None = None
    sheet: Sheet | None = None


def look_at(request: DoctorRequest) -> Work:
    """What ``ddim doctor`` finds; if the request shows images, also those before and after."""

    def work(ticket: Ticket) -> Examined:
        asked, title = request, "The same seed before the fix and after it"
        if request.show is not None:
            asked = replace(request, show=str(ticket.folder / "doctor.png"))
        examination = examine(asked)
        diagnosis, source = examination.diagnosis, Path(request.source)
        name = source.name if source.is_file() else request.source
        report = report_text(name, examination.source.declares, diagnosis, examination.probe)
        fix = fix_text(diagnosis, _CORRECTED)
        found = Examined(
            diagnosis, report, fix, command_line("doctor", replace(request, source=name))
        )
        if diagnosis.summary:
            plot_start(diagnosis, ticket.folder / "curve.png")
            found = replace(found, curve=open_picture(ticket.folder / "curve.png"))
        ticket.report(found)
        rows = list(fix_rows(diagnosis).values())
        if request.show is None or len(rows) == 1 or not diagnosis.summary:
            return found
        shown = show_request(asked, examination.source, diagnosis)
        shown = replace(shown, rows={"before": rows[0], "after": rows[-1]})
        sheet = _show(
            ticket, shown, title, lambda sheet: ticket.report(replace(found, sheet=sheet))
        )
        return replace(found, sheet=sheet)

    return work


def _command(name: str, request: Any) -> str:
    """The command of a request; before it, of a checkpoint in one file, the one that makes a
    folder of it, since commands take folders."""
    if (made := made_from(request.model)) is None:
        return command_line(name, request)
    return f"{made.command}\n{command_line(name, replace(request, model=made.folder))}"


_CORRECTED = "scheduler_config.json"


def _name(label: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "-" for c in label)[:60]


def _archive(path: Path, folder: Path) -> Path:
    """A folder's pictures and records in one file."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                archive.write(file, file.relative_to(folder))
    return path
