"""A configuration refuses what cannot be trained, and is the command that trains it."""

import shlex
from dataclasses import fields

import pytest

from ddim.cli.arguments import parse
from ddim.cli.train import Request, configuration, defaults
from ddim.errors import DDIMError
from ddim.training.config import PRESETS, Pace, TrainConfig, command_line

# One value that is not the default for every option.
OTHER = {
    "data": "a folder/it's",
    "out": "runs/x y",
    "base": "owner/model",
    "from_scratch": True,
    "train_text_encoder": True,
    "caption_dropout": 0.0,
    "cache_latents": "disk",
    "gradient_checkpointing": True,
    "split": "test",
    "resolution": 16,
    "center_crop": True,
    "channels": 3,
    "horizontal_flip": True,
    "image_column": "scan",
    "label_column": "kind",
    "caption_column": "said",
    "class_conditional": True,
    "validation_images": 0,
    "block_out_channels": (16, 32),
    "layers_per_block": 2,
    "attention_levels": 0,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "dropout": 0.1,
    "prediction_type": "v_prediction",
    "num_train_timesteps": 500,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": "off",
    "rescale_betas_zero_snr": True,
    "offset_noise": 0.1,
    "weighting": "min-snr",
    "snr_gamma": 3.0,
    "weight_floor": 0.0,
    "images": 7,
    "batch_size": 2,
    "gradient_accumulation": 3,
    "learning_rate": 1e-5,
    "lr_schedule": "constant",
    "lr_warmup_steps": 0,
    "weight_decay": 0.01,
    "gradient_clip": 0.0,
    "ema_decay": 0.0,
    "mixed_precision": "bf16",
    "compile": True,
    "seed": 5,
    "checkpoint_every": 3,
    "keep_checkpoints": 1,
    "preview_every": 4,
    "preview_count": 9,
    "preview_steps": 10,
    "preview_guidance_scale": 1.0,
    "log_every": 1,
    "workers": 2,
}


# These have no effect together with some of the others.
CROPPED = {"center_crop": False, "random_crop": True, "cache_latents": "no", "resolution": "24x16"}


def parsed(words):
    command = parse(Request, name="train", arguments=words, default=defaults(words))
    return {field.name: getattr(command, field.name) for field in fields(TrainConfig)}


@pytest.mark.parametrize(
    "options",
    [
        OTHER,
        OTHER | CROPPED,
        {"data": "digits", "out": "x"},
        *[{"data": "a", "out": "x", **p.options} for p in PRESETS.values()],
    ],
)
def test_the_command_line_of_a_configuration_gives_that_configuration(options):
    config = TrainConfig(**options)
    words = shlex.split(command_line(config))
    assert words[:2] == ["ddim", "train"]
    assert parsed(words[2:]) == vars(config)


def test_every_option_is_tried():
    every = {"random_crop": True, **OTHER}
    tried = {field.name for field in fields(TrainConfig) if every[field.name] != field.default}
    assert tried == set(every)


def test_a_resolution_is_a_side_or_width_and_height():
    sizes = [TrainConfig("a", "b", resolution=value).size for value in (None, 16, "24x16")]
    assert sizes == [None, 16, (16, 24)]
    words = ["--data", "a", "--out", "b", "--resolution"]
    assert parse(Request, name="train", arguments=[*words, "24x16"]).resolution == "24x16"
    assert parse(Request, name="train", arguments=[*words, "24"]).resolution == 24
    for wrong in ("24x", "x16", "24x16x3", "0x16", "24x99999", "wide", "-4x4", "24X16", "9" * 30):
        with pytest.raises(DDIMError, match="--resolution must be"):
            TrainConfig("a", "b", resolution=int(wrong) if wrong.isdigit() else wrong)


def test_crops_that_cannot_be_are_refused():
    with pytest.raises(DDIMError, match="--random-crop has no effect with --center-crop"):
        TrainConfig("a", "b", random_crop=True, center_crop=True)
    with pytest.raises(DDIMError, match="--random-crop cuts an image elsewhere each time"):
        TrainConfig("a", "b", base="c", random_crop=True, cache_latents="memory")


