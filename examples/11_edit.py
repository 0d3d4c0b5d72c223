"""Edits pictures by words: encodes them under the prompt that describes them, and decodes their
codes under others. What the prompts share stays where it was.

Run: python examples/11_edit.py [MODEL] [OUT.png]
MODEL is a checkpoint in Stable Diffusion's format: an embedded model, a folder, or a hub id.
"""

import sys
from pathlib import Path

import numpy as np

from ddim import DiffusionPipeline
from ddim.models.images import label_rows, save_picture

BEFORE = "a red sneaker on a black background"
AFTER = ("a blue sneaker on a black background", "a green sneaker on a white background")


def main(
    model: str = "fashion-text", out: str = "out/edit.png", steps: int = 25, count: int = 6
) -> list[np.ndarray]:
    pipe = DiffusionPipeline.from_pretrained(model)
    drawn = pipe(
        BEFORE, seeds=range(count), num_inference_steps=steps, guidance_scale=3.0, progress=False
    ).images

    # Without guidance a code comes back under its own prompt as the picture that it was made of.
    code = pipe.encode(drawn, BEFORE, steps)
    rows, labels = [drawn, pipe.decode(code, BEFORE)], [BEFORE, "encoded, and decoded again"]
    for prompt in AFTER:
        rows.append(pipe.decode(code, prompt, guidance_scale=3.0))
        labels.append(f"the same codes as {prompt}")

    sheets = [np.stack([np.asarray(picture) for picture in row]) for row in rows]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_picture(label_rows(np.concatenate(sheets), labels, scale=3), out)
    print(f"{out}: {len(rows)} rows of {count} pictures")
    return sheets


if __name__ == "__main__":
    main(*sys.argv[1:])
