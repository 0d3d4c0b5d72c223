"""Training checkpoints: written whole or not at all, and read back to the same bits.

A checkpoint is a folder ``checkpoints/<step>`` in diffusers format (the averaged network, the
scheduler and what a base gave, ready to be sampled) with a folder ``training`` inside: the
network's own weights, the optimiser, and a JSON record. Files that training does not change are the
same file on the disk in all checkpoints, where the file system has hard links."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
from torch import nn

from ddim.configuration import LEVEL_OPTIONS, PIXEL_MODEL, spelled_betas
from ddim.core.prior import DataPrior
from ddim.errors import CheckpointError, DDIMError, OutputError
from ddim.models.checkpoints import read_json, weight_hash
from ddim.training.config import EPSILON_AT_ZERO_SNR, TrainConfig

__all__ = [
    "Package",
    "check_out",
    "is_published",
    "latest_checkpoint",
    "load_training_state",
    "make_scheduler",
    "prune",
    "publish",
    "resume_record",
    "save_checkpoint",
]

# What may differ between the parts of a resumed run: it changes what is written and how fast, not
# what is learnt. ``compile``,
# ``cache_latents`` and ``gradient_checkpointing`` may change the rounding, so that only a run that
# keeps them continues to the same bits.
FREE_FIELDS = frozenset(
    {
        *(
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "workers",
            "compile",
            "cache_latents",
            "gradient_checkpointing",
        ),
        *("preview_every", "preview_count", "preview_steps", "preview_guidance_scale"),
    }
)

# Of a finished model: folders, then files, the index last.
_FILES = ("prior.json", "card.json", "model_index.json")
_PUBLISHED = ("unet", "scheduler", "vae", "text_encoder", "tokenizer", *_FILES)


@dataclass(frozen=True, eq=False)
class Package:
    """What the folder of a trained model holds.

    Attributes:
        index: The pipeline's class, and the library and class of each part: model_index.json.
        scheduler: What samples it.
        parts: The trained parts of a network, by their folders.
        frozen: Parts that are copied as they are, by their folders.
    """

    index: Mapping[str, Any]
    scheduler: diffusers.DDIMScheduler
    parts: Callable[[nn.Module], Mapping[str, Any]]
    frozen: Mapping[str, Path]


def make_scheduler(
    config: TrainConfig, inherited: Mapping[str, Any] | None = None
) -> diffusers.DDIMScheduler:
    """The scheduler that samples what this configuration trains: no clipping, trailing timesteps,
    to clean data.

    Args:
        config: The run.
        inherited: The scheduler's configuration of the base, for what the run does not say.

    Raises:
        DDIMError: If it is epsilon prediction at zero terminal SNR.
    """
    base = dict(inherited or {})
    names = (*LEVEL_OPTIONS, "prediction_type")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    options = PIXEL_MODEL | {name: base[name] for name in names if name in base} | given
    # Another schedule is another table, not the base's rescaled one.
    is_inherited = not given.keys() & set(LEVEL_OPTIONS)
    rescale = config.rescale_betas_zero_snr or (
        is_inherited and bool(base.get("rescale_betas_zero_snr"))
    )
    if rescale and options["prediction_type"] == "epsilon":
        if config.rescale_betas_zero_snr:
            raise DDIMError(EPSILON_AT_ZERO_SNR)
        raise DDIMError(
            f"{config.base} has zero terminal SNR, and epsilon prediction cannot be trained there; "
            "leave out --prediction-type, or name a --beta-schedule, which is then not rescaled."
        )
    trained = base.get("trained_betas") if is_inherited else None
    return diffusers.DDIMScheduler(
        **options,
        trained_betas=spelled_betas({**options, "trained_betas": trained}),
        rescale_betas_zero_snr=rescale,
        set_alpha_to_one=True,
        # Unused by trailing; pipelines of diffusers want 1 of a text model.
        steps_offset=base.get("steps_offset", 0),
    )


def save_model(
    folder: Path, network: nn.Module, package: Package, *, previous: Path | None = None
) -> None:
    """Writes a model in diffusers format into a new folder; what was written before, and does not
    change, is linked from there."""
    for name, part in package.parts(network).items():
        part.save_pretrained(folder / name)
        config = read_json(folder / name / "config.json")
        if config.pop("_name_or_path", None) is not None:  # where the base lay on this machine
            (folder / name / "config.json").write_text(
                json.dumps(config, indent=2, sort_keys=True) + "\n"
            )
    package.scheduler.save_pretrained(folder / "scheduler")
    for name, source in package.frozen.items():
        _copy_part(source, folder / name, None if previous is None else previous / name)
    index = {
        **package.index,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for weights in folder.glob(
        "*/*.safetensors"
    ):  # written for this user alone, unlike the files beside them
        shutil.copymode(folder / "model_index.json", weights)


def _copy_part(source: Path, target: Path, before: Path | None) -> None:
    """Copies the files of a part, of weights the safetensors without a variant; from ``before`` by
    hard links where that can be."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        stem, _, kind = file.name.rpartition(".")
        if (
            not file.is_file()
            or kind not in ("json", "txt", "model", "safetensors")
            or (kind == "safetensors" and "." in stem)
        ):
            continue
        if before is not None:
            with contextlib.suppress(OSError):
                os.link(before / file.name, target / file.name)
                continue
        shutil.copyfile(file, target / file.name)


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
    except (
        OSError,
        RuntimeError,
        safetensors.SafetensorError,
    ) as error:  # torch and safetensors have errors of their own for a full disk
        reason = getattr(error, "strerror", None) or (
            str(error).strip() or type(error).__name__
        ).splitlines()[0].rstrip(".")
        raise OutputError(
            f"{what} cannot be written to {folder.parent} ({reason}); mend that, and the same "
            "command goes on from the last checkpoint."
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
    package: Package,
) -> Path:
    """Writes ``root/<step>`` under a temporary name and renames it: whoever sees the folder sees
    all of it."""
    target, previous = root / f"{step:07d}", latest_checkpoint(root)
    with _partial(root / f".partial-{step:07d}", f"the checkpoint of step {step}") as partial:
        save_model(partial, averaged, package, previous=previous)
        inner = partial / "training"
        inner.mkdir()
        safetensors.torch.save_file(
            {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()},
            inner / "network.safetensors",
        )
        torch.save(optimizer.state_dict(), inner / "optimizer.pt")
        (inner / "record.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        for path in partial.rglob(
            "*.*"
        ):  # onto the disk before the name, so that a power cut leaves no empty files under it
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    return target


