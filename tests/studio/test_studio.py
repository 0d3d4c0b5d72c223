"""The studio without a browser: its fields ask for what the commands do, its lines make the same
pictures, and nobody reads or sees what is not theirs."""

import http.client
import json
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from tests.cli.test_convert import song_checkpoint
from tests.studio.conftest import ZOO, start

from ddim.cli import _command, _parse, main
from ddim.errors import DDIMError
from ddim.runs.requests import SampleRequest
from ddim.studio.desk import MOST_OF_ONE, Desk
from ddim.studio.fields import (
    Subject,
    check_picture,
    command_line,
    doctor_request,
    edit_request,
    interpolate_request,
    sample_request,
    solver_cells,
    step_cells,
)
from ddim.studio.guard import LARGEST_UPLOAD
from ddim.studio.markup import pictures_html, sheet_html
from ddim.studio.opening import made_from, open_model
from ddim.studio.request import StudioRequest
from ddim.studio.server import check_address
from ddim.studio.shelf import Shelf
from ddim.studio.tasks import compare, draw, edit, fixes, look_at, walk_between

PIXELS = Subject("fashion-mnist", device="cpu")
WORDS = Subject("fashion-text", "it's a -red- sneaker", guidance=3.0, device="cpu")


@pytest.fixture
def desk():
    desk = Desk()
    yield desk
    assert desk.close(patience=20)
    assert not desk.folder.exists()


def done(ticket):
    """The last update of a run."""
    return list(ticket.updates(every=0))[-1]


def parsed(line):
    """The request that a command line makes, and the command."""
    _, name, *words = shlex.split(line)
    return name, _parse(_command(name), name, words)


REQUESTS = [
    ("sample", sample_request(PIXELS, seed=3)),
    (
        "sample",
        sample_request(PIXELS, seed=7, count=2, steps=9, eta=0.3, order=1, spacing="leading"),
    ),
    ("sample", sample_request(WORDS, seed=0, steps=4, order=2)),
    ("sample", sample_request(Subject("m", class_="3"), seed=0)),
    ("interpolate", interpolate_request(PIXELS, seeds=[3, 17, 1, 2], count=5, steps=7)),
    ("interpolate", interpolate_request(PIXELS, seeds=[3, 17, 1, 2], count=3, grid=True)),
    ("interpolate", interpolate_request(PIXELS, seeds=[], images=["a b.png", "-c.png"])),
    ("edit", edit_request(WORDS, to="a blue one", seed=2, image=None, steps=6)),
    ("doctor", doctor_request("fashion-text", steps=20, **WORDS.shown(seed=1, count=1))),
]


@pytest.mark.parametrize(("name", "request_"), REQUESTS)
def test_the_command_that_is_shown_asks_for_the_same(name, request_):
    assert parsed(command_line(name, request_)) == (name, request_)


