"""Edits an attribute: adds the difference between the mean codes of two groups of images to the
code of a third.

Here a T-shirt is given sleeves: the direction is mean(pullovers) - mean(T-shirts).
Run: python examples/11_edit.py [OUT.png]
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

from ddim import UnconditionalPipeline
from ddim.models.images import make_grid, save_picture

IMAGES = Path(__file__).parent.parent / "tests" / "data" / "fashion_mnist_2048.npz"
SHIRT, PULLOVER = 0, 2


def main(out: str = "out/edit.png", group: int = 80, steps: int = 20) -> torch.Tensor:
    pipe = UnconditionalPipeline.from_pretrained("fashion-mnist")
    with np.load(IMAGES) as arrays:
        images, labels = arrays["train_images"][..., None], arrays["train_labels"]
    shirts, pullovers = (images[labels == label][:group] for label in (SHIRT, PULLOVER))
    edited = images[labels == SHIRT][group : group + 4]

    # BDIA's authors edit with gamma 0.96; both states of a code are moved alike, and come back to
    # the image where nothing is added.
    codes = [
        pipe.encode(part, steps, method="bdia", gamma=0.96) for part in (shirts, pullovers, edited)
    ]
    direction = codes[1].states.mean(1, keepdim=True) - codes[0].states.mean(1, keepdim=True)

    rows = [edited]
    for strength in (0.0, 0.5, 1.0):
        states = codes[2].states + strength * direction
        states *= (
            codes[2].states.flatten(2).norm(dim=2)[..., None, None, None]
            / states.flatten(2).norm(dim=2)[..., None, None, None]
        )
        moved = dataclasses.replace(
            codes[2], states=states
        )  # as long as before: a longer code is an image of too much contrast
        rows.append(np.stack([np.asarray(p) for p in pipe.decode(moved)])[..., None])

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    save_picture(make_grid(np.concatenate(rows), columns=len(edited)), out, scale=3)
    print(f"{out}: originals, then strengths 0, 0.5 and 1")
    return torch.from_numpy(np.stack(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
