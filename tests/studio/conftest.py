"""A studio that serves, as a person starts it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ddim

ZOO = Path(ddim.__file__).parent / "zoo"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder of models: one whose configuration the doctor has something to say about."""
    folder = tmp_path_factory.mktemp("studio") / "models"
    shutil.copytree(ZOO / "fashion-text", folder / "washed-out")
    path = folder / "washed-out" / "scheduler" / "scheduler_config.json"
    flawed = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | flawed))
    return folder


def start(*words, cwd):
    """Starts ``ddim studio``; the process, and the address that it tells."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    source = str(Path(ddim.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "ddim", "studio", "--port", "0", "--no-browser", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": source, "PYTHONUNBUFFERED": "1"},
    )
    seen = []
    for line in process.stdout:
        seen.append(line)
        if found := re.search(r"http://\S+", line):
            return process, found[0]
    raise AssertionError("".join(seen))


@pytest.fixture(scope="session")
def studio(models):
    """The address of a studio with a folder of models."""
    process, address = start("--folder", models.name, cwd=models.parent)
    yield address
    process.kill()
    process.communicate()
