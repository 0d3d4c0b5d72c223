"""The recipe of docs/training.md in small: a few hundred pictures make a model that draws them."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ddim.evaluation.metrics import Statistics, frechet_distance
from ddim.pipelines.unconditional import UnconditionalPipeline
from ddim.training.config import TrainConfig
from ddim.training.trainer import train


def distance(model, pictures):
    """The Frechet distance of 200 drawn images from the pictures, on pixels in [-1, 1]."""
    pipe = UnconditionalPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(seeds=range(200), num_inference_steps=8, output_type="pt").images * 2 - 1
    real = torch.from_numpy(pictures).flatten(1).float() / 127.5 - 1
    return frechet_distance(Statistics.of(drawn.flatten(1)), Statistics.of(real))


@pytest.mark.slow
def test_a_few_hundred_pictures_make_a_model_that_draws_them(tmp_path, alone):
    pictures = np.round(load_digits().images[:300] * (255 / 16)).astype(np.uint8)
    np.savez(tmp_path / "pictures.npz", images=pictures)
    measured = {}
    for images in (16, 3200):
        out = tmp_path / str(images)
        train(
            TrainConfig(
                data=str(tmp_path / "pictures.npz"),
                out=str(out),
                block_out_channels=(16, 32),
                prediction_type="v_prediction",
                batch_size=16,
                learning_rate=0.0015,
                images=images,
                validation_images=0,
                preview_every=0,
            )
        )
        measured[images] = distance(out, pictures)
    assert measured[3200] < measured[16] / 3
