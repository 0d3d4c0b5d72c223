"""What models, data and files make of options: one refusal for all commands, one sentence, and no
file."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import edit, ours, tiny_text_parts, tiny_unet

from ddim.cli import main
from ddim.data.sources import load_images
from ddim.pipelines.unconditional import UnconditionalPipeline
from ddim.training.config import TrainConfig
from ddim.training.subject import pixel_subject


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model whose weights hold a NaN, a text model of that kind, one of epsilon at zero SNR,
    grey and coloured pictures in class folders, and a grey prior."""
    folder = tmp_path_factory.mktemp("place")
    network = tiny_unet()
    network.conv_in.weight.data[0, 0, 0, 0] = torch.nan
    diffusers.DDIMPipeline(network, ours()).save_pretrained(folder / "nan")
    diffusers.DDIMPipeline(tiny_unet(), ours()).save_pretrained(folder / "tiny")
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, clip_sample=False)
    diffusers.DDIMPipeline(tiny_unet(), scheduler).save_pretrained(folder / "zero")
    parts = tiny_text_parts()
    parts["vae"].decoder.conv_out.bias.data[0] = torch.inf
    others = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    text = diffusers.StableDiffusionPipeline(**parts, scheduler=scheduler, **others)
    text.save_pretrained(folder / "text-nan")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        for name, array in (("grey", picture[..., 0]), ("coloured", picture)):
            path = folder / name / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(exist_ok=True, parents=True)
            Image.fromarray(array).save(path)
    prior = {"mean": [0, 0, 0], "covariance": np.eye(3).tolist()}
    (folder / "prior.json").write_text(json.dumps(prior))
    return folder