def test_several_processes_are_launched_by_torchrun():
    line = command_line(TrainConfig(data="digits", out="x"), processes=2)
    assert line == "torchrun --nproc-per-node 2 -m ddim train --data digits --out x"


def test_options_replace_those_of_a_preset():
    expected = vars(
        TrainConfig(**{**PRESETS["digits"].options, "out": "runs/digits", "batch_size": 3})
    )
    assert parsed(["--preset", "digits", "--batch-size", "3"]) == expected
    assert parsed(["--batch-size=3", "--preset=digits"]) == expected


def test_an_option_of_a_preset_without_effect_falls_back_and_a_given_one_is_refused():
    words = ["--preset", "fashion-text", "--beta-schedule", "squaredcos_cap_v2"]
    request = parse(Request, name="train", arguments=words, default=defaults(words))
    assert (request.beta_start, configuration(request).beta_start) == (0.00085, None)
    with pytest.raises(DDIMError, match="--beta-end acts only with --beta-schedule linear"):
        parse(Request, name="train", arguments=[*words, "--beta-end", "0.01"], default=request)


def test_a_preset_that_leaves_the_data_open_asks_for_them():
    words = ["--preset", "few-pictures", "--data", "a", "--resolution", "64"]
    found = parsed(words)
    assert (found["data"], found["out"], found["resolution"]) == ("a", "runs/few-pictures", 64)
    with pytest.raises(DDIMError, match="--data"):
        parsed(words[:2])