def test_the_python_lines_make_the_same_pictures_bit_for_bit(desk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for subject in (PIXELS, WORDS):
        fields = {"seed": 3, "count": 2, "steps": 4, "eta": 0.5, "spacing": "trailing"}
        update = done(ticket := desk.submit("a/draw", draw(sample_request(subject, **fields))))
        assert update.state == "finished", update.error
        known = {}
        exec(update.result.python, known)  # noqa: S102
        pairs = zip(known["images"], update.result.pictures, strict=True)
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
        first = np.asarray(Image.open("picture.png"))
        assert np.array_equal(first, np.asarray(update.result.pictures[0]))
        with zipfile.ZipFile(update.result.archive) as archive:
            kept = json.loads(archive.read("run.json"))
            assert "000003.png" in archive.namelist()
        assert (kept["protocol"]["steps"], kept["protocol"]["eta"]) == (4, 0.5)
        ticket.close()
        assert not ticket.folder.exists()


def test_a_picture_grows_step_by_step_and_stops_between_two(desk):
    ticket = desk.submit("a/draw", draw(sample_request(PIXELS, seed=1, steps=200, order=1)))
    seen = []
    for update in ticket.updates(every=0):
        seen.append(update)
        if update.done >= 3:
            ticket.stop()
    assert seen[-1].state == "stopped"
    assert 3 <= seen[-1].done < 200
    assert seen[-1].total == 200
    assert any(update.left for update in seen)
    assert seen[-1].previews[0].size == (28, 28)
    assert parsed(seen[-1].part.command)[1].steps == 200


def test_visitors_see_their_own_runs_and_one_model_is_in_memory(desk):
    asked = {"a": (PIXELS, 1), "b": (WORDS, 2), "c": (PIXELS, 3)}
    tickets = {
        visitor: desk.submit(f"{visitor}/draw", draw(sample_request(subject, seed=seed, steps=2)))
        for visitor, (subject, seed) in asked.items()
    }
    results = {visitor: done(ticket).result for visitor, ticket in tickets.items()}
    for visitor, (_, seed) in asked.items():
        assert results[visitor].labels == (f"seed {seed}",)
        assert parsed(results[visitor].command)[1].seed == seed
    assert results["b"].pictures[0].mode == "RGB"
    assert results["a"].pictures[0].tobytes() != results["c"].pictures[0].tobytes()
    assert type(desk.pipe).__name__ == "UnconditionalPipeline"
    again = done(desk.submit("d/draw", draw(sample_request(PIXELS, seed=1, steps=2)))).result
    assert again.pictures[0].tobytes() == results["a"].pictures[0].tobytes()


def test_stopping_a_visitor_leaves_the_others_alone_and_a_visitor_has_few_runs(desk):
    long = sample_request(PIXELS, seed=1, steps=300)
    mine = [desk.submit("a/draw", draw(long)) for _ in range(MOST_OF_ONE)]
    other = desk.submit("ab/draw", draw(sample_request(PIXELS, seed=1, steps=2)))
    with pytest.raises(DDIMError, match="you have 2 runs here already"):
        desk.submit("a/draw", draw(long))
    assert desk.before(other) == 2
    desk.stop("a")
    assert [done(ticket).state for ticket in (*mine, other)] == ["stopped", "stopped", "finished"]


def test_the_pipeline_in_memory_has_its_own_scheduler_again_after_the_doctor(desk, models):
    subject = Subject(str(models / "washed-out"), "a red sneaker", guidance=3.0, device="cpu")
    asked = sample_request(subject, seed=1, steps=3)
    first = done(desk.submit("a/draw", draw(asked))).result.pictures[0].tobytes()
    shown = subject.shown(seed=1, count=1)
    update = done(
        desk.submit("a/compare", fixes(doctor_request(subject.model, steps=3, **shown), "t"))
    )
    assert update.state == "finished", update.error
    sheet = update.result
    assert len(sheet.cells) == len(sheet.rows) > 2
    assert sheet.cells[sheet.rows[0], "seed 1"].tobytes() == first
    assert sheet.cells[sheet.rows[-1], "seed 1"].tobytes() != first
    assert done(desk.submit("a/draw", draw(asked))).result.pictures[0].tobytes() == first


def test_a_sheet_fills_and_a_refused_cell_says_why(desk):
    cells = step_cells(PIXELS, seed=4, steps="2, 3", etas="0, 1")
    parts = list(desk.submit("a/compare", compare(cells)).updates(every=0))
    counts = [len(update.part.cells) for update in parts if update.part]
    assert counts[-1] == 4
    assert counts == sorted(counts)
    alone = done(desk.submit("a/draw", draw(sample_request(PIXELS, seed=4, steps=3, eta=1.0))))
    cell = parts[-1].result.cells["eta 1", "3 steps"]
    assert cell.tobytes() == alone.result.pictures[0].tobytes()
    with zipfile.ZipFile(parts[-1].result.archive) as archive:
        assert sum(name.endswith("run.json") for name in archive.namelist()) == 4
        assert "sheet.png" in archive.namelist()
    refused = done(desk.submit("a/compare", compare(solver_cells(WORDS, seed=0, steps="1")))).result
    told = [cell for cell in refused.cells.values() if isinstance(cell, str)]
    assert all(text.endswith(".") for text in told)


@pytest.mark.slow
def test_a_path_a_square_and_an_edit(desk, tmp_path):
    path = done(
        desk.submit(
            "a/latent", walk_between(interpolate_request(PIXELS, seeds=[3, 17], count=3, steps=2))
        )
    ).result
    ends = [
        done(desk.submit("a/draw", draw(sample_request(PIXELS, seed=s, steps=2, order=1)))).result
        for s in (3, 17)
    ]
    for place, end in ((0, ends[0]), (-1, ends[1])):
        near = np.asarray(path.pictures[place], int) - np.asarray(end.pictures[0], int)
        assert abs(near).max() <= 1
    square = done(
        desk.submit(
            "a/latent",
            walk_between(
                interpolate_request(PIXELS, seeds=[3, 17, 5, 8], count=2, steps=2, grid=True)
            ),
        )
    ).result
    assert (len(square.pictures), square.is_grid) == (4, True)
    red = Subject("fashion-text", "a red sneaker on a black background", "", 3.0, "cpu")
    asked = edit_request(
        red, to="a blue sneaker on a black background", seed=3, image=None, steps=8
    )
    edited = done(desk.submit("a/latent", edit(asked))).result
    before, back, after = (np.asarray(p, float).mean((0, 1)) for p in edited.pictures)
    assert before.argmax() == 0
    assert after.argmax() == 2
    assert abs(before - back).max() < 8
    for name, picture in zip("ab", edited.pictures[::2], strict=True):
        picture.convert("L").save(tmp_path / f"{name}.png")
    names = [str(tmp_path / f"{name}.png") for name in "ab"]
    between = done(
        desk.submit(
            "a/latent",
            walk_between(interpolate_request(PIXELS, seeds=[], images=names, count=3, steps=2)),
        )
    ).result
    assert "--images a.png,b.png" in between.command
    assert len(between.pictures) == 3


def test_the_doctor_tells_draws_and_fixes(desk, models):
    source = str(models / "washed-out")
    shown = Subject(source, "a red sneaker", guidance=3.0, device="cpu").shown(seed=1, count=1)
    update = done(desk.submit("a/doctor", look_at(doctor_request(source, steps=3, **shown))))
    assert update.state == "finished", update.error
    found = update.result
    assert found.diagnosis.verdict.endswith(".")
    assert "timestep_spacing='trailing'" in found.diagnosis.python
    assert found.curve.width > 500
    assert found.sheet.rows == ("before", "after")
    assert len({cell.tobytes() for cell in found.sheet.cells.values()}) == 2
    config = models / "washed-out" / "scheduler" / "scheduler_config.json"
    alone = done(desk.submit("a/doctor", look_at(doctor_request(str(config), steps=3)))).result
    assert alone.sheet is None
    assert alone.command == "ddim doctor scheduler_config.json --steps 3"


WRONG = [
    ({"seed": -1}, "the seed must be from 0 to 4294967295; got -1."),
    ({"seed": None}, "the seed must be a whole number; got 'None'."),
    ({"seed": 0, "count": 17}, "the number of pictures must be from 1 to 16; got 17."),
    ({"seed": 0, "steps": 10**9}, "the number of steps must be from 1 to 1000"),
    ({"seed": 0, "eta": float("nan")}, "--eta must be a finite number; got nan."),
    ({"seed": 0, "order": 3}, "the order must be from 1 to 2; got 3."),
    ({"seed": 0, "spacing": "mars"}, "there is no spacing 'mars'."),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_wrong_field_is_a_sentence(fields, message):
    with pytest.raises(DDIMError) as error:
        sample_request(PIXELS, **fields)
    assert str(error.value).startswith(message)


def test_what_a_visitor_gives_is_bounded_and_names_no_file(tmp_path):
    for words in ("/etc/hostname.txt", "x.txt "):
        with pytest.raises(DDIMError, match="must not end in .txt"):
            sample_request(Subject("fashion-text", words), seed=0)
    with pytest.raises(DDIMError, match="at most 2000 characters"):
        sample_request(Subject("fashion-text", "x" * 2001), seed=0)
    with pytest.raises(DDIMError, match="at most 48 pictures; these are 49"):
        step_cells(PIXELS, seed=0, steps="1,2,3,4,5,6,7", etas="0,.1,.2,.3,.4,.5,.6")
    with pytest.raises(DDIMError, match="separated by commas; got 'a, b'"):
        step_cells(PIXELS, seed=0, steps="a, b", etas="0")
    with pytest.raises(DDIMError, match="1 of 2 pictures are given"):
        interpolate_request(PIXELS, seeds=[1, 2], images=["a.png", None])
    Image.new("1", (5000, 2)).save(tmp_path / "wide.png")
    with pytest.raises(DDIMError, match="at most 4096 pixels a side here; got 5000x2"):
        check_picture(str(tmp_path / "wide.png"))
    (tmp_path / "no.png").write_bytes(b"%!PS-Adobe")
    with pytest.raises(DDIMError, match="that file is no picture"):
        check_picture(str(tmp_path / "no.png"))


def test_the_page_opens_models_of_its_list_alone(models, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "out").symlink_to(models / "washed-out")
    shelf = Shelf("fashion-mnist", tmp_path / "all")
    assert set(shelf.names()) == {"fashion-mnist", "fashion-text"}
    (tmp_path / "all" / "deep").symlink_to(tmp_path / "all")  # no walk without end
    assert len(shelf.names()) == 2
    inside = Shelf("fashion-mnist", models)
    assert inside.find(str(models / "washed-out")) == str(models / "washed-out")
    for name in (
        "/etc",
        "OWNER/NAME",
        f"{models}/../x",
        str(ZOO / "fashion-text"),
        None,
        "x" * 999,
    ):
        with pytest.raises(DDIMError, match="the page opens models that it lists"):
            inside.find(name)


def test_a_checkpoint_in_one_file_is_opened(tmp_path, desk):
    wrong = tmp_path / "weights.pth"
    wrong.write_bytes(b"no weights")
    shelf = Shelf("fashion-mnist", tmp_path)
    assert str(wrong) in shelf.names()
    with pytest.raises(DDIMError, match=r"weights\.pth"):
        open_model(str(wrong), shelf, desk.folder)


def test_the_lines_of_a_checkpoint_in_one_file_make_its_folder_first(tmp_path, desk, monkeypatch):
    """The folder that the studio made for itself is gone with it, and is not named."""
    song_checkpoint(tmp_path / "our ema.pth", attention="Attn")
    name = str(tmp_path / "our ema.pth")
    opened = open_model(name, Shelf(name), desk.folder)
    assert made_from("fashion-mnist") is None
    request = SampleRequest(model=opened.folder, count=2, steps=2)
    drawn = done(desk.submit("a/draw", draw(request))).result
    assert str(desk.folder) not in drawn.command + drawn.python
    monkeypatch.chdir(tmp_path)
    first, then = drawn.command.splitlines()
    for line in (first, f"{then} --out drawn"):
        assert main(shlex.split(line)[1:]) == 0
    assert drawn.python.startswith(f"# once, in a shell: {first}\n")
    exec(compile(drawn.python, "the lines", "exec"), {})
    shown = [np.asarray(picture) for picture in drawn.pictures]
    with Image.open("picture.png") as picture:
        assert (np.asarray(picture) == shown[0]).all()
    with Image.open("drawn/000001.png") as picture:
        assert (np.asarray(picture) == shown[1]).all()


def test_words_of_a_visitor_are_no_markup():
    evil = "<script>alert(1)</script>"
    picture = Image.new("L", (8, 8))
    html = pictures_html([picture], [evil]) + sheet_html(
        [evil], [evil], {(evil, evil): evil}, title=evil
    )
    assert "<script" not in html
    assert 'alt="&lt;script' in html


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "example.org"])
def test_another_address_needs_a_password(host):
    with pytest.raises(DDIMError, match=f"--host {host} lets other machines use the studio; give"):
        check_address(StudioRequest(host=host))
    with pytest.raises(DDIMError, match="at least 8 characters"):
        check_address(StudioRequest(host=host, password="short"))
    check_address(StudioRequest(host=host, password="long enough"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.0.1"])
def test_the_loopback_needs_none(host):
    check_address(StudioRequest(host=host))


def test_a_refused_studio_exits_with_2(capsys):
    assert main(["studio", "--host", "0.0.0.0"]) == 2
    assert main(["studio", "no-such-model"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("ddim: --host 0.0.0.0 lets other machines")
    assert said[1].startswith("ddim: 'no-such-model' is neither")


@pytest.mark.slow
def test_without_gradio_it_says_how_to_install_it():
    code = "import sys; sys.modules['gradio'] = None; from ddim.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "studio", "--no-browser"]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1] == (
        "ddim: the studio needs gradio, which is not installed; run: pip install 'ddim[studio]'."
    )


def get(url, *, data=None, **headers):
    """The status of an answer, and its text."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_no_file_of_the_machine_is_read(studio, tmp_path):
    secret = tmp_path / "scheduler_config.json"
    secret.write_text((ZOO / "fashion-mnist" / "scheduler" / "scheduler_config.json").read_text())
    for path in (secret, "/etc/hostname", f"{tmp_path}/../{tmp_path.name}/{secret.name}"):
        for route in ("gradio_api/file=", "gradio_api/file/", "file="):
            assert get(f"{studio}{route}{path}")[0] in (400, 403, 404), (route, path)
    config = json.loads(get(f"{studio}config")[1])
    ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
    number = next(d["id"] for d in config["dependencies"] if ids["doctor-file"] in d["inputs"])
    for path in (str(secret), "http://127.0.0.1:1/x.json", f"{tmp_path}/a\0b"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"fn_index": number, "session_hash": "x", "data": ["m", "", "", 3, file, 20, 0]}
        for route in ("queue/join", "queue/join/", "run/predict"):
            status, _ = get(
                f"{studio}gradio_api/{route}",
                data=json.dumps(body).encode(),
                Content_Type="application/json",
            )
            assert status == 403, (route, path)


def test_hosts_bodies_and_interfaces_that_it_has_not(studio):
    assert get(f"{studio}config", Host="evil.example")[0] == 421
    connection = http.client.HTTPConnection(urlsplit(studio).netloc, timeout=30)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("Content-Length", str(LARGEST_UPLOAD + 2**17))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert json.loads(get(f"{studio}gradio_api/info")[1])["named_endpoints"] == {}
    for path in ("docs", "openapi.json", "monitoring"):
        assert get(f"{studio}{path}")[0] in (403, 404), path


def test_a_password_is_asked_for_and_ctrl_c_ends_it_at_once(tmp_path):
    process, address = start("--host", "0.0.0.0", "--password", "open sesame", cwd=tmp_path)
    assert get(f"{address}config")[0] == 401
    form = b"username=me&password="
    assert get(f"{address}login", data=form + b"wrong+one")[0] == 400
    assert get(f"{address}login", data=form + b"open+sesame")[0] == 200
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert time.monotonic() - began < 5
    assert said.endswith("The studio is closed.\n")
    assert not list(tmp_path.iterdir())
    port = int(address.rsplit(":", 1)[1].strip("/"))
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2)
