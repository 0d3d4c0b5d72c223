"""What a run trains: a batch, how the network is called on it, how a preview is drawn, what the
model's folder holds.

The loop knows nothing else of images and captions. A :class:`PixelSubject` is an unconditional or
class-conditional network on pixels; :class:`ddim.training.text.TextSubject` is a text-conditional
one on latents."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddim.data.dataset import ImageData
from ddim.errors import DDIMError
from ddim.models.checkpoints import load_network
from ddim.training.base import Base
from ddim.training.config import Architecture, TrainConfig
from ddim.training.draws import Draws
from ddim.training.package import Package, make_scheduler

__all__ = [
    "PixelSubject",
    "Predictor",
    "Subject",
    "check_halvings",
    "make_network",
    "mirror",
    "pixel_subject",
    "to_float",
]

Predictor = Callable[[Tensor, Tensor], Tensor]
"""A network with its condition: (x_t, t) -> prediction, float32."""


class Subject(Protocol):
    """What is trained, as the loop sees it."""

    @property
    def network(self) -> nn.Module:
        """All that is trained, in one module."""
        ...

    @property
    def package(self) -> Package:
        """What the model's folder holds."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is noised."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the record says of the data beside its size."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that the user should read before the run."""
        ...

    def prepared(self, accelerator: Accelerator, cache: Path) -> "Subject":
        """The same with all that is computed once for the run; ``cache`` is the name of a file that
        it may write."""
        ...

    @property
    def examples(self) -> Any:
        """By the index of an image, what a batch is collated from."""
        ...

    def clean(
        self, batch: list[Tensor], device: torch.device, draws: Draws | None
    ) -> tuple[Tensor, Any]:
        """Clean data [B, C, H, W] and its condition; without ``draws`` nothing about it is random,
        as for held-out images."""
        ...

    def predictor(self, network: Callable[..., Any], condition: Any) -> Predictor:
        """The network under a condition."""
        ...

    def preview(
        self, network: nn.Module, count: int, device: torch.device
    ) -> tuple[Predictor, list[str]]:
        """The network as a preview of ``count`` images calls it, and the captions, if there are
        any."""
        ...

    def images(self, x0: Tensor) -> Tensor:
        """Pictures in [-1, 1] of clean data."""
        ...


@dataclass(frozen=True, eq=False)
class PixelSubject:
    """An unconditional or class-conditional network on pixels."""

    config: TrainConfig
    data: ImageData
    network: nn.Module
    package: Package
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return (self.data.channels, *self.data.resolution)

    @property
    def examples(self) -> ImageData:
        """Images and labels."""
        return self.data

    def prepared(self, accelerator: Accelerator, cache: Path) -> "PixelSubject":
        """Itself: nothing is computed once."""
        return self

    def clean(
        self, batch: list[Tensor], device: torch.device, draws: Draws | None
    ) -> tuple[Tensor, Tensor | None]:
        """Images in [-1, 1] and their labels, None without classes."""
        images, labels = batch
        x0 = to_float(images.to(device, non_blocking=True))
        if draws is not None and self.config.horizontal_flip:
            x0 = torch.where(mirror(len(x0), draws, device), x0.flip(-1), x0)
        return x0, labels.to(device, non_blocking=True) if self.config.class_conditional else None

    def predictor(self, network: Callable[..., Any], condition: Tensor | None) -> Predictor:
        """The network under its labels."""
        options = {} if condition is None else {"class_labels": condition}
        return lambda x_t, t: network(x_t, t, **options, return_dict=False)[0].float()

    def preview(
        self, network: nn.Module, count: int, device: torch.device
    ) -> tuple[Predictor, list[str]]:
        """All classes in turn."""
        classes = len(self.data.class_names or ())
        labels = (
            torch.tensor([i % classes for i in range(count)], device=device)
            if self.config.class_conditional
            else None
        )
        return self.predictor(network, labels), []

    def images(self, x0: Tensor) -> Tensor:
        """Pixels are pictures."""
        return x0


def pixel_subject(config: TrainConfig, data: ImageData, base: Base | None) -> PixelSubject:
    """A network on pixels: new, or that of an unconditional base.

    Raises:
        DDIMError: If data, configuration and base do not fit together.
    """
    classes = len(data.class_names or ()) if config.class_conditional else None
    if config.class_conditional and not classes:
        raise DDIMError(
            f"a class-conditional model needs labels, and {data.name} has none; leave out "
            "--class-conditional, "
            "or sort images into subfolders."
        )
    torch.manual_seed(
        config.seed
    )  # the run owns its process: initial weights and dropout follow from the seed
    if base is None:
        network = make_network(config, data)
    elif config.from_scratch:
        network = _fresh(config, data, base)
    else:
        network = load_network(base.folder).train()
        _check_fit(network, data, classes, base)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    package = Package(
        index={"_class_name": "DDIMPipeline", "unet": ["diffusers", type(network).__name__]},
        scheduler=make_scheduler(config, None if base is None else base.scheduler),
        parts=lambda module: {"unet": module},
        frozen={},
    )
    return PixelSubject(config, data, network, package, {"classes": list(data.class_names or ())})


