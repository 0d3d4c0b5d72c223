"""The small classifier whose features judge 28x28 grey images.

``recipes/fashion_classifier.py`` trained it on Fashion-MNIST; its weights and card are in the
package."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

__all__ = ["FOLDER", "FashionClassifier", "load_classifier"]

FOLDER = Path(__file__).parent.parent / "zoo" / "fashion-classifier"


class FashionClassifier(nn.Module):
    """Six small convolutions, 64 features, ten classes; 28x28 grey images in [-1, 1].

    The features are taken before their activation: there, none is constant, and their distribution
    is close to a Gaussian."""

    dimensions = 64

    def __init__(self) -> None:
        super().__init__()

        def block(before: int, after: int, stride: int = 1) -> list[nn.Module]:
            convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(after), nn.ReLU()]

        widths = ((1, 16), (16, 32, 2), (32, 32), (32, 64, 2), (64, 64), (64, 64, 2))
        blocks = [part for arguments in widths for part in block(*arguments)]
        self.body = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64 * 4 * 4, self.dimensions))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(self.dimensions, 10))

    def features(self, images: Tensor) -> Tensor:
        """[B, 1, 28, 28] in [-1, 1] -> [B, 64]."""
        result: Tensor = self.body(images)
        return result

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, 28, 28] in [-1, 1] -> logits [B, 10]."""
        result: Tensor = self.head(self.features(images))
        return result


def load_classifier() -> tuple[FashionClassifier, dict[str, Any]]:
    """The embedded classifier in evaluation mode, and its card."""
    network = FashionClassifier()
    network.load_state_dict(safetensors.torch.load_file(FOLDER / "classifier.safetensors"))
    card: dict[str, Any] = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
    return network.eval().requires_grad_(False), card