def prune(root: Path, *, keep: int, best: int | None) -> None:
    """Removes all but the newest ``keep`` checkpoints and the best one."""
    for old in root.glob(".*.old"):  # of a run that was killed here
        shutil.rmtree(old)
    for step in _steps(root)[:-keep]:
        if step != best:
            old = (root / f"{step:07d}").rename(
                root / f".{step:07d}.old"
            )  # one that is gone in part must not pass for a checkpoint
            shutil.rmtree(old)


def _steps(root: Path) -> list[int]:
    return (
        sorted(int(p.name) for p in root.iterdir() if p.is_dir() and p.name.isdigit())
        if root.is_dir()
        else []
    )


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint below ``root``, or None."""
    steps = _steps(root)
    return root / f"{steps[-1]:07d}" if steps else None


def check_out(out: Path) -> None:
    """Refuses a folder that no run began: one whose model :func:`publish` would replace, or of
    another command's results.

    Raises:
        OutputError: If it is such a one.
    """
    if latest_checkpoint(out / "checkpoints") is not None:
        return
    if (out / "run.json").exists():
        raise OutputError(
            f"{out} holds the results of another command (run.json), and no checkpoint of a run; "
            "use another --out."
        )
    if found := [name for name in _PUBLISHED if (out / name).exists()]:
        raise OutputError(
            f"{out} holds {', '.join(found)} and no checkpoint of a run that made them, and the "
            "trained model would replace them; "
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
            f"the training checkpoint {checkpoint} cannot be read ({error}); delete that folder to "
            "go on from an earlier one."
        ) from error
    return record


def resume_record(checkpoint: Path, fresh: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The record of a checkpoint, if it belongs to this run: ``fresh`` is the record that the run
    would begin with.

    Raises:
        CheckpointError: If it is damaged, or was made with other options, other data, or another
            number of processes.
    """
    record = read_record(checkpoint)
    defaults = {
        field.name: field.default for field in fields(TrainConfig)
    }  # of options that the run's own version did not have
    for group in ("config", "data", "base"):
        for name, value in fresh[group].items():
            before = record.get(group, {}).get(name, defaults.get(name))
            if name in FREE_FIELDS or before == value:
                continue
            if group != "config":
                what = f"data {config.data}" if group == "data" else f"base {config.base}"
                raise CheckpointError(
                    f"{config.out} holds a run whose {what} had {name}={before!r}, and there is "
                    f"{name}={value!r} now; "
                    f"use another --out, or the {group} as it was."
                )
            if name == "images" and before <= min(value, record.get("images_seen", 0)):
                raise CheckpointError(
                    f"{config.out} holds a run that is finished, of images={before!r}; to go on "
                    f"from its model give --base {config.out}, "
                    "another --out, and as --images what is to be added."
                )
            raise CheckpointError(
                f"{config.out} holds a run with {name}={before!r}, and {name}={value!r} was asked "
                "for; "
                "use another --out, or the same options."
            )
    if record.get("processes") != fresh["processes"]:
        raise CheckpointError(
            f"{config.out} holds a run on {record.get('processes')} process(es), and this one has "
            f"{fresh['processes']}; "
            "use the same number."
        )
    if "held_out" not in record:  # the first version held out the end of the data
        count = len(range(*fresh["held_out"]))
        record["held_out"] = [fresh["data"]["images"] - count, fresh["data"]["images"], 1]
    part = fresh["revisions"][0] | {"step": record["step"]}
    revisions = record.get("revisions", [])
    if not revisions or revisions[-1]["revision"] != part["revision"]:
        revisions = [*revisions, part]
    return (
        fresh
        | record
        | {"config": fresh["config"], "versions": fresh["versions"], "revisions": revisions}
    )


