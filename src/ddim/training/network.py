"""The network of a run: makes a new one, or checks that a base's fits the data."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import diffusers

from ddim.data.dataset import ImageData
from ddim.errors import DDIMError, first_line
from ddim.models.folder import read_json
from ddim.training.base import Base
from ddim.training.config import TrainConfig

__all__ = ["Ends", "as_resolution", "check_network", "check_text_network"]
__all__ += ["latent_factor", "make_network", "make_text_network", "resolution_for"]


class Ends(NamedTuple):
    """What the network of a text model has to fit: latents on one side, captions on the other."""

    latents: tuple[int, int, int]
    """(C, H, W) of the latents that it denoises."""
    factor: int
    """Pixels of an image along a side of one latent."""
    width: int
    """Channels of a caption's tokens."""


def resolution_for(config: TrainConfig, base: Base | None, size: tuple[int, int]) -> str:
    """What --resolution must say for images of about this height and width, so that the run begins:
    the base's own size, or what the network can halve."""
    factor, shape = 1, {} if base is None else base.network_config
    if base is not None and base.is_text:
        factor = latent_factor(read_json(base.folder / "vae" / "config.json"))
    if base is not None and not config.from_scratch and (own := shape.get("sample_size")):
        height, width = (own, own) if isinstance(own, int) else own
        return as_resolution(height * factor, width * factor)
    is_new = base is None or config.shape_options
    channels = config.architecture.block_out_channels if is_new else shape["block_out_channels"]
    return _halved(size, len(channels), unit=factor)


def latent_factor(autoencoder: Mapping[str, Any]) -> int:
    """Pixels of an image along a side of one latent, by the autoencoder's configuration."""
    return int(2 ** (len(autoencoder.get("block_out_channels", (0,))) - 1))


def as_resolution(height: int, width: int) -> str:
    """A size as --resolution takes it."""
    return str(height) if height == width else f"{width}x{height}"


def _halved(size: tuple[int, int], levels: int, *, unit: int = 1) -> str:
    """The nearest size of which latents of ``unit`` pixels can be halved as often as a network has
    resolutions."""
    factor = 2 ** (levels - 1) * unit
    height, width = (max(factor, round(side / factor) * factor) for side in size)
    return as_resolution(height, width)


def make_network(config: TrainConfig, data: ImageData, base: Base | None = None) -> Any:
    """Makes a diffusers UNet2DModel for this data. Without a base, or as soon as one option gives a
    shape, the options give all of it; otherwise it has the base's shape.

    Raises:
        DDIMError: If the images cannot be halved as often as the network has resolutions.
    """
    options: dict[str, Any] = {} if base is None else dict(base.network_config)
    if base is None or config.shape_options:
        options |= _shape(config, down="AttnDownBlock2D", up="AttnUpBlock2D")
    options |= _sizes(data.channels, *data.resolution)
    options["num_class_embeds"] = len(data.class_names or ()) if config.class_conditional else None
    _check_halvings(data.resolution, len(options["block_out_channels"]))
    make = diffusers.UNet2DModel
    return make(**options) if base is None else make.from_config(options)


def make_text_network(config: TrainConfig, base: Base, ends: Ends) -> Any:
    """Makes a diffusers UNet2DConditionModel. As soon as one option gives a shape, the options give
    all of it; otherwise it has the base's shape.

    Raises:
        DDIMError: If the latents cannot be halved as often as it has resolutions, or diffusers
            refuses the options.
    """
    options = {key: value for key, value in base.network_config.items() if not key.startswith("_")}
    if config.shape_options:
        options = _shape(config, down="CrossAttnDownBlock2D", up="CrossAttnUpBlock2D")
        size = config.architecture.attention_head_dim
        # By this name, diffusers means the number of heads here.
        heads = tuple(max(1, c // size) for c in options["block_out_channels"])
        options["attention_head_dim"] = heads
    options |= {**_sizes(*ends.latents), "cross_attention_dim": ends.width}
    _check_halvings(ends.latents[1:], len(options["block_out_channels"]), unit=ends.factor)
    try:
        return diffusers.UNet2DConditionModel.from_config(options)
    except (ValueError, TypeError) as error:
        raise DDIMError(
            f"no network can be made of these options, or of {base.name}'s configuration "
            f"({first_line(error)})."
        ) from error


def _sizes(channels: int, height: int, width: int) -> dict[str, Any]:
    size = height if height == width else (height, width)
    return {"sample_size": size, "in_channels": channels, "out_channels": channels}


def _shape(config: TrainConfig, *, down: str, up: str) -> dict[str, Any]:
    """Returns diffusers' options for the shape of a new network. ``down`` and ``up`` are the blocks
    with attention."""
    options = asdict(config.architecture)
    levels = len(options["block_out_channels"])
    first = levels - options.pop("attention_levels")
    attention = [level >= first for level in range(levels)]
    return options | {
        "down_block_types": tuple(down if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple(up if a else "UpBlock2D" for a in reversed(attention)),
    }


def _check_halvings(size: tuple[int, int], levels: int, *, unit: int = 1) -> None:
    """Checks that a size, in units of ``unit`` pixels, can be halved as often as a network has
    resolutions."""
    factor, (height, width) = 2 ** (levels - 1), (side * unit for side in size)
    if size[0] % factor or size[1] % factor:
        usable = _halved((height, width), levels, unit=unit)
        raise DDIMError(
            f"images of {width}x{height} cannot be halved {levels - 1} times, as {levels} entries "
            f"of --block-out-channels ask; use --resolution {usable}, or fewer entries."
        )


def check_network(network: Any, data: ImageData, classes: int | None, base: Base) -> None:
    """Checks that a base's network fits the images and the number of their classes.

    Raises:
        DDIMError: If it does not; the message says what to do.
    """
    channels, size = int(network.config.in_channels), network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size or data.resolution
    if channels not in (1, 3) or network.config.out_channels != channels:
        raise DDIMError(
            f"{base.name} takes {channels} channels and gives {network.config.out_channels}, and "
            "images have 1 or 3 each way; take another --base."
        )
    if (channels, height, width) != (data.channels, *data.resolution):
        size, theirs = as_resolution(height, width), data.resolution
        resolution = "" if (height, width) == theirs else f" --resolution {size}"
        raise DDIMError(
            f"{base.name} is for {width}x{height} images with {channels} channel(s), and "
            f"{data.name} has {theirs[1]}x{theirs[0]} with {data.channels}; use "
            f"--channels {channels}{resolution}."
        )
    theirs = network.config.get("num_class_embeds")
    if theirs != classes:
        raise DDIMError(
            f"{base.name} knows {theirs or 'no'} classes, and {classes or 'none'} were asked for; "
            f"{'use --class-conditional' if theirs else 'leave out --class-conditional'}, or add "
            "--from-scratch."
        )


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
            f"{as_resolution(wanted[0] * factor, wanted[1] * factor)}, or --from-scratch for a "
            "network of that size."
        )
