"""Checkpoints with the configuration files of Stable Diffusion 1.5 and 2.1, their networks narrowed
and not trained."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from tests.conftest import tiny_tokenizer

from ddim import DDIMScheduler, DiffusionPipeline
from ddim.core.noise import make_generators
from ddim.pipelines.text_to_image import TextToImagePipeline

CONFIGS = json.loads((Path(__file__).parents[1] / "data" / "model_configs.json").read_text())
PROMPT = "a red square on a black background"


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    """The folder of a checkpoint: every file as published, but for widths, sizes, words, and the
    safety checker."""
    configs = CONFIGS[request.param]
    out = tmp_path_factory.mktemp("checkpoints") / request.param
    torch.manual_seed(0)
    heads = (
        {"attention_head_dim": [1, 2, 4, 4]}
        if isinstance(configs["unet"]["attention_head_dim"], list)
        else {}
    )
    narrow = {
        "block_out_channels": [32, 32, 64, 64],
        "cross_attention_dim": 32,
        "sample_size": 8,
        **heads,
    }
    diffusers.UNet2DConditionModel.from_config({**configs["unet"], **narrow}).save_pretrained(
        out / "unet"
    )
    narrow = {"block_out_channels": [32] * 4, "layers_per_block": 1, "sample_size": 64}
    diffusers.AutoencoderKL.from_config({**configs["vae"], **narrow}).save_pretrained(out / "vae")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(out / "tokenizer")
    narrow = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    words = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPTextConfig.from_dict(
        {**configs["text_encoder"], **narrow, **words, "torch_dtype": "float32"}
    )
    transformers.CLIPTextModel(config).save_pretrained(out / "text_encoder")
    index = {
        **configs["model_index"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    rest = {
        "scheduler/scheduler_config.json": configs["scheduler"],
        "feature_extractor/preprocessor_config.json": configs["feature_extractor"],
        "model_index.json": index,
    }
    for name, content in rest.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(json.dumps(content))
    return out


def open_theirs(folder, **options):
    """diffusers' pipeline with diffusers' DDIM, whatever scheduler the folder names."""
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, **options)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def draw(pipe, **options):
    options = {"guidance_scale": 1.5, "num_inference_steps": 5, "output_type": "latent", **options}
    return pipe(PROMPT, generator=make_generators([0]), **options).images


def assert_alike(found, expected):
    """Networks that were never trained take latents out to 20, and guide diffusers' float32 levels
    far from ours at larger scales."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


def test_the_folder_opens_and_draws_what_diffusers_draws(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is TextToImagePipeline
    assert pipe.image_shape == (3, 64, 64)
    assert pipe.scheduler.config.prediction_type == CONFIGS[folder.name]["scheduler"].get(
        "prediction_type", "epsilon"
    )
    assert_alike(draw(pipe, progress=False), draw(open_theirs(folder)))
    assert draw(pipe, progress=False, output_type="pil")[0].size == (64, 64)


def test_the_fixes_are_set_as_in_diffusers_and_kept_in_a_folder(folder, tmp_path):
    """Zero terminal SNR for the checkpoint that predicts v; with epsilon it has no solution, and is
    refused."""
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    zero_snr = pipe.scheduler.config.prediction_type == "v_prediction"
    fixes = {"rescale_betas_zero_snr": zero_snr, "timestep_spacing": "trailing"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **fixes)
    latents = draw(pipe, guidance_rescale=0.7, progress=False)
    assert_alike(latents, draw(open_theirs(folder, **fixes), guidance_rescale=0.7))
    pipe.save_pretrained(tmp_path)
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    assert_alike(latents, draw(stock, guidance_rescale=0.7))
