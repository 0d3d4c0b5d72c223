"""Text-conditional training: what is trained, what stays as it was, and what the folder says."""

import json
import shutil
import signal
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.conftest import edit, thinned

from ddim.cli.train import _tell_end
from ddim.configuration import noise_schedule
from ddim.core.denoiser import ModelDenoiser
from ddim.core.noise import seeded_randn
from ddim.core.sampler import sample
from ddim.core.schedule import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from ddim.core.timesteps import select_timesteps, step_pairs
from ddim.errors import DataError, DDIMError
from ddim.files import file_hash
from ddim.models.checkpoints import configuration_hash, weight_hash
from ddim.training import loop, text, trainer
from ddim.training.base import open_base
from ddim.training.config import TrainConfig
from ddim.training.division import Piece
from ddim.training.draws import Draws
from ddim.training.package import make_scheduler
from ddim.training.trainer import train

DATA = Path(__file__).parents[1] / "data"
SHIFTED = {"horizontal_flip": True, "offset_noise": 0.1}
ALL_TRAINED = {"train_text_encoder": True, "gradient_checkpointing": True}
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """Sixty 16x16 images of a coloured square on black or white, with captions."""
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    images, captions = np.zeros((60, 16, 16, 3), np.uint8), []
    for i, image in enumerate(images):
        name, ground = list(COLOURS)[i % 3], ("black", "white")[i // 3 % 2]
        image[:] = 255 * (ground == "white")
        image[3 + i % 5 : 11 + i % 5, 2:10] = COLOURS[name]  # its mirror image is another
        captions.append(f"a {name} square on a {ground} background")
    np.savez(path, images=images, captions=np.array(captions))
    return path


def config(out, base, data, **options):
    tiny = {
        "batch_size": 4,
        "images": 24,
        "lr_warmup_steps": 2,
        "validation_images": 6,
        "checkpoint_every": 2,
        "log_every": 1,
        "preview_every": 0,
    }
    return TrainConfig(
        out=str(out), base=str(base), data=str(data), keep_checkpoints=9, **{**tiny, **options}
    )


def first_batches(run, monkeypatch):
    """What the loop gives the loss at every step: clean data and noise."""
    seen, usual = [], loop.training_loss

    def spied(network, x0, **options):
        if "weights" in options:
            seen.append((x0, options["noise"]))
        return usual(network, x0, **options)

    monkeypatch.setattr(loop, "training_loss", spied)
    train(run)
    monkeypatch.setattr(loop, "training_loss", usual)
    return seen


def hashes(folder, *parts):
    return {part: file_hash(sorted((folder / part).glob("*.safetensors"))) for part in parts}


def test_one_command_makes_a_zero_snr_v_model_of_an_epsilon_one(tmp_path, tiny_text, squares):
    run = config(
        tmp_path, tiny_text, squares, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    assert train(run).finished
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert {
        name: scheduler[name]
        for name in ("_class_name", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
    } == {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    assert (scheduler["clip_sample"], scheduler["set_alpha_to_one"], scheduler["steps_offset"]) == (
        False,
        True,
        1,
    )
    assert (scheduler["beta_schedule"], scheduler["beta_start"], scheduler["beta_end"]) == (
        "scaled_linear",
        0.00085,
        0.012,
    )
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index == {
        **json.loads((tiny_text / "model_index.json").read_text()),
        "_diffusers_version": diffusers.__version__,
    }
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["weight_hash"] == weight_hash(tmp_path)
    assert card["base"] == {
        "base_class": "StableDiffusionPipeline",
        "base_weights": weight_hash(tiny_text),
        "base_configuration": configuration_hash(tiny_text),
    }
    assert card["data"]["captions"] == 6
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a red square", num_inference_steps=4, guidance_rescale=0.7, output_type="np"
    ).images[0]
    assert image.shape == (16, 16, 3)
    assert np.isfinite(image).all()


@pytest.mark.parametrize(
    ("cache", "options"),
    [
        ("no", ALL_TRAINED),
        ("memory", SHIFTED),
        ("disk", SHIFTED),
        pytest.param("no", SHIFTED, marks=pytest.mark.slow),
        pytest.param("memory", ALL_TRAINED, marks=pytest.mark.slow),
        pytest.param("disk", ALL_TRAINED, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_taken_up_again_ends_in_the_same_weights(
    tmp_path, tiny_text, squares, cache, options
):
    run = config(tmp_path, tiny_text, squares, learning_rate=1e-3, cache_latents=cache, **options)
    whole = train(run)
    before = weight_hash(tmp_path)
    for folder in sorted((tmp_path / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    rest = train(run)
    assert rest.losses == whole.losses[2:]
    assert weight_hash(tmp_path) == before
    assert not (tmp_path / "latents.bin").exists()


def test_only_what_is_trained_changes(tmp_path, tiny_text, squares):
    for along in (False, True):
        out = tmp_path / str(along)
        train(config(out, tiny_text, squares, learning_rate=1e-3, train_text_encoder=along))
        ours, theirs = (
            hashes(folder, "unet", "text_encoder", "vae") for folder in (out, tiny_text)
        )
        assert {part for part in ours if ours[part] != theirs[part]} == (
            {"unet", "text_encoder"} if along else {"unet"}
        )
        assert (out / "tokenizer" / "tokenizer.json").read_bytes() == (
            tiny_text / "tokenizer" / "tokenizer.json"
        ).read_bytes()
        first, last = (
            out / "checkpoints" / step / "vae" / "diffusion_pytorch_model.safetensors"
            for step in ("0000002", "0000006")
        )
        assert first.samefile(last)
        assert not first.samefile(tiny_text / "vae" / first.name)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_average_is_over_the_text_encoder_too(tmp_path, tiny_text, squares, decay):
    train(
        config(
            tmp_path,
            tiny_text,
            squares,
            learning_rate=1e-3,
            train_text_encoder=True,
            ema_decay=decay,
        )
    )
    network = load_file(tmp_path / "checkpoints" / "0000006" / "training" / "network.safetensors")
    for part in ("unet", "text_encoder"):
        (file,) = (tmp_path / part).glob("*.safetensors")
        average = load_file(file)
        assert {f"{part}.{name}" for name in average} == {
            name for name in network if name.startswith(f"{part}.")
        }
        same = [torch.equal(value, network[f"{part}.{name}"]) for name, value in average.items()]
        assert all(same) if decay == 0 else not any(same)


def test_gradient_checkpointing_changes_no_gradient(tmp_path, tiny_text, squares):
    losses = []
    for on in (False, True):
        run = config(
            tmp_path / str(on),
            tiny_text,
            squares,
            learning_rate=1e-3,
            train_text_encoder=True,
            gradient_checkpointing=on,
        )
        _, subject = trainer.make_subject(run, open_base(run.base))
        encoder = subject.network.text_encoder
        encoder = getattr(encoder, "text_model", encoder).encoder  # by release of transformers
        parts = (subject.network.unet.down_blocks[0], encoder.layers[0])
        assert [bool(getattr(part, "gradient_checkpointing", False)) for part in parts] == [on, on]
        losses.append([loss for _, loss in train(run).losses])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bf16_keeps_the_latents_in_float32(tmp_path, tiny_text, squares, monkeypatch):
    drawn = first_batches(
        config(tmp_path, tiny_text, squares, mixed_precision="bf16", train_text_encoder=True),
        monkeypatch,
    )
    assert {x0.dtype for x0, _ in drawn} == {torch.float32}


def test_offset_noise_reaches_the_loss(tmp_path, tiny_text, squares, monkeypatch):
    plain = first_batches(config(tmp_path / "a", tiny_text, squares), monkeypatch)
    offset = first_batches(
        config(tmp_path / "b", tiny_text, squares, offset_noise=0.3), monkeypatch
    )
    for (x0, noise), (same, shifted) in zip(plain, offset, strict=True):
        assert torch.equal(x0, same)
        shift = shifted - noise
        assert 0.05 < float(shift.std()) < 0.6
        torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift))


def test_further_parts_of_the_base_are_copied_and_pickled_ones_left_out(
    tmp_path, tiny_text, squares
):
    index = {
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    base = broken(tiny_text, tmp_path / "base", index=index)
    for name, file in (
        ("feature_extractor", "preprocessor_config.json"),
        ("safety_checker", "pytorch_model.bin"),
    ):
        (base / name).mkdir()
        (base / name / file).write_text("{}")
    notes = []
    train(config(tmp_path / "out", base, squares, images=4), on_note=notes.append)
    assert notes == [f"the safety_checker of {base} has pickled weights alone, and is left out."]
    written = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert (written["feature_extractor"], written["safety_checker"]) == (
        index["feature_extractor"],
        [None, None],
    )
    assert (tmp_path / "out" / "feature_extractor" / "preprocessor_config.json").is_file()
    assert not (tmp_path / "out" / "safety_checker").exists()


@pytest.mark.slow
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


# What follows from seed and step


@pytest.mark.parametrize("flip", [False, True])
def test_cached_latents_are_those_of_the_moment(tmp_path, tiny_text, squares, monkeypatch, flip):
    drawn = {}
    for cache in ("no", "memory", "disk"):
        run = config(
            tmp_path / cache,
            tiny_text,
            squares,
            cache_latents=cache,
            horizontal_flip=flip,
            images=16,
        )
        drawn[cache] = first_batches(run, monkeypatch)
    for (a, noise_a), (b, noise_b), (c, noise_c) in zip(*drawn.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert torch.equal(b, c)
        assert torch.equal(noise_a, noise_b)
        assert torch.equal(noise_b, noise_c)


def stop_at(monkeypatch, method, call, name="SIGTERM"):
    """Sends this process a signal in a call of a method of the subject."""
    usual, calls = getattr(text.TextSubject, method), []

    def counted(self, *arguments):
        calls.append(method)
        if len(calls) == call:
            signal.raise_signal(getattr(signal, name))
        return usual(self, *arguments)

    monkeypatch.setattr(text.TextSubject, method, counted)
    return calls


@pytest.mark.parametrize(
    ("before", "name"),
    thinned(
        [("memory", "_posterior"), ("disk", "_posterior"), ("disk", "_embed")],
        ["SIGINT", "SIGTERM", "SIGHUP"],
        stride=4,
    ),
)
def test_a_signal_before_the_first_step_ends_the_run_cleanly(
    tmp_path, tiny_text, squares, monkeypatch, capsys, before, name
):
    cache, method = before
    run = config(tmp_path / "out", tiny_text, squares, cache_latents=cache)
    number = getattr(signal, name)
    # It may be ignored, as under nohup.
    usual = signal.signal(number, signal.default_int_handler)
    with monkeypatch.context() as patch:
        calls = stop_at(patch, method, 1 if method == "_embed" else 2, name)
        try:
            result = train(run)
        finally:
            signal.signal(number, usual)
    assert (result.finished, result.step, result.losses) == (False, 0, ())
    assert len(calls) <= 2  # of the 15 batches
    assert not (tmp_path / "out").exists()
    _tell_end(result)
    assert capsys.readouterr().out == (
        "Stopped before the first step, without a checkpoint; the same command begins anew.\n"
    )
    assert train(run).finished


def test_a_picture_that_cannot_be_read_while_latents_are_cached_is_a_sentence(
    tmp_path, tiny_text, squares
):
    """In a worker too, which would return the error's traceback as its message."""
    content, folder = np.load(squares), tmp_path / "pictures"
    folder.mkdir()
    for i, (image, caption) in enumerate(zip(content["images"], content["captions"], strict=True)):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(str(caption))
    path = folder / "07.png"
    path.write_bytes(path.read_bytes()[:60])  # the header, which is all that is read at first
    run = config(tmp_path / "out", tiny_text, folder, cache_latents="disk", workers=1)
    with pytest.raises(DataError, match=r"^.*07\.png is not an image that can be read [^\n]*$"):
        train(run)
    assert not (tmp_path / "out").exists()


def subject_of(tmp_path, tiny_text, squares, **options):
    run = config(tmp_path, tiny_text, squares, **options)
    data, subject = trainer.make_subject(run, open_base(run.base))
    return data, subject.prepared(Accelerator(cpu=True), tmp_path / "latents.bin", lambda: None)


def test_a_latent_is_drawn_from_its_posterior_and_scaled(tmp_path, tiny_text, squares):
    data, subject = subject_of(tmp_path, tiny_text, squares, cache_latents="memory")
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_text, subfolder="vae")
    pixels = data[5][0][None].float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    batch = [subject.examples[5][0][None].expand(4000, -1, -1, -1, -1, -1), torch.full((4000,), 5)]
    drawn, _ = subject.clean(
        batch, torch.device("cpu"), Draws.at(0, 0, Piece(0, 0), torch.device("cpu"))
    )
    again, _ = subject.clean(
        batch, torch.device("cpu"), Draws.at(0, 1, Piece(0, 0), torch.device("cpu"))
    )
    assert not torch.equal(drawn, again)
    torch.testing.assert_close(
        drawn.mean(0),
        0.5 * posterior.mean[0],
        atol=4 * 0.5 * float(posterior.std.max()) / 4000**0.5 + 1e-5,
        rtol=0,
    )
    torch.testing.assert_close(drawn.std(0), 0.5 * posterior.std[0], rtol=0.1, atol=0)
    held, _ = subject.clean([b[:1] for b in batch], torch.device("cpu"), None)
    torch.testing.assert_close(held, 0.5 * posterior.mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_captions_are_dropped_at_their_rate_and_never_of_held_out_images(
    tmp_path, tiny_text, squares, share
):
    data, subject = subject_of(tmp_path, tiny_text, squares, caption_dropout=share)
    batch = [torch.stack([data[i][0] for i in range(50)]), torch.arange(50)]
    rows = torch.cat(
        [
            subject.clean(
                batch, torch.device("cpu"), Draws.at(0, s, Piece(0, 0), torch.device("cpu"))
            )[1]
            for s in range(80)
        ]
    )
    dropped = rows.reshape(80, 50) == 0
    assert float(dropped.float().mean()) == pytest.approx(
        share, abs=4 * (share * (1 - share) / 4000) ** 0.5
    )
    assert (
        share in (0, 1) or dropped.any(1).float().mean() > 0.9
    )  # each caption by itself, not the batch
    texts = [subject.captions.texts[int(row)] for row in rows[:50][~dropped[0]]]
    assert texts == [
        caption for caption, gone in zip(data.captions[:50], dropped[0], strict=True) if not gone
    ]
    assert not (subject.clean(batch, torch.device("cpu"), None)[1] == 0).any()


def test_a_condition_is_what_a_pipeline_makes_of_the_caption(tmp_path, tiny_text, squares):
    data, subject = subject_of(tmp_path, tiny_text, squares)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_text)
    conditional, empty = pipe.encode_prompt(list(data.captions[:3]), "cpu", 1, True)
    torch.testing.assert_close(subject.embeddings[subject.captions.rows[:3]], conditional)
    torch.testing.assert_close(subject.embeddings[:1], empty[:1])


def test_embeddings_that_do_not_fit_are_computed_batch_by_batch(
    tmp_path, tiny_text, squares, monkeypatch
):
    losses = []
    for most in (2**30, 1):
        monkeypatch.setattr(text, "_MOST_EMBEDDINGS", most)
        losses.append(
            [loss for _, loss in train(config(tmp_path / str(most), tiny_text, squares)).losses]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_previews_are_drawn_under_captions(tmp_path, tiny_text, squares):
    options = {"preview_every": 3, "preview_count": 8, "preview_steps": 2}
    train(config(tmp_path, tiny_text, squares, **options))
    assert sorted(p.name for p in (tmp_path / "previews").iterdir()) == [
        "0000003.png",
        "0000006.png",
        "captions.txt",
    ]
    captions = (tmp_path / "previews" / "captions.txt").read_text().splitlines()
    assert len(captions) == 8
    assert len(set(captions)) == 6


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_a_preview_is_what_a_pipeline_draws(tmp_path, tiny_text, squares, scale):
    options = {
        "preview_every": 1,
        "preview_guidance_scale": scale,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    _, subject = subject_of(tmp_path, tiny_text, squares, **options)
    scheduler = subject.package.scheduler
    predict, captions = subject.preview(subject.network.eval(), 2, torch.device("cpu"))
    schedule = noise_schedule(scheduler.config)
    x_t = seeded_randn(subject.shape, [0, 1])
    with torch.no_grad():
        x0 = sample(
            ModelDenoiser(predict, schedule, "v_prediction"),
            x_t,
            step_pairs(select_timesteps(1000, 5, "trailing")),
            schedule=schedule,
        )
        ours = (subject.images(x0) / 2 + 0.5).clamp(0, 1)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_text, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        captions, num_inference_steps=5, guidance_scale=scale, latents=x_t, output_type="pt"
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Schedules


def test_without_options_the_base_says_what_is_predicted(tmp_path, tiny_text, squares):
    """Only trailing, clipping and the last level are this package's own."""
    theirs = diffusers.DDIMScheduler.from_pretrained(tiny_text, subfolder="scheduler")
    ours = make_scheduler(config(tmp_path, tiny_text, squares), theirs.config)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    differing = {
        name
        for name in ours.config
        if ours.config[name] != theirs.config.get(name) and not name.startswith("_")
    }
    assert differing == {"timestep_spacing", "set_alpha_to_one"}


@pytest.mark.parametrize(
    "name",
    [
        "stable-diffusion-v1-5",
        "stable-diffusion-2-1",
        "stable-diffusion-2-1-base",
        "stable-diffusion-inpainting",
    ],
)
def test_well_known_checkpoints_become_zero_snr_ones(tmp_path, name):
    """Whatever scheduler they came with, the result walks their betas rescaled, and so without an
    offset."""
    inherited = json.loads((DATA / "scheduler_configs" / f"{name}.json").read_text())
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    made = make_scheduler(config(tmp_path, "base", "data", **options), inherited).config
    expected = rescale_zero_terminal_snr(
        make_betas("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012)
    )
    torch.testing.assert_close(
        noise_schedule(made).alphas_cumprod, NoiseSchedule.from_betas(expected).alphas_cumprod
    )
    assert (
        made.timestep_spacing,
        made.clip_sample,
        made.set_alpha_to_one,
        made.prediction_type,
    ) == ("trailing", False, True, "v_prediction")


@pytest.mark.parametrize(
    ("options", "inherited", "expected"),
    [
        ({"prediction_type": "v_prediction"}, {}, ("v_prediction", False, "scaled_linear")),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {},
            ("v_prediction", True, "scaled_linear"),
        ),
        (
            {},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            ("v_prediction", True, "scaled_linear"),
        ),
        (
            {"beta_schedule": "linear"},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            ("v_prediction", False, "linear"),
        ),
        (
            {},
            {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
            ("epsilon", False, "scaled_linear"),
        ),
    ],
)
def test_each_switch_replaces_what_the_base_says(tmp_path, options, inherited, expected):
    base = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **inherited}
    made = make_scheduler(config(tmp_path, "base", "data", **options), base).config
    assert (made.prediction_type, made.rescale_betas_zero_snr, made.beta_schedule) == expected
    assert made.trained_betas == inherited.get("trained_betas")


def test_epsilon_at_zero_terminal_snr_is_refused_whoever_asks_for_it(tmp_path):
    with pytest.raises(
        DDIMError,
        match=(
            "^epsilon prediction cannot be trained at zero terminal SNR, .*; use --prediction-type "
            "v_prediction"
        ),
    ):
        make_scheduler(
            config(tmp_path, "owner/base", "x", rescale_betas_zero_snr=True),
            {"prediction_type": "epsilon"},
        )
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    with pytest.raises(
        DDIMError,
        match="^owner/base has zero terminal SNR, and epsilon prediction cannot be trained there",
    ):
        make_scheduler(config(tmp_path, "owner/base", "x", prediction_type="epsilon"), zero)


def test_the_terminal_step_is_trained_under_min_snr(tmp_path, tiny_text, squares, monkeypatch):
    options = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "weighting": "min-snr",
        "weight_floor": 0.02,
    }
    smallest = []
    monkeypatch.setattr(
        loop, "draw_timesteps", lambda count, levels, **_: torch.full((count,), levels - 1)
    )
    usual = loop.loss_weights
    monkeypatch.setattr(
        loop,
        "loss_weights",
        lambda *a, **o: smallest.append(float(usual(*a, **o).min())) or usual(*a, **o),
    )
    result = train(config(tmp_path, tiny_text, squares, **options))
    assert set(smallest) == {0.02}
    assert all(loss > 0 for _, loss in result.losses)


# Errors


def broken(base, folder, **changes):
    """A copy of a base whose index or configurations differ."""
    shutil.copytree(base, folder)
    for name, change in changes.items():
        path = folder / {
            "index": "model_index.json",
            "scheduler": "scheduler/scheduler_config.json",
        }.get(name, f"{name}/config.json")
        edit(path, **change)
    return folder


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"index": {"vae": None}},
            "has no vae (the autoencoder), which a text model needs; complete the folder",
        ),
        (
            {"index": {"tokenizer": [None, None]}},
            "has no tokenizer (the tokenizer), which a text model needs",
        ),
        (
            {"index": {"text_encoder_2": ["transformers", "CLIPTextModel"]}},
            "with a text_encoder_2, and only Stable Diffusion 1 and 2 can be trained",
        ),
        (
            {"index": {"unet": ["diffusers", "UNet2DModel"]}},
            "the unet of .* is a UNet2DModel, and only UNet2DConditionModel can be trained",
        ),
        (
            {"scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}},
            "a FlowMatchEulerDiscreteScheduler of a flow-matching model",
        ),
        (
            {"unet": {"sample_size": 16}},
            (
                "makes images of 32x32, and those of the data are 16x16 .*; use --resolution 32, "
                "or --from-scratch"
            ),
        ),
    ],
)
def test_bases_that_cannot_be_trained(tmp_path, tiny_text, squares, changes, text):
    base = broken(tiny_text, tmp_path / "base", **changes)
    with pytest.raises(DDIMError, match=text.replace("(", r"\(").replace(")", r"\)")):
        train(config(tmp_path / "out", base, squares))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "unet"])
def test_a_folder_that_is_missing_is_named(tmp_path, tiny_text, squares, part):
    base = broken(tiny_text, tmp_path / "base")
    shutil.rmtree(base / part)
    with pytest.raises(DDIMError, match=rf"has no {part} \(the .*\), which a text model needs"):
        train(config(tmp_path / "out", base, squares))


def test_pickled_weights_are_not_copied(tmp_path, tiny_text, squares):
    base = broken(tiny_text, tmp_path / "base")
    (base / "vae" / "diffusion_pytorch_model.safetensors").rename(
        base / "vae" / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(
        DDIMError, match=r"the vae of .* has no \.safetensors file without a variant"
    ):
        train(config(tmp_path / "out", base, squares))


def test_damaged_weights_are_named(tmp_path, tiny_text, squares):
    base = broken(tiny_text, tmp_path / "base")
    (base / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"words")
    with pytest.raises(DDIMError, match=r"the vae of .* cannot be loaded \(.*\); check .*vae"):
        train(config(tmp_path / "out", base, squares))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"resolution": 15},
            (
                r"images of 15x15 \(width x height\) cannot be made into latents: the autoencoder "
                r"of .* divides by 2; use --resolution 16"
            ),
        ),
        (
            {"resolution": 32},
            (
                "makes images of 16x16, and those of the data are 32x32 .*; use --resolution 16, "
                "or --from-scratch"
            ),
        ),
        (
            {"channels": 1},
            r"the autoencoder of .* takes 3 channel\(s\), and the images have 1; use --channels 3",
        ),
        (
            {"class_conditional": True},
            "is a text model, which knows captions and no classes; leave out --class-conditional",
        ),
        (
            {"from_scratch": True, "block_out_channels": (8,) * 5},
            "images of 16x16 cannot be halved 4 times, .*; use --resolution 32",
        ),
        ({"data": "digits"}, "digits has no captions; put metadata.jsonl"),
    ],
)
def test_data_and_options_that_do_not_fit_the_base(tmp_path, tiny_text, squares, options, text):
    with pytest.raises(DDIMError, match=text):
        train(config(tmp_path / "out", tiny_text, **{"data": squares, **options}))
    assert not (tmp_path / "out").exists()


