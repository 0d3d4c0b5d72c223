"""The record of a run: its options, its data and how far it is; what resuming compares, and what
the model's card says."""

import json
import subprocess
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator

from ddim.core.schedule import NoiseSchedule
from ddim.data.batches import data_hash, hold_out
from ddim.data.dataset import ImageData
from ddim.errors import CheckpointError
from ddim.files import load_json
from ddim.training.base import Base
from ddim.training.config import TrainConfig, command_line
from ddim.training.draws import mix
from ddim.training.subject import Subject

__all__ = ["begun_on", "card_guidance", "code_revision", "make_card", "new_record"]
__all__ += ["read_record", "resume_record"]

# Options that may differ when a run is resumed: they change what is written and how fast, but not
# what is learnt. ``compile``, ``cache_latents`` and ``gradient_checkpointing`` may change the
# rounding, so that only a run that keeps them continues to the same bits.
FREE_FIELDS = frozenset(
    {"checkpoint_every", "keep_checkpoints", "log_every", "workers"}
    | {"compile", "cache_latents", "gradient_checkpointing"}
    | {"clip_sample", "preview_every", "preview_count", "preview_steps", "preview_guidance_scale"}
)

# Entries of the record that the card repeats.
_ON_CARD = (
    *("config", "data", "base", "step", "images_seen", "loss", "validation_loss", "seconds"),
    *("parameters", "processes", "device", "revisions", "versions"),
)


def new_record(
    config: TrainConfig,
    data: ImageData,
    subject: Subject,
    base: Base | None,
    accelerator: Accelerator,
    revision: str | None,
    processes: int,
) -> dict[str, Any]:
    """Returns the record of a run that begins on so many processes."""
    import accelerate

    # The values that options left open have taken are recorded too.
    scheduler = subject.package.scheduler.config
    resolved = {name: scheduler[name] for name in vars(config) if name in scheduler}
    resolved["learning_rate"] = config.peak_learning_rate
    resolved["clip_sample"] = "on" if scheduler["clip_sample"] else "off"
    resolved |= config.pace(config.steps(processes))._asdict()
    options = asdict(config) | resolved | (asdict(config.architecture) if base is None else {})
    options = json.loads(json.dumps(options))  # as a checkpoint gives it back
    del options["out"]
    facts = {"channels": data.channels, "resolution": list(data.resolution)}
    facts |= {"hash": data_hash(data), **subject.facts}
    return {
        "config": options,
        "data": {"name": data.name, "images": len(data), **facts},
        "base": {} if base is None else base.facts,
        "held_out_images": hold_out(data, config.validation_images, seed=mix(config.seed, 9)),
        **{"step": 0, "images_seen": 0, "seconds": 0.0},
        **dict.fromkeys(("loss", "validation_loss", "best", "scaler")),
        "parameters": sum(p.numel() for p in subject.network.parameters()),
        "processes": processes,
        "device": accelerator.device.type,
        "revisions": [{"step": 0, "revision": revision}],
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, accelerate)},
    }


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Reads the record of a checkpoint; a CheckpointError says that it is damaged."""
    try:
        record = load_json(checkpoint / "training" / "record.json")
        if not isinstance(record, dict):
            raise ValueError("it is no object")
        return record
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the training checkpoint {checkpoint} cannot be read ({error}); delete that folder to "
            "go on from an earlier one."
        ) from error


def begun_on(record: dict[str, Any], config: TrainConfig) -> int:
    """The number of processes that a run began on, from which its steps follow; a CheckpointError
    says that the record does not tell."""
    processes = record.get("processes")
    if not isinstance(processes, int) or processes < 1:
        raise CheckpointError(
            f"{config.out} holds a run that began on {processes!r} processes, which is no number "
            "of them; use another --out."
        )
    return processes


def resume_record(
    record: dict[str, Any], fresh: dict[str, Any], config: TrainConfig, world: int
) -> dict[str, Any]:
    """Checks that the record of a checkpoint belongs to this run, which would begin with the record
    ``fresh`` (:func:`new_record`), and returns the one that it goes on with, on ``world``
    processes.

    Raises:
        CheckpointError: If it was made with other options or other data.
    """
    # An option that the run's own version did not have was at its default.
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    for group in ("config", "data", "base"):
        for name, value in fresh[group].items():
            before = record.get(group, {}).get(name, defaults.get(name))
            if (
                name in ("hash", "base_configuration", "empty_classes") and before is None
            ):  # of earlier versions
                continue
            if name not in FREE_FIELDS and before != value:
                raise _changed_option(group, name, before, value, record, config)
    if "held_out_images" not in record:  # runs of earlier versions; the first held out the end
        total = fresh["data"]["images"]
        count = min(config.validation_images, total // 10)
        record["held_out_images"] = list(range(*record.pop("held_out", (total - count, total))))
    record["data"] = fresh["data"] | record["data"]
    part = fresh["revisions"][0] | {"step": record["step"]}
    part |= {} if world == fresh["processes"] else {"processes": world}
    revisions = record.get("revisions", [])
    if not revisions or revisions[-1] | {"step": part["step"]} != part:
        revisions = [*revisions, part]
    current = {name: fresh[name] for name in ("config", "versions")}
    return fresh | record | current | {"revisions": revisions}


def _changed_option(
    group: str, name: str, before: Any, now: Any, record: dict[str, Any], config: TrainConfig
) -> CheckpointError:
    out = config.out
    if name == "hash":
        return CheckpointError(
            f"{out} holds a run that began on other images or labels than {config.data} holds now; "
            "use another --out, or the data as they were."
        )
    if group != "config":
        what = f"data {config.data}" if group == "data" else f"base {config.base}"
        return CheckpointError(
            f"{out} holds a run whose {what} had {name}={before!r}, and there is {name}={now!r} "
            f"now; use another --out, or the {group} as it was."
        )
    if name == "images" and before <= min(now, record.get("images_seen", 0)):
        return CheckpointError(
            f"{out} holds a run that is finished, of images={before!r}; to go on from its model "
            f"give --base {out}, another --out, and as --images what is to be added."
        )
    return CheckpointError(
        f"{out} holds a run with {name}={before!r}, and {name}={now!r} was asked for; use another "
        "--out, or the same options."
    )


def make_card(record: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Returns the content of a model's card."""
    command = command_line(config, processes=record["processes"])
    return {"command": command, **{name: record[name] for name in _ON_CARD}}


def card_guidance(
    config: TrainConfig, base: Base | None, schedule: NoiseSchedule
) -> dict[str, float]:
    """Returns the guidance that a text model's card recommends: that of its base and, at zero
    terminal SNR, the rescale that such a model needs.

    References:
        Lin et al. Common Diffusion Noise Schedules and Sample Steps Are Flawed. 2023. Sec. 3.4: 7.5
        and 0.7. https://arxiv.org/abs/2305.08891
    """
    if base is None or not base.is_text:
        return {}
    inherited = {} if config.from_scratch else base.guidance
    if float(schedule.alphas_cumprod[-1]) > 0:
        return inherited
    rescale = inherited.get("guidance_rescale") or 0.7
    return {"guidance_scale": inherited.get("guidance_scale", 7.5), "guidance_rescale": rescale}


def code_revision() -> str | None:
    """The git revision of this code, with -dirty where it has uncommitted changes; None where git
    does not track it."""

    def git(*arguments: str) -> str:
        words = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Otherwise, an environment inside someone's repository would have theirs.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None
