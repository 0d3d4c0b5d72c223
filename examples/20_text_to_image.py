"""Draws prompts under rising guidance, with and without its rescale, and edits a picture: encoded
under one prompt, decoded under another.

Run: python examples/20_text_to_image.py [MODEL] [OUT.png]
MODEL is a checkpoint in Stable Diffusion's format: an embedded model, a folder, or a hub id.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from ddim import DDIMScheduler, DiffusionPipeline
from ddim.models.images import label_rows, save_picture

BEFORE, AFTER = "a red sneaker on a black background", "a blue sneaker on a white background"


def main(
    model: str = "fashion-text", out: str = "out/text.png", steps: int = 25
) -> list[list[Any]]:
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    options = {"seeds": range(4), "num_inference_steps": steps, "progress": False}

    rows, labels = [], []
    for scale, rescale in ((1.0, 0.0), (7.5, 0.0), (7.5, 0.7), (15.0, 0.0), (15.0, 0.7)):
        rows.append(pipe(BEFORE, guidance_scale=scale, guidance_rescale=rescale, **options).images)
        labels.append(f"{BEFORE}: guidance {scale}, rescale {rescale}")

    # A code comes back under the prompt that made it, without guidance as it was made, and follows
    # another prompt from there.
    code = pipe.encode(rows[0], BEFORE, steps)
    for prompt, scale in ((BEFORE, 1.0), (AFTER, 1.0), (AFTER, 3.0)):
        rows.append(pipe.decode(code, prompt, guidance_scale=scale))
        labels.append(f"the first row, decoded as {prompt}: guidance {scale}")

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_picture(
        label_rows(np.stack([np.asarray(picture) for row in rows for picture in row]), labels), out
    )
    print(f"{out}: {len(rows)} rows")
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:])
