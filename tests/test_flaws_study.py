"""The study of docs/flaws.md: three models are measured cell by cell, a run is resumed, and models
that differ in more than their training are refused."""

import json
import shutil

import diffusers
import numpy as np
import pytest
from PIL import Image
from tests.conftest import record, tiny_text_parts

import flaws
from ddim.training.config import TrainConfig
from flaws import find_models, make_prompts
from flaws_report import settings

pytestmark = [
    pytest.mark.slow,
    # The tiny tokenizer reads little, and what it reads matters little here.
    pytest.mark.filterwarnings("ignore:a prompt has"),
]

SCHEDULES = {
    "epsilon": {"prediction_type": "epsilon"},
    "v": {"prediction_type": "v_prediction"},
    "zero-snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three tiny models of 32x32 images that share their weights."""
    folder = tmp_path_factory.mktemp("twins")
    parts = tiny_text_parts(sample_size=16)
    for name, options in SCHEDULES.items():
        scheduler = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            steps_offset=1,
            **options,
        )
        diffusers.StableDiffusionPipeline(
            **parts,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def garments(tmp_path_factory):
    """A few images in the place of Fashion-MNIST's."""
    folder = tmp_path_factory.mktemp("garments")
    images, labels = (
        np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8),
        np.arange(12, dtype=np.uint8) % 10,
    )
    for split in ("train", "t10k"):
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(
                n.to_bytes(4, "big") for n in array.shape
            )
            (folder / f"{split}-{name}-ubyte").write_bytes(header + array.tobytes())
    return folder


@pytest.fixture(autouse=True)
def data(garments, monkeypatch):
    monkeypatch.setenv("DDIM_FASHION_MNIST", str(garments))


def run(models, out, *options):
    given = [word for name in SCHEDULES for word in (f"--{name}", str(models / name))]
    small = ["--steps", "2", "--count", "4", "--unconditional", "3", "--guidance", "1", "7.5"]
    return flaws.main([*given, *small, "--out", str(out), "--device", "cpu", *map(str, options)])


@pytest.fixture(scope="module")
def whole(models, garments, tmp_path_factory):
    out = tmp_path_factory.mktemp("flaws") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDIM_FASHION_MNIST", str(garments))
        assert run(models, out) == 0
    return out


def test_it_writes_a_record_a_table_a_plot_and_a_sheet(whole):
    assert sorted(p.name for p in whole.iterdir() if p.name[0] != ".") == [
        "cells",
        "flaws.md",
        "flaws.png",
        "run.json",
        "sheet.png",
    ]
    found = record(whole)
    kinds = [r["measured"] for r in found["results"]]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "background": 12 * 5,
        "saturation": 4 * 2,
        "unconditional": 6 * 5,
    }
    assert found["protocol"]["command"] == "flaws"
    assert set(found["protocol"]["weight_hash"]) == set(SCHEDULES)
    assert found["seconds"] > 0
    assert "v, zero SNR, trailing, rescale 0.7" in (whole / "flaws.md").read_text()
    for name in ("flaws.png", "sheet.png"):
        with Image.open(whole / name) as picture:
            assert picture.width > 500


def test_no_two_settings_are_the_same_images(whole):
    found = {}
    for r in record(whole)["results"]:
        if r["measured"] == "background":
            found.setdefault((r["model"], r["spacing"], r["guidance_rescale"]), []).append(
                r["brightness"]
            )
    assert len(found) == 12
    assert len({tuple(values) for values in found.values()}) == 12
    saturated = [
        (r["contrast"], r["guidance_rescale"])
        for r in record(whole)["results"]
        if r["measured"] == "saturation"
    ]
    assert (
        len({contrast for contrast, _ in saturated}) == 6
    )  # without guidance the rescale does nothing


def test_the_theory_knows_that_zero_terminal_snr_costs_nothing_at_the_last_level(whole):
    for r in record(whole)["results"]:
        if r["measured"] == "unconditional" and r["bias_in_theory"] is not None:
            assert (r["factor_in_theory"] == pytest.approx(1)) == (
                r["model"] == "zero-snr" and r["spacing"] == "trailing"
            )