def test_a_base_is_no_place_for_its_successor(tmp_path, tiny_text, squares):
    base = broken(tiny_text, tmp_path / "base")
    with pytest.raises(
        DDIMError, match="holds unet, scheduler, .* and no checkpoint of a run that made them"
    ):
        train(config(base, base, squares))


def test_a_text_model_without_transformers(tmp_path, tiny_text, squares, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        DDIMError,
        match=(
            r"^text models need transformers, which is not installed; run: pip install "
            r"'ddim\[text\]'\.$"
        ),
    ):
        train(config(tmp_path, tiny_text, squares))


def test_captions_that_are_cut_are_counted(tmp_path, tiny_text, squares):
    with np.load(squares) as file:
        arrays = dict(file)
    arrays["captions"] = np.array(
        [*arrays["captions"][:57], *["a red square " * 9] * 2, "word " * 30]
    )
    np.savez(tmp_path / "long.npz", **arrays)
    notes = []
    train(
        config(tmp_path / "out", tiny_text, tmp_path / "long.npz", images=4), on_note=notes.append
    )
    assert notes == [
        f"3 of 60 captions are longer than the 12 tokens that {tiny_text} reads, and are cut there."
    ]
    assert json.loads((tmp_path / "out" / "card.json").read_text())["data"]["captions_cut"] == 3


