"""No command on local or embedded input looks up a host, or connects to one."""

import json

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from tests.data.conftest import datasets, write_parquet  # noqa: F401

from ddim.cli import main


@pytest.fixture
def table(tmp_path, datasets):  # noqa: F811
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 8, 8), dtype=np.uint8)
    words = datasets.Value("string")
    return write_parquet(datasets, tmp_path / "a.parquet", image=images, text=(words, ["red"] * 24))


def run(*words):
    assert main([str(word) for word in words]) == 0


def test_commands_on_pixels_ask_no_host(tiny, table, tmp_path, silent_log, no_socket):
    AcceleratorState._reset_state(reset_partial_state=True)
    model, drawn, data = tmp_path / "model", tmp_path / "drawn", ("--data", table)
    shape = ("--block-out-channels", "8,16", "--images", 8, "--batch-size", 4)
    run("train", *data, "--out", model, *shape)
    run("train", "--base", model, *data, "--out", tmp_path / "tuned", *shape[2:])
    analytic = ("--variance", "analytic", "--count", 2, "--steps", 2)
    run("sample", model, *analytic, "--out", drawn)
    run("sample", "fashion-mnist", "--count", 1, "--steps", 1, "--out", tmp_path / "embedded")
    measured = ("--reference", table, "--metrics", "kid-pixels")
    run("evaluate", drawn, *measured, "--out", tmp_path / "measured")
    run("doctor", model, *data, "--probe", "--json")
    run("encode", tiny, *data, "--count", 2, "--steps", 2, "--out", tmp_path / "codes.safetensors")


def test_commands_on_text_ask_no_host(tiny_text, tmp_path, silent_log, no_socket):
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red square")
    (folder / "README.md").write_text(json.dumps({"data_files": "https://host/a.parquet"}))
    model = tmp_path / "model"
    sized = ("--images", 4, "--batch-size", 2)
    run("train", "--base", tiny_text, "--data", folder, "--out", model, *sized)
    drawn = ("--count", 1, "--steps", 2, "--out", tmp_path / "drawn")
    run("sample", model, "--prompt", "a red square", *drawn)