def load_training_state(
    checkpoint: Path,
    *,
    network: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
    package: Package,
) -> None:
    """Restores weights, averages and optimiser in place.

    Raises:
        CheckpointError: If a file is missing, damaged, or of another network.
    """
    try:
        network.load_state_dict(
            safetensors.torch.load_file(checkpoint / "training" / "network.safetensors")
        )
        for name, part in package.parts(averaged).items():
            files = (checkpoint / name).glob("*.safetensors")
            part.load_state_dict(
                {
                    key: value
                    for file in files
                    for key, value in safetensors.torch.load_file(file).items()
                }
            )
        optimizer.load_state_dict(
            torch.load(
                checkpoint / "training" / "optimizer.pt", weights_only=True, map_location="cpu"
            )
        )
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"the training checkpoint {checkpoint} cannot be restored ({first}); delete that "
            "folder to go on from an earlier one."
        ) from error


def is_published(out: Path, network: nn.Module, package: Package) -> bool:
    """Whether :func:`publish` has put a model there, with all its parts."""
    parts = (*package.parts(network), *package.frozen, "scheduler")
    return (out / "model_index.json").is_file() and all((out / name).is_dir() for name in parts)


def publish(
    out: Path,
    network: nn.Module,
    package: Package,
    card: dict[str, Any],
    prior: DataPrior | None = None,
) -> None:
    """Puts the finished model into ``out``; model_index.json is written last, so a half-written
    model is never loadable.

    With what is known of the data's brightness where there is a prior, for ``ddim sample --prior
    data`` and the doctor."""
    with _partial(out / ".partial-model", "the model") as partial:
        save_model(partial, network, package)
        facts = json.dumps(card | {"weight_hash": weight_hash(partial)}, indent=2, sort_keys=True)
        (partial / "card.json").write_text(facts + "\n")
        if prior is not None:
            (partial / "prior.json").write_text(
                json.dumps({**asdict(prior), "data": card["data"]["name"]}, sort_keys=True) + "\n"
            )
        for name in ("model_index.json", "prior.json"):
            (out / name).unlink(missing_ok=True)
        for folder in sorted(p for p in partial.iterdir() if p.is_dir()):
            shutil.rmtree(out / folder.name, ignore_errors=True)
            folder.rename(out / folder.name)
        for path in (partial / name for name in _FILES):
            if path.is_file():
                path.replace(out / path.name)