def test_another_base_than_the_runs_is_refused(tmp_path, tiny_text, squares):
    base = broken(tiny_text, tmp_path / "base")
    train(config(tmp_path / "out", base, squares, images=8))
    parts = {"vae": diffusers.AutoencoderKL.from_pretrained(base, subfolder="vae")}
    with torch.no_grad():
        parts["vae"].quant_conv.bias.add_(1)
    parts["vae"].save_pretrained(base / "vae")
    with pytest.raises(
        DDIMError,
        match="a run whose base .* had base_weights='.*', and there is base_weights='.*' now",
    ):
        train(config(tmp_path / "out", base, squares, images=8))


# Unconditional bases


def test_no_path_of_the_base_gets_into_the_model(tmp_path, tiny_text, squares):
    train(config(tmp_path, tiny_text, squares, images=4, train_text_encoder=True))
    for path in [*tmp_path.glob("*.json"), *tmp_path.glob("*/*.json")]:
        assert path.name == "card.json" or str(tiny_text) not in path.read_text(), path


def test_an_unconditional_base_goes_on(tmp_path, tiny):
    train(config(tmp_path, tiny, "digits", learning_rate=1e-9, ema_decay=0.0))
    before, after = (
        load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (tiny, tmp_path)
    )
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    pipe = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(pipe.unet) is diffusers.UNet2DModel