def make_network(config: TrainConfig, data: ImageData) -> Any:
    """A diffusers UNet2DModel for this data.

    Raises:
        DDIMError: If the images' size cannot be halved as often as the network has resolutions.
    """
    shape = config.architecture
    check_halvings(data.resolution, len(shape.block_out_channels))
    return diffusers.UNet2DModel(**_of_data(config, data), **_of_shape(shape))


def _of_data(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    height, width = data.resolution
    return {
        "sample_size": height if height == width else (height, width),
        "in_channels": data.channels,
        "out_channels": data.channels,
        "num_class_embeds": len(data.class_names or ()) if config.class_conditional else None,
    }


def _of_shape(shape: Architecture) -> dict[str, Any]:
    levels = len(shape.block_out_channels)
    attention = [level >= levels - shape.attention_levels for level in range(levels)]
    return {
        "block_out_channels": shape.block_out_channels,
        "layers_per_block": shape.layers_per_block,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        "attention_head_dim": shape.attention_head_dim,
        "norm_num_groups": shape.norm_num_groups,
        "dropout": shape.dropout,
    }


def _fresh(config: TrainConfig, data: ImageData, base: Base) -> Any:
    """A new network of the base's configuration, or, as soon as one option gives a shape, of the
    shape that all of them give."""
    given = any(getattr(config, f.name) is not None for f in fields(Architecture))
    shape = _of_shape(config.architecture) if given else {}
    options = dict(base.network_config) | shape | _of_data(config, data)
    check_halvings(data.resolution, len(options["block_out_channels"]))
    return diffusers.UNet2DModel.from_config(options)


def check_halvings(size: tuple[int, int], levels: int, *, unit: int = 1) -> None:
    """Refuses a size, in units of ``unit`` pixels, that cannot be halved as often as a network has
    resolutions.

    Raises:
        DDIMError: The sizes that could be.
    """
    factor = 2 ** (levels - 1)
    if size[0] % factor or size[1] % factor:
        usable = max(factor, round(size[0] / factor) * factor) * unit
        raise DDIMError(
            f"images of {size[0] * unit}x{size[1] * unit} cannot be halved {levels - 1} times, as "
            f"{levels} entries of "
            f"block_out_channels ask; use --resolution {usable}, or fewer entries."
        )


def _check_fit(network: Any, data: ImageData, classes: int | None, base: Base) -> None:
    size = network.config.sample_size
    wanted = (
        int(network.config.in_channels),
        *((size, size) if isinstance(size, int) else size or data.resolution),
    )
    if wanted[0] not in (1, 3) or network.config.out_channels != wanted[0]:
        raise DDIMError(
            f"{base.name} takes {wanted[0]} channels and gives {network.config.out_channels}, and "
            "images have 1 or 3 each way; "
            "take another --base."
        )
    if wanted != (data.channels, *data.resolution):
        told = f"--channels {wanted[0]}" + (
            f" --resolution {wanted[1]}" if wanted[1:] != data.resolution else ""
        )
        raise DDIMError(
            f"{base.name} is of {wanted[1]}x{wanted[2]} images with {wanted[0]} channel(s), and "
            f"{data.name} has "
            f"{data.resolution[0]}x{data.resolution[1]} with {data.channels}; use {told}."
        )
    theirs = network.config.get("num_class_embeds")
    if theirs != classes:
        raise DDIMError(
            f"{base.name} knows {theirs or 'no'} classes, and {classes or 'none'} were asked for; "
            f"{'use --class-conditional' if theirs else 'leave out --class-conditional'}, or add "
            "--from-scratch."
        )


def to_float(images: Tensor) -> Tensor:
    """Bytes as numbers in [-1, 1]."""
    return images.float() / 127.5 - 1


def mirror(count: int, draws: Draws, device: torch.device) -> Tensor:
    """Which images of a batch are mirrored: a coin each, shape [B, 1, 1, 1]."""
    return torch.rand((count, 1, 1, 1), generator=draws.generator, device=device) < 0.5
