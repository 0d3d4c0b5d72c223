"""Pictures as a text-to-image pipeline's VAE takes them, and as the latents that it makes of them.

These functions take one of diffusers' Stable Diffusion pipelines, for its VAE and its sizes."""

from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddim.core.checks import check_whole, shown
from ddim.errors import DDIMError
from ddim.models.images import convert_mode, to_pil
from ddim.pipelines.networks import acting, prepare_walk

__all__ = ["Posterior", "check_size", "encode_images", "prepare_images"]


class Posterior(NamedTuple):
    """A VAE's Gaussian latents of images, as the network knows them, [B, C, h, w] each, float32."""

    mean: Tensor
    std: Tensor


_LARGEST_SIDE = 2**16


def check_size(height: int, width: int, factor: int) -> tuple[int, int]:
    """Returns the size of a picture as whole numbers. A DDIMError refuses one that has no whole
    number of latents, and says the nearest that has; and what is no size, such as an image in the
    place of the height."""
    advice = "Images to begin at are for ImageToImagePipeline(**pipe.components)"
    height = check_whole("height", height, note=" of pixels", advice=advice)
    width = check_whole("width", width, note=" of pixels", advice=advice)
    if max(height, width) > _LARGEST_SIDE:
        sides = shown([width, height])
        raise DDIMError(f"width and height are at most {_LARGEST_SIDE} pixels; got {sides}.")
    if height < factor or width < factor or height % factor or width % factor:
        near = "x".join(str(max(1, round(side / factor)) * factor) for side in (width, height))
        raise DDIMError(
            f"width and height must be multiples of {factor}, the VAE's factor; got "
            f"{width}x{height} (width x height), and {near} would do."
        )
    return height, width


def prepare_images(pipe: Any, images: Any) -> Tensor:
    """Turns pictures into a tensor [I, C, H, W] in [-1, 1]; latents [I, c, h, w], which have the
    network's channels, stay as they are.

    Args:
        pipe: The pipeline, for the size of its latents and its VAE's channels.
        images: One or a list of Pillow images, of bytes [H, W, C], or of arrays [H, W, C] or
            tensors [C, H, W] in [0, 1]; a batch.

    Raises:
        DDIMError: If there is none, sizes differ or have no whole number of latents, or the values
            lie elsewhere.
    """
    listed = list(images) if isinstance(images, (list, tuple)) else [images]
    kinds = (Image.Image, np.ndarray, Tensor)
    if not listed or not all(isinstance(image, kinds) for image in listed):
        found = "an empty list" if not listed else type(listed[0]).__name__
        raise DDIMError(
            f"image must be a picture, an array or a tensor, or a list of them; got {found}."
        )
    channels, latent = int(pipe.vae.config.in_channels), int(pipe.unet.config.in_channels)
    for image in listed:
        _check_shape(image, channels, latent)
    if isinstance(listed[0], Tensor) and listed[0].shape[-3] == latent != channels:
        return torch.cat([image if image.ndim == 4 else image[None] for image in listed])
    parts = [_pictures(image) if _is_bytes(image) else [image] for image in listed]
    listed = [picture for part in parts for picture in part]
    if isinstance(listed[0], Image.Image):
        sizes = {(image.height, image.width) for image in listed}
        listed = [convert_mode(image, channels) for image in listed]
    else:
        sizes = {
            tuple(image.shape[-3:-1] if isinstance(image, np.ndarray) else image.shape[-2:])
            for image in listed
        }
        if any(float(abs(image).max()) > 1 + 1e-3 for image in listed):
            raise DDIMError(
                "arrays and tensors of images must lie in [0, 1]; bytes go in as uint8 arrays, or "
                "as pictures."
            )
    if len(sizes) > 1:
        found = ", ".join(f"{w}x{h}" for h, w in sorted(sizes))
        raise DDIMError(f"images of one call must have one size; got {found} (width x height).")
    check_size(*sizes.pop(), pipe.vae_scale_factor)
    prepared: Tensor = pipe.image_processor.preprocess(listed if len(listed) > 1 else listed[0])
    return prepared


def _check_shape(image: Image.Image | NDArray[Any] | Tensor, channels: int, latent: int) -> None:
    """Refuses arrays and tensors that are no images of the VAE's channels, nor latents."""
    if isinstance(image, Image.Image):
        return
    if isinstance(image, Tensor):
        fits = image.ndim in (3, 4) and image.shape[-3] in (channels, latent)
        wanted = f"a tensor must have shape [C, H, W] or [B, C, H, W] with {channels} channels"
        wanted += f", or {latent} for latents"
    elif _is_bytes(image):
        fits = image.ndim == 2 or (image.ndim in (3, 4) and image.shape[-1] in (1, 3, 4))
        wanted = (
            "an array of bytes must have shape [H, W], [H, W, C] or [B, H, W, C] with 1, 3 or 4 "
            "channels"
        )
    else:
        fits = image.ndim in (3, 4) and image.shape[-1] == channels
        wanted = f"an array must have shape [H, W, C] or [B, H, W, C] with {channels} channels"
    if not fits or 0 in image.shape:
        raise DDIMError(f"the image has a wrong shape: {wanted}; got {list(image.shape)}.")


def _is_bytes(image: Any) -> TypeGuard[NDArray[np.uint8]]:
    return isinstance(image, np.ndarray) and image.dtype == np.uint8


def _pictures(image: NDArray[np.uint8]) -> list[Image.Image]:
    is_grey = image.ndim == 2
    return to_pil(image[None, ..., None] if is_grey else image.reshape(-1, *image.shape[-3:]))


@torch.no_grad()
def encode_images(pipe: Any, x: Tensor, device: torch.device) -> Posterior:
    """The VAE's latents of pictures [I, C, H, W] in [-1, 1], computed on a device."""
    prepare_walk(pipe.vae)
    with acting(pipe.vae):
        found = pipe.vae.encode(x.to(device, pipe.vae.dtype))
    scale = pipe.vae.config.scaling_factor
    if hasattr(found, "latent_dist"):
        mean, std = found.latent_dist.mean.float(), found.latent_dist.std.float()
        return Posterior(mean * scale, std * scale)
    latents = found.latents.float()
    return Posterior(latents * scale, torch.zeros_like(latents))