def test_what_is_missing_is_measured_again_to_the_same_numbers(whole, models, tmp_path, capsys):
    out = tmp_path / "again"
    shutil.copytree(whole, out)
    (out / "cells" / "saturation-zero-snr-trailing-0.json").unlink()
    (out / "cells" / "unconditional-v-leading-0.json").unlink()
    assert run(models, out, "--batch-size", 2) == 0
    told = capsys.readouterr().out
    assert "2 of 2" in told
    for ours, theirs in zip(record(out)["results"], record(whole)["results"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value == (
                pytest.approx(theirs[key], abs=1e-4) if isinstance(value, float) else theirs[key]
            )


def test_a_run_that_finds_all_there_keeps_the_times_of_the_one_that_measured(
    whole, models, tmp_path
):
    out = tmp_path / "all"
    shutil.copytree(whole, out)
    assert run(models, out) == 0
    assert record(out) == record(whole)


def test_an_interrupted_run_leaves_whole_cells_and_is_gone_on_with(
    models, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "broken"
    with monkeypatch.context() as patch:

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(flaws.Bench, "saturation", stop)
        assert run(models, out) == 130
    assert "resumes from what is there" in capsys.readouterr().err
    assert len(list((out / "cells").glob("*.json"))) == len(settings(0.7))
    assert {r["measured"] for r in record(out)["results"]} == {"background"}
    assert not list(out.rglob("*.partial"))
    assert run(models, out) == 0
    assert "10 of 10" in capsys.readouterr().out


def test_a_folder_of_another_protocol_is_refused(whole, models, capsys):
    before = record(whole)
    assert run(models, whole, "--seed", 5) == 2
    assert (
        "holds results of another protocol: seed is 0 there and 5 here" in capsys.readouterr().err
    )
    assert record(whole) == before


def test_models_in_wrong_places_and_strangers_are_refused(models, tiny, tmp_path, capsys):
    assert run(models, tmp_path / "a", "--v", models / "zero-snr") == 2
    assert (
        "should be the model of v, leaky, but its scheduler says v_prediction, zero SNR"
        in capsys.readouterr().err
    )
    assert run(models, tmp_path / "b", "--v", tiny) == 2
    assert "is a model without text" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(models / "v", other)
    weights = next((other / "vae").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    assert run(models, tmp_path / "c", "--v", other) == 2
    assert "is not that of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--count", "0"), "--count must be at least 1; got 0"),
        (
            ("--guidance", "0.5", "2"),
            "--guidance and --guidance-scale must be at least 1, which means no guidance",
        ),
        (("--guidance-rescale", "0"), "--guidance-rescale must lie in"),
        (("--epsilon", "nowhere"), "neither an embedded model nor an existing folder"),
    ],
)
def test_bad_input_is_told_in_one_sentence(models, tmp_path, capsys, options, text):
    assert run(models, tmp_path / "out", *options) == 2
    told = capsys.readouterr().err
    assert text in told
    assert told.count("\n") == 1


def test_models_that_are_not_named_are_trained_from_one_base(models, tmp_path, monkeypatch):
    asked = {}

    def train(config: TrainConfig, **_):
        asked[config.out.rsplit("/", 1)[1]] = config
        shutil.copytree(models / config.out.rsplit("/", 1)[1], config.out)
        (tmp_path / "out" / "models" / config.out.rsplit("/", 1)[1] / "card.json").write_text(
            json.dumps({"config": {"images": config.images}})
        )
        return type("Result", (), {"finished": True})

    monkeypatch.setattr("ddim.training.trainer.train", train)
    command, out = (
        flaws.Options(base=str(models / "zero-snr"), train_images=640, v=str(models / "v")),
        tmp_path / "out",
    )
    assert find_models(command, out) == {
        "epsilon": out / "models" / "epsilon",
        "v": models / "v",
        "zero-snr": out / "models" / "zero-snr",
    }
    assert {
        name: (c.prediction_type, c.rescale_betas_zero_snr, c.images, c.base, c.from_scratch)
        for name, c in asked.items()
    } == {
        "epsilon": ("epsilon", False, 640, str(models / "zero-snr"), True),
        "zero-snr": ("v_prediction", True, 640, str(models / "zero-snr"), True),
    }
    options = [
        {
            k: v
            for k, v in vars(c).items()
            if k not in ("out", "prediction_type", "rescale_betas_zero_snr")
        }
        for c in asked.values()
    ]
    assert options[0] == options[1]
    asked.clear()
    find_models(command, out)
    assert asked == {}


def test_colours_and_garments_do_not_go_in_step():
    found = make_prompts(60, ("black",))
    assert len({(c.colour, c.garment) for c in found}) == 60
    three = make_prompts(64, ("dark gray", "gray", "light gray"))
    assert {c.background for c in three} == {"dark gray", "gray", "light gray"}
