"""The engine: what is missing is made, what happens is told, and a run stops when asked."""

import json
import subprocess
import sys
import threading

import filelock
import pytest

from ddim.errors import DDIMError, OutputError
from ddim.options import Range, check_request, option_names
from ddim.runs.engine import Control, FileJob, Job, Made, Stopped, execute
from ddim.runs.record import claim, read_run
from ddim.runs.requests import InterpolateRequest, SampleRequest, TableRequest
from ddim.runs.rules import Options
from ddim.runs.sample import SampleJob


class Letters(Job):
    """Writes a file for each letter, of three steps each."""

    def __init__(self, folder, letters="abc", *, control=None, protocol=None, overwrite=False):
        super().__init__(SampleRequest(overwrite=overwrite), control or Control())
        self.folder, self.items = folder, list(letters)
        self.files = [f"{letter}.txt" for letter in letters]
        self.protocol = {"command": "sample", **(protocol or {})}
        self.execution = {}

    def there(self, record):
        return {path.stem for path in self.folder.glob("*.txt")}

    def is_empty(self, record):
        return not self.there(record)

    def results(self, rows):
        return [{"letter": letter} for letter in sorted(self.there(None))]

    def make(self, missing):
        for letter in missing:
            for _ in range(3):
                self.control.step()
            (self.folder / f"{letter}.txt").write_text(letter)
            yield Made(letter, seconds=1.0, text=f"letter {letter}")


def test_what_is_missing_is_made_and_told(tmp_path):
    (tmp_path / "out").mkdir()
    assert execute(Letters(tmp_path / "out", "ab")).made == 2
    events = []
    outcome = execute(Letters(tmp_path / "out", "bcd", control=Control(emit=events.append)))
    assert (outcome.made, outcome.there, outcome.beside, outcome.finished) == (2, 1, 1, True)
    assert [e.state for e in events] == [
        "started",
        *["step", "step", "step", "item"] * 2,
        "finished",
    ]
    assert [(e.item, e.text, e.done, e.total) for e in events if e.state == "item"] == [
        ("c", "letter c", 2, 3),
        ("d", "letter d", 3, 3),
    ]
    assert all(e.rate > 0 for e in events if e.state == "item")
    assert [e.done for e in events if e.state == "step"] == [1, 2, 3, 4, 5, 6]
    assert [row["letter"] for row in read_run(tmp_path / "out").results] == list("abcd")
    assert read_run(tmp_path / "out").seconds == 2


def test_a_run_stops_between_two_steps_and_the_next_continues(tmp_path):
    steps = []
    control = Control(
        emit=lambda event: steps.append(event) if event.state == "step" else None,
        stopping=lambda: len(steps) == 5,
    )
    outcome = execute(Letters(tmp_path, control=control))
    assert (outcome.made, outcome.finished, len(steps)) == (1, False, 5)
    assert [row["letter"] for row in read_run(tmp_path).results] == ["a"]
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "a.txt"}
    again = execute(Letters(tmp_path))
    assert (again.made, again.there, again.finished) == (2, 1, True)


def test_one_request_is_cancelled_while_another_runs_in_the_same_process(tiny, tmp_path):
    """Each has its own control: stopping one leaves the images of the other as they are alone."""
    request = SampleRequest(model=str(tiny), steps=6, count=4, batch_size=1)
    begun, cancelled = threading.Event(), threading.Event()

    def told(event):
        if event.state == "step":
            begun.set()
            cancelled.wait(60)  # so that both surely run at the same time

    outcomes = {}

    def run(name, control):
        given = SampleRequest(**{**vars(request), "out": str(tmp_path / name)})
        outcomes[name] = execute(SampleJob(given, control))

    stopped = threading.Thread(
        target=run, args=("stopped", Control(emit=told, stopping=cancelled.is_set))
    )
    stopped.start()
    assert begun.wait(60)
    other = threading.Thread(target=run, args=("other", Control()))
    other.start()
    other.join(120)
    cancelled.set()
    stopped.join(60)
    assert not outcomes["stopped"].finished
    assert outcomes["stopped"].made == 0
    assert outcomes["other"].finished
    run("alone", Control())
    for seed in range(4):
        name = f"{seed:06d}.png"
        assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "stopped").iterdir()) == ["run.json"]
    run("stopped", Control())  # and the same request continues
    assert outcomes["stopped"].made == 4


