"""Folders and files of an attacker, given to whatever takes a model: none of their code runs."""

import importlib
import re
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
from PIL import Image
from tests.conftest import edit, on_a_terminal

import ddim
import ddim.cli
from ddim.cli import main
from ddim.errors import CheckpointError, plain_words, printable
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
def trap(tmp_path, monkeypatch, no_socket):
    """A place to work in, with a module `payload` that leaves a mark when it is imported; returns
    whether it was. No host is asked meanwhile."""
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


def test_code_of_a_folder_is_run_where_the_user_trusts_it(tiny, tmp_path, trap, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(cache)
    model = shutil.copytree(tiny, tmp_path / "model")
    code = (tmp_path / "site" / "payload.py").read_text()
    code += "from diffusers import UNet2DModel\nclass Own(UNet2DModel): pass\n"
    (model / "unet" / "own_network.py").write_text(code)
    edit(model / "model_index.json", unet=["own_network", "Own"])
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(CheckpointError, match=r"names own_network\.Own as the class of unet"):
            ddim.DiffusionPipeline.from_pretrained(model, **options)
    assert not trap()
    pipe = ddim.DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
    assert (type(pipe.unet).__name__, type(pipe.scheduler)) == ("Own", ddim.DDIMScheduler)
    assert trap()


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


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("text_encoder", "model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("unet", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_weights_that_are_cut_off_are_told_in_a_sentence(
    part, file, tiny_text, tmp_path, trap, capsys
):
    model = shutil.copytree(tiny_text, tmp_path / "model")
    whole = (model / part / file).read_bytes()
    (model / part / file).write_bytes(whole[: len(whole) // 2])
    assert call("sample", model) == 2
    said = capsys.readouterr().err
    assert f"{model / part / file} is damaged or cut off" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "Evil"}),
        ("tokenizer/tokenizer_config.json", {"vocab_file": "secret", "merges_file": "secret"}),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}),
        ("text_encoder/config.json", {"model_type": "evil", "architectures": ["Evil"]}),
        ("unet/config.json", {"_class_name": ["payload", "Evil"]}),
        ("vae/config.json", {"auto_map": {"AutoModel": "payload.Evil"}}),
    ],
)
def test_what_a_configuration_names_beside_its_class_acts_on_nothing(
    file, keys, tiny_text, tmp_path, trap, monkeypatch
):
    """The class is the index's; a model whose files name others is opened as if they did not."""
    model = shutil.copytree(tiny_text, tmp_path / "model")
    (model / "evil.py").write_text((tmp_path / "site" / "payload.py").read_text())
    edit(model / file, **keys)
    assert call("sample", model) == 0
    assert call("doctor", model) in (0, 1)
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


def test_what_is_saved_names_no_path_of_the_machine(tiny, tiny_text, tmp_path, trap):
    for number in range(2):
        (tmp_path / "pictures" / f"{number}.txt").write_text("a square")
    model = shutil.copytree(tiny_text, tmp_path / "model")
    edit(model / "vae" / "config.json", _name_or_path=str(model / "vae"))
    edit(model / "tokenizer" / "tokenizer_config.json", name_or_path=str(model / "tokenizer"))
    text, pixels = (ddim.DiffusionPipeline.from_pretrained(path) for path in (model, tiny))
    assert text.config._name_or_path == "model"
    assert text.unet.config._name_or_path == "model/unet"
    saved = tmp_path / "saved"
    pixels.save_pretrained(saved / "pixels")
    text.save_pretrained(saved / "text")
    text.vae.save_pretrained(saved / "vae")
    diffusers.StableDiffusionInpaintPipeline(**text.components).save_pretrained(saved / "inpaint")
    opened = ddim.DiffusionPipeline.from_pretrained(saved / "inpaint")
    opened.save_pretrained(saved / "again")
    words = COMMANDS["train"].format(model=model).split()
    assert main(["train", *words, "--train-text-encoder", "--resolution", "16"]) == 0
    for path in [*saved.rglob("*"), *(tmp_path / "out").glob("[tuv]*/*.json")]:
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("kind", ["tiny", "tiny_text"])
def test_a_model_of_the_hub_is_named_by_its_id_with_all_of_its_parts(kind, request, tmp_path):
    folder = tmp_path / "models--owner--some-name" / "snapshots" / "0123abcd"
    shutil.copytree(request.getfixturevalue(kind), folder)
    pipe = ddim.DiffusionPipeline.from_pretrained(folder)
    assert pipe.config._name_or_path == "owner/some-name"
    if kind == "tiny_text":
        for name in ("unet", "vae", "text_encoder"):
            part = getattr(pipe, name)
            assert part.config._name_or_path == f"owner/some-name/{name}"


CONTROL = "\x1b]0;owned\x07\x9b2J\u202e"


def test_nothing_that_controls_a_terminal_reaches_it(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(tiny, tmp_path / f"a{CONTROL}")
    edit(model / "scheduler" / "scheduler_config.json", **{f"beta_{CONTROL}": 1})
    out = f"b{CONTROL}"
    edit(model / "model_index.json", vae=[f"c{CONTROL}", "X"])
    assert main(["sample", str(model), "--out", out]) == 2
    edit(model / "model_index.json", vae=[None, None])
    assert main(["sample", str(model), "--out", out, "--steps", "1", "--count", "1"]) == 0
    assert main(["doctor", str(model)]) == 2
    shutil.copy(tiny / "scheduler" / "scheduler_config.json", model / "scheduler")
    with on_a_terminal(monkeypatch, columns=80, stream="stdout") as shown:
        main(["doctor", str(model), "--eta", "1"])
    said = "".join(capsys.readouterr())
    assert said.count(r"\x1b]0;owned\x07\x9b2J\u202e") >= 4
    assert not set(CONTROL) & set(said) - set("0;2Jowned]")
    assert r"\x1b]0;owned\x07\x9b2J\u202e" in shown()
    colours = {f"\x1b[{number}m" for number in (0, 31, 33, 36)}
    assert set(re.findall("\x1b" + r"\[?\d*m?", shown())) <= colours


def test_all_that_commands_print_goes_through_one_function():
    for path in Path(ddim.cli.__file__).parent.glob("*.py"):
        source = path.read_text()
        printed = re.findall(r"(?<!\w)print\((.*)", source)
        own = {"__init__.py": ("completion(", '"', 'f"  {name', 'f"ddim {__version__}"')}
        for what in printed:
            allowed = "printable(" in what or what.startswith("json.dumps(")
            assert allowed or what.startswith(own.get(path.name, ())), (path.name, what)


def test_names_stand_for_themselves_in_markdown():
    assert plain_words("a|b<img src=x>[c](d)`*\n# e\x1b") == (
        r"a\|b\<img src=x\>\[c\](d)\`\*\n\# e\x1b"
    )
    assert plain_words("runs/my_model-1.png") == "runs/my_model-1.png"


def test_a_name_of_bytes_that_are_no_text_is_printed():
    assert printable("caf\udce9 \u2028é😀\tx\n") == "caf\\udce9 \\u2028é😀\tx\n"
