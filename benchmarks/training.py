"""Sides that train: ``ddim train``, and diffusers' unconditional example, written anew from its
description: accelerate, ``UNet2DModel``, ``DDPMScheduler.add_noise``, AdamW, ``EMAModel``, gradient
clipping and a progress bar. Both have the same configuration of the network, batch, threads,
workers and precision, and data in memory."""

import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ddim.training.config import TrainConfig
from ddim.training.trainer import train
from drawing import FOLDER, wait
from sides import Call, Taken, row

__all__ = ["our_training", "their_training", "training_rows"]

SEEN = 2048
"""Images of the data, which are noise: what they show costs nothing."""
EVERY = 10
"""Optimiser steps between two logged losses, on both sides."""


def _images() -> np.ndarray:
    shape = (SEEN, *_side(), 1)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _side() -> tuple[int, int]:
    size = json.loads((FOLDER / "unet" / "config.json").read_text())["sample_size"]
    return size, size


class _Watch:
    """Sums up the seconds of the network: its forward and backward passes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def timed(self) -> Any:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


def our_training(*, batch: int, steps: int, precision: str = "no", compiled: bool = False) -> Call:
    """``ddim train`` on a new network of the embedded one's shape."""
    watch, forward = _Watch(), diffusers.UNet2DModel.forward
    backward = Accelerator.backward
    held: list[float] = []

    def timed_forward(*given: Any, **options: Any) -> Any:
        with watch.timed():
            return forward(*given, **options)

    def timed_backward(*given: Any, **options: Any) -> Any:
        with watch.timed():
            return backward(*given, **options)

    def run() -> Taken:
        AcceleratorState._reset_state(reset_partial_state=True)
        seen: list[tuple[int, float, float]] = []

        def follow(progress: Any) -> None:
            seen.append((progress.step, time.perf_counter(), watch.seconds))

        diffusers.UNet2DModel.forward = timed_forward
        Accelerator.backward = timed_backward
        try:
            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder) / "images.npz"
                np.savez(data, images=_images())
                silent = {"validation_images": 0, "preview_every": 0, "checkpoint_every": 10**6}
                shape = {"base": "fashion-mnist", "from_scratch": True, "batch_size": batch}
                train(
                    TrainConfig(
                        data=str(data),
                        out=f"{folder}/out",
                        images=steps * batch,
                        log_every=EVERY,
                        mixed_precision=precision,
                        compile=compiled,
                        **silent,
                        **shape,
                    ),
                    on_progress=follow,
                )
        finally:
            diffusers.UNet2DModel.forward, Accelerator.backward = forward, backward
        (first, began, of_network), (last, ended, later) = seen[0], seen[-1]
        held.append((later - of_network) / (ended - began))
        return Taken((ended - began) / (last - first) / batch, {"network": held[-1]})

    return run


class _Held(Dataset[torch.Tensor]):
    """Images in memory, scaled when they are read."""

    def __init__(self) -> None:
        self.images = torch.from_numpy(_images()).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.images[number].float() / 127.5 - 1


def their_training(
    *, batch: int, steps: int, precision: str = "no", channels_last: bool = False
) -> Call:
    """diffusers' example."""

    def run() -> Taken:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(
            mixed_precision=precision, cpu=not torch.accelerator.is_available()
        )
        config = diffusers.UNet2DModel.load_config(FOLDER / "unet")
        model = diffusers.UNet2DModel.from_config(config).train()
        if channels_last:
            model.to(memory_format=torch.channels_last)
        average = EMAModel(
            model.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=0.75,
            model_cls=diffusers.UNet2DModel,
            model_config=model.config,
        )
        noise_scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        loader = DataLoader(_Held(), batch_size=batch, shuffle=True, num_workers=0)
        rates = get_scheduler("cosine", optimizer, num_warmup_steps=10, num_training_steps=steps)
        model, optimizer, loader, rates = accelerator.prepare(model, optimizer, loader, rates)
        average.to(accelerator.device)
        taken, began = 0, 0.0
        bar = tqdm(total=steps, file=io.StringIO())
        while taken < steps:
            for clean in loader:
                noise = torch.randn(clean.shape, device=clean.device)
                levels = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
                noisy = noise_scheduler.add_noise(clean, noise, levels)
                with accelerator.accumulate(model):
                    output = model(noisy, levels).sample
                    loss = F.mse_loss(output.float(), noise.float())
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    rates.step()
                    optimizer.zero_grad()
                average.step(model.parameters())
                bar.update(1)
                bar.set_postfix(loss=loss.detach().item(), lr=rates.get_last_lr()[0])
                taken += 1
                if taken == EVERY:  # the first steps set up memory
                    wait(accelerator.device)
                    began = time.perf_counter()
                if taken == steps:
                    break
        wait(accelerator.device)
        return Taken((time.perf_counter() - began) / (steps - EVERY) / batch)

    return run


def training_rows(
    ours: list[Taken], theirs: float, layout: str, *, least: float | None, batch: int
) -> list[list[str]]:
    """The rows of training: images a second, and what of a step is the network's."""
    seconds = sorted(taken.seconds for taken in ours)[len(ours) // 2]
    network = sorted(taken.facts["network"] for taken in ours)[len(ours) // 2]
    name = f"training, batch {batch}; diffusers' example, {layout} (its better layout)"
    rows = [row(name, 1 / seconds, 1 / theirs, unit="images/s", least=least)]
    beside = f"{1 - network:.1%}"
    met = "at most 3 %" if 1 - network <= 0.03 else "at most 3 %: missed"
    return [*rows, ["what of such a step is not the network", beside, "", "", met]]
