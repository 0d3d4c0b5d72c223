"""The network of a text model: makes a new one, or checks that a base's fits the rest and the
data."""

from typing import Any, NamedTuple

import diffusers

from ddim.errors import DDIMError
from ddim.training.base import Base
from ddim.training.config import TrainConfig
from ddim.training.subject import check_halvings, shape_options

__all__ = ["Ends", "check_text_network", "make_text_network"]


class Ends(NamedTuple):
    """What a network has to fit: latents on one side, captions on the other."""

    latents: tuple[int, int, int]
    """(C, H, W) of the latents that it denoises."""
    factor: int
    """Pixels of an image along a side of one latent."""
    width: int
    """Channels of a caption's tokens."""


def make_text_network(config: TrainConfig, base: Base, ends: Ends) -> Any:
    """Makes a new network. As soon as one option gives a shape, the options give all of it;
    otherwise it has the base's shape.

    Raises:
        DDIMError: If the latents cannot be halved as often as it has resolutions, or diffusers
            refuses the options.
    """
    channels, height, width = ends.latents
    options = {key: value for key, value in base.network_config.items() if not key.startswith("_")}
    if config.shape_options:
        options = shape_options(config, down="CrossAttnDownBlock2D", up="CrossAttnUpBlock2D")
        size = config.architecture.attention_head_dim
        # By this name, diffusers means the number of heads here.
        options["attention_head_dim"] = tuple(
            max(1, c // size) for c in options["block_out_channels"]
        )
    options |= {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": channels,
        "cross_attention_dim": ends.width,
    }
    check_halvings((height, width), len(options["block_out_channels"]), unit=ends.factor)
    try:
        return diffusers.UNet2DConditionModel.from_config(options)
    except (ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise DDIMError(
            f"no network can be made of these options, or of {base.name}'s configuration "
            f"({reason})."
        ) from error


def check_text_network(unet: Any, base: Base, ends: Ends) -> None:
    """Checks that a network fits the latents and the captions.

    Raises:
        DDIMError: If it does not; the message says what to do.
    """
    config, (channels, height, width), factor = unet.config, ends.latents, ends.factor
    if (config.in_channels, config.out_channels) != (channels, channels):
        raise DDIMError(
            f"the network of {base.name} takes {config.in_channels} channels and gives "
            f"{config.out_channels}, and its autoencoder has {channels}: it is for another task "
            "(inpainting, upscaling, ...), which diffusers' own scripts train."
        )
    if config.cross_attention_dim != ends.width:
        raise DDIMError(
            f"the network of {base.name} reads captions of width {config.cross_attention_dim}, and "
            f"its text encoder gives {ends.width}; the two do not belong together."
        )
    size = config.sample_size
    wanted = (size, size) if isinstance(size, int) else tuple(size or (height, width))
    if wanted != (height, width):
        raise DDIMError(
            f"{base.name} makes images of {wanted[1] * factor}x{wanted[0] * factor}, and those of "
            f"the data are {width * factor}x{height * factor} (width x height); use --resolution "
            f"{wanted[0] * factor}, or --from-scratch for a network of that size."
        )
