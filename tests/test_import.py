import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ddim
import ddim.cli

STUB = ast.parse(Path(ddim.__file__).with_suffix(".pyi").read_text())
HOMES = {
    alias.asname: f"ddim.{node.module}"
    for node in STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


def test_every_public_name_is_there_and_public_at_home():
    for name, home in HOMES.items():
        assert getattr(ddim, name) is getattr(importlib.import_module(home), name)
        assert name in importlib.import_module(home).__all__
    assert set(HOMES) == set(ddim.__all__) <= set(dir(ddim))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = ddim.nothing_of_the_kind


def test_import_and_help_load_nothing_heavy():
    code = (
        "import sys, ddim, ddim.cli; assert ddim.cli.main(['--help']) == 0;"
        "print(sorted({n.split('.')[0] for n in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert "'ddim'" in loaded
    for name in ("torch", "diffusers", "numpy", "PIL", "tyro", "huggingface_hub"):
        assert f"'{name}'" not in loaded


def test_a_commands_help_loads_neither_torch_nor_diffusers():
    code = """
import sys, ddim.cli
for command in ddim.cli.COMMANDS:
    try:
        ddim.cli.main([command, "--help"])
    except SystemExit as stop:
        assert not stop.code, command
    assert not {"torch", "diffusers"} & set(sys.modules), command
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ddim.cli.COMMANDS:
        assert f"usage: ddim {command}" in result.stdout


def test_the_doctor_of_a_configuration_does_not_load_diffusers(tmp_path):
    """Which takes three quarters of the time of the command."""
    config = tmp_path / "scheduler_config.json"
    config.write_text('{"_class_name": "DDIMScheduler"}')
    code = """
import sys, ddim.cli
assert ddim.cli.main(["doctor", sys.argv[1], "--steps", "50"]) == 0
assert "torch" in sys.modules and "diffusers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(config)], check=True, capture_output=True)
