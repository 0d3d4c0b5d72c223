"""Interpolates between two real images: encode both, walk the great circle between their codes,
decode.

Run: python examples/10_interpolate.py [OUT.png]
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

from ddim import UnconditionalPipeline, interpolate
from ddim.models.images import make_grid, save_picture

IMAGES = Path(__file__).parent.parent / "tests" / "data" / "fashion_mnist_2048.npz"


def main(out: str = "out/interpolation.png", steps: int = 25) -> float:
    pipe = UnconditionalPipeline.from_pretrained("fashion-mnist")
    with np.load(IMAGES) as arrays:
        first, last = arrays["test_images"][[0, 1]][..., None]

    # A code of fixed-point is one state that looks like noise, which is where a great circle means
    # something.
    code = pipe.encode([first, last], steps, method="fixed-point")
    print(
        f"codes of root mean square {code.rms().tolist()}, in {code.evaluations} evaluations each"
    )

    path = interpolate(code.x_T[0], code.x_T[1], 9)
    along = dataclasses.replace(code, states=path.unsqueeze(0), residual=None)
    pictures = np.stack([np.asarray(p) for p in pipe.decode(along)])[..., None]

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_picture(
        make_grid(np.concatenate([first[None], pictures, last[None]]), columns=11), out, scale=3
    )
    missed = float(
        np.square((pictures[[0, -1]].astype(float) - np.stack([first, last])) / 255).mean()
    )
    print(f"{out}: the first and last of the path miss the images by {missed:.1e} (mean square)")
    return missed


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:])
