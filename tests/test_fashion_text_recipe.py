"""The recipe of the base that fashion-text models are trained from: its tokenizer, and the folder
that plain diffusers loads."""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location(
        "recipe_of_fashion_text", RECIPES / "fashion_text.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(recipe, tmp_path_factory):
    return recipe.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_word_of_the_captions_is_one_token(recipe, tokenizer):
    captions = [
        recipe.Combination(c, g, b).caption
        for c in recipe.COLOURS
        for g in recipe.GARMENTS
        for b in recipe.BACKGROUNDS
    ]
    assert len(captions) == 300
    for caption in captions:
        words = caption.replace("-", " - ").split()
        assert tokenizer.convert_ids_to_tokens(tokenizer(caption).input_ids) == [
            recipe.START,
            *(f"{w}</w>" for w in words),
            recipe.END,
        ]
        assert len(words) + 2 <= recipe.LENGTH


def test_unknown_words_fall_apart_into_known_pieces_and_nothing_is_lost(tokenizer):
    for text in ("a purple hat", "zebra", "\u6f22 caf\u00e9 \U0001f600", "42%"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids[1:-1]
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(
            " ", ""
        )


def test_the_longest_prompt_is_cut_at_the_length_of_the_text_encoder(recipe, tokenizer):
    tokens = recipe.tokenize(tokenizer, ["", "red " * 100])
    assert tokens.shape == (2, recipe.LENGTH)
    assert tokens[0, 1:].eq(tokenizer.eos_token_id).all()
    assert tokens[1, -1] == tokenizer.eos_token_id


def test_the_text_encoder_reads_the_sentence_at_its_end(recipe, tokenizer):
    torch.manual_seed(0)
    encoder = recipe.make_text_encoder(tokenizer).eval()
    tokens = recipe.tokenize(
        tokenizer, ["a red bag on a black background", "a red bag on a white background"]
    )
    with torch.no_grad():
        states, pooled = encoder(tokens)[:2]
    end = tokens.eq(tokenizer.eos_token_id).int().argmax(1)
    torch.testing.assert_close(pooled, states[torch.arange(2), end])
    assert not torch.allclose(pooled[0], pooled[1])


@pytest.fixture(scope="module")
def base(recipe, tmp_path_factory):
    """The folder, its VAE and text encoder untrained."""
    out = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    recipe.make_vae().save_pretrained(out / "vae")
    recipe.make_text_encoder(recipe.make_tokenizer(out / "tokenizer")).save_pretrained(
        out / "text_encoder"
    )
    return out, recipe.write_base(argparse.Namespace(out=out, seed=0))


def test_the_base_is_small_and_says_how_it_is_to_be_sampled(base):
    out, facts = base
    assert facts["bytes"] < 16e6
    config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert (
        config["prediction_type"],
        config["timestep_spacing"],
        config["rescale_betas_zero_snr"],
    ) == ("v_prediction", "trailing", True)
    assert (config["beta_schedule"], config["beta_start"], config["beta_end"]) == (
        "scaled_linear",
        0.00085,
        0.012,
    )
    assert not config["clip_sample"]
    assert config["set_alpha_to_one"]


def test_the_base_of_a_seed_is_always_the_same(recipe, base, tmp_path):
    _, facts = base
    recipe.make_unet(0).save_pretrained(tmp_path)
    assert (
        recipe.file_hash([tmp_path / "diffusion_pytorch_model.safetensors"]) == facts["weight_hash"]
    )


@pytest.mark.slow
def test_plain_diffusers_loads_the_base_and_draws(base):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base[0], safety_checker=None)
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    images = pipe(
        ["a red sneaker on a black background"] * 2, num_inference_steps=2, output_type="np"
    ).images
    assert images.shape == (2, 32, 32, 3)


def test_what_is_shipped_is_a_model_with_its_history_and_without_its_checkpoints(
    recipe, base, tmp_path
):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(base[0], model)
    (model / "card.json").write_text(json.dumps({"seconds": 1.0}))
    (base[0] / "card.json").write_text(json.dumps({"vae": {"seconds": 2.0}}))
    (model / "checkpoints").mkdir()
    recipe.ship(
        argparse.Namespace(
            model=model, base=base[0], out=out, guidance_scale=3.0, guidance_rescale=0.7
        )
    )
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["card.json", "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    )
    card = json.loads((out / "card.json").read_text())
    assert card == {
        "seconds": 1.0,
        "parts": {"vae": {"seconds": 2.0}},
        "guidance_scale": 3.0,
        "guidance_rescale": 0.7,
    }


def test_the_error_of_a_frame_is_told_by_background(recipe):
    class Brighter(torch.nn.Module):
        def encode(self, x):
            return type("Output", (), {"latent_dist": type("Code", (), {"mean": x})})

        def decode(self, z):
            return type("Output", (), {"sample": z + 0.2})

    images = (
        torch.tensor([0, 128], dtype=torch.uint8)[:, None, None, None].expand(2, 32, 32, 3).numpy()
    )
    captions = ["a red bag on a black background", "a red bag on a gray background"] + [
        f"a red bag on a {name} background" for name in ("dark gray", "light gray", "white")
    ]
    images = images[[0, 1, 1, 1, 0]]
    told = recipe.measure_vae(Brighter(), images, captions)
    assert told["frame_mean_error"]["black"] == pytest.approx(0.1, abs=0.004)
    assert told["rmse"] == pytest.approx(0.1, abs=0.004)
