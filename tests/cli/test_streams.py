"""Output that is closed, full or not to be coloured."""

import errno
import io
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

from ddim.cli import COMMANDS, main
from ddim.cli.sample import savings


class Failing(io.StringIO):
    """A stream whose writes fail."""

    def __init__(self, number, *, is_terminal=False):
        super().__init__()
        self.number, self.is_terminal = number, is_terminal

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


@pytest.fixture
def unread(monkeypatch):
    """Has standard output be a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield
    monkeypatch.undo()


def test_a_pipe_that_is_closed_ends_no_run_and_is_not_spoken_of(unread, tiny, tmp_path, capsys):
    assert main(["--help"]) == 0
    assert main(["sample", str(tiny), "--steps", "2", "--count", "2", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "000001.png").exists()
    assert capsys.readouterr().err == ""


def test_help_into_a_closed_pipe_is_no_error(unread, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sample", "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_that_was_closed_ends_no_run(tiny, tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Failing(errno.EIO, is_terminal=True))
    assert main(["sample", str(tiny), "--steps", "2", "--count", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "000000.png").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_file_that_cannot_be_written_is_an_error(number, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Failing(number))
    assert main(["--help"]) == 2
    assert capsys.readouterr().err.startswith(f"ddim: {os.strerror(number)}")


def test_streams_that_were_closed_before_are_none(tiny, tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["sample", str(tiny), "--steps", "2", "--count", "1", "--out", str(tmp_path)]) == 0
    assert main(["fly"]) == 2
    with pytest.raises(SystemExit):
        main(["sample", "--help"])


@pytest.mark.parametrize(("asked", "is_coloured"), [(None, True), ("1", False), ("", True)])
def test_help_is_coloured_on_a_terminal_unless_no_color_is_set(
    asked, is_coloured, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if asked is not None:
        monkeypatch.setenv("NO_COLOR", asked)
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert ("\x1b[" in capsys.readouterr().out) is is_coloured


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_choices(tmp_path, capsys):
    assert main(["--completion", "bash"]) == 0
    (tmp_path / "ddim.bash").write_text(capsys.readouterr().out)

    def completed(*words):
        line = " ".join(f"'{word}'" for word in words)
        code = f"source ./ddim.bash; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        code += f"_tyro_ddim ddim '{words[-1]}'; echo ${{COMPREPLY[@]}}"
        result = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True)
        return result.stdout.split()

    assert set(completed("ddim", "")) >= set(COMMANDS)
    assert completed("ddim", "fit") == ["fit-steps"]
    assert completed("ddim", "sample", "--sp") == ["--spacing"]
    assert completed("ddim", "sample", "--sampler", "e") == ["edict"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_their_scripts(shell, capsys):
    assert main(["--completion", shell]) == 0
    assert "fit-steps" in capsys.readouterr().out


COMPLETED = {"ddim samp": "sample", "ddim sample --spac": "--spacing", "ddim doctor --fi": "--fix"}


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize("typed", COMPLETED)
def test_fish_completes_commands_and_options(typed, tmp_path, capsys):
    assert main(["--completion", "fish"]) == 0
    (tmp_path / "ddim.fish").write_text(capsys.readouterr().out)
    code = f"source ./ddim.fish; complete -C '{typed}'"
    result = subprocess.run(
        ["fish", "--no-config", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [COMPLETED[typed]]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_commands_and_options(tmp_path, capsys):
    """In an interactive shell, since nothing else asks a completion function."""
    pty = pytest.importorskip("pty")
    assert main(["--completion", "zsh"]) == 0
    (tmp_path / "_ddim").write_text(capsys.readouterr().out)
    process, terminal = pty.fork()
    if process == 0:
        os.execve("/usr/bin/env", ["env", "zsh", "-f", "-i"], {**os.environ, "TERM": "dumb"})
    shown = ""

    def until(wanted):
        nonlocal shown
        end = time.monotonic() + 60
        while wanted not in shown and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
        assert wanted in shown, shown
        shown = ""

    try:
        begin = f"fpath=({tmp_path} $fpath); autoload -U compinit; compinit -u -D; echo rea''dy"
        os.write(terminal, f"{begin}\n".encode())
        until("ready\r\n")
        for typed, word in COMPLETED.items():
            os.write(terminal, f"\x15{typed}\t".encode())
            until(f"{typed.rpartition(' ')[0]} {word} ")
    finally:
        os.close(terminal)
        os.waitpid(process, 0)


@pytest.mark.parametrize("shells", [["tcsh"], [], ["bash", "zsh"]])
def test_a_shell_without_completion_is_told(shells, capsys):
    assert main(["--completion", *shells]) == 2
    assert "--completion must be one of bash, zsh, fish; got" in capsys.readouterr().err


def test_what_few_steps_save_is_told_where_that_is_much():
    assert savings(2.0, steps=50, total=1000) == "; all 1000 steps would have taken 40 s"
    assert savings(0.2, steps=50, total=1000) == ""
    assert savings(100.0, steps=999, total=1000) == ""
    assert savings(100.0, steps=1000, total=1000) == ""
