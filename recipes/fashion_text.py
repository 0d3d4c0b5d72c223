"""Makes the folder that fashion-text models are trained from: a VAE, a text encoder, and a UNet and
scheduler of the same shapes.

    python recipes/fashion_text.py all --out runs/fashion-text-base

It is a Stable Diffusion pipeline in diffusers format whose UNet has not been trained. ``vae``,
``text`` and ``base`` are its three parts, each of which can be made by itself, in this order, into
one folder. The seed gives the initial weights and the order of the images, so a rerun on one thread
gives the same weights. ``ship`` copies a model that was trained from it to where it is embedded:

    python recipes/fashion_text.py ship --model runs/fashion-text --base runs/fashion-text-base
    --out src/ddim/zoo/fashion-text
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddim.data.fashion_text import BACKGROUNDS, COLOURS, FRAME, GARMENTS, Combination
from ddim.data.sources import load_images
from ddim.files import file_hash, write_text
from ddim.models.images import from_uint8, to_uint8

LENGTH = 24
"""Tokens of a caption, with its beginning and its end; the longest caption has 12, and unknown
words take a token a byte or so."""
WIDTH = 96
"""Channels of a token."""
LARGEST = 16_000_000
"""Bytes of an embedded model."""
START, END = "<|startoftext|>", "<|endoftext|>"


def read(split: str) -> tuple[NDArray[np.uint8], list[str]]:
    """Images [N, 32, 32, 3] and captions."""
    data = load_images("fashion-text", split=split, captions=True)
    images = torch.stack([data[i][0] for i in range(len(data))]).permute(0, 2, 3, 1)
    return images.numpy(), list(data.captions or ())


def batches(images: NDArray[np.uint8], *, count: int, size: int, generator: torch.Generator) -> Any:
    """Indices [size] of ``count`` images in all, every epoch in another order."""
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(count // size):
        if len(left) < size:
            left = torch.cat([left, torch.randperm(len(images), generator=generator)])
        yield left[:size].numpy()
        left = left[size:]


def one_cycle(parameters: Any, *, rate: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW whose learning rate rises over a tenth of the steps and then falls to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR
    return optimizer, schedule(optimizer, rate, total_steps=steps, pct_start=0.1)


class Log:
    """Prints the mean of a loss now and then."""

    def __init__(self, every: int) -> None:
        self.every, self.losses, self.began = every, [], time.perf_counter()

    def add(self, step: int, loss: Tensor, seen: int) -> None:
        """Takes the loss of a step; stops the run if it is NaN."""
        self.losses.append(loss.detach())
        if step % self.every:
            return
        mean = torch.stack(self.losses).mean().item()
        if mean != mean:
            raise SystemExit(f"the loss is NaN at step {step}; use a smaller learning rate.")
        speed = seen / (time.perf_counter() - self.began)
        print(f"step {step}  {seen} images  loss {mean:.5f}  {speed:.0f} images/s", flush=True)
        self.losses = []


def make_vae() -> AutoencoderKL:
    """Factor 2, four channels: 3x32x32 -> 4x16x16. It has no attention, since nothing in these
    images needs a wide view to be encoded."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def train_vae(options: argparse.Namespace) -> dict[str, Any]:
    r"""Trains the VAE on mean squared and absolute error and on

    .. math:: KL = \\tfrac12(\\mu^2 + \\sigma^2 - 1 - \\log\\sigma^2)

    with a small weight: it keeps neighbouring codes smooth, but does not make them Gaussian.
    """
    torch.manual_seed(options.seed)
    images, _ = read("train")
    vae = make_vae().to(memory_format=torch.channels_last).train()
    generator = torch.Generator().manual_seed(options.seed)
    count, rate, log = options.vae_images, options.vae_learning_rate, Log(100)
    optimizer, cycle = one_cycle(vae.parameters(), rate=rate, steps=count // 32)
    stream = batches(images, count=count, size=32, generator=generator)
    for step, chosen in enumerate(stream, 1):
        x = from_uint8(images[chosen]).contiguous(memory_format=torch.channels_last)
        code = vae.encode(x).latent_dist
        error = vae.decode(code.sample()).sample - x
        kl = 0.5 * (code.mean.square() + code.var - 1 - code.logvar).mean()
        loss = error.square().mean() + 0.1 * error.abs().mean() + options.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        log.add(step, loss, step * 32)
    vae.eval().requires_grad_(False)
    parts = (from_uint8(images[i : i + 500]) for i in range(0, 10_000, 500))
    codes = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
    vae.register_to_config(scaling_factor=round(1 / codes.std().item(), 4))
    seconds = time.perf_counter() - log.began
    vae.save_pretrained(options.out / "vae")
    measured = measure_vae(vae, *read("test"))
    channels = {
        "latent_mean": codes.mean((0, 2, 3)) * vae.config.scaling_factor,
        "latent_std": codes.std((0, 2, 3)) * vae.config.scaling_factor,
    }
    return {
        "images_seen": count,
        "learning_rate": rate,
        "kl_weight": options.kl_weight,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "seconds": round(seconds, 1),
        "scaling_factor": vae.config.scaling_factor,
        **{name: [round(v, 4) for v in values.tolist()] for name, values in channels.items()},
        "test": measured,
        "weight_hash": file_hash([options.out / "vae" / "diffusion_pytorch_model.safetensors"]),
    }


@torch.no_grad()
def measure_vae(
    vae: AutoencoderKL, images: NDArray[np.uint8], captions: list[str]
) -> dict[str, Any]:
    """The reconstruction error, pixels in [0, 1]: that of all images, and the frame's for each
    background."""
    parts = (from_uint8(images[i : i + 500]) for i in range(0, len(images), 500))
    codes = (vae.encode(part).latent_dist.mean for part in parts)
    back = np.concatenate([to_uint8(vae.decode(code).sample) for code in codes])
    error = (back.astype(np.float64) - images) / 255
    frame = np.ones(images.shape[1:3], dtype=bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    names = np.array(
        [next(n for n in BACKGROUNDS if c.endswith(f"on a {n} background")) for c in captions]
    )
    frames = {name: error[names == name][:, frame] for name in BACKGROUNDS}
    largest = {name: np.abs(e.mean((1, 2))).max() for name, e in frames.items()}
    return {
        "rmse": round(float(np.sqrt((error**2).mean())), 5),
        "frame_mean_error": {name: round(float(e.mean()), 5) for name, e in frames.items()},
        "frame_largest_mean_error": {name: round(float(e), 5) for name, e in largest.items()},
    }


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes and reads a tokenizer of CLIP's kind in which every word of the captions is one token.

    Byte pairs are merged, the most frequent first, until every word is one token; other text stays
    in bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    captions = [
        Combination(c, g, b).caption for c in COLOURS for g in GARMENTS for b in BACKGROUNDS
    ]
    counts = Counter(word for caption in captions for word in caption.replace("-", " - ").split())
    words = {word: [*word[:-1], f"{word[-1]}</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in words.values()):
        pairs = Counter[tuple[str, str]]()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += counts[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts in words.values():
            for i in range(len(parts) - 2, -1, -1):
                if (parts[i], *parts[i + 1 : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [*("".join(pair) for pair in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **special}
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(lines) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text encoder with two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_image_encoder() -> nn.Module:
    """The network that the text encoder is trained against, and that is then thrown away: 3x32x32
    -> a vector."""

    def block(before: int, after: int) -> list[nn.Module]:
        convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(
        *block(3, 32), *block(32, 64), *block(64, 128), nn.Flatten(), nn.Linear(128 * 4 * 4, WIDTH)
    )


def train_text(options: argparse.Namespace) -> dict[str, Any]:
    """Trains the text encoder by contrast: a caption's vector should be near those of its images,
    and far from those of others.

    All images of a caption in a batch are right answers: images choose among the batch's distinct
    captions, and a caption's target is spread evenly over its images.

    References:
        Radford and others. Learning Transferable Visual Models From Natural Language Supervision.
        2021. https://arxiv.org/abs/2103.00020
    """
    torch.manual_seed(options.seed)
    images, captions = read("train")
    tokenizer = make_tokenizer(options.out / "tokenizer")
    text, vision = make_text_encoder(tokenizer).train(), make_image_encoder().train()
    head = nn.Linear(WIDTH, WIDTH, bias=False)
    scale = nn.Parameter(torch.tensor(2.3))
    distinct = sorted(set(captions))
    tokens = tokenize(tokenizer, distinct)
    numbers = torch.tensor([distinct.index(c) for c in captions])
    parameters = [*text.parameters(), *vision.parameters(), *head.parameters(), scale]
    count, rate, log = options.text_images, options.text_learning_rate, Log(100)
    optimizer, cycle = one_cycle(parameters, rate=rate, steps=count // 128)
    generator = torch.Generator().manual_seed(options.seed)
    stream = batches(images, count=count, size=128, generator=generator)
    for step, chosen in enumerate(stream, 1):
        present, answers = numbers[chosen].unique(return_inverse=True)
        seen = nn.functional.normalize(vision(from_uint8(images[chosen])), dim=1)
        said = nn.functional.normalize(head(text(tokens[present]).pooler_output), dim=1)
        logits = scale.exp().clamp(max=100) * seen @ said.T
        shares = nn.functional.one_hot(answers, len(present)).float()
        loss = nn.functional.cross_entropy(logits, answers)
        loss = loss + nn.functional.cross_entropy(logits.T, (shares / shares.sum(0)).T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        log.add(step, loss / 2, step * 128)
    seconds = time.perf_counter() - log.began
    text.eval().requires_grad_(False).save_pretrained(options.out / "text_encoder")
    return {
        "images_seen": count,
        "learning_rate": rate,
        "parameters": sum(p.numel() for p in text.parameters()),
        "tokens": len(tokenizer),
        "captions": len(distinct),
        "seconds": round(seconds, 1),
        "test": measure_text(text, vision.eval(), head, tokens, distinct, *read("test")),
        "weight_hash": file_hash([options.out / "text_encoder" / "model.safetensors"]),
    }


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Tokens [B, LENGTH], as a pipeline makes them."""
    tokens: Tensor = tokenizer(
        captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens


@torch.no_grad()
def measure_text(
    text: CLIPTextModel,
    vision: nn.Module,
    head: nn.Module,
    tokens: Tensor,
    distinct: list[str],
    images: NDArray[np.uint8],
    captions: list[str],
) -> dict[str, float]:
    """How often an image finds its caption among all captions, a caption finds one of its own
    images, and a part of the caption is right."""
    parts = (from_uint8(images[i : i + 500]) for i in range(0, len(images), 500))
    seen = torch.cat([nn.functional.normalize(vision(part), dim=1) for part in parts])
    likeness = seen @ nn.functional.normalize(head(text(tokens).pooler_output), dim=1).T
    found = [distinct[i] for i in likeness.argmax(1).tolist()]
    back = [captions[i] for i in likeness.argmax(0).tolist()]
    split = [(a.split(" on a "), b.split(" on a ")) for a, b in zip(found, captions, strict=True)]
    right = {
        "image_to_caption": [a == b for a, b in zip(found, captions, strict=True)],
        "caption_to_image": [a == b for a, b in zip(back, distinct, strict=True)],
        "background": [a[1] == b[1] for a, b in split],
        "colour": [a[0].split()[1] == b[0].split()[1] for a, b in split],
        "garment": [a[0].split()[2:] == b[0].split()[2:] for a, b in split],
    }
    return {name: round(float(np.mean(values)), 4) for name, values in right.items()}


def make_unet(seed: int) -> UNet2DConditionModel:
    """A UNet that attends to the caption at 4x4, since what it names concerns the whole image."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers reads it as the number of heads
        norm_num_groups=8,
    ).eval()


def write_base(options: argparse.Namespace) -> dict[str, Any]:
    """Puts a fresh UNet and the scheduler beside the two trained parts, as a pipeline that
    diffusers loads."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # for leading timesteps, as in Stable Diffusion
    )
    unet = make_unet(options.seed)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(options.out / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(options.out / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(options.out / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(options.out)
    weights = sorted(options.out.rglob("*.safetensors"))
    return {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "weight_hash": file_hash([options.out / "unet" / "diffusion_pytorch_model.safetensors"]),
        "bytes": sum(path.stat().st_size for path in weights),
    }


def ship(options: argparse.Namespace) -> None:
    """Copies a trained model without its checkpoints; its card then says how its frozen parts were
    made, and how to guide it."""
    index = json.loads((options.model / "model_index.json").read_text(encoding="utf-8"))
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    for part in parts:
        shutil.copytree(options.model / part, options.out / part, dirs_exist_ok=True)
    card = json.loads((options.model / "card.json").read_text(encoding="utf-8"))
    card["parts"] = json.loads((options.base / "card.json").read_text(encoding="utf-8"))
    card |= {"guidance_scale": options.guidance_scale, "guidance_rescale": options.guidance_rescale}
    write_text(options.out / "card.json", json.dumps(card, indent=2, sort_keys=True) + "\n")
    shutil.copy(options.model / "model_index.json", options.out)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    if size > LARGEST:
        raise SystemExit(f"the model has {size} bytes; an embedded model has at most {LARGEST}.")
    print(f"{options.out} holds {', '.join(parts)}: {size} bytes.")


PARTS = {"vae": train_vae, "text": train_text, "base": write_base}


def main() -> None:
    """Makes the parts that are asked for, and enters each in the folder's card."""
    parser = argparse.ArgumentParser(description=__doc__)
    peak = "the highest rate of the cycle"
    parser.add_argument("part", choices=[*PARTS, "all", "ship"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae-images", type=int, default=70_000)
    parser.add_argument("--vae-learning-rate", type=float, default=2e-3, help=peak)
    parser.add_argument("--kl-weight", type=float, default=1e-3)
    parser.add_argument("--text-images", type=int, default=180_000)
    parser.add_argument("--text-learning-rate", type=float, default=2e-3, help=peak)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="for ship: the folder of a finished training")
    parser.add_argument("--base", type=Path, help="for ship: the folder that it was trained from")
    card_help = "for ship: the card's default"
    parser.add_argument("--guidance-scale", type=float, default=3.0, help=card_help)
    parser.add_argument("--guidance-rescale", type=float, default=0.7, help=card_help)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "ship":
        if options.model is None or options.base is None:
            parser.error("ship needs --model and --base")
        ship(options)
        return
    place = options.out / "card.json"
    for part in PARTS if options.part == "all" else [options.part]:
        made = PARTS[part](options)
        card = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
        card |= {"data": "fashion-text: 60,000 training images", "seed": options.seed}
        card["versions"] = {"torch": torch.__version__}
        card[part] = {"command": shlex.join(["python", *sys.argv]), **made}
        write_text(place, json.dumps(card, indent=2, sort_keys=True) + "\n")
        print(json.dumps({part: made}, indent=2), flush=True)


if __name__ == "__main__":
    main()
