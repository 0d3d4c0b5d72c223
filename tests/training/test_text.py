"""Text-conditional training: what is trained, what stays as it was, and what the folder says."""

import json
import shutil

import diffusers
import numpy as np
import pytest
from accelerate.state import AcceleratorState

from ddim.checkpoints import file_hash, weight_hash
from ddim.training.config import TrainConfig
from ddim.training.trainer import train

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Silent:
    """In place of tensorboard's writer, whose import warns of its own dependencies."""

    def __init__(self, *args, **kwargs): ...

    def add_scalar(self, *args): ...

    def close(self): ...


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Silent)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """Sixty 16x16 images of a coloured square on black or white, with captions."""
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    images, captions = np.zeros((60, 16, 16, 3), np.uint8), []
    for i, image in enumerate(images):
        name, ground = list(COLOURS)[i % 3], ("black", "white")[i // 3 % 2]
        image[:] = 255 * (ground == "white")
        image[3 + i % 5 : 11 + i % 5, 4:12] = COLOURS[name]
        captions.append(f"a {name} square on a {ground} background")
    np.savez(path, images=images, captions=np.array(captions))
    return path


def config(out, base, data, **options):
    tiny = {"batch_size": 4, "images": 24, "lr_warmup_steps": 2, "validation_images": 6, "checkpoint_every": 2, "log_every": 1}
    return TrainConfig(out=str(out), base=str(base), data=str(data), keep_checkpoints=9, **{**tiny, **options})


def hashes(folder, *parts):
    return {part: file_hash(sorted((folder / part).glob("*.safetensors"))) for part in parts}


def test_one_command_makes_a_zero_snr_v_model_of_an_epsilon_one(tmp_path, tiny_text, squares):
    run = config(tmp_path, tiny_text, squares, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert train(run).finished
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert {name: scheduler[name] for name in ("_class_name", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing")} == {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    assert (scheduler["clip_sample"], scheduler["set_alpha_to_one"], scheduler["steps_offset"]) == (False, True, 1)
    assert (scheduler["beta_schedule"], scheduler["beta_start"], scheduler["beta_end"]) == ("scaled_linear", 0.00085, 0.012)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index == {**json.loads((tiny_text / "model_index.json").read_text()), "_diffusers_version": diffusers.__version__}
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["weight_hash"] == weight_hash(tmp_path)
    assert card["base"] == {"base_class": "StableDiffusionPipeline", "base_weights": weight_hash(tiny_text)}
    assert card["data"]["captions"] == 6
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red square", num_inference_steps=4, guidance_rescale=0.7, output_type="np").images[0]
    assert image.shape == (16, 16, 3)
    assert np.isfinite(image).all()


@pytest.mark.parametrize("cache", ["no", "memory", "disk"])
@pytest.mark.parametrize(
    "options", [{"horizontal_flip": True, "offset_noise": 0.1}, {"train_text_encoder": True, "gradient_checkpointing": True}]
)
def test_a_run_that_is_taken_up_again_ends_in_the_same_weights(tmp_path, tiny_text, squares, cache, options):
    run = config(tmp_path, tiny_text, squares, learning_rate=1e-3, cache_latents=cache, **options)
    whole = train(run)
    before = weight_hash(tmp_path)
    for folder in sorted((tmp_path / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    rest = train(run)
    assert rest.losses == whole.losses[2:]
    assert weight_hash(tmp_path) == before
    assert not (tmp_path / "latents.bin").exists()


def test_only_what_is_trained_changes(tmp_path, tiny_text, squares):
    for along in (False, True):
        out = tmp_path / str(along)
        AcceleratorState._reset_state(reset_partial_state=True)
        train(config(out, tiny_text, squares, learning_rate=1e-3, train_text_encoder=along))
        ours, theirs = (hashes(folder, "unet", "text_encoder", "vae") for folder in (out, tiny_text))
        assert {part for part in ours if ours[part] != theirs[part]} == ({"unet", "text_encoder"} if along else {"unet"})
        assert (out / "tokenizer" / "tokenizer.json").read_bytes() == (tiny_text / "tokenizer" / "tokenizer.json").read_bytes()
        first, last = (out / "checkpoints" / step / "vae" / "diffusion_pytorch_model.safetensors" for step in ("0000002", "0000006"))
        assert first.samefile(last)
        assert not first.samefile(tiny_text / "vae" / first.name)


def test_a_new_network_learns_the_captions(tmp_path, tiny_text, squares):
    run = config(
        tmp_path,
        tiny_text,
        squares,
        from_scratch=True,
        block_out_channels=(16, 32),
        attention_levels=2,
        images=800,
        batch_size=16,
        learning_rate=3e-3,
        cache_latents="memory",
        validation_images=0,
        checkpoint_every=100,
        ema_decay=0.9,
    )
    losses = [loss for _, loss in train(run).losses]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:3])
