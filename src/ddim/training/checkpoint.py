"""Training checkpoints: written whole or not at all, and read back to the same bits.

A checkpoint is a folder ``checkpoints/<step>`` in diffusers format (the averaged network and the scheduler, ready to be
sampled) with a folder ``training`` inside: the network's own weights, the optimiser, and a JSON record.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
from torch import nn

from ddim.errors import CheckpointError
from ddim.schedule import make_betas
from ddim.training.config import TrainConfig

__all__ = ["latest_checkpoint", "load_training_state", "make_scheduler", "publish", "save_checkpoint"]


def make_scheduler(config: TrainConfig) -> diffusers.DDIMScheduler:
    """The scheduler that samples what this configuration trains: no clipping, trailing timesteps, to clean data."""
    native = config.beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")
    betas = (
        None
        if native
        else make_betas(config.beta_schedule, config.num_train_timesteps, beta_start=config.beta_start, beta_end=config.beta_end)
    )
    return diffusers.DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        trained_betas=None if betas is None else betas.tolist(),
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )


def save_model(folder: Path, network: nn.Module, config: TrainConfig) -> None:
    """Writes network and scheduler as a diffusers DDIMPipeline into a new folder."""
    diffusers.DDIMPipeline(unet=network, scheduler=make_scheduler(config)).save_pretrained(folder)


def save_checkpoint(
    root: Path,
    step: int,
    *,
    network: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
    record: dict[str, Any],
    config: TrainConfig,
) -> Path:
    """Writes ``root/<step>`` under a temporary name and renames it: whoever sees the folder sees all of it."""
    root.mkdir(parents=True, exist_ok=True)
    target, partial = root / f"{step:07d}", root / f".partial-{step:07d}"
    shutil.rmtree(partial, ignore_errors=True)
    save_model(partial, averaged, config)
    inner = partial / "training"
    inner.mkdir()
    safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, inner / "network.safetensors")
    torch.save(optimizer.state_dict(), inner / "optimizer.pt")
    (inner / "record.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    for path in inner.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target


def prune(root: Path, *, keep: int, best: int | None) -> None:
    """Removes all but the newest ``keep`` checkpoints and the best one."""
    steps = _steps(root)
    for step in steps[:-keep]:
        if step != best:
            shutil.rmtree(root / f"{step:07d}")


def _steps(root: Path) -> list[int]:
    return sorted(int(p.name) for p in root.iterdir() if p.is_dir() and p.name.isdigit()) if root.is_dir() else []


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint below ``root``, or None."""
    steps = _steps(root)
    return root / f"{steps[-1]:07d}" if steps else None


def read_record(checkpoint: Path) -> dict[str, Any]:
    """The JSON record of a checkpoint.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    path = checkpoint / "training" / "record.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the training checkpoint {checkpoint} cannot be read ({error}); delete that folder to go on from an earlier one."
        ) from error
    return record


def load_training_state(checkpoint: Path, *, network: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores weights, averages and optimiser in place.

    Raises:
        CheckpointError: If a file is missing, damaged, or of another network.
    """
    try:
        network.load_state_dict(safetensors.torch.load_file(checkpoint / "training" / "network.safetensors"))
        averaged.load_state_dict(safetensors.torch.load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors"))
        optimizer.load_state_dict(torch.load(checkpoint / "training" / "optimizer.pt", weights_only=True, map_location="cpu"))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"the training checkpoint {checkpoint} cannot be restored ({first}); delete that folder to go on from an earlier one."
        ) from error


def publish(out: Path, network: nn.Module, config: TrainConfig, card: dict[str, Any]) -> None:
    """Puts the finished model into ``out``; model_index.json is written last, so a half-written model is never loadable."""
    partial = out / ".partial-model"
    shutil.rmtree(partial, ignore_errors=True)
    save_model(partial, network, config)
    (partial / "card.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
    (out / "model_index.json").unlink(missing_ok=True)
    for name in ("unet", "scheduler"):
        shutil.rmtree(out / name, ignore_errors=True)
        (partial / name).rename(out / name)
    for name in ("card.json", "model_index.json"):
        (partial / name).replace(out / name)
    partial.rmdir()