def test_items_stay_when_a_job_fails(tmp_path):
    class Failing(Letters):
        def make(self, missing):
            yield from super().make(missing[:1])
            raise DDIMError("it broke.")

    with pytest.raises(DDIMError, match="it broke"):
        execute(Failing(tmp_path))
    assert execute(Letters(tmp_path)).there == 1


def test_a_refusal_before_anything_is_made_leaves_nothing(tmp_path):
    class Refusing(Letters):
        def make(self, missing):
            raise DDIMError("it cannot be.")
            yield

    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "new", tmp_path / "there"):
        with pytest.raises(DDIMError, match="it cannot be"):
            execute(Refusing(folder))
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]
    execute(Letters(tmp_path / "there", "a"))
    with pytest.raises(DDIMError, match="it cannot be"):
        execute(Refusing(tmp_path / "there", "ab"))
    assert {p.name for p in (tmp_path / "there").iterdir()} == {"a.txt", "run.json"}


def test_a_folder_belongs_to_one_protocol_and_one_run(tmp_path):
    execute(Letters(tmp_path, protocol={"eta": 0.0}))
    with pytest.raises(OutputError, match=r"another protocol: eta is 0\.0 there and 1\.0 here"):
        execute(Letters(tmp_path, protocol={"eta": 1.0}))
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(OutputError, match="another run"):
        execute(Letters(tmp_path, protocol={"eta": 0.0}))


