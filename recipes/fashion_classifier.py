"""Trains the classifier whose features judge Fashion-MNIST, and writes its weights and card.

    python recipes/fashion_classifier.py --out src/ddim/zoo/fashion-classifier

The seed gives the initial weights, the order of the images and their flips, so a rerun on one
thread gives the same weights."""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddim.data.named import FASHION_MNIST_CLASSES
from ddim.data.sources import load_images
from ddim.evaluation.classifier import FashionClassifier
from ddim.files import file_hash, write_text
from ddim.models.images import from_uint8


def read(split: str) -> tuple[NDArray[np.uint8], Tensor]:
    """Images [N, H, W, 1] and labels [N] of Fashion-MNIST."""
    data = load_images("fashion-mnist", split=split)
    pairs = [data[i] for i in range(len(data))]
    images = torch.stack([image for image, _ in pairs]).permute(0, 2, 3, 1)
    return images.numpy(), torch.tensor([label for _, label in pairs])


@torch.no_grad()
def accuracy(network: nn.Module, images: NDArray[np.uint8], labels: Tensor) -> float:
    """The fraction of the images whose class is recognised."""
    right = sum(
        int((network(from_uint8(images[i : i + 500])).argmax(1) == labels[i : i + 500]).sum())
        for i in range(0, len(labels), 500)
    )
    return right / len(labels)


def main() -> None:
    """Trains, measures on the test images, and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="the cycle's highest")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(options.seed)
    images, labels = read("train")
    network = FashionClassifier().train()
    steps = len(labels) // options.batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=1e-2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.epochs * steps
    )
    for epoch in range(options.epochs):
        order, losses = torch.randperm(len(labels)), []
        for batch in order[: steps * options.batch_size].view(steps, -1):
            x = from_uint8(images[batch.numpy()])
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
            loss = nn.functional.cross_entropy(network(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            losses.append(loss.detach())
        loss, seconds = torch.stack(losses).mean(), time.perf_counter() - began
        print(f"epoch {epoch + 1}/{options.epochs}  loss {loss:.4f}  {seconds:.0f} s", flush=True)
    network.eval()
    card = {
        "command": shlex.join(["python", *sys.argv]),
        "data": "fashion-mnist: 60,000 training images, mirrored at random",
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "parameters": sum(p.numel() for p in network.parameters()),
        "dimensions": FashionClassifier.dimensions,
        "classes": list(FASHION_MNIST_CLASSES),
        "train_accuracy": accuracy(network, images, labels),
        "test_accuracy": accuracy(network, *read("test")),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {"torch": torch.__version__},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    weights = options.out / "classifier.safetensors"
    safetensors.torch.save_file(network.state_dict(), weights)
    card["weight_hash"] = file_hash([weights])
    write_text(options.out / "card.json", json.dumps(card, indent=2, sort_keys=True) + "\n")
    print(
        f"{card['test_accuracy']:.2%} of the test images are recognised; weights "
        f"{card['weight_hash']} are in {options.out}."
    )


if __name__ == "__main__":
    main()
