"""What an unconditional or class-conditional network takes: images of its sizes, one label each."""

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from ddim.bounds import MOST_IMAGES
from ddim.core.checks import check_samples, check_whole, wrong_argument
from ddim.errors import DDIMError
from ddim.pipelines.recording import network_call

__all__ = [
    "Labels",
    "as_labels",
    "as_network",
    "check_latents",
    "check_network",
    "check_sides",
    "count_images",
    "read_image_shape",
    "takes_labels",
]

Labels = int | Sequence[int] | Tensor | None


def count_images(batch_size: int | None, **given: Any) -> int:
    """The number of images, from whatever says it; refuses where two say different numbers."""
    sizes = {}
    if batch_size is not None:
        sizes["batch_size"] = check_whole("batch_size", batch_size, least=1, most=MOST_IMAGES)
    for name, value in given.items():
        if hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0:  # not a 0-d tensor
            sizes[name] = len(value)
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise DDIMError(
            f"the arguments tell different numbers of images ({listed}); give one of each an image."
        )
    return check_whole("batch_size", next(iter(sizes.values()), 1), least=1)


def read_image_shape(unet: Any) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network was trained on; a DDIMError if its configuration has
    no size, or one that it cannot take."""
    size = unet.config.sample_size
    if size is None:
        raise DDIMError(
            "the network's configuration has no sample_size; give latents of the size to sample."
        )
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise DDIMError(
            "the sample_size of the network's configuration must be one whole number or two; "
            f"got {size!r}."
        )
    height, width = sides
    check_sides(unet, height, width, "its configuration's sample_size")
    return int(unet.config.in_channels), height, width


def check_sides(unet: Any, height: int, width: int, what: str) -> None:
    """Refuses images that a UNet cannot halve as often as it does."""
    if not isinstance(unet, diffusers.UNet2DModel):
        return
    factor = 2 ** (len(unet.config.block_out_channels) - 1)
    if height % factor or width % factor:
        raise DDIMError(
            f"the network needs images whose sides are multiples of {factor}; {what} is "
            f"{width}x{height} (width x height)."
        )


def check_latents(unet: Any, latents: Tensor) -> None:
    """Refuses latents that are no x_T of a network."""
    check_samples(latents=latents)
    channels, sizes = int(unet.config.in_channels), list(latents.shape)
    if len(sizes) != 4 or sizes[1] != channels:
        raise DDIMError(f"latents must have shape [B, {channels}, H, W]; got {sizes}.")
    check_sides(unet, sizes[2], sizes[3], "the latents' size")


def takes_labels(unet: Any) -> bool:
    """Whether a network is class-conditional."""
    names = ("num_class_embeds", "class_embed_type")
    return any(unet.config.get(name) is not None for name in names)


def as_labels(unet: Any, class_labels: Labels, count: int, device: torch.device) -> Tensor | None:
    """One label an image on a device, or None for a network without classes."""
    classes = unet.config.get("num_class_embeds")
    if class_labels is None and not takes_labels(unet):
        return None
    if class_labels is None:
        which = f", from 0 to {classes - 1}" if classes else ""
        raise DDIMError(f"the network is class-conditional: give class_labels{which}.")
    if not takes_labels(unet):
        raise DDIMError("the network was trained without classes; leave out class_labels.")
    try:
        labels = torch.as_tensor(class_labels)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        wanted = "be a whole number, or one for each image"
        raise wrong_argument("class_labels", wanted, class_labels) from None
    if labels.ndim > 1 or (labels.ndim == 1 and len(labels) != count):
        raise DDIMError(
            f"class_labels must be one number for all images, or one for each of {count}; got "
            f"shape {list(labels.shape)}."
        )
    if classes is not None:
        is_outside = bool(((labels < 0) | (labels >= classes)).any())
        if is_outside or labels.is_floating_point():
            given = labels.tolist()
            raise DDIMError(
                f"class_labels must be whole numbers from 0 to {classes - 1}; got {given}."
            )
    return labels.expand(count).contiguous().to(device)


def check_network(unet: Any) -> int:
    """Returns the channels of a network's images; a DDIMError refuses one that returns others."""
    channels, made = int(unet.config.in_channels), int(unet.config.out_channels)
    if made not in (channels, 2 * channels):
        raise DDIMError(
            f"the network takes {channels} channels and returns {made}; an unconditional model "
            "returns as many as it takes, or twice as many where it predicts a variance too."
        )
    return channels


def as_network(
    unet: Any, labels: Tensor | None, *, records: bool = True
) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as (x_t, t) -> prediction: labels filled in, the channels of a learned
    variance left out; for ``records`` see :func:`ddim.pipelines.recording.network_call`."""
    channels = check_network(unet)
    options: dict[str, Any] = {} if labels is None else {"class_labels": labels}
    call = network_call(unet, records=records, **options)
    return lambda x_t, t: call(x_t, t)[:, :channels]