def test_what_is_not_ours_is_not_mixed_with_and_debris_is_removed(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds files such as mine\.txt, and no run\.json"):
        execute(Letters(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    out = tmp_path / "out"
    execute(Letters(out, "a"))
    (out / ".b.txt.123.partial").write_text("half")
    (out / ".c.partial").mkdir()
    execute(Letters(out, "ab"))
    assert {p.name for p in out.iterdir()} == {"run.json", "a.txt", "b.txt"}


def test_a_run_that_is_killed_while_it_adds_files_knows_them_again(tmp_path):
    execute(Letters(tmp_path, "a"))

    class Killed(Letters):
        def make(self, missing):
            yield from super().make(missing[:1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(Killed(tmp_path, "abc"))
    assert read_run(tmp_path).files == ["a.txt", "b.txt", "c.txt"]
    outcome = execute(Letters(tmp_path, "abc"))
    assert (outcome.made, outcome.there) == (1, 2)


def test_overwriting_leaves_alone_what_a_record_names_outside_of_its_folder(tmp_path):
    out, mine = tmp_path / "out", tmp_path / "mine.txt"
    mine.write_text("mine")
    execute(Letters(out, "a", protocol={"eta": 0.0}))
    (out / "folder").mkdir()
    (out / "link").symlink_to(tmp_path)
    content = json.loads((out / "run.json").read_text())
    content["files"] += [str(mine), "../mine.txt", "link/mine.txt", "folder", "..", "", "none/x"]
    (out / "run.json").write_text(json.dumps(content))
    assert execute(Letters(out, "b", protocol={"eta": 1.0}, overwrite=True)).made == 1
    assert mine.read_text() == "mine"
    assert {p.name for p in out.iterdir()} == {"run.json", "b.txt", "folder", "link"}
    assert read_run(out).files == ["b.txt"]


def test_a_record_of_an_older_version_is_gone_on_with_and_not_overwritten(tmp_path):
    execute(Letters(tmp_path, "ab"))
    content = json.loads((tmp_path / "run.json").read_text())
    del content["files"]
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert execute(Letters(tmp_path, "abc")).there == 2
    assert read_run(tmp_path).files is None
    with pytest.raises(OutputError, match=r"a\.txt would be written by this run"):
        execute(Letters(tmp_path, "abc", overwrite=True))


def test_a_killed_process_lets_go_of_its_folder(tmp_path):
    code = (
        "import sys, os, pathlib\nfrom ddim.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    with claim(tmp_path, {"command": "sample"}, lambda record: True) as before:
        assert before is None


def test_a_record_without_results_binds_no_run_of_the_same_command(tmp_path):
    class Interrupted(Letters):
        def make(self, missing):
            raise KeyboardInterrupt
            yield

    with pytest.raises(KeyboardInterrupt):
        execute(Interrupted(tmp_path, protocol={"eta": 0.0}))
    assert json.loads((tmp_path / "run.json").read_text())["results"] == []
    assert execute(Letters(tmp_path, protocol={"eta": 1.0})).made == 3


def test_a_file_is_never_overwritten_and_has_one_writer(tmp_path):
    class Note(FileJob):
        protocol, execution = {"command": "encode"}, {}

        def make(self, missing):
            yield Made(missing[0])

        def finish(self, rows):
            self.folder.write_text("note")

    out = tmp_path / "deep" / "note.txt"
    request = SampleRequest(out=str(out))
    execute(Note(request, Control()))
    assert [p.name for p in out.parent.iterdir()] == ["note.txt"]
    with pytest.raises(OutputError, match=r"note\.txt is there already"):
        Note(request, Control())
    job = Note(SampleRequest(out=str(tmp_path / "other.txt")), Control())
    job.folder.write_text("written meanwhile")
    with pytest.raises(OutputError, match="is there already"):
        execute(job)


def test_stopping_is_no_error_of_the_job():
    assert not issubclass(Stopped, DDIMError)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SampleRequest(count=0), "--count must be at least 1; got 0."),
        (TableRequest(reference="x", count=1_000_001), "--count must be at most 1000000; got"),
        (SampleRequest(batch_size=-3), "--batch-size must be at least 1; got -3."),
        (
            TableRequest(reference="x", timing_rounds=-1),
            "--timing-rounds must be from 0 to 1000; got -1.",
        ),
        (SampleRequest(strength=0.5), "--strength acts only with --image; give both, or leave"),
        (SampleRequest(data="x"), "--data acts only with --variance analytic; give both"),
        (InterpolateRequest(resize=True), "--resize acts only with --images; give both"),
        (InterpolateRequest(count=1), "--count must be from 2 to 1000; got 1."),
    ],
)
def test_ranges_and_needs_are_declared_with_the_option(request_, message):
    with pytest.raises(DDIMError) as error:
        check_request(request_)
    assert message in str(error.value)


def test_nan_is_in_no_range():
    assert float("nan") not in Range()
    assert float("nan") not in Range(0, 1)
    assert Range(0, 1).refusal(2.0) == "must be from 0 to 1; got 2.0."


def test_an_option_that_was_given_and_not_read_is_refused_by_one_rule():
    options = Options(SampleRequest(class_=3, prompt=["a"], order=2), "model")
    assert options.order == 2
    with pytest.raises(DDIMError, match="--prompt is for text-to-image models, and m is not one"):
        options.refuse_unread("m", {"pixels"})
    assert options.prompt == ["a"]
    with pytest.raises(DDIMError, match="--class is for class-conditional models, and m is not"):
        options.refuse_unread("m", {"pixels"})
    with pytest.raises(DDIMError, match="--class has no effect on m; leave it out"):
        options.refuse_unread("m", {"pixels", "classes"})
    assert options.class_ == 3
    options.refuse_unread("m", {"pixels"})


def test_options_are_named_as_on_the_command_line():
    options = option_names(SampleRequest)
    assert {"--class", "--guidance-rescale"} <= set(options)
    assert "--model" not in options
