"""The check of ``make dist`` finds what is missing in the archives, and what does not belong."""

import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("check_dist", ROOT / "packaging" / "check_dist.py")
check_dist = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_dist)

INFO = "ddim-0.1.0.dist-info"
METADATA = b"Name: ddim\nProvides-Extra: plot\nProvides-Extra: text\n\nThe text.\n"


@pytest.fixture
def wheel():
    names = [name.replace("*.dist-info", INFO) for name in check_dist.CONTENTS]
    return {name: b"text" for name in names} | {f"{INFO}/METADATA": METADATA}


@pytest.fixture
def source(wheel):
    package = {f"src/{name}": text for name, text in wheel.items() if name.startswith("ddim/")}
    return package | dict.fromkeys(check_dist.SOURCES, b"text")


def test_sound_archives_have_no_fault(wheel, source):
    assert check_dist.faults(wheel, source, {*source}) == []
    assert check_dist.extras(wheel) == ["plot", "text"]


@pytest.mark.parametrize("name", check_dist.CONTENTS)
def test_a_file_that_the_wheel_lacks_is_told(name, wheel, source):
    del wheel[name.replace("*.dist-info", INFO)]
    assert f"the wheel lacks {name}" in check_dist.faults(wheel, source)


@pytest.mark.parametrize("name", check_dist.SOURCES)
def test_a_file_that_the_source_archive_lacks_is_told(name, wheel, source):
    del source[name]
    assert check_dist.faults(wheel, source) == [f"the source archive lacks {name}"]


@pytest.mark.parametrize(
    "name", [".venv/bin/python", ".venv-oldest/x", "tests/__pycache__/a.pyc", "out/1.png", "dist/w"]
)
def test_junk_in_the_source_archive_is_told(name, wheel, source):
    source[name] = b""
    assert check_dist.faults(wheel, source) == [f"the source archive should not hold {name}"]


def test_a_file_that_the_repository_does_not_know_is_told(wheel, source):
    tracked = {*source}
    source["notes.txt"] = b""
    told = check_dist.faults(wheel, source, tracked)
    assert told == ["the source archive should not hold notes.txt"]


def test_archives_that_differ_are_told(wheel, source):
    source |= {"src/ddim/extra.py": b"", "src/ddim/py.typed": b"other"}
    told = check_dist.faults(wheel, source)
    assert told == ["only one of both holds ddim/extra.py", "ddim/py.typed differs"]


def test_a_wheel_that_was_built_again_may_differ_in_the_tool_alone(wheel):
    again = wheel | {f"{INFO}/WHEEL": b"Generator: other", f"{INFO}/RECORD": b"other"}
    assert check_dist.differences(wheel, again) == []
    assert check_dist.differences(wheel, again | {"ddim/a.py": b""}) == ["ddim/a.py"]


def test_both_kinds_of_archive_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("ddim/a.py", "text")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("ddim-0.1.0/src/ddim/a.py")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"text"))
    assert check_dist.read(tmp_path / "a.whl") == {"ddim/a.py": b"text"}
    assert check_dist.read(tmp_path / "a.tar.gz") == {"src/ddim/a.py": b"text"}