@pytest.mark.parametrize("words", [["--preset"], ["--preset="], ["--preset", "mars"]])
def test_a_preset_that_does_not_exist(words):
    with pytest.raises(DDIMError, match=f"--preset must be one of {', '.join(PRESETS)}; got"):
        defaults(words)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"images": 0}, "--images must be at least 1; got 0"),
        ({"block_out_channels": (8, 0)}, "--block-out-channels must be at least 1; got 0"),
        ({"block_out_channels": ()}, "--block-out-channels must name at least one value"),
        (
            {"block_out_channels": (8, 12)},
            "--block-out-channels must be multiples of --norm-num-groups, which is 8; got 12",
        ),
        ({"norm_num_groups": 0}, "--norm-num-groups must be at least 1; got 0"),
        ({"layers_per_block": 0}, "--layers-per-block must be from 1 to 100; got 0"),
        ({"attention_head_dim": 0}, "--attention-head-dim must be at least 1; got 0"),
        ({"preview_steps": 0, "preview_every": 1}, "--preview-steps must be at least 1; got 0"),
        (
            {"attention_head_dim": 33, "attention_levels": 9},
            (
                "--attention-head-dim must be at most 32, the fewest channels that have attention; "
                "got 33"
            ),
        ),
        (
            {"attention_head_dim": 129, "attention_levels": 0},
            "--attention-head-dim must be at most 128, .*; got 129",
        ),
        (
            {"num_train_timesteps": 3 * 10**9},
            "--num-train-timesteps must be at most 1000000; got 3000000000",
        ),
        ({"seed": 2**32}, "--seed must be at most 4294967295; got 4294967296"),
        ({"learning_rate": float("inf")}, "--learning-rate must be a finite number; got inf"),
        ({"gradient_clip": float("inf")}, "--gradient-clip must be a finite number; got inf"),
        ({"out": ""}, "--out must not be empty"),
        ({"seed": -1}, "--seed must be at least 0; got -1"),
        ({"weight_decay": float("nan")}, "--weight-decay must be a finite number; got nan"),
        ({"learning_rate": 0.0}, r"--learning-rate must be above 0 and at most 100; got 0\.0"),
        ({"snr_gamma": float("nan")}, "--snr-gamma must be a finite number; got nan"),
        ({"beta_start": 0.0}, r"--beta-start must be above 0 and below 1; got 0\.0"),
        ({"beta_end": 1e-5}, "betas must rise; got --beta-start"),
        ({"beta_end": 1.0}, "--beta-end must be above 0 and below 1"),
        ({"ema_decay": 1.0}, r"--ema-decay must be at least 0 and below 1; got 1\.0"),
        ({"dropout": -0.1}, r"--dropout must be at least 0 and below 1; got -0\.1"),
        ({"beta_start": 0.03}, r"betas must rise; got --beta-start 0\.03, --beta-end 0\.02"),
        ({"caption_dropout": 1.5, "base": "x"}, r"--caption-dropout must be from 0 to 1; got 1\.5"),
        ({"offset_noise": -0.1}, r"--offset-noise must be from 0 to 10; got -0\.1"),
        ({"from_scratch": True}, "--from-scratch acts only with --base; give both"),
        ({"train_text_encoder": True}, "--train-text-encoder acts only with --base; give both"),
        ({"cache_latents": "disk"}, "--cache-latents acts only with --base"),
        ({"caption_dropout": 0.2}, "--caption-dropout acts only with --base"),
        (
            {"base": "x", "layers_per_block": 2},
            "--layers-per-block is for a new network, and the base has one; add --from-scratch",
        ),
        (
            {"base": "x", "from_scratch": True, "block_out_channels": (8, 12)},
            "must be multiples of --norm-num-groups, which is 8; got 12",
        ),
        (
            {"prediction_type": "epsilon", "rescale_betas_zero_snr": True, "base": "x"},
            "epsilon prediction cannot be trained at zero",
        ),
        ({"snr_gamma": 3.0}, "--snr-gamma acts only with --weighting min-snr; give both"),
        ({"weight_floor": 0.1}, "--weight-floor acts only with --weighting min-snr"),
        (
            {"beta_start": 0.01, "beta_schedule": "squaredcos_cap_v2"},
            "--beta-start acts only with --beta-schedule linear, scaled_linear or sigmoid",
        ),
        ({"label_column": "x"}, "--label-column acts only with --class-conditional"),
        (
            {"preview_count": 3, "preview_every": 0},
            "--preview-count has no effect with --preview-every 0; leave out one of the two.",
        ),
        (
            {"rescale_betas_zero_snr": True},
            "epsilon prediction cannot be trained at zero terminal SNR",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(options, text):
    with pytest.raises(DDIMError, match=text):
        TrainConfig(**{"data": "digits", "out": "x"} | options)


def test_open_options_follow_from_the_length_of_the_run():
    def pace(images, **options):
        config = TrainConfig(data="digits", out="x", images=images, **options)
        return config.pace(config.steps(1))

    assert pace(64) == Pace(0, 0.0, 1, 1)
    assert pace(2_000) == Pace(3, pytest.approx(1 - 10 / 32), 1, 32)
    assert pace(16_000) == Pace(25, 0.96, 12, 84)  # 250 steps in three parts, of 5,376 images
    assert pace(64_000) == Pace(100, 0.99, 50, 100)
    assert pace(64_000_000) == Pace(500, 0.9995, 50, 100_000)
    given = {"lr_warmup_steps": 0, "ema_decay": 0.5, "log_every": 7, "preview_every": 0}
    assert pace(2_000, **given) == Pace(*given.values())


def test_a_run_that_is_too_short_for_a_new_network_is_told_how_long_it_has_to_be():
    def told(**options):
        config = TrainConfig(data="digits", out="x", **options)
        return config.shortness(config.steps(1))

    assert told(images=2_000) == (
        "a new network learns little in 32 optimiser steps, and will draw noise; give --images "
        "63000 or more, or a smaller --batch-size."
    )
    assert told(images=63_000) is None
    assert told(images=2_000, batch_size=8) is None
    assert told(images=2_000, base="fashion-mnist") is None
    assert told(images=2_000, base="fashion-mnist", from_scratch=True) is not None
