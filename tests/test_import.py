import ast
import importlib
import subprocess
import sys
from pathlib import Path

import ddim
import ddim.cli


def test_every_public_name_is_there_and_public_at_home():
    for name, home in ddim._HOME_OF.items():
        assert getattr(ddim, name) is getattr(importlib.import_module(f"ddim.{home}"), name)
        assert name in importlib.import_module(f"ddim.{home}").__all__
    assert set(ddim.__all__) <= set(dir(ddim))


def test_type_checkers_see_the_names_that_are_loaded_later():
    tree = ast.parse(Path(ddim.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {a.asname: node.module for node in block.body for a in node.names}
    assert seen == {name: f"ddim.{home}" for name, home in ddim._HOME_OF.items()}


def test_import_and_help_load_nothing_heavy():
    code = "import sys, ddim, ddim.cli; assert ddim.cli.main(['--help']) == 0; print(sorted({n.split('.')[0] for n in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert "'ddim'" in loaded
    for name in ("torch", "diffusers", "numpy", "PIL", "tyro", "huggingface_hub"):
        assert f"'{name}'" not in loaded


def test_a_commands_help_loads_neither_torch_nor_diffusers():
    code = """
import sys, ddim.cli
try:
    ddim.cli.main([sys.argv[1], "--help"])
except SystemExit as stop:
    assert not stop.code
assert not {"torch", "diffusers"} & set(sys.modules)
"""
    for command in ddim.cli.COMMANDS:
        result = subprocess.run(
            [sys.executable, "-c", code, command], check=True, capture_output=True, text=True
        )
        assert f"usage: ddim {command}" in result.stdout
