"""Measures, over all captions, whether a model of fashion-text shows what it is asked for:
background, hue and garment.

    python studies/fashion_text_check.py fashion-text --out out/fashion-text-check

It writes check.json, with a line for people on standard output, and sheet.png: a row a garment, a
column a pair of background and colour."""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch import Tensor

from ddim import DiffusionPipeline
from ddim.data.fashion_text import (
    BACKGROUNDS,
    COLOURS,
    GARMENTS,
    Combination,
    FashionText,
    extract_garments,
    hues,
)
from ddim.data.sources import load_images
from ddim.evaluation.classifier import load_classifier
from ddim.files import write_text
from ddim.models.checkpoints import find_model, weight_hash
from ddim.models.images import make_grid, save_picture, to_uint8
from fashion_judge import Asked, Judged, judge, saturated


def judge_all(images: Tensor, combinations: list[Combination]) -> Judged:
    """What images [B, 3, 32, 32] in [0, 1] show, against what was asked for."""
    garments = torch.from_numpy(extract_garments(images.permute(0, 2, 3, 1).numpy()))
    asked = [Asked(*c.numbers) for c in combinations]
    return judge(
        images, garments, asked, palette=list(hues().values()), classifier=load_classifier()[0]
    )


def summary(judged: Judged, combinations: list[Combination], each: int) -> dict[str, object]:
    """Shares and errors over all images, by what was asked for, and by prompt."""
    both = judged.hue_right & judged.class_right

    def where(test: Callable[[Combination], bool]) -> Tensor:
        return torch.tensor([test(c) for c in combinations])

    def share(values: Tensor) -> float:
        return round(values.double().mean().item(), 4)

    backgrounds = {
        name: judged.error[where(lambda c, n=name: c.background == n)] for name in BACKGROUNDS
    }
    return {
        "hue_right": share(judged.hue_right),
        "class_right": share(judged.class_right),
        "both_right": share(both),
        "prompts_mostly_right": share(both.view(-1, each).double().mean(1) > 0.5),
        "background_error": {
            name: {"mean": round(e.mean().item(), 4), "std": round(e.std().item(), 4)}
            for name, e in backgrounds.items()
        },
        "class_right_by_garment": {
            g: share(judged.class_right[where(lambda c, g=g: c.garment == g)]) for g in GARMENTS
        },
        "hue_right_by_colour": {
            n: share(judged.hue_right[where(lambda c, n=n: c.colour == n)]) for n in COLOURS
        },
    }


@torch.no_grad()
def judge_real(vae: torch.nn.Module) -> dict[str, dict[str, float]]:
    """The most that can be reached: real test images as they are, and as the VAE gives them
    back."""
    data = load_images("fashion-text", split="test")
    labels = [data[i][1] for i in range(len(data))]
    images = torch.stack([data[i][0] for i in range(len(data))]).float() / 255
    combinations = FashionText.of_garments(
        np.empty((len(data), 0, 0), np.uint8), np.array(labels)
    ).combinations
    back = torch.cat(
        [vae.decode(vae.encode(x * 2 - 1).latent_dist.mean).sample for x in images.split(250)]
    )
    found = {}
    for name, pictures in (("composed", images), ("through_vae", (back / 2 + 0.5).clamp(0, 1))):
        judged = judge_all(pictures, list(combinations))
        shares = {
            key: round(getattr(judged, key).double().mean().item(), 4)
            for key in ("hue_right", "class_right")
        }
        found[name] = {
            **shares,
            "background_error": round(judged.error.abs().mean().item(), 4),
            "images": len(data),
        }
    return found


def main() -> None:
    """Draws every caption's images, and judges them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=4, help="images of each of the 300 captions")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--guidance-rescale", type=float, default=0.7)
    parser.add_argument("--batch-size", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    folder = find_model(options.model)
    pipe = DiffusionPipeline.from_pretrained(folder)
    captions = [Combination(c, g, b) for g in GARMENTS for b in BACKGROUNDS for c in COLOURS]
    every = [caption for caption in captions for _ in range(options.each)]
    parts = []
    for first in range(0, len(every), options.batch_size):
        part = every[first : first + options.batch_size]
        drawn = pipe(
            [c.caption for c in part],
            seeds=range(options.seed + first, options.seed + first + len(part)),
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            guidance_rescale=options.guidance_rescale,
            output_type="pt",
            progress=False,
        ).images
        parts.append(drawn)
    images = torch.cat(parts)
    found = {
        "command": shlex.join(["python", *sys.argv]),
        "model": options.model,
        "weight_hash": weight_hash(folder),
        "steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "guidance_rescale": options.guidance_rescale,
        "captions": len(captions),
        "images": len(every),
        **summary(judge_all(images, every), every, options.each),
        "saturated": round(saturated(images).mean().item(), 4),
        "real": judge_real(pipe.vae),
        "seconds": round(time.perf_counter() - began, 1),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "check.json", json.dumps(found, indent=2) + "\n")
    shown = to_uint8(images[:: options.each] * 2 - 1)
    save_picture(
        make_grid(shown, columns=len(BACKGROUNDS) * len(COLOURS), padding=0),
        options.out / "sheet.png",
        scale=2,
    )
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
