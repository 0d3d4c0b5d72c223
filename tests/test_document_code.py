"""Code blocks of the README and the documentation run, Python as well as commands, or say why they
are not run; and their commands have options that exist."""

import contextlib
import json
import re
import shlex
import struct
import warnings
from itertools import pairwise
from pathlib import Path
from unittest import SkipTest

import numpy as np
import pytest
from PIL import Image
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import ddim
from ddim.cli import COMMANDS, _command, _parse, main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts),
]
SYBIL = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])
WITH_PYTHON = [path for path in DOCUMENTS if "```python" in path.read_text()]
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"^<!-- not run: (\S.*) -->\n\Z", re.MULTILINE)
"""Stands in the line above a block that is not run, and says why. Pages do not show it."""
CURRENT = [path for path in DOCUMENTS if not {"decisions", "measured"} & set(path.parts)]
"""All but the records, whose commands are those of their day."""

ZOO = Path(ddim.__file__).parent / "zoo"
GARMENTS = Path(__file__).parent / "data" / "fashion_mnist_2048.npz"
NAMES = {
    "OWNER/NAME": "fashion-text",
    "FOLDER_OR_ID": "fashion-text",
    "my-model": "fashion-mnist",
    "my-text-model": "fashion-text",
}
"""The embedded models that stand for a name on the hub and for a folder of the reader's."""
FEWER = {
    "sample": {"--count": "4", "--steps": "2"},
    "train": {"--images": "16", "--batch-size": "8"},
    "interpolate": {"--count": "3", "--steps": "2"},
    "edit": {"--steps": "2"},
    "reconstruct": {"--count": "2", "--steps": "2"},
    "consistency": {"--count": "2", "--steps": "2,4"},
    "evaluate": {"--count": "8", "--steps": "2"},
    "encode": {"--count": "20", "--shard-size": "8", "--steps": "2"},
    "decode": {"--seed": "6", "--count": "4"},
}
"""The options that a command of a block is run with whatever it says of them, so that it takes
seconds. All others are those that are written."""


def title(path):
    return str(path.relative_to(ROOT))


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader's machine: an empty folder, and models under the names that documents use."""
    import diffusers

    monkeypatch.chdir(tmp_path)
    for opener in (ddim.DiffusionPipeline, diffusers.StableDiffusionPipeline):
        there = opener.from_pretrained.__func__

        def opened(cls, name, _there=there, **options):
            known = ZOO / NAMES[name] if name in NAMES else name
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


def blocks(path):
    """The blocks of commands of a document: the line, the text, and why it is not run or None."""
    text = path.read_text()
    for found in SHELL.finditer(text):
        reason = NOT_RUN.search(text[: found.start()])
        line = text.count("\n", 0, found.start()) + 1
        yield f"{title(path)}:{line}", found.group(1), reason and reason.group(1)


def lines(block):
    """The commands of a block as lists of words, without comments."""
    for line in block.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            if words := shlex.split(part, comments=True):
                yield words


SLOW = tuple(
    f"docs/{name}.md"
    for name in "benchmarks scale training tutorials/your-images howto/interpolate-and-edit".split()
)
"""Documents whose commands measure by many methods, start processes, or train once more."""
RUN = [
    pytest.param(place, block, id=place, marks=[pytest.mark.slow] * place.startswith(SLOW))
    for path in CURRENT
    for place, block, reason in blocks(path)
    if reason is None
]


def garments(folder, *, captions=False):
    """A folder of 24 real pictures, grey and 28x28, or in colour, 32x32 and with captions."""
    folder.mkdir()
    with np.load(GARMENTS) as data:
        pictures = [Image.fromarray(array) for array in data["train_images"][:24]]
    rows = []
    for number, picture in enumerate(pictures):
        name = f"{number:02d}.png"
        (picture.convert("RGB").resize((32, 32)) if captions else picture).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": "a sneaker on a black background"}))
    if captions:
        (folder / "metadata.jsonl").write_text("\n".join(rows))


def idx(folder):
    """A folder of IDX files in the place of Fashion-MNIST's."""
    folder.mkdir()
    with np.load(GARMENTS) as data:
        for split, name in (("train", "train"), ("t10k", "test")):
            for kind, what in (("images-idx3", "images"), ("labels-idx1", "labels")):
                array = data[f"{name}_{what}"][:24].astype(np.uint8)
                header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
                (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A reader's folder, with the data that documents name."""
    for name in ("FOLDER_OF_IMAGES", "IMAGES", "MORE", "PICTURES"):
        garments(tmp_path / name)
    for name in ("CAPTIONED", "CAPTIONED_IMAGES"):
        garments(tmp_path / name, captions=True)
    for name, number in (("a.png", 0), ("b.png", 1), ("sneaker.png", 2)):
        kind = "CAPTIONED" if name == "sneaker.png" else "IMAGES"
        (tmp_path / name).write_bytes((tmp_path / kind / f"{number:02d}.png").read_bytes())
    (tmp_path / "prompts.txt").write_text("a red sneaker\na blue bag\n")
    (tmp_path / "models").mkdir()
    idx(tmp_path / "fashion-mnist-files")
    monkeypatch.setenv("DDIM_FASHION_MNIST", str(tmp_path / "fashion-mnist-files"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(name, arguments):
    """The arguments of a command with the options of :data:`FEWER` in place of its own."""
    given = list(arguments)
    for option, value in FEWER.get(name, {}).items():
        if option in given:
            at = given.index(option)
            del given[at : at + 2]
        given += [option, value]
    return given


@pytest.mark.parametrize(("place", "block"), RUN)
def test_the_commands_of_a_block_run(place, block, folder, capsys):
    commands = list(lines(block))
    made = {after for words in commands for word, after in pairwise(words) if word == "--out"}
    for name in NAMES.keys() - made:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(ZOO / NAMES[name])
    for program, *words in commands:
        assert program == "ddim", f"{place}: say above the block why {program} is not run"
        name, *arguments = words
        code = main([name, *shortened(name, arguments)])
        assert code == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("path", CURRENT, ids=title)
def test_every_block_of_commands_is_found_with_its_reason(path):
    text = path.read_text()
    reasons = [reason for _, _, reason in blocks(path)]
    fences = re.findall(r"(?m)^[ >]*(?:```|~~~) *\{?(?:sh|bash|shell|console|zsh)\b", text)
    assert len(fences) == len(reasons), "write a block of commands as ```sh, from a line's start"
    told = text.count("<!-- not run")
    assert told == len(list(filter(None, reasons))), "a reason stands in the line above its block"
