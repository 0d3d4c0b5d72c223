"""Calls a model's network on noised images for the doctor: on pixels, or on an autoencoder's
latents."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.core.schedule import NoiseSchedule
from ddim.data.batches import pick, stack_images
from ddim.data.dataset import ImageData
from ddim.data.sources import load_images
from ddim.doctor.probing import Probe, probe
from ddim.errors import DataError, DDIMError
from ddim.models.checkpoints import STABLE_DIFFUSION, check_finite, load_network, read_model_index
from ddim.pipelines.diffusion_pipeline import text_pipeline
from ddim.pipelines.pictures import encode_images
from ddim.runs.model import find_device, open_finite, quiet_libraries

__all__ = ["probe_latents", "probe_pixels"]

_PIXELS, _LATENTS = 32, 16
"""Images that a network is called on; those of latents are larger as a rule."""


def probe_pixels(
    folder: Path, name: str, schedule: NoiseSchedule, data: ImageData, device_name: str
) -> Probe:
    """What the answers of a network of pixels tell; classes are the images' own.

    Raises:
        CheckpointError: If the weights cannot be loaded, or are not finite.
        DataError: If the labels are not the network's.
    """
    device = find_device(device_name)
    network = load_network(folder).to(device)
    check_finite(name, dict(network.named_parameters()))
    few, labels = pick(len(data), _PIXELS, labels=data.labels), {}
    if network.config.get("num_class_embeds"):
        chosen = _classes(data, few, network, name)
        labels = {"class_labels": torch.tensor(chosen, device=device)}

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        prediction: Tensor = network(x_t, t, **labels).sample
        return prediction[:, : x_t.shape[1]]

    return probe(predict, schedule, stack_images(data, few).to(device))


def probe_latents(
    folder: Path, name: str, schedule: NoiseSchedule, data: str, device_name: str
) -> tuple[Probe, tuple[str, ...]]:
    """What the answers of a text model's network to the empty prompt tell, and notes on the data.

    Raises:
        DDIMError: If the model is not in Stable Diffusion's format.
        CheckpointError: If it cannot be opened, or its weights are not finite.
        DataError: If the data cannot be read.
    """
    kind = read_model_index(folder).get("_class_name")
    if kind not in STABLE_DIFFUSION:
        raise DDIMError(
            f"--probe calls networks of pixels, and of text in Stable Diffusion's format; {name} "
            f"is a {kind}. Leave it out."
        )
    device = find_device(device_name)
    quiet_libraries(text=True)
    opened = text_pipeline("StableDiffusionPipeline")
    pipe = open_finite(opened, folder, name, torch.float32).to(device)
    channels, *sides = pipe.image_shape
    pictures = load_images(data, channels=channels, resolution=tuple(sides))
    conditions = pipe.conditions("", guidance_scale=1.0)
    pipe.denoiser(conditions)  # refuses a network that takes more than latents

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        empty = conditions.cond.expand(len(x_t), -1, -1)
        prediction: Tensor = pipe.unet(x_t, t, encoder_hidden_states=empty).sample
        return prediction

    chunks = torch.split(stack_images(pictures, pick(len(pictures), _LATENTS)), 4)
    latents = torch.cat([encode_images(pipe, chunk, device).mean for chunk in chunks])
    return probe(predict, schedule, latents), pictures.notes


def _classes(data: ImageData, chosen: list[int], network: Any, name: str) -> list[int]:
    """The labels of these images, which the network must know."""
    labels, known = [data[i][1] for i in chosen], int(network.config.num_class_embeds)
    if min(labels) < 0 or max(labels) >= known:
        got = "has no labels" if min(labels) < 0 else f"has others; got {max(labels)}"
        raise DataError(
            f"--probe needs labels in 0..{known - 1}, the classes of {name}, and {data.name} {got}."
        )
    return labels
