"""Folders and files of an attacker, given to whatever takes a model: none of their code runs."""

import importlib
import json
import shutil
import sys

import diffusers
import pytest
import safetensors.torch
import torch
from PIL import Image

import ddim
from ddim.cli import main
from ddim.errors import CheckpointError
from ddim.pipelines.unconditional import UnconditionalPipeline

COMMANDS = {
    "sample": "{model} --prompt a --out out --steps 1",
    "encode": "{model} --images picture.png --out code.safetensors --steps 1",
    "interpolate": "{model} --seeds 1,2 --out out --steps 1",
    "reconstruct": "{model} --data pictures --out out",
    "consistency": "{model} --out out",
    "table": "{model} --reference pictures --out out",
    "fit-steps": "{model} --out fitted.json",
    "evaluate": "{model} --reference pictures --out out",
    "doctor": "{model}",
    "train": "--base {model} --data pictures --out out --images 1",
}
"""What each command that opens a model is called with."""


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A place to work in, with a module `payload` that leaves a mark when it is imported; returns
    whether it was."""
    mark, site = tmp_path / "sprung", tmp_path / "site"
    site.mkdir()
    (site / "payload.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.png")
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / f"{number}.png")
    yield mark.exists
    sys.modules.pop("payload", None)


def edit(path, **keys):
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def call(command, model):
    words = COMMANDS[command].format(model=model).split()
    return main([command, *words])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("part", ["vae", "unet", "scheduler", "safety_checker"])
def test_no_command_imports_what_a_folder_names(command, part, tiny_text, tmp_path, trap, capsys):
    model = shutil.copytree(tiny_text, tmp_path / "model")
    (model / part).mkdir(exist_ok=True)
    edit(model / "model_index.json", **{part: ["payload", "AutoencoderKL"]})
    assert call(command, model) == 2
    assert "names payload.AutoencoderKL as the class of" in capsys.readouterr().err
    assert not trap()
    assert not (tmp_path / "out").exists()


def openers(folder):
    yield ddim.DiffusionPipeline.from_pretrained, folder, {}
    yield UnconditionalPipeline.from_pretrained, folder, {}
    yield ddim.TextToImagePipeline.from_pretrained, folder, {}
    yield ddim.ImageToImagePipeline.from_pretrained, folder, {}
    for kind in (ddim.DiffusionPipeline, ddim.TextToImagePipeline):
        yield kind.from_single_file, folder / "one.safetensors", {"config": str(folder)}


def test_no_opener_imports_what_a_folder_names(tiny_text, tmp_path, trap):
    model = shutil.copytree(tiny_text, tmp_path / "model")
    safetensors.torch.save_file({"x": torch.zeros(1)}, model / "one.safetensors")
    edit(model / "model_index.json", vae=["payload", "AutoencoderKL"])
    for load, name, options in openers(model):
        with pytest.raises(CheckpointError, match=r"names payload\.AutoencoderKL"):
            load(name, **options)
    edit(model / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    code = (tmp_path / "site" / "payload.py").read_text()
    for place in ("vae/diffusers.py", "None.py", "text_encoder/transformers.py"):
        (model / place).write_text(code)
        for load, name, options in openers(model):
            with pytest.raises(CheckpointError, match="is code"):
                load(name, **options)
        (model / place).unlink()
    assert not trap()


def test_a_class_of_the_users_own_module_is_opened(tiny_text, tmp_path, trap):
    class Own(diffusers.AutoencoderKL):
        pass

    model = shutil.copytree(tiny_text, tmp_path / "model")
    edit(model / "model_index.json", vae=["payload", "Own"])
    module = importlib.import_module("payload")
    module.Own, module.ModelMixin = Own, diffusers.ModelMixin  # as diffusers tells a network
    assert type(ddim.DiffusionPipeline.from_pretrained(model).vae) is Own
    assert call("sample", model) == 2


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("text_encoder", "pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("unet", "diffusion_pytorch_model.bin"),
    ],
)
def test_pickles_that_would_run_code_are_told_in_a_sentence(
    part, file, tiny_text, tmp_path, trap, capsys
):
    model = shutil.copytree(tiny_text, tmp_path / "model")
    for weights in (model / part).glob("*.safetensors"):
        weights.unlink()
    torch.save({"x": Trap(tmp_path / "sprung")}, model / part / file)
    for number in range(2):
        (tmp_path / "pictures" / f"{number}.txt").write_text("a square")
    for command in ("sample", "train"):
        assert call(command, model) == 2
        said = capsys.readouterr().err
        assert "pickled" in said or "has no .safetensors" in said
        assert "weights_only" not in said
    with pytest.raises(CheckpointError) as caught:
        ddim.DiffusionPipeline.from_pretrained(model)
    assert caught.value.__cause__ is None
    assert not trap()


def test_training_copies_nothing_from_outside_of_its_base(tiny_text, tmp_path, trap, capsys):
    for number in range(2):
        (tmp_path / "pictures" / f"{number}.txt").write_text("a square")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.json").write_text("{}")
    kept = sorted(path.name for path in tmp_path.iterdir())
    named = shutil.copytree(tiny_text, tmp_path / "models" / "named")
    edit(named / "model_index.json", **{"../secrets": ["transformers", "CLIPTextModel"]})
    linked = shutil.copytree(tiny_text, tmp_path / "models" / "linked")
    (linked / "vae" / "key.json").symlink_to(tmp_path / "secrets" / "key.json")
    folder = shutil.copytree(tiny_text, tmp_path / "models" / "folder")
    (folder / "image_encoder").symlink_to(tmp_path / "secrets")
    edit(folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModel"])
    for model, message in (
        (named, "a part must be the name of a folder inside the model's"),
        (linked, "key.json is a link to"),
        (folder, "image_encoder is a link to"),
    ):
        assert call("train", model) == 2
        assert message in capsys.readouterr().err
    shutil.rmtree(tmp_path / "models")
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