def test_a_new_network_of_an_unconditional_base(tmp_path, tiny):
    train(config(tmp_path / "a", tiny, "digits", from_scratch=True, images=4))
    train(
        config(
            tmp_path / "b", tiny, "digits", from_scratch=True, images=4, block_out_channels=(8, 8)
        )
    )
    theirs, a, b = (
        json.loads((f / "unet" / "config.json").read_text())
        for f in (tiny, tmp_path / "a", tmp_path / "b")
    )
    assert a == theirs
    assert (b["block_out_channels"], b["norm_num_groups"]) == ([8, 8], 8)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"resolution": 16},
            (
                r"is for 8x8 images with 1 channel\(s\), and digits has 16x16 with 1; use "
                r"--channels 1 --resolution 8"
            ),
        ),
        (
            {"class_conditional": True},
            (
                "knows no classes, and 10 were asked for; leave out --class-conditional, or add "
                "--from-scratch"
            ),
        ),
        (
            {"train_text_encoder": True},
            "--train-text-encoder is for text models, and .* has no text encoder",
        ),
    ],
)
def test_what_does_not_fit_an_unconditional_base(tmp_path, tiny, options, text):
    with pytest.raises(DDIMError, match=text):
        train(config(tmp_path / "out", tiny, "digits", **options))


