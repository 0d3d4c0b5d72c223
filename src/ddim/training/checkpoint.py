"""Training checkpoints: written whole or not at all, and read back to the same bits.

A checkpoint is a folder ``checkpoints/<step>`` in diffusers format (the averaged network and the scheduler, ready to be
sampled) with a folder ``training`` inside: the network's own weights, the optimiser, and a JSON record.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
from torch import nn

from ddim.checkpoints import weight_hash
from ddim.errors import CheckpointError, OutputError
from ddim.schedule import make_betas
from ddim.training.config import TrainConfig

__all__ = [
    "check_out",
    "latest_checkpoint",
    "load_training_state",
    "make_scheduler",
    "prune",
    "publish",
    "resume_record",
    "save_checkpoint",
]

# What may differ between the parts of a resumed run: it changes what is written and how fast, not what is learnt. ``compile``
# changes the rounding as well, so that only a run that keeps it continues to the same bits.
FREE_FIELDS = frozenset(
    {"checkpoint_every", "keep_checkpoints", "preview_every", "preview_count", "preview_steps", "log_every", "workers", "compile"}
)

_PUBLISHED = ("unet", "scheduler", "card.json", "model_index.json")  # two folders, two files, in the order they are put in place


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
    for weights in folder.glob("unet/*.safetensors"):  # written for this user alone, unlike the files beside them
        shutil.copymode(folder / "model_index.json", weights)


@contextlib.contextmanager
def _partial(folder: Path, what: str) -> Iterator[Path]:
    """A name to write a folder under, which is gone at the end whatever happens.

    Raises:
        OutputError: If something cannot be written, as on a full disk.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch and safetensors have errors of their own for a full disk
        reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise OutputError(
            f"{what} cannot be written to {folder.parent} ({reason}); mend that, and the same command goes on from the last checkpoint."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    target = root / f"{step:07d}"
    with _partial(root / f".partial-{step:07d}", f"the checkpoint of step {step}") as partial:
        save_model(partial, averaged, config)
        inner = partial / "training"
        inner.mkdir()
        safetensors.torch.save_file(
            {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, inner / "network.safetensors"
        )
        torch.save(optimizer.state_dict(), inner / "optimizer.pt")
        (inner / "record.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        for path in partial.rglob("*.*"):  # onto the disk before the name, so that a power cut leaves no empty files under it
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


def check_out(out: Path) -> None:
    """Refuses a folder whose model :func:`publish` would replace though no run in it made that model.

    Raises:
        OutputError: If there is one.
    """
    found = [name for name in _PUBLISHED if (out / name).exists()]
    if found and latest_checkpoint(out / "checkpoints") is None:
        raise OutputError(
            f"{out} holds {', '.join(found)} and no checkpoint of a run that made them, and the trained model would replace them; "
            "use another --out, or move them away."
        )


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


def resume_record(checkpoint: Path, fresh: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The record of a checkpoint, if it belongs to this run: ``fresh`` is the record that the run would begin with.

    Raises:
        CheckpointError: If it is damaged, or was made with other options, other data, or another number of processes.
    """
    record = read_record(checkpoint)
    defaults = {field.name: field.default for field in fields(TrainConfig)}  # of options that the run's own version did not have
    for group in ("config", "data"):
        for name, value in fresh[group].items():
            before = record.get(group, {}).get(name, defaults.get(name))
            if name not in FREE_FIELDS and before != value:
                raise CheckpointError(
                    f"{config.out} holds a run with {name}={before!r}, and {name}={value!r} was asked for; "
                    "use another --out, or the same options."
                )
    if record.get("processes") != fresh["processes"]:
        raise CheckpointError(
            f"{config.out} holds a run on {record.get('processes')} process(es), and this one has {fresh['processes']}; "
            "use the same number."
        )
    if "held_out" not in record:  # the first version held out the end of the data
        count = len(range(*fresh["held_out"]))
        record["held_out"] = [fresh["data"]["images"] - count, fresh["data"]["images"], 1]
    part = fresh["revisions"][0] | {"step": record["step"]}
    revisions = record.get("revisions", [])
    if not revisions or revisions[-1]["revision"] != part["revision"]:
        revisions = [*revisions, part]
    return fresh | record | {"config": fresh["config"], "versions": fresh["versions"], "revisions": revisions}


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
    with _partial(out / ".partial-model", "the model") as partial:
        save_model(partial, network, config)
        facts = json.dumps(card | {"weight_hash": weight_hash(partial)}, indent=2, sort_keys=True)
        (partial / "card.json").write_text(facts + "\n")
        (out / "model_index.json").unlink(missing_ok=True)
        for name in _PUBLISHED[:2]:
            shutil.rmtree(out / name, ignore_errors=True)
            (partial / name).rename(out / name)
        for name in _PUBLISHED[2:]:
            (partial / name).replace(out / name)
