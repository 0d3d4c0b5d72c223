"""Code blocks of the README and the documentation run, and their commands have options that
exist."""

import contextlib
import re
import shlex
import warnings
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import ddim
from ddim.cli import COMMANDS, _command, _parse

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts),
]
SYBIL = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])
WITH_PYTHON = [path for path in DOCUMENTS if "```python" in path.read_text()]
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)

NAMES = {"OWNER/NAME": "fashion-text", "my-model": "fashion-mnist"}
"""The embedded models that stand for a name on the hub and for a folder of the reader's."""


def title(path):
    return str(path.relative_to(ROOT))


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader's machine: an empty folder, and models under the names that documents use."""
    import diffusers

    monkeypatch.chdir(tmp_path)
    folder = Path(ddim.__file__).parent / "zoo"
    for opener in (ddim.DiffusionPipeline, diffusers.StableDiffusionPipeline):
        there = opener.from_pretrained.__func__

        def opened(cls, name, _there=there, **options):
            known = folder / NAMES[name] if name in NAMES else name
            return _there(cls, known, **options)

        monkeypatch.setattr(opener, "from_pretrained", classmethod(opened))


@pytest.mark.parametrize("path", WITH_PYTHON, ids=title)
def test_the_code_of_a_document_runs(path, reader):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of diffusers, which a document does not discuss
        for example in SYBIL.parse(path).examples():
            with contextlib.suppress(SkipTest):  # a block that says why it is not run
                example.evaluate()


def commands(path):
    """The ``ddim`` commands of a document, as lists of words."""
    for block in SHELL.findall(path.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if "ddim" in words and "pip" not in words:
                    yield words[words.index("ddim") + 1 :]


@pytest.mark.parametrize("path", DOCUMENTS, ids=title)
def test_the_commands_of_a_document_have_options_that_exist(path):
    for name, *arguments in commands(path):
        if name.startswith("-") or name == "COMMAND" or any("..." in word for word in arguments):
            continue
        assert name in COMMANDS, name
        if "[" in " ".join(arguments):  # a synopsis
            continue
        _parse(_command(name), name, arguments)