def test_random_crops_train_a_text_model_and_what_was_left_out_is_told(tmp_path, tiny_text):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, size in enumerate([(40, 16), (16, 30), (20, 20)]):
        Image.effect_noise(size, 99).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red square\nmore")
    (folder / "0.svg").write_text("no picture")
    options = {"images": 8, "resolution": 16, "random_crop": True, "validation_images": 0}
    notes = []
    result = train(config(tmp_path / "out", tiny_text, folder, **options), on_note=notes.append)
    assert result.finished
    assert notes[0] == f"files of {folder} that are no pictures are left out: 1 .svg."
    assert notes[1] == f"captions of {folder} of several lines are read by the first: 3."


def in_half_precision(model, folder):
    """A copy of a model whose weights are stored as float16."""
    shutil.copytree(model, folder)
    for path in folder.glob("*/*.safetensors"):
        save_file({k: v.half() for k, v in load_file(path).items()}, path, {"format": "pt"})
    path = folder / "text_encoder" / "config.json"  # which transformers loads as it says
    edit(path, dtype="float16")
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, {"mixed_precision": "bf16"}, {"train_text_encoder": True}, {"cache_latents": "memory"}],
)
def test_a_base_of_half_precision_is_trained_and_its_frozen_parts_compute_in_float32(
    tmp_path, tiny_text, squares, monkeypatch, options
):
    half = in_half_precision(tiny_text, tmp_path / "half")
    seen, usual = [], text.TextSubject._embed

    def embed(self, tokens):
        hidden = usual(self, tokens)
        seen.append((self.text_encoder.dtype, self.vae.dtype, tokens, hidden, self.text_encoder))
        return hidden

    monkeypatch.setattr(text, "_MOST_EMBEDDINGS", 0)  # each batch embeds its own
    monkeypatch.setattr(text.TextSubject, "_embed", embed)
    out = tmp_path / "out"
    assert train(config(out, half, squares, images=4, **options)).finished
    assert bool(seen) is not options.get("train_text_encoder", False)
    for encoder_type, vae_type, tokens, hidden, encoder in seen:
        assert (encoder_type, vae_type) == (torch.float32, torch.float32)
        with torch.no_grad():
            assert torch.equal(hidden, encoder(tokens)[0])
    weights = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red square", num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(picture).all()


def test_latents_are_not_clipped(tmp_path, tiny_text, squares):
    with pytest.raises(
        DDIMError,
        match=r"draws latents, which have no range to be clipped to; leave out --clip-sample\.$",
    ):
        train(config(tmp_path, tiny_text, squares, clip_sample="on"))
