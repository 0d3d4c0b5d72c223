"""Draws a prompt under rising guidance, with and without its rescale.

Run: python examples/20_text_to_image.py [MODEL] [OUT.png]
MODEL is a checkpoint in Stable Diffusion's format: an embedded model, a folder, or a hub id.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from ddim import DDIMScheduler, DiffusionPipeline
from ddim.models.images import label_rows, save_picture

PROMPT = "a yellow sandal on a gray background"


def main(
    model: str = "fashion-text", out: str = "out/text.png", steps: int = 25
) -> list[list[Any]]:
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    options = {"seeds": range(4), "num_inference_steps": steps, "progress": False}

    rows, labels = [], []
    for scale, rescale in ((1.0, 0.0), (3.0, 0.0), (7.5, 0.0), (15.0, 0.0), (15.0, 0.7)):
        rows.append(pipe(PROMPT, guidance_scale=scale, guidance_rescale=rescale, **options).images)
        labels.append(f"{PROMPT}: guidance {scale}, rescale {rescale}")

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    pictures = np.stack([np.asarray(picture) for row in rows for picture in row])
    save_picture(label_rows(pictures, labels, scale=3), out)
    print(f"{out}: {len(rows)} rows")
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:])
