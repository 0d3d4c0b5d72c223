"""The network of a text model: a new one, or whether a base's fits its other parts and the data."""

from dataclasses import fields
from typing import Any, NamedTuple

import diffusers

from ddim.errors import DDIMError
from ddim.training.base import Base
from ddim.training.config import Architecture, TrainConfig
from ddim.training.subject import check_halvings

__all__ = ["Surroundings", "check_text_network", "make_text_network"]


class Surroundings(NamedTuple):
    """What a network lies between."""

    latents: tuple[int, int, int]
    """(C, H, W) of what it denoises."""
    factor: int
    """Pixels of an image along a side of one latent."""
    width: int
    """Channels of a caption's tokens."""


def make_text_network(config: TrainConfig, base: Base, around: Surroundings) -> Any:
    """A new network of the base's configuration, or, as soon as one option gives a shape, of the
    shape that all of them give.

    Raises:
        DDIMError: If the latents cannot be halved as often as it has resolutions, or diffusers
            refuses the options.
    """
    channels, *size = around.latents
    options = {key: value for key, value in base.network_config.items() if not key.startswith("_")}
    if any(getattr(config, f.name) is not None for f in fields(Architecture)):
        given = config.architecture
        levels = len(given.block_out_channels)
        attention = [level >= levels - given.attention_levels for level in range(levels)]
        options = {
            "block_out_channels": given.block_out_channels,
            "layers_per_block": given.layers_per_block,
            "down_block_types": tuple(
                "CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention
            ),
            "up_block_types": tuple(
                "CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)
            ),
            # diffusers' name for the number of heads
            "attention_head_dim": tuple(
                max(1, c // given.attention_head_dim) for c in given.block_out_channels
            ),
            "norm_num_groups": given.norm_num_groups,
            "dropout": given.dropout,
        }
    square = size[0] if size[0] == size[1] else tuple(size)
    options |= {
        "sample_size": square,
        "in_channels": channels,
        "out_channels": channels,
        "cross_attention_dim": around.width,
    }
    check_halvings((size[0], size[1]), len(options["block_out_channels"]), unit=around.factor)
    try:
        return diffusers.UNet2DConditionModel.from_config(options)
    except (ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise DDIMError(
            f"no network can be made of these options, or of {base.name}'s configuration "
            f"({reason})."
        ) from error


def check_text_network(unet: Any, base: Base, around: Surroundings) -> None:
    """Refuses a network that does not fit what it lies between.

    Raises:
        DDIMError: What does not fit, and what to do.
    """
    config, (channels, height, width), factor = unet.config, around.latents, around.factor
    if (config.in_channels, config.out_channels) != (channels, channels):
        raise DDIMError(
            f"the network of {base.name} takes {config.in_channels} channels and gives "
            f"{config.out_channels}, and its autoencoder has "
            f"{channels}: it is of another task (inpainting, upscaling, ...), which diffusers' own "
            "scripts train."
        )
    if config.cross_attention_dim != around.width:
        raise DDIMError(
            f"the network of {base.name} reads captions of width {config.cross_attention_dim}, and "
            f"its text encoder gives {around.width}; "
            "the two do not belong together."
        )
    size = config.sample_size
    wanted = (size, size) if isinstance(size, int) else tuple(size or (height, width))
    if wanted != (height, width):
        raise DDIMError(
            f"{base.name} makes images of {wanted[1] * factor}x{wanted[0] * factor}, and those of "
            "the data are "
            f"{width * factor}x{height * factor} (width x height); "
            f"use --resolution {wanted[0] * factor}, or --from-scratch for a network of that size."
        )
