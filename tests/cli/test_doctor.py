import itertools
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tests.conftest import edit

import ddim
from ddim.cli import main
from ddim.configuration import noise_schedule
from ddim.data.fashion_text import FashionText
from ddim.models.checkpoints import resolve_model
from ddim.training.config import TrainConfig
from ddim.training.package import make_scheduler

DATA = Path(__file__).parents[1] / "data"
CONFIGS = DATA / "scheduler_configs"
ZOO = resolve_model("fashion-text").parent
SD = CONFIGS / "stable-diffusion-v1-5.json"
SOUND = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
SOUND |= {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
FASHION = str(DATA / "fashion_mnist_2048.npz")


@pytest.fixture
def config(tmp_path):
    """Writes a configuration and returns its path."""

    def write(**keys):
        path = tmp_path / "scheduler_config.json"
        path.write_text(json.dumps(SOUND | keys))
        return str(path)

    return write


def findings(capsys, *arguments):
    code = main(["doctor", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_exit_code_tells_errors_and_strictly_warnings(config, capsys):
    assert findings(capsys, config(), "--steps", 50, "--strict")[0] == 0
    assert findings(capsys, SD)[0] == 0
    assert findings(capsys, SD, "--strict")[0] == 1
    code, content = findings(capsys, config(prediction_type="epsilon"), "--steps", 50)
    assert code == 1
    (error,) = (f for f in content["findings"] if f["severity"] == "error")
    assert {"code", "severity", "message", "evidence", "fix"} <= set(error)
    assert "(DDIM006)" in content["verdict"]
    assert content["python"].endswith("rescale_betas_zero_snr=False)")
    assert error["code"] == "DDIM006"
    assert findings(capsys, config(), "--steps", 50, "--eta", "1.5")[0] == 1


def test_the_report_is_for_people(capsys):
    assert main(["doctor", str(SD), "--steps", "50"]) == 0
    told = capsys.readouterr().out
    verdict, _, loads, python = told.splitlines()[:4]
    assert loads == "import ddim"
    assert verdict.startswith(
        "What should be dark comes out too bright, by about 47 of 255 grey levels, and all"
    )
    assert python == (
        "pipe.scheduler = ddim.DDIMScheduler.from_config(pipe.scheduler.config, "
        "set_alpha_to_one=True, timestep_spacing='trailing')"
    )
    assert "warning DDIM001  The terminal SNR is 0.004682, not 0" in told
    assert 'Fix: timestep_spacing="trailing"' in told
    assert "0 errors, 2 warnings, 2 notes." in told
    assert "\x1b" not in told


@pytest.mark.parametrize(
    ("terminal", "refused", "coloured"),
    [(True, None, True), (True, "1", False), (False, None, False)],
)
def test_colours_are_for_terminals(terminal, refused, coloured, config, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if refused:
        monkeypatch.setenv("NO_COLOR", refused)
    assert main(["doctor", config(prediction_type="epsilon"), "--steps", "61"]) == 1
    told = capsys.readouterr().out
    assert ("\x1b[31merror DDIM006\x1b[0m  The terminal SNR is 0" in told) is coloured
    assert ("\x1b" in told) is coloured


def test_a_fix_goes_into_a_folder_with_the_spacing_that_was_asked_for_and_what_it_takes_for_granted(
    config, tmp_path, capsys
):
    (tmp_path / "fixed").mkdir()
    source = config(prediction_type="epsilon", timestep_spacing="leading")
    assert (
        main(
            [
                "doctor",
                source,
                "--steps",
                "50",
                "--spacing",
                "trailing",
                "--fix",
                str(tmp_path / "fixed"),
            ]
        )
        == 1
    )
    told = capsys.readouterr().out
    written = json.loads((tmp_path / "fixed" / "scheduler_config.json").read_text())
    assert written == json.loads(Path(source).read_text()) | {
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": False,
    }
    assert "DDIM006: If it was trained on these betas, keep them and start below 999" in told


def test_a_fix_makes_the_folder_that_is_named_and_says_what_to_do_with_it(tmp_path, capsys):
    assert main(["doctor", str(SD), "--fix", f"{tmp_path / 'none' / 'fixed'}/"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["doctor", str(SD), "--fix", f"{tmp_path / 'fixed'}/"]) == 0
    told = capsys.readouterr().out
    opened = re.search(r'ddim.DDIMScheduler.from_pretrained\("(.*?)"\)', told)
    scheduler = ddim.DDIMScheduler.from_pretrained(opened[1])
    assert scheduler.config.timestep_spacing == "trailing"
    assert main(["doctor", str(SD), "--fix", str(tmp_path / "fixed.json")]) == 0
    assert "put it in the place of the model's scheduler/" in capsys.readouterr().out
    assert main(["doctor", str(SD), "--fix", f"{tmp_path / 'fixed.json'}/"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_text_model_without_a_record_is_probed_on_the_latents_of_pictures(tmp_path, capsys):
    """The dark checkpoint whose weights are right and whose configuration is not."""
    model = tmp_path / "model"
    shutil.copytree(ZOO / "fashion-text", model)
    (model / "card.json").unlink()
    edit(model / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=False)
    asked = (model, "--steps", 20, "--device", "cpu", "--probe", "--data")
    code, content = findings(capsys, *asked, fashion_text_pictures(tmp_path))
    assert code == 0
    assert content["probe"]["prediction_type"] == "v_prediction"
    assert content["probe"]["zero_terminal_snr"] is True
    assert "DDIM019" in content["verdict"]
    assert content["python"].endswith(".config, rescale_betas_zero_snr=True)")


def fashion_text_pictures(folder):
    with np.load(FASHION) as arrays:
        data = FashionText.of_garments(arrays["train_images"], arrays["train_labels"])
    np.savez(folder / "pictures.npz", images=np.stack([data[i] for i in range(len(data))]))
    return folder / "pictures.npz"


def test_a_probe_of_latents_refuses_what_it_cannot_tell(tiny_text, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=np.zeros((9, 16, 16, 3), np.uint8))
    data = ("--data", str(tmp_path / "a.npz"))
    ldm = tmp_path / "ldm"
    shutil.copytree(tiny_text, ldm)
    edit(ldm / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    for model, options, told in (
        (tiny_text, data, "leave it out, or ask the network about the images with --probe."),
        (tiny_text, (*data, "--probe", "--prior", str(tmp_path / "x")), "--prior measures the"),
        (tiny_text, ("--probe",), "--probe acts only with --data"),
        (tiny_text, ("--device", "cpu"), "--device acts only with --show or --probe"),
        (ldm, (*data, "--probe"), "ldm is a StableDiffusionInpaintPipeline. Leave it out."),
    ):
        assert main(["doctor", str(model), *options]) == 2
        assert told in capsys.readouterr().err


def test_a_fix_is_written_once_shown_and_leaves_training_to_its_owner(tmp_path, capsys):
    out = tmp_path / "fixed.json"
    assert main(["doctor", str(SD), "--fix", str(out)]) == 0
    told = capsys.readouterr().out
    assert '+  "timestep_spacing": "trailing",' in told
    assert (
        "DDIM001 needs a network that is trained anew, and is left as it is: "
        'rescale_betas_zero_snr=true, prediction_type="v_' in told
    )
    before, after = json.loads(SD.read_text()), json.loads(out.read_text())
    assert after == {**before, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    assert main(["doctor", str(SD), "--fix", str(out)]) == 2
    assert "is there already, and is not overwritten" in capsys.readouterr().err
    assert main(["doctor", str(out), "--fix", str(tmp_path / "again.json")]) == 0
    told = capsys.readouterr().out
    assert "nothing to change without training" in told
    assert [
        line
        for line in told.splitlines()
        if line.startswith("  Fix: ") and "trained anew" not in line
    ] == []
    assert not (tmp_path / "again.json").exists()


def test_a_fix_tells_what_gets_worse_by_it(config, tmp_path, capsys):
    out = tmp_path / "fixed.json"
    assert (
        main(["doctor", config(prediction_type="epsilon"), "--steps", "50", "--fix", str(out)]) == 1
    )
    told = capsys.readouterr().out.splitlines()
    assert (
        sum(
            line.startswith(
                "The fix makes what is predicted worse (brightness bias from +0.000 to +0.3"
            )
            for line in told
        )
        == 1
    )
    assert "DDIM001 needs a network that is trained anew" in "\n".join(told)
    assert main(["doctor", str(out), "--steps", "50", "--fix", str(tmp_path / "again.json")]) == 0
    assert not (tmp_path / "again.json").exists()


def test_models_of_text_are_not_advised_what_sample_refuses_them(tiny, tiny_text, capsys):
    assert main(["doctor", str(tiny_text), "--steps", "50"]) == 0
    told = capsys.readouterr().out
    assert "warning DDIM001" in told
    assert "--prior" not in told
    assert (
        "ddim train --base MODEL --data CAPTIONED --prediction-type v_prediction "
        "--rescale-betas-zero-snr" in told
    )
    assert main(["doctor", str(tiny), "--steps", "50", "--brightness", "-0.9,0.9"]) == 0
    assert "Without training: ddim sample --prior data" in capsys.readouterr().out


def test_a_file_that_is_not_there_is_called_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub")
    )
    monkeypatch.chdir(tmp_path)
    for name in ("nothere.json", "folder/nothere.json"):
        assert main(["doctor", name]) == 2
        assert capsys.readouterr().err == f"ddim: there is no file {name}; check the path.\n"


def test_folders_embedded_models_and_training_runs_are_read(tiny, foreign, tmp_path, capsys):
    assert findings(capsys, tiny)[1]["summary"]["prediction_type"] == "v_prediction"
    assert findings(capsys, foreign)[1]["summary"]["brightness"]["dimensions"] == 3 * 8 * 8
    code, content = findings(capsys, "fashion-mnist", "--steps", 50, "--strict")
    assert code == 0
    assert [f["code"] for f in content["findings"]] == [
        "DDIM001"
    ]  # linear betas at 28x28: too little to be seen
    zoo = Path(__import__("ddim").__file__).parent / "zoo" / "fashion-mnist"
    assert findings(capsys, zoo / "card.json")[1]["summary"]["beta_schedule"] == "linear"
    run = tmp_path / "run"
    shutil.copytree(zoo, run)
    path = run / "scheduler" / "scheduler_config.json"
    edit(path, beta_schedule="scaled_linear")
    code, content = findings(capsys, run)
    (found,) = (f for f in content["findings"] if f["code"] == "DDIM019")
    assert found["fix"] == {"beta_schedule": "linear"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "sigmoid", "num_train_timesteps": 300},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "beta_end": 0.01},
    ],
)
def test_the_schedule_of_a_training_run_is_that_of_the_scheduler_it_writes(
    options, tmp_path, capsys
):
    config = TrainConfig(out="x", data="digits", **options)
    scheduler = make_scheduler(config).config
    card = asdict(config) | {name: scheduler[name] for name in asdict(config) if name in scheduler}
    for name, content in {"card.json": {"config": card}, "bare.json": asdict(config)}.items():
        (tmp_path / name).write_text(json.dumps(content))
        summary = findings(capsys, tmp_path / name, "--steps", 10)[1]["summary"]
        expected = noise_schedule(scheduler)
        assert summary["levels"] == len(expected)
        assert summary["prediction_type"] == scheduler.prediction_type
        assert summary["terminal_snr"] == pytest.approx(float(expected.snr(len(expected) - 1)))
        assert summary["timestep_spacing"] == "trailing"


def test_latents_are_known_by_the_autoencoder(tiny, tmp_path, capsys):
    model = tmp_path / "latent"
    shutil.copytree(tiny, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(
        json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]})
    )
    path = model / "scheduler" / "scheduler_config.json"
    edit(path, clip_sample=True)
    assert "DDIM009" in [
        f["code"] for f in findings(capsys, model)[1]["findings"] if f["severity"] == "warning"
    ]
    assert main(["doctor", str(model), "--data", FASHION]) == 2
    assert "this model works on latents" in capsys.readouterr().err


def test_data_that_are_sorted_are_seen_from_end_to_end(tmp_path, capsys):
    """1,024 dark images and then 1,023 light ones; the first 1,024 would be dark alone."""
    levels = np.repeat([20, 220], [1024, 1023]).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=np.tile(levels[:, None, None], (1, 28, 28)))
    data = ("--data", tmp_path / "a.npz")
    code, content = findings(capsys, "fashion-mnist", "--steps", 50, *data)
    brightness = content["summary"]["brightness"]
    pixels = levels / 127.5 - 1
    assert brightness["mean"] == pytest.approx(pixels.mean(), abs=0.05)
    assert brightness["std"] == pytest.approx(pixels.std(), abs=0.01)


def test_data_are_brought_to_the_shape_of_the_model(tiny, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    path = model / "unet" / "config.json"
    edit(path, sample_size=[16, 24])
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 48), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    prior = tmp_path / "prior.json"
    data = ("--data", tmp_path / "a.npz", "--prior", prior)
    assert findings(capsys, model, "--steps", 50, *data)[0] == 0
    assert np.shape(json.loads(prior.read_text())["image"]) == (1, 16, 24)


def test_labels_that_the_probed_network_does_not_know_are_refused(tiny_classes, tmp_path, capsys):
    for labels, text in ((np.arange(5) + 1, "got 5"), (None, "has no labels")):
        arrays = {"images": np.zeros((5, 8, 8), np.uint8)} | (
            {} if labels is None else {"labels": labels}
        )
        np.savez(tmp_path / "a.npz", **arrays)
        command = ["doctor", str(tiny_classes), "--data", str(tmp_path / "a.npz"), "--probe"]
        assert main(command) == 2
        assert text in capsys.readouterr().err


def test_data_tell_brightness_a_prior_and_what_the_network_is(tmp_path, capsys):
    prior = tmp_path / "prior.json"
    code, content = findings(
        capsys, "fashion-mnist", "--steps", 50, "--data", FASHION, "--prior", prior, "--probe"
    )
    assert code == 0
    assert content["probe"]["prediction_type"] == "epsilon"
    assert content["summary"]["brightness"]["whole_images"]
    assert not content["summary"]["brightness"]["assumed"]
    assert content["summary"]["brightness"]["mean"] == pytest.approx(-0.43, abs=0.02)
    common = ["sample", "fashion-mnist", "--count", "2", "--timesteps", "600,200"]
    assert main([*common, "--out", str(tmp_path / "a")]) == 0
    assert main([*common, "--out", str(tmp_path / "b"), "--prior", str(prior)]) == 0
    assert (
        main([*common, "--out", str(tmp_path / "c"), "--prior", "data"]) == 0
    )  # of all images, stored with the model
    a, b = (np.asarray(Image.open(tmp_path / name / "000000.png")).astype(int) for name in "ab")
    assert a.mean() > b.mean() + 5  # the images of Fashion-MNIST are dark
    assert json.loads((tmp_path / "b" / "run.json").read_text())["protocol"]["prior"]["mean"] == [
        pytest.approx(-0.43, abs=0.02)
    ]
    capsys.readouterr()
    assert main([*common, "--out", str(tmp_path / "b")]) == 2
    assert "prior is" in capsys.readouterr().err


def test_no_file_is_overwritten_nor_named_twice(config, tmp_path, capsys):
    mine = tmp_path / "mine.png"
    mine.write_text("mine")
    for options, told in (
        (("--plot", mine), "mine.png is there already, and is not overwritten"),
        (("--show", mine), "mine.png is there already, and is not overwritten"),
        (("--plot", tmp_path / "x", "--fix", tmp_path / "x"), "is named for two files"),
        (("--plot", tmp_path / "none" / "x.png"), "there is no folder"),
    ):
        assert main(["doctor", config(), *map(str, options)]) == 2
        assert told in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_a_plot_is_drawn_for_every_schedule(config, tmp_path, capsys):
    assert main(["doctor", config(), "--steps", "10", "--plot", str(tmp_path / "plot.png")]) == 0
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size[0] > 1000
        colours = {
            colour
            for _, colour in plot.convert("RGB").quantize(64).convert("RGB").getcolors(1 << 20)
        }
    assert len(colours) > 4  # the curves of four spacings, and not white alone
    assert (
        main(
            [
                "doctor",
                str(CONFIGS / "black-forest-labs_FLUX.1-dev.json"),
                "--plot",
                str(tmp_path / "none.png"),
            ]
        )
        == 0
    )
    assert "There is no plot" in capsys.readouterr().out
    assert not (tmp_path / "none.png").exists()


def test_a_model_of_the_hub_is_read_by_its_configurations_alone(tiny, capsys, monkeypatch):
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    code, content = findings(capsys, "owner/model", "--steps", 50)
    assert (code, content["source"], content["summary"]["prediction_type"]) == (
        0,
        "owner/model",
        "v_prediction",
    )
    ((name, patterns),) = asked
    assert name == "owner/model"
    assert all(pattern.endswith(".json") for pattern in patterns)


def test_a_model_of_the_hub_is_probed_with_its_weights(tiny, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(tiny))
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda name, **options: str(tiny))
    code, content = findings(capsys, "owner/model", "--steps", 50, "--data", FASHION, "--probe")
    assert content["probe"]["prediction_type"] is None  # of random weights
    assert "DDIM021" in [f["code"] for f in content["findings"]]


def test_a_hub_that_cannot_be_reached_is_one_sentence(capsys, monkeypatch):
    def fail(name, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert main(["doctor", "owner/model"]) == 2
    told = capsys.readouterr().err
    assert "'owner/model' is neither an embedded model nor an existing file or folder" in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"beta_start": 0.1', "cannot be read as JSON"),
        ("[]", "must hold a JSON object; got list"),
        ('{"beta_strat": 1}', "unknown key 'beta_strat'; did you mean 'beta_start'?"),
        ('{"trained_betas": [NaN]}', "trained_betas[0] must be a number from 0 to 1; got nan"),
    ],
)
def test_a_damaged_configuration_is_refused_and_nothing_is_written(
    content, message, tmp_path, capsys
):
    (tmp_path / "config.json").write_text(content)
    assert main(["doctor", str(tmp_path / "config.json"), "--fix", str(tmp_path / "out.json")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--brightness", "nan,0.1"), "--brightness must be a finite number; got nan."),
        (("--probe",), "--probe acts only with --data"),
        (("--prior", "x.json"), "--prior acts only with --data"),
        (("--brightness", "0.1"), "--brightness must be MEAN,STD"),
        (("--steps", "0"), "--steps must be at least 1; got 0."),
        (("--eta", "-1"), "eta must be from 0 to 100"),
        (
            ("--data", FASHION, "--probe"),
            "stable-diffusion-v1-5.json is a configuration or a single",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, capsys):
    assert main(["doctor", str(SD), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_scheduler_is_refused(tiny, tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "is a folder without model_index.json" in capsys.readouterr().err
    shutil.copytree(tiny, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "scheduler")
    assert main(["doctor", str(tmp_path / "model")]) == 2
    assert "holds no scheduler/scheduler_config.json" in capsys.readouterr().err


def test_a_prior_that_is_missing_is_told_with_the_way_to_one(tiny, tmp_path, capsys):
    assert main(["sample", str(tiny), "--prior", "data", "--out", str(tmp_path)]) == 2
    assert "there is no prior at" in capsys.readouterr().err


WEIGHTS = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}
EMPTY = torch.zeros(0)


@pytest.mark.parametrize(
    ("names", "metadata", "fix"),
    [
        (
            ("v_pred", "ztsnr"),
            {},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        (("v_pred",), None, {"prediction_type": "v_prediction"}),
        ((), {"v_pred": "true"}, {"prediction_type": "v_prediction"}),
        (
            (),
            {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
    ],
)
def test_a_single_file_is_read_by_its_header(names, metadata, fix, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({**WEIGHTS, **dict.fromkeys(names, EMPTY)}, path, metadata=metadata)
    code, content = findings(capsys, path, "--steps", 30)
    (found,) = (f for f in content["findings"] if f["code"] == "DDIM019")
    assert (code, found["fix"]) == (1, fix)
    assert "declares prediction_type=v_prediction" in content["declares"]
    assert "prediction_type='v_prediction'" in content["python"]
    assert "DDIM019" in content["verdict"]
    assert main(["doctor", str(path), "--steps", "30"]) == 1
    assert "plain diffusers does not read that" in capsys.readouterr().out


def test_files_that_declare_nothing_or_are_no_checkpoints_are_told_apart(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(WEIGHTS, path)
    code, content = findings(capsys, path, "--steps", 30)
    assert (code, content["summary"]["prediction_type"]) == (0, "epsilon")
    assert "declares neither" in content["declares"]
    safetensors.torch.save_file({**WEIGHTS, "edm_mean": EMPTY}, path)
    assert [f["code"] for f in findings(capsys, path)[1]["findings"]] == ["DDIM018"]
    safetensors.torch.save_file({"decoder.weight": EMPTY}, path)
    assert main(["doctor", str(path)]) == 2
    assert "weights that say nothing of a noise schedule" in capsys.readouterr().err
    path.write_bytes(b"0123456789")
    assert main(["doctor", str(path)]) == 2
    assert "is damaged or cut off" in capsys.readouterr().err
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert main(["doctor", str(tmp_path / "model.ckpt")]) == 2
    assert "is a pickled file" in capsys.readouterr().err


def test_the_same_seeds_are_drawn_as_configured_and_with_each_fix(tmp_path, capsys):
    """Of the embedded model with a planted flaw: a single leading step returns its noise."""
    zoo = Path(__import__("ddim").__file__).parent / "zoo" / "fashion-mnist"
    model, picture = tmp_path / "model", tmp_path / "before-after.png"
    shutil.copytree(zoo, model)
    path = model / "scheduler" / "scheduler_config.json"
    edit(path, timestep_spacing="leading")
    asked = ["doctor", str(model), "--steps", "1", "--count", "3", "--device", "cpu"]
    assert main([*asked, "--show", str(picture)]) == 1
    told = capsys.readouterr().out
    assert told.startswith("Your pictures are noise")
    assert "The same seeds as configured and with each fix are in" in told
    with Image.open(picture) as opened:
        rows = np.asarray(opened.convert("L")).astype(int)[18:]  # below the names of columns
    height = (rows.shape[0]) // 2  # two rows, each under its label
    before, after = (rows[n * height + 20 : (n + 1) * height - 2, 4:260] for n in (0, 1))
    # Noise is as bright as dark everywhere; of garments the edges are dark.
    assert 115 < before.mean() < 140
    assert before[:, :30].mean() > after[:, :30].mean() + 25
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("before")] == [picture.name]
    assert main([*asked, "--show", str(picture)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((str(SD), "--show", "x.png"), "--show draws images, and"),
        (("fashion-mnist", "--prompt", "a"), "--prompt acts only with --show"),
        (("fashion-mnist", "--count", "3"), "--count acts only with --show"),
        (("fashion-mnist", "--show", "x.png", "--count", "99"), "--count must be from 1 to 16"),
        (("fashion-mnist", "--show", "x.png", "--prompt", "a"), "--prompt is for text-to-image"),
    ],
)
def test_show_refuses_what_cannot_be_shown(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_text_models_are_shown_with_a_prompt(tiny_text, tmp_path, capsys):
    picture = tmp_path / "x.png"
    asked = ["doctor", str(tiny_text), "--steps", "2", "--count", "2", "--show", str(picture)]
    assert main(asked) == 2
    assert "give --prompt TEXT" in capsys.readouterr().err
    for count, prompts in enumerate((["a red sneaker"], ["a red sneaker", "a bag"]), start=1):
        picture.unlink(missing_ok=True)
        told = [word for prompt in prompts for word in ("--prompt", prompt)]
        assert main([*asked, *told, "--device", "cpu"]) == 0
        with Image.open(picture) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        width = pixels.shape[1] // (2 * count)  # two seeds of each prompt
        shown = [pixels[-40:, n * width + 4 : (n + 1) * width - 4] for n in range(2 * count)]
        assert all((a != b).any() for a, b in itertools.combinations(shown, 2))
