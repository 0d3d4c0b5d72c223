"""What a run trains: a batch, how the network is called on it, how a preview is drawn, and what the
model's folder holds.

The loop knows nothing else about images and captions. Here is the subject on pixels;
:class:`ddim.training.text.TextSubject` is the one on latents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddim.data.dataset import ImageData
from ddim.errors import DDIMError
from ddim.models.checkpoints import check_finite, load_network
from ddim.models.facts import spread_labels
from ddim.training.base import Base
from ddim.training.config import TrainConfig
from ddim.training.draws import Draws
from ddim.training.network import check_network, make_network
from ddim.training.package import Package, make_scheduler

__all__ = ["PixelSubject", "Predictor", "Subject", "match_classes", "mirror", "pixel_subject"]
__all__ += ["to_float"]

Predictor = Callable[[Tensor, Tensor], Tensor]
"""A network with its condition: (x_t, t) -> prediction, float32."""


class Subject(Protocol):
    """What is trained, as the loop sees it."""

    @property
    def network(self) -> nn.Module:
        """All that is trained, in one module."""

    @property
    def package(self) -> Package:
        """The content of the model's folder."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the clean data to which noise is added."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the record says about the data, besides their size."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that the user should read before the run."""

    @property
    def examples(self) -> Any:
        """By the index of an image, what a batch is collated from."""

    def prepared(
        self, accelerator: Accelerator, cache: Path, check: Callable[[], None]
    ) -> "Subject":
        """Returns the subject with all that is computed once per run; it may write ``cache``.
        Where ``check`` raises :class:`~ddim.training.stopping.Stopped`, that is cut short, and the
        subject cannot be trained."""

    def clean(
        self, batch: list[Tensor], device: torch.device, draws: Draws | None
    ) -> tuple[Tensor, Any]:
        """Returns clean data [B, C, H, W] and its condition. Without ``draws``, as for held-out
        images, nothing is random."""

    def predictor(self, network: Callable[..., Any], condition: Any) -> Predictor:
        """Returns the network under a condition."""

    def preview(
        self, network: nn.Module, count: int, device: torch.device
    ) -> tuple[Predictor, list[str]]:
        """Returns the network as a preview of ``count`` images calls it, and their captions."""

    def images(self, x0: Tensor) -> Tensor:
        """Turns clean data into pictures in [-1, 1]."""


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
        return (self.data.channels, *self.data.resolution)

    @property
    def examples(self) -> ImageData:
        return self.data

    def prepared(
        self, accelerator: Accelerator, cache: Path, check: Callable[[], None]
    ) -> "PixelSubject":
        return self

    def clean(
        self, batch: list[Tensor], device: torch.device, draws: Draws | None
    ) -> tuple[Tensor, Tensor | None]:
        images, labels = batch
        x0 = to_float(images.to(device, non_blocking=True))
        if draws is not None and self.config.horizontal_flip:
            x0 = torch.where(mirror(len(x0), draws, device), x0.flip(-1), x0)
        return x0, labels.to(device, non_blocking=True) if self.config.class_conditional else None

    def predictor(self, network: Callable[..., Any], condition: Tensor | None) -> Predictor:
        options = {} if condition is None else {"class_labels": condition}
        return lambda x_t, t: network(x_t, t, **options, return_dict=False)[0].float()

    def preview(
        self, network: nn.Module, count: int, device: torch.device
    ) -> tuple[Predictor, list[str]]:
        labels = None
        if self.config.class_conditional:
            classes, empty = len(self.data.class_names or ()), set(self.data.empty_classes)
            labels = torch.tensor(spread_labels(range(count), classes, empty), device=device)
        return self.predictor(network, labels), []

    def images(self, x0: Tensor) -> Tensor:
        return x0


def match_classes(data: ImageData, base: Base) -> ImageData:
    """Gives classes the numbers that they have in the base, by their names, and says where only
    numbers tell which class is which.

    Raises:
        DataError: If the base does not know a class.
    """
    theirs, ours = base.class_names, data.class_names or ()
    if not ours:
        return data  # which is refused where classes are needed
    if theirs and _is_named(theirs) and _is_named(ours):
        return data.with_classes(theirs)
    names = theirs if len(theirs) >= len(ours) and _is_named(theirs) else ours
    if not _is_named(names):
        return data
    unnamed = base.name if names is ours else data.name
    note = (
        f"{unnamed} does not name its classes, so its class 0 is taken for {names[0]!r}, and so on."
    )
    return replace(data, class_names=names, notes=(*data.notes, note))


def _is_named(names: Sequence[str]) -> bool:
    """Whether classes have names, and not their numbers alone."""
    return list(names) != [str(number) for number in range(len(names))]


def pixel_subject(config: TrainConfig, data: ImageData, base: Base | None) -> PixelSubject:
    """Makes a network on pixels, or takes that of an unconditional base.

    Raises:
        DDIMError: If data, configuration and base do not fit together.
    """
    classes = len(data.class_names or ()) if config.class_conditional else None
    if config.class_conditional and not classes:
        raise DDIMError(
            f"a class-conditional model needs labels, and {data.name} has none; leave out "
            "--class-conditional, or sort images into subfolders."
        )
    torch.manual_seed(config.seed)  # for initial weights and dropout; the run owns its process
    if base is None or config.from_scratch:
        network = make_network(config, data, base)
    else:
        network = load_network(base.folder).train().to(memory_format=torch.channels_last)
        check_finite(base.name, dict(network.named_parameters()))
        check_network(network, data, classes, base)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    package = Package(
        index={"_class_name": "DDIMPipeline", "unet": ["diffusers", type(network).__name__]},
        scheduler=make_scheduler(config, None if base is None else base.scheduler),
        parts=lambda module: {"unet": module},
        frozen={},
    )
    facts: dict[str, Any] = {"classes": list(data.class_names or ())}
    notes: tuple[str, ...] = ()
    if config.class_conditional:
        facts["empty_classes"], notes = list(data.empty_classes), _class_notes(data)
    elif data.class_names:
        notes = (
            f"the images of {data.name} are of {len(data.class_names)} classes, of which the model "
            "learns nothing; --class-conditional would train it on them.",
        )
    return PixelSubject(config, data, network, package, facts, notes)


def _class_notes(data: ImageData) -> tuple[str, ...]:
    """The names of the classes by their numbers, and those without images."""
    names, empty = data.class_names or (), data.empty_classes
    numbered = [f"{i} {name}" if name != str(i) else name for i, name in enumerate(names)]

    def some(shown: list[str]) -> str:
        return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")

    notes = (f"the classes are {some(numbered)}.",)
    missing = some([numbered[number] for number in empty])
    return (*notes, f"classes without images are not drawn: {missing}.") if empty else notes


def to_float(images: Tensor) -> Tensor:
    """Turns bytes into numbers in [-1, 1]."""
    return images.float() / 127.5 - 1


def mirror(count: int, draws: Draws, device: torch.device) -> Tensor:
    """Draws which images of a batch are mirrored: a coin for each, shape [B, 1, 1, 1]."""

    def coins(count: int) -> Tensor:
        return torch.rand((count, 1, 1, 1), generator=draws.generator, device=device)

    return draws.own(count, coins) < 0.5
