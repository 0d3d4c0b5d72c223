"""The embedded text model does what it is there for: what a caption asks for is what its image
shows."""

import json

import pytest
import torch

from ddim import DiffusionPipeline
from ddim.data.fashion_text import COLOURS, GARMENTS, Combination, combine, extract_garments, hues
from ddim.evaluation.classifier import load_classifier
from ddim.models.checkpoints import embedded_models, find_model
from fashion_judge import Asked, judge

pytestmark = pytest.mark.skipif(
    "fashion-text" not in embedded_models(), reason="fashion-text is not embedded yet"
)


@pytest.fixture(scope="module")
def card():
    return json.loads((find_model("fashion-text") / "card.json").read_text())


@pytest.fixture(scope="module")
def pipe():
    return DiffusionPipeline.from_pretrained("fashion-text")


def draw(pipe, card, combinations, *, steps=25):
    """Images in [0, 1] with all fixes, and what they show."""
    images = pipe(
        [c.caption for c in combinations],
        seeds=range(len(combinations)),
        num_inference_steps=steps,
        guidance_scale=card["guidance_scale"],
        guidance_rescale=card["guidance_rescale"],
        output_type="pt",
        progress=False,
    ).images
    garments = torch.from_numpy(extract_garments(images.permute(0, 2, 3, 1).numpy()))
    asked = [Asked(*c.numbers) for c in combinations]
    return images, judge(
        images, garments, asked, palette=list(hues().values()), classifier=load_classifier()[0]
    )


def test_it_has_all_fixes_and_says_what_made_it(pipe, card):
    config = pipe.scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr, config.timestep_spacing) == (
        "v_prediction",
        True,
        "trailing",
    )
    assert card["command"].startswith("ddim train ")
    assert card["seconds"] > 0
    for part in ("vae", "text"):
        assert card["parts"][part]["command"].startswith("python recipes/fashion_text.py")
        assert card["parts"][part]["weight_hash"]
    assert (
        sum(path.stat().st_size for path in find_model("fashion-text").rglob("*") if path.is_file())
        <= 16e6
    )


@pytest.mark.parametrize("background", ["black", "white"])
def test_black_is_black_and_white_is_white_in_a_few_steps(pipe, card, background):
    _, judged = draw(pipe, card, [Combination(c, "bag", background) for c in COLOURS], steps=8)
    assert judged.error.abs().mean() < 0.06
    assert judged.hue_right.all()


@pytest.mark.slow
@pytest.mark.parametrize("background", ["black", "white"])
def test_the_brightness_of_64_images_is_the_one_asked_for(pipe, card, background):
    combinations = [
        Combination(list(COLOURS)[i % 6], GARMENTS[i % 10], background) for i in range(64)
    ]
    assert abs(draw(pipe, card, combinations)[1].error.mean()) <= 0.06


@pytest.mark.slow
def test_four_prompts_of_five_give_the_right_garment_in_the_right_hue(pipe, card):
    _, judged = draw(
        pipe, card, [combine(garment, rank) for garment in range(10) for rank in range(30)]
    )
    assert (judged.hue_right & judged.class_right).double().mean() >= 0.8
