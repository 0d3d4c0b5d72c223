"""``ddim sample`` of models of text."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tests.conftest import edit, pixels, record

from ddim.cli import main
from ddim.pipelines.text_to_image import ImageToImagePipeline, TextToImagePipeline


def sample(model, out, *options):
    steps = () if "--steps" in options else ("--steps", "2")
    return main(["sample", str(model), *steps, "--out", str(out), *map(str, options)])


def names(folder):
    return sorted(p.name for p in folder.glob("*.png"))


def near(path, picture):
    return np.abs(pixels(path) - np.asarray(picture).astype(int)).max() <= 1


@pytest.fixture(scope="module")
def pipe(tiny_text):
    return TextToImagePipeline.from_pretrained(tiny_text)


@pytest.fixture
def card(tiny_text, tmp_path):
    """The same model with a card that says how it wants to be guided."""
    shutil.copytree(tiny_text, tmp_path / "model")
    (tmp_path / "model" / "card.json").write_text(
        json.dumps({"guidance_scale": 3.0, "guidance_rescale": 0.7})
    )
    return tmp_path / "model"


def test_one_prompt_is_drawn_like_any_model(tiny_text, tmp_path, pipe):
    assert sample(tiny_text, tmp_path, "--prompt", "a red square", "--count", 2, "--seed", 3) == 0
    assert names(tmp_path) == ["000003.png", "000004.png", "grid.png"]
    expected = pipe("a red square", seeds=[3, 4], num_inference_steps=2, progress=False).images
    assert all(near(tmp_path / f"{3 + k:06d}.png", picture) for k, picture in enumerate(expected))
    run = record(tmp_path)
    told = {
        "prompt": "a red square",
        "negative_prompt": None,
        "guidance_scale": 7.5,
        "guidance_rescale": 0.0,
        "image": None,
    }
    assert {name: run["protocol"][name] for name in told} == told
    assert run["results"][0] == {"seed": 3, "file": "000003.png", "prompt": "a red square"}
    assert run["evaluations"] == 4


def test_many_prompts_from_arguments_and_files_are_taken_up_again(
    tiny_text, tmp_path, pipe, capsys
):
    (tmp_path / "more.txt").write_text("a blue square\n\n  a green, square \n")
    options = (
        "--prompt",
        "a red square",
        "--prompt",
        tmp_path / "more.txt",
        "--count",
        2,
        "--batch-size",
        4,
    )
    out = tmp_path / "out"
    assert sample(tiny_text, out, *options) == 0
    assert names(out)[:-1] == [f"{p:03d}-{s:06d}.png" for p in range(3) for s in range(2)]
    texts = ["a red square", "a blue square", "a green, square"]
    assert record(out)["protocol"]["prompt"] == texts
    assert [r["prompt"] for r in record(out)["results"]] == [
        text for text in texts for _ in range(2)
    ]
    for p, text in enumerate(texts):
        picture = pipe(text, seeds=[1], num_inference_steps=2, progress=False).images[0]
        assert near(out / f"{p:03d}-000001.png", picture)
    assert pixels(out / "grid.png").shape[0] > 3 * 96
    (out / "001-000000.png").unlink()
    capsys.readouterr()
    assert sample(tiny_text, out, *options) == 0
    assert "1 image drawn, 5 were there" in capsys.readouterr().out
    assert sample(tiny_text, out, *options[:2], *options[4:]) == 2
    assert "another protocol: prompt is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("unet/config.json", {"norm_eps": 0.1}),
        ("vae/config.json", {"scaling_factor": 0.2}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 5}),
    ],
)
def test_a_folder_is_of_one_configuration_of_the_model(file, keys, card, tmp_path, capsys):
    options = ("--prompt", "a red square", "--steps", 1, "--count")
    assert sample(card, tmp_path / "out", *options, 1) == 0
    run = record(tmp_path / "out")
    changed = card / file
    edit(changed, **keys)
    assert sample(card, tmp_path / "out", *options, 2) == 2
    assert "another protocol: configuration_hash is" in capsys.readouterr().err
    del run["protocol"]["configuration_hash"]  # as earlier versions wrote it
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    assert sample(card, tmp_path / "out", *options, 2) == 0


def test_guidance_is_the_cards_unless_it_is_given(card, tmp_path, pipe):
    assert (
        sample(
            card,
            tmp_path / "a",
            "--prompt",
            "a red square",
            "--count",
            1,
            "--negative-prompt",
            "blue",
        )
        == 0
    )
    assert (
        record(tmp_path / "a")["protocol"]["guidance_scale"],
        record(tmp_path / "a")["protocol"]["guidance_rescale"],
    ) == (3.0, 0.7)
    expected = pipe(
        "a red square",
        negative_prompt="blue",
        guidance_scale=3.0,
        guidance_rescale=0.7,
        seeds=[0],
        num_inference_steps=2,
        progress=False,
    )
    assert near(tmp_path / "a" / "000000.png", expected.images[0])
    assert (
        sample(
            card,
            tmp_path / "b",
            "--prompt",
            "a",
            "--count",
            1,
            "--guidance-scale",
            1,
            "--guidance-rescale",
            0,
        )
        == 0
    )
    assert record(tmp_path / "b")["protocol"]["guidance_scale"] == 1.0
    assert record(tmp_path / "b")["evaluations"] == 2


def test_an_image_to_begin_with(tiny_text, tmp_path, pipe, capsys):
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    )
    picture.save(tmp_path / "a.png")
    options = (
        "--prompt",
        "a red square",
        "--count",
        2,
        "--steps",
        4,
        "--image",
        tmp_path / "a.png",
    )
    assert sample(tiny_text, tmp_path / "out", *options, "--strength", 0.5) == 0
    expected = ImageToImagePipeline(**pipe.components)(
        "a red square", picture, 0.5, num_inference_steps=4, seeds=[0, 1], progress=False
    ).images
    assert near(tmp_path / "out" / "000001.png", expected[1])
    run = record(tmp_path / "out")
    assert run["protocol"]["timesteps"] == pipe.select_timesteps(4)[2:]
    assert run["protocol"]["strength"] == 0.5
    assert set(run["protocol"]["image"]) == {"name", "hash"}
    assert run["evaluations"] == 4
    assert sample(tiny_text, tmp_path / "out", *options) == 2
    assert "strength is 0.5 there and 0.8 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "makes images of prompts: give --prompt TEXT, or --prompt FILE.txt with one prompt"),
        (("--prompt", "a", "--class", "1"), "--class is for class-conditional models, and"),
        (("--prompt", "a", "--prior", "data"), "--prior is for models without text, and"),
        (("--prompt", "a", "--variance", "analytic"), "--variance is for models without text, and"),
        (
            ("--prompt", "a", "--strength", "0.5"),
            "--strength acts only with --image; give both, or leave out --strength.",
        ),
        (
            ("--prompt", "none.txt"),
            "a text that ends in .txt is a file of prompts, and it cannot be read",
        ),
        (("--prompt", "EMPTY"), "the file holds no prompt; write one in a line"),
        (
            ("--prompt", "a", "--guidance-rescale", "2"),
            "--guidance-rescale must be from 0 to 1; got 2.0.",
        ),
        (("--prompt", "a", "--image", "none.png"), "there is no picture at none.png"),
        (
            ("--prompt", "a", "--image", "ODD"),
            "odd.png: width and height must be multiples of 2, the VAE's factor; got 16x15",
        ),
        (
            ("--prompt", "a", "--image", "GOOD", "--strength", "1.5"),
            "--strength must be above 0 and at most 1; got 1.5.",
        ),
        (
            ("--prompt", "a", "--image", "GOOD", "--strength", "0.1"),
            "strength 0.1 of 2 steps keeps none",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    options, message, tiny_text, tmp_path, capsys
):
    given = {
        "EMPTY": tmp_path / "empty.txt",
        "ODD": tmp_path / "odd.png",
        "GOOD": tmp_path / "good.png",
    }
    given["EMPTY"].write_text("\n")
    Image.new("RGB", (16, 15)).save(given["ODD"])
    Image.new("RGB", (16, 16)).save(given["GOOD"])
    assert (
        sample(tiny_text, tmp_path / "out", *(given.get(option, option) for option in options)) == 2
    )
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [("--prompt", "a"), ("--guidance-scale", "3"), ("--image", "a.png")]
)
def test_options_of_text_are_refused_for_models_without(option, tiny, tmp_path, capsys):
    assert sample(tiny, tmp_path / "out", *option) == 2
    assert (
        f"{option[0]} is for text-to-image models, and {tiny} is not one; leave it out"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default")
def test_what_is_not_used_is_told_in_a_line(tiny_text, tmp_path, capsys):
    long = "a red square on a black background on a white background"
    assert sample(tiny_text, tmp_path, "--prompt", long, "--count", 1) == 0
    told = capsys.readouterr().err
    assert (
        "ddim: warning: a prompt has 11 tokens and the text encoder reads 10; this was cut off: "
        "'background'." in told
    )
    unguided = ("--guidance-scale", 1, "--negative-prompt", "blue")
    assert sample(tiny_text, tmp_path, "--prompt", "a", *unguided) == 2
    told = capsys.readouterr().err
    assert "--negative-prompt acts only with guidance, and the scale 1 turns it off" in told
