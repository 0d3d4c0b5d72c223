"""The commands, end to end: train on real digits for seconds, sample what came out, and refuse what
is wrong."""

import importlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from ddim.cli import COMMANDS, main
from ddim.options import option_names

TRAIN = [
    "train",
    "--data",
    "digits",
    "--block-out-channels",
    "8,16",
    "--batch-size",
    "8",
    "--images",
    "64",
]
TRAIN += [
    "--checkpoint-every",
    "4",
    "--log-every",
    "2",
    "--validation-images",
    "32",
    "--lr-warmup-steps",
    "2",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory, silent_log):
    out = tmp_path_factory.mktemp("run") / "digits"
    assert main([*TRAIN, "--out", str(out)]) == 0
    return out


def read(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.slow
def test_training_writes_a_model_that_plain_diffusers_samples_without_ddim(model):
    card = json.loads((model / "card.json").read_text())
    assert card["images_seen"] == 64
    assert card["command"].startswith("ddim")
    code = (
        "import sys, diffusers; p = diffusers.DDIMPipeline.from_pretrained(sys.argv[1]);"
        "p.set_progress_bar_config(disable=True); p(num_inference_steps=2); assert 'ddim' not in "
        "sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(model)], check=True, capture_output=True)


def test_a_stopped_run_resumes_to_the_same_losses_bit_by_bit(model, tmp_path):
    from ddim.training.config import TrainConfig
    from ddim.training.trainer import train

    config = json.loads((model / "card.json").read_text())["config"]
    config |= {"block_out_channels": tuple(config["block_out_channels"]), "dropout": 0.1}
    whole = train(TrainConfig(out=str(tmp_path / "a"), **config))
    shutil.rmtree(tmp_path / "a" / "checkpoints" / f"{whole.step:07d}")
    rest = train(TrainConfig(out=str(tmp_path / "a"), **config))
    assert len(rest.losses) == 4
    assert rest.losses == whole.losses[-4:]


def test_a_seed_is_one_image_whatever_the_batch_and_missing_ones_are_added(model, tmp_path, capsys):
    common = ["sample", str(model), "--steps", "4", "--eta", "1"]
    assert main([*common, "--count", "5", "--batch-size", "5", "--out", str(tmp_path / "a")]) == 0
    assert (
        main(
            [
                *common,
                "--count",
                "2",
                "--seed",
                "3",
                "--batch-size",
                "1",
                "--out",
                str(tmp_path / "b"),
            ]
        )
        == 0
    )
    for name in ("000003.png", "000004.png"):
        assert np.abs(read(tmp_path / "a" / name) - read(tmp_path / "b" / name)).max() <= 1
    capsys.readouterr()
    assert main([*common, "--count", "6", "--out", str(tmp_path / "a")]) == 0
    assert "1 image drawn, 5 were there" in capsys.readouterr().out
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["results"][5] == {"seed": 5, "file": "000005.png"}
    assert record["evaluations"] == 4
    assert (tmp_path / "a" / "grid.png").exists()
    assert main([*common[:2], "--steps", "5", "--out", str(tmp_path / "a")]) == 2
    assert "holds results of another protocol: timesteps is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "there is no command 'dance'; the commands are sample, train,"),
        (["sampel"], "there is no command 'sampel'; did you mean sample?"),
        (
            ["evaluate", "--repeats", "2", "m", "--reference", "x"],
            "there is no option --repeats; `ddim evaluate --help` lists the options.",
        ),
        (
            ["evaluate", "--referense", "x"],
            "there is no option --referense; did you mean --reference?",
        ),
        (["evaluate"], "SAMPLES_OR_MODEL and --reference must be given"),
        (["evaluate", "--reference", "x"], "SAMPLES_OR_MODEL must be given"),
        (["convert", "x"], "OUT must be given"),
        (["train", "--preset", "few-pictures"], "--data must be given"),
        (["sample", "nowhere"], "'nowhere' is neither an embedded model nor an existing folder"),
        (["sample", "--count", "0"], "must be at least 1; got 0"),
        (["sample", "--seed", "-1"], "--seed must be at least 0; got -1."),
        (["sample", "--eta", "-1"], "eta must be from 0 to 100"),
        (["sample", "--eta", "much"], "--eta: it must be a number or sigma-hat; got 'much'"),
        (["sample", "--steps", "1001"], "from 1 to 1000"),
        (["sample", "--steps", "few"], "--steps: it must be a whole number; got 'few'"),
        (["train", "--preset", "mars"], "fashion-text-epsilon, digits; got 'mars'"),
        (["train", "--data", "./none", "--out", "x"], "there is no data at './none'"),
        (
            ["train", "--data", "digits", "--out", "x", "--rescale-betas-zero-snr"],
            "epsilon prediction cannot be trained at zero terminal SNR",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert [p for p in tmp_path.rglob("*") if p.suffix in (".png", ".json")] == []


def test_damaged_weights_are_named(model, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    assert main(["sample", str(broken), "--out", str(tmp_path / "o")]) == 2
    assert "is damaged or cut off" in capsys.readouterr().err


def test_help_and_import_need_neither_torch_nor_diffusers():
    code = (
        "import sys, ddim, ddim.cli; ddim.cli.main(['--help']); assert not {'torch', 'diffusers', "
        "'tyro'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_options_that_messages_know_are_those_of_the_help(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    told = capsys.readouterr().out
    assert not re.search(r"default: (unset|None)|default:\s*\)", told)
    listed = re.findall(r"^\W*(--[a-z][\w-]*)", told, re.MULTILINE)
    command = importlib.import_module(f"ddim.cli.{name.replace('-', '_')}").Request
    assert set(option_names(command)) == set(listed)


def test_float32_is_float32_once_a_command_has_its_device():
    """Torch's default lets GPUs round float32 numbers to TF32; tests/test_cuda.py shows what
    follows from it."""
    import torch

    from ddim.runs.model import find_device

    kept = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        find_device("cpu")
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cudnn.allow_tf32 = kept[0]
        torch.set_float32_matmul_precision(kept[1])


@pytest.fixture(scope="module")
def broken(tmp_path_factory, tiny):
    """A model with one weight of NaN, a picture, data and a folder to work in."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(tiny, folder / "model")
    path = folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    safetensors.torch.save_file(weights, path)
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images)
    Image.fromarray(images[0]).save(folder / "a.png")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        "sample model",
        "encode model --images a.png --out code",
        "interpolate model --seeds 1,2",
        "reconstruct model --data data.npz --count 2",
        "consistency model",
        "evaluate model --reference data.npz --count 20 --metrics kid-pixels",
        "table model --reference data.npz --count 20 --metrics kid-pixels",
        "fit-steps model",
        "doctor model --data data.npz --probe",
        "doctor model --show x.png",
    ],
)
def test_weights_that_are_no_numbers_get_one_refusal_and_leave_nothing(
    arguments, broken, monkeypatch, capsys
):
    monkeypatch.chdir(broken)
    before = sorted(broken.rglob("*"))
    assert main(arguments.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("ddim: the weight conv_in.weight of model is NaN or infinite in torch.f")
    assert told.count("\n") == 1
    assert sorted(broken.rglob("*")) == before
