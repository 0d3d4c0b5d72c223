"""What a model's folder knows beside its parts is saved along, while it is true of the weights."""

import json

import pytest
import torch

from ddim import DiffusionPipeline, TextToImagePipeline, UnconditionalPipeline
from ddim.cli import main
from ddim.models.checkpoints import read_guidance, resolve_model

ZOO = resolve_model("fashion-mnist").parent


@pytest.fixture
def text():
    return TextToImagePipeline.from_pretrained("fashion-text")


def test_guidance_and_training_are_saved_along(text, tmp_path, capsys):
    text.save_pretrained(tmp_path / "copy")
    assert read_guidance(tmp_path / "copy") == {"guidance_scale": 3.0, "guidance_rescale": 0.7}
    config = tmp_path / "copy" / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(config.read_text())
    config.write_text(json.dumps(scheduler | {"rescale_betas_zero_snr": False}))
    main(["doctor", str(tmp_path / "copy"), "--steps", "20", "--json"])
    found = {f["code"]: f["fix"] for f in json.loads(capsys.readouterr().out)["findings"]}
    assert found["DDIM019"] == {"rescale_betas_zero_snr": True}


def test_a_prior_is_saved_along_too_and_again_from_the_copy(tmp_path):
    UnconditionalPipeline.from_pretrained("fashion-mnist").save_pretrained(tmp_path / "a")
    DiffusionPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("card.json", "prior.json"):
        wanted = (ZOO / "fashion-mnist" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() == wanted
        assert (tmp_path / "b" / name).read_bytes() == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_another_type_are_the_same(text, dtype, tmp_path):
    text.to(dtype).to(torch.float32).save_pretrained(tmp_path)
    assert (tmp_path / "card.json").is_file()


def test_weights_in_another_layout_are_the_same(text, tmp_path):
    text.unet.to(memory_format=torch.channels_last)
    text.save_pretrained(tmp_path)
    assert (tmp_path / "card.json").is_file()


def test_weights_that_were_changed_lose_the_card(text, tmp_path):
    optimizer = torch.optim.AdamW(text.unet.parameters(), lr=1e-5)
    for weight in text.unet.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    text.save_pretrained(tmp_path)
    assert not (tmp_path / "card.json").exists()


def test_a_part_that_was_given_loses_the_card(tmp_path):
    network = UnconditionalPipeline.from_pretrained("fashion-mnist").unet
    UnconditionalPipeline.from_pretrained("fashion-mnist", unet=network).save_pretrained(tmp_path)
    assert (tmp_path / "model_index.json").is_file()
    assert not (tmp_path / "card.json").exists()