@pytest.fixture
def refused(place, capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder, and returns the sentence that refuses it."""
    monkeypatch.chdir(tmp_path)

    def run(words):
        assert main(words.replace("@", f"{place}/").split()) == 2, words
        out, err = capsys.readouterr()
        assert (err.count("\n"), list(tmp_path.iterdir())) == (1, []), (words, err)
        return err.removeprefix("ddim: ").strip()

    return run


OF_A_MODEL = [
    "sample @nan --count 1 --steps 2",
    "encode @nan --images @grey/a/0.png --steps 2",
    "interpolate @nan --seeds 1,2 --steps 2",
    "consistency @nan --steps 2,3 --count 2",
    "reconstruct @nan --data @grey --count 2 --steps 2",
    "evaluate @nan --reference @grey --metrics swd-pixels --count 4 --steps 2",
    "table @nan --reference @grey --metrics swd-pixels --count 4 --steps 2",
    "fit-steps @nan --steps 2 --count 2 --held-out 2",
    "doctor @nan --data @grey --probe",
    "train --base @nan --data @grey --images 8 --out run",
    "sample @text-nan --prompt a --count 1 --steps 2",
    "fit-steps @text-nan --prompt a --steps 2 --count 2 --held-out 2",
]


@pytest.mark.parametrize("words", OF_A_MODEL)
def test_weights_that_are_not_finite_get_one_refusal_in_every_command(words, refused):
    message = refused(words)
    assert message.startswith("the weight ")
    assert " is NaN or infinite in torch.float32; " in message


@pytest.mark.parametrize("command", ["sample", "encode", "interpolate", "reconstruct"])
def test_epsilon_at_zero_snr_is_refused_alike_where_images_are_drawn_and_encoded(command, refused):
    more = {
        "encode": "--images @grey/a/0.png --spacing trailing",
        "interpolate": "--images @grey/a/0.png,@grey/a/2.png --spacing trailing",
        "reconstruct": "--data @grey --count 2 --spacing trailing",
        "sample": "--count 1 --spacing trailing",
    }
    message = refused(f"{command} @zero --steps 4 {more[command]}")
    assert message.startswith("epsilon prediction cannot be used where the SNR is 0")


OTHERS = [
    ("sample --prior @prior.json", "the prior is of images with 3 channels; the model makes"),
    ("sample --guidance-scale 2", "--guidance-scale is for text-to-image models, and fas"),
    ("doctor fashion-mnist --guidance-rescale 0.5", "--guidance-rescale is for text-to-image mode"),
    (
        "doctor fashion-text --guidance-scale 1 --guidance-rescale 0.5",
        "--guidance-rescale acts only with guidance, and the scale 1 turns it off; give",
    ),
    (
        "sample fashion-text --prompt a --guidance-scale 0.5 --negative-prompt b",
        "--negative-prompt acts only with guidance, and the scale 0.5 turns it off; give",
    ),
    (
        "table --reference digits --count 500001 --repeats 2",
        "--count times --repeats must be at most 1000000 together; got 1000002.",
    ),
    ("sample @tiny --steps 1001", "--steps must be a whole number from 1 to 1000, the number of"),
    ("sample @tiny --timesteps 1000", "timesteps must lie in [0, 1000)"),
    ("sample @tiny --eta 3 --steps 4", "eta=3.0 would draw more noise than the level can hold"),
    ("sample @tiny --sampler edict --clip static", "edict cannot be run backwards through clip"),
    ("sample @tiny --variance analytic", "@tiny does not say what it was trained on"),
    ("sample fashion-text --prompt a --steps 1001", "--steps must be a whole number from 1 to"),
    ("encode @tiny --images @grey/a/0.png --steps 1001", "--steps must be a whole number from 1"),
    ("encode @tiny --data @grey --count 99", "@grey has 12 images in its split train, and"),
    ("interpolate @tiny --seeds 1,2 --steps 1001", "--steps must be a whole number from 1 to 1000"),
    ("interpolate @tiny --seeds 1,2 --class 3", "--class has no effect: @tiny was trained without"),
    ("reconstruct @tiny --data @grey --steps 2,1001", "--steps must be a whole number from 1 to"),
    ("consistency @tiny --steps 2,1001", "--steps must be a whole number from 1 to 1000"),
    ("evaluate @tiny --reference @grey --steps 1001", "--steps must be a whole number from 1 to"),
    ("evaluate @tiny --reference @none.npz --steps 10", "there is no data at '@none.npz'"),
    ("table @tiny --reference @grey --eta 3 --steps 4", "eta=3.0 would draw more noise than"),
    ("fit-steps @tiny --steps 1001", "--steps must be a whole number from 1 to 1000"),
    ("fit-steps @tiny --out @prior.json", "@prior.json is there already; use another --out"),
    (
        "sample fashion-text --prompt none.txt",
        "--prompt none.txt: a text that ends in .txt is a file of prompts, and it cannot be read "
        "(No such file or directory).",
    ),
    ("evaluate @grey --reference @grey --seed 3", "--seed has no effect on "),
    ("evaluate @grey --reference @grey --batch-size 3", "--batch-size has no effect on "),
]


@pytest.mark.parametrize(("words", "message"), OTHERS)
def test_what_does_not_fit_the_model_is_refused_before_weights_are_loaded_or_a_file_written(
    words, message, refused, place, monkeypatch
):
    def load(*args, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("ddim.pipelines.unconditional.load_network", load)
    monkeypatch.setattr("ddim.pipelines.latent.load_pipeline", load)
    assert refused(words).startswith(message.replace("@", f"{place}/"))


def test_a_conversion_finds_out_first_that_its_folder_exists(place, capsys):
    assert main(["convert", "no-such-file", str(place)]) == 2
    assert f"{place} is there already, and is not overwritten" in capsys.readouterr().err


def test_grey_images_that_are_compared_with_coloured_ones_are_told(place, tmp_path, capsys):
    for one, other, read in (
        ("grey", "coloured", "coloured, and read as grey"),
        ("coloured", "grey", "grey, and read in colour"),
    ):
        words = ["evaluate", str(place / one), "--reference", str(place / other)]
        words += ["--metrics", "swd-pixels", "--out", str(tmp_path / one)]
        assert main(words) == 0
        assert f"note: the images of {place / other} are {read}." in capsys.readouterr().out
    assert load_images(str(place / "grey")).notes == ()


def test_classes_that_are_not_trained_on_are_told(place):
    data = load_images(str(place / "grey"))
    options = {"data": str(place / "grey"), "out": "x", "block_out_channels": (8,)}
    subject = pixel_subject(TrainConfig(**options), data, None)
    told = f"the images of {place / 'grey'} are of 2 classes, of which the model learns nothing"
    assert [note[: len(told)] for note in subject.notes] == [told]


def test_an_interrupted_command_says_whether_it_goes_on(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddim.cli._parse", interrupt)
    for command, then in (("sample", "goes on from what is there"), ("fit-steps", "begins anew")):
        assert main([command]) == 130
        assert capsys.readouterr().err == f"ddim: interrupted; the same command {then}.\n"


def test_a_message_tells_nothing_of_a_programs_inside(monkeypatch, capsys):
    def fail(*args):
        raise OSError(28, "No space: <_io.BytesIO object at 0x7f01>", "out/.000000.png.123.partial")

    monkeypatch.setattr("ddim.cli._parse", fail)
    assert main(["sample"]) == 2
    message = "cannot read or write out/000000.png: No space:; nothing is left half-written."
    assert capsys.readouterr().err == f"ddim: {message}\n"


def test_a_mistyped_key_of_a_scheduler_is_refused(tiny, tmp_path, refused):
    path = shutil.copytree(tiny, tmp_path.parent / "mistyped") / "scheduler/scheduler_config.json"
    edit(path, beta_strt=0.1)
    message = refused(f"sample {path.parents[1]}")
    assert "there is no option 'beta_strt'; did you mean 'beta_start'?" in message


def test_a_file_that_was_written_by_others_during_the_run_is_not_overwritten(
    place, tmp_path, capsys, monkeypatch
):
    encode, out = UnconditionalPipeline.encode, tmp_path / "code.safetensors"

    def encode_meanwhile(*args, **options):
        out.write_text("mine")
        return encode(*args, **options)

    monkeypatch.setattr(UnconditionalPipeline, "encode", encode_meanwhile)
    words = f"encode {place}/tiny --images {place}/grey/a/0.png --steps 2 --out {out}"
    assert main(words.split()) == 2
    assert "is there already; use another --out" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(out.name, "mine")]
