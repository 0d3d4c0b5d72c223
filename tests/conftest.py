"""Tiny models in diffusers format, made once: their weights are random, and nothing here judges a
picture."""

import contextlib
import itertools
import json
import math
import os
import shutil
import socket
import sys
import threading

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image


def thinned(*values, stride):
    """The combinations of some parameters' values for `make test-all`, of which `make test` runs
    each stride-th: with no factor in common with the numbers of values, these have every value."""
    cases = list(itertools.product(*values))
    assert math.gcd(stride, len(cases)) == 1
    for some, every in zip(zip(*cases[::stride], strict=True), values, strict=True):
        assert all(value in some for value in every)
    return [
        pytest.param(*case, marks=() if n % stride == 0 else pytest.mark.slow)
        for n, case in enumerate(cases)
    ]


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
    """A scheduler as this package's training writes it; velocities keep the images of a random
    network in range."""
    return diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction", **options
    )


def with_fewer_levels(model, folder, *, count=250):
    """A copy of a model with fewer levels of noise, so that a walk over all of them is short."""
    shutil.copytree(model, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    scale = config["num_train_timesteps"] / count  # keeps the noise of the last level
    config |= {"num_train_timesteps": count}
    config |= {name: scale * config[name] for name in ("beta_start", "beta_end")}
    path.write_text(json.dumps(config))
    return folder


def record(folder):
    """The run.json of a command."""
    return json.loads((folder / "run.json").read_text())


def edit(path, **keys):
    """Sets keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def pixels(path):
    """The grey levels of a picture."""
    return np.asarray(Image.open(path)).astype(int)


@contextlib.contextmanager
def on_a_terminal(monkeypatch, *, columns, stream="stderr"):
    """Has standard error, or another stream, be a terminal of so many columns; what is yielded
    returns what it showed, afterwards."""
    termios = pytest.importorskip("termios")
    here, there = os.openpty()
    termios.tcsetwinsize(there, (24, columns))
    shown = []

    def read():
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while part := os.read(here, 4096):
                shown.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(there, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, stream, terminal)
            yield lambda: b"".join(shown).decode()
    finally:
        reader.join()
        os.close(here)


class SilentWriter:
    """What training asks of tensorboard's writer, saying nothing."""

    def __init__(self, *args, **kwargs): ...

    def add_scalar(self, *args): ...

    def add_image(self, *args, **options): ...

    def close(self): ...


@pytest.fixture(scope="session")
def silent_log():
    """Puts a silent writer in tensorboard's place, whose import warns of its own dependencies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter", SilentWriter)
        yield


@pytest.fixture
def alone(silent_log):
    """A training run in this process, which may choose its precision: accelerate otherwise fixes
    that for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test asks the hub whether it is there."""

    def unreachable(self, name, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)


@pytest.fixture
def no_socket(monkeypatch):
    """Fails a test that looks up a host or connects to one, also where the error is swallowed."""
    tried = []

    def refuse(*arguments, **options):
        tried.append(arguments)
        raise OSError("no connection is allowed here")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    yield
    assert tried == []


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
    diffusers.DDPMPipeline(
        tiny_unet(in_channels=3, out_channels=3), diffusers.DDPMScheduler()
    ).save_pretrained(folder)
    return folder


WORDS = ("a", "red", "green", "blue", "square", "on", "black", "white", "background")


def tiny_tokenizer():
    """A CLIP tokenizer that knows :data:`WORDS` whole and all other words by their letters, of 12
    tokens at most."""
    import transformers

    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(f"{c}{end}" for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")),
    ]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while (
            len(parts) > 1
        ):  # byte-pair encoding: the oldest merge that fits, else a new one at the start
            pairs = list(zip(parts, parts[1:], strict=False))
            pair = min((p for p in pairs if p in merges), key=merges.index, default=pairs[0])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            place = pairs.index(pair)
            parts[place : place + 2] = ["".join(pair)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(
        vocabulary, merges, model_max_length=12, pad_token="<|endoftext|>"
    )


def tiny_text_parts(**options):
    """The parts of a Stable-Diffusion-format model for 16x16 colour images: 8x8 latents of 4
    channels, 12 tokens; random weights."""
    import transformers

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()
    vae = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    ).eval()
    unet = diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            **options,
        }
    ).eval()
    return {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    """A text-conditional model as Stable Diffusion 1.5 writes it: epsilon, scaled_linear betas,
    leading, no zero terminal SNR."""
    folder = tmp_path_factory.mktemp("models") / "text"
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = diffusers.StableDiffusionPipeline(
        **tiny_text_parts(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder
