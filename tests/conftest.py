"""Tiny models in diffusers format, made once: their weights are random, and nothing here judges a picture."""

import diffusers
import pytest
import torch


def tiny_unet(**options):
    """A UNet2DModel of a few thousand parameters for 8x8 grey images."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **options,
        }
    ).eval()


def ours(**options):
    """A scheduler as this package's training writes it; velocities keep the images of a random network in range."""
    return diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction", **options)


class SilentWriter:
    """What training asks of tensorboard's writer, saying nothing."""

    def __init__(self, *args, **kwargs): ...

    def add_scalar(self, *args): ...

    def close(self): ...


@pytest.fixture(scope="session")
def silent_log():
    """Puts a silent writer in tensorboard's place, whose import warns of its own dependencies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter", SilentWriter)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """An unconditional model as this package writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    diffusers.DDIMPipeline(tiny_unet(), ours()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_classes(tmp_path_factory):
    """A class-conditional one with four classes."""
    folder = tmp_path_factory.mktemp("models") / "classes"
    diffusers.DDIMPipeline(tiny_unet(num_class_embeds=4), ours()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    """A colour DDPMPipeline with the defaults of diffusers: clipped, leading."""
    folder = tmp_path_factory.mktemp("models") / "foreign"
    diffusers.DDPMPipeline(tiny_unet(in_channels=3, out_channels=3), diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder
