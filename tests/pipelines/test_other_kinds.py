"""Pipelines that stay diffusers' own behind ddim.DiffusionPipeline: their files, their calls, and
the schedulers that are replaced in them."""

import json
import subprocess
import sys

import diffusers
import pytest
import torch

from ddim.pipelines.diffusion_pipeline import DiffusionPipeline
from ddim.scheduler import DDIMInverseScheduler, DDIMScheduler

BLOCKS = {"block_out_channels": (8, 16), "norm_num_groups": 4}


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    """An LDMPipeline, whose call takes any keyword and reads none of them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "ldm"
    diffusers.LDMPipeline(
        vqvae=diffusers.VQModel(
            latent_channels=3,
            num_vq_embeddings=16,
            scaling_factor=1.0,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **BLOCKS,
        ),
        unet=diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            **BLOCKS,
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    ).save_pretrained(folder)
    return folder


PLAIN = """
import sys
sys.modules["ddim"] = None
import diffusers
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
print([type(pipe).__name__, type(pipe.scheduler).__module__.split(".")[0]])
"""


def test_what_was_opened_and_saved_opens_without_this_package(latent_model, tmp_path):
    DiffusionPipeline.from_pretrained(latent_model).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    command = [sys.executable, "-c", PLAIN, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.strip() == "['LDMPipeline', 'diffusers']", run.stderr
    assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler) is DDIMScheduler


def test_a_pipeline_of_diffusers_writes_diffusers_names_of_our_schedulers(latent_model, tmp_path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(latent_model)
    pipe.scheduler = DDIMScheduler(beta_schedule="sigmoid", num_train_timesteps=20)
    expected = pipe.scheduler.alphas_cumprod
    pipe.save_pretrained(tmp_path)
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock.scheduler) is diffusers.DDIMScheduler  # which knows no sigmoid
    torch.testing.assert_close(stock.scheduler.alphas_cumprod, expected)
    assert pipe.scheduler.config.beta_schedule == "sigmoid"
    assert pipe.config["scheduler"] == ("diffusers", "DDIMScheduler")
    pipe.register_modules(inverse=DDIMInverseScheduler())
    assert pipe.config["inverse"] == ("diffusers", "DDIMInverseScheduler")
    assert DDIMInverseScheduler.__module__ == DDIMScheduler.__module__ == "ddim.scheduler"
