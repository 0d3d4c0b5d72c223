"""Training checkpoints: written whole or not at all, and read back to the same bits.

A checkpoint is a folder ``checkpoints/<step>`` in diffusers format (the averaged network, the
scheduler and the parts of the base, ready to be sampled) with a folder ``training`` inside: the
network's own weights, the optimiser, and a JSON record. Files that training does not change are
shared between the checkpoints by hard links, if the file system has them."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ddim.errors import CheckpointError, DDIMError, OutputError, first_line
from ddim.files import locked, remove_partial, replacing_folder, write_json
from ddim.training.loop import Run
from ddim.training.package import PUBLISHED, save_model, writing

__all__ = [
    "checkpoint_folder",
    "hold",
    "latest_checkpoint",
    "load_training_state",
    "prune",
    "save_checkpoint",
]


@contextlib.contextmanager
def hold(out: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keeps the folder of a run to this run, and removes what killed runs left there.

    The main process holds the folder; the other processes wait until it does. A run that writes
    nothing leaves no folder behind.

    Raises:
        OutputError: On every process, if another run holds the folder, or it is not one of a run.
    """
    refusal: Exception | None = None
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            try:
                if not out.exists():
                    stack.callback(_remove_empty, out)
                stack.enter_context(locked(out))
                _check_out(out)
                _remove_debris(out)
            except (DDIMError, OSError) as error:
                refusal = error
        refusal = broadcast_object_list([refusal])[0]
        if refusal is not None:
            raise refusal
        yield


def _remove_empty(out: Path) -> None:
    with contextlib.suppress(OSError):  # it is not empty
        out.rmdir()


_USUAL = (".log", ".out", ".err", "README.md")
"""Ends of names that may be there before a run begins: a shell or a queue opens logs, and a person
writes what the model is."""


def _check_out(out: Path) -> None:
    """Refuses, with an OutputError, a folder that no training run began, if it holds a model, which
    the trained one would replace, or another command's results."""
    if latest_checkpoint(out / "checkpoints") is not None:
        return
    if (out / "run.json").exists():
        raise OutputError(
            f"{out} holds the results of another command (run.json), and no checkpoint of a run; "
            "use another --out."
        )
    if found := [name for name in PUBLISHED if (out / name).exists()]:
        raise OutputError(
            f"{out} holds {', '.join(found)} and no checkpoint of a run that made them, and the "
            "trained model would replace them; use another --out, or move them away."
        )
    files = (path for path in sorted(out.iterdir()) if path.is_file())
    other = [p.name for p in files if p.name[0] != "." and not p.name.endswith(_USUAL)]
    if other:
        raise OutputError(
            f"{out} holds files that no run wrote, such as {other[0]}; use another --out, so that "
            "the model is not mixed with them."
        )


def _remove_debris(out: Path) -> None:
    """Removes what killed runs left half-written or half-removed."""
    root = out / "checkpoints"
    for folder in (out, root, out / "log", out / "previews"):
        remove_partial(folder)
    for path in (*out.glob(".partial-*"), *root.glob(".partial-*"), *root.glob(".*.old")):
        shutil.rmtree(path, ignore_errors=True)  # the names of earlier versions


def save_checkpoint(root: Path, step: int, run: Run, record: dict[str, Any]) -> None:
    """Writes ``root/<step>`` of a run that ``accelerate`` has prepared, whole or not at all.

    Raises:
        OutputError: If something cannot be written.
    """
    target, previous = checkpoint_folder(root, step), latest_checkpoint(root)
    network = run.accelerator.unwrap_model(run.model)
    with writing(f"the checkpoint of step {step}", root), replacing_folder(target) as partial:
        save_model(partial, run.average.network, run.subject.package, previous=previous)
        inner = partial / "training"
        inner.mkdir()
        weights = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
        safetensors.torch.save_file(weights, inner / "network.safetensors")
        torch.save(run.optimizer.optimizer.state_dict(), inner / "optimizer.pt")
        write_json(inner / "record.json", record, sort_keys=True)
        # Onto the disk before the folder gets its name, so that a power cut leaves no empty files.
        for path in partial.rglob("*.*"):
            with path.open("rb") as file:
                os.fsync(file.fileno())


def prune(root: Path, *, keep: int, best: int | None) -> None:
    """Removes all but the newest ``keep`` checkpoints and the best one."""
    for step in _steps(root)[:-keep]:
        if step != best:  # renamed first: a half-removed folder must not pass for a checkpoint
            folder = checkpoint_folder(root, step)
            shutil.rmtree(folder.rename(root / f".{folder.name}.partial"))


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.is_dir() and p.name.isdigit())


def checkpoint_folder(root: Path, step: int) -> Path:
    """The checkpoint of a step below ``root``."""
    return root / f"{step:07d}"


def latest_checkpoint(root: Path) -> Path | None:
    """Returns the newest checkpoint below ``root``, or None."""
    steps = _steps(root)
    return checkpoint_folder(root, steps[-1]) if steps else None


def load_training_state(checkpoint: Path, run: Run) -> None:
    """Restores weights, averages and optimiser in place, before ``accelerate`` prepares the run.

    Raises:
        CheckpointError: If a file is missing, damaged, or of another network.
    """
    inner, load = checkpoint / "training", safetensors.torch.load_file
    try:
        run.model.load_state_dict(load(inner / "network.safetensors"))
        for name, part in run.subject.package.parts(run.average.network).items():
            files = (checkpoint / name).glob("*.safetensors")
            part.load_state_dict({k: v for file in files for k, v in load(file).items()})
        state = torch.load(inner / "optimizer.pt", weights_only=True, map_location="cpu")
        run.optimizer.load_state_dict(state)
    except Exception as error:
        raise CheckpointError(
            f"the training checkpoint {checkpoint} cannot be restored ({first_line(error)}); "
            "delete that folder to go on from an earlier one."
        ) from error
