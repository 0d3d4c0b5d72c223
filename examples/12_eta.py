"""Draws the same seeds at several etas and numbers of steps: one row an eta, one column a number.

Run: python examples/12_eta.py [MODEL] [OUT.png]
MODEL is an unconditional model: an embedded one, a folder in diffusers format, or a hub id.
"""

import sys
from pathlib import Path

import numpy as np

from ddim import DiffusionPipeline
from ddim.models.images import label_rows, save_picture

ETAS = {"eta 0": 0.0, "eta 0.5": 0.5, "eta 1: DDPM": 1.0, "sigma-hat": "sigma-hat"}


def main(
    model: str = "fashion-mnist",
    out: str = "out/eta.png",
    steps: tuple[int, ...] = (10, 20, 50, 100, 1000),
    count: int = 2,
) -> np.ndarray:
    pipe = DiffusionPipeline.from_pretrained(model)
    cells = []
    for eta in ETAS.values():
        for number in steps:
            drawn = pipe(
                seeds=range(count),
                num_inference_steps=number,
                eta=eta,
                output_type="np",
                progress=False,
            ).images
            cells.append(np.concatenate(list(drawn), axis=1))  # the seeds beside each other

    sheet = np.round(255 * np.stack(cells)).astype(np.uint8)
    columns = [f"{number} steps" for number in steps]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_picture(label_rows(sheet, list(ETAS), columns=columns, scale=2, padding=6), out)
    print(f"{out}: {len(ETAS)} etas (rows) and {len(steps)} numbers of steps (columns)")
    return sheet.reshape(len(ETAS), len(steps), *sheet.shape[1:])


if __name__ == "__main__":
    main(*sys.argv[1:])
