"""The folder of a trained model, in diffusers format: what it holds, and how it is written."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
from torch import nn

from ddim.configuration import DEFAULTS, LEVEL_OPTIONS, PIXEL_MODEL, spelled_betas
from ddim.core.prior import DataPrior
from ddim.errors import DDIMError, OutputError, first_line
from ddim.files import write_json
from ddim.models.checkpoints import weight_hash
from ddim.models.folder import read_json
from ddim.training.config import EPSILON_AT_ZERO_SNR, TrainConfig
from ddim.training.model_card import write_model_card

__all__ = [
    "PUBLISHED",
    "Package",
    "is_published",
    "make_scheduler",
    "publish",
    "save_model",
    "writing",
]

_FILES = ("prior.json", "card.json", "model_index.json")

PUBLISHED = ("unet", "scheduler", "vae", "text_encoder", "tokenizer", *_FILES)
"""Names in the folder of a finished model: folders, then files, the index last."""


@dataclass(frozen=True, eq=False)
class Package:
    """The content of a trained model's folder."""

    index: Mapping[str, Any]
    """model_index.json: the pipeline's class, and the library and class of each part."""
    scheduler: diffusers.DDIMScheduler
    parts: Callable[[nn.Module], Mapping[str, Any]]
    """Splits a network into the trained parts, by the names of their folders."""
    frozen: Mapping[str, Path]
    """Folders of parts that are copied as they are, by the names of their folders."""


def make_scheduler(
    config: TrainConfig, inherited: Mapping[str, Any] | None = None
) -> diffusers.DDIMScheduler:
    """Makes the scheduler that samples what this configuration trains: trailing timesteps down to
    clean data. ``inherited`` is the configuration of the base's scheduler, for what the run leaves
    open. Without a base, epsilon prediction is sampled with clipping: x0 has the error of eps times
    sigma / alpha, so that without it a short training draws noise.

    Raises:
        DDIMError: If it is epsilon prediction at zero terminal SNR.
    """
    base = dict(inherited or {})
    names = (*LEVEL_OPTIONS, "prediction_type")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    options = PIXEL_MODEL | {name: base[name] for name in names if name in base} | given
    clip = bool(base.get("clip_sample", DEFAULTS["clip_sample"]))
    if inherited is None:
        clip = options["prediction_type"] == "epsilon"
    options["clip_sample"] = clip if config.clip_sample is None else config.clip_sample == "on"
    # A schedule that is named replaces the base's table, rescaling included.
    inherits = not given.keys() & set(LEVEL_OPTIONS)
    is_rescaled = inherits and bool(base.get("rescale_betas_zero_snr"))
    rescale = config.rescale_betas_zero_snr or is_rescaled
    if rescale and options["prediction_type"] == "epsilon":
        if config.rescale_betas_zero_snr:
            raise DDIMError(EPSILON_AT_ZERO_SNR)
        raise DDIMError(
            f"{config.base} has zero terminal SNR, and epsilon prediction cannot be trained there; "
            "leave out --prediction-type, or name a --beta-schedule, which is then not rescaled."
        )
    trained = base.get("trained_betas") if inherits else None
    return diffusers.DDIMScheduler(
        **options,
        trained_betas=spelled_betas({**options, "trained_betas": trained}),
        rescale_betas_zero_snr=rescale,
        set_alpha_to_one=True,
        # Trailing does not use it; diffusers' pipelines expect 1 of a text model.
        steps_offset=base.get("steps_offset", 0),
    )


@contextlib.contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turns errors of the disk into one sentence.

    Raises:
        OutputError: If something cannot be written, for example because the disk is full.
    """
    try:
        yield
    # torch and safetensors raise their own errors when the disk is full.
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(
            f"{what} cannot be written to {folder} ({reason}); mend that, and the same command "
            "goes on from the last checkpoint."
        ) from error


def save_model(
    folder: Path, network: nn.Module, package: Package, *, previous: Path | None = None
) -> None:
    """Writes a model into a new folder. Frozen parts are hard links to those of ``previous``, a
    folder written before, if the file system allows it."""
    for name, part in package.parts(network).items():
        part.save_pretrained(folder / name)
        _mend_configurations(folder / name)
    package.scheduler.save_pretrained(folder / "scheduler")
    for name, source in package.frozen.items():
        _copy_part(source, folder / name, None if previous is None else previous / name)
    scheduler = {"scheduler": ["diffusers", "DDIMScheduler"]}
    index = {**package.index, "_diffusers_version": diffusers.__version__, **scheduler}
    write_json(folder / "model_index.json", index, sort_keys=True)
    # Weights are created for this user alone, unlike the files beside them.
    for weights in folder.glob("*/*.safetensors"):
        shutil.copymode(folder / "model_index.json", weights)


def _copy_part(source: Path, target: Path, previous: Path | None) -> None:
    """Copies the files of a part; of its weights only the safetensors without a variant."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        stem, _, kind = file.name.rpartition(".")
        is_variant = kind == "safetensors" and "." in stem
        if not file.is_file() or kind not in ("json", "txt", "model", "safetensors") or is_variant:
            continue
        if previous is not None:
            with contextlib.suppress(OSError):
                os.link(previous / file.name, target / file.name)
                continue
        if kind == "safetensors":
            _copy_weights(file, target / file.name)
        else:
            shutil.copyfile(file, target / file.name)
    _mend_configurations(target)


def _copy_weights(source: Path, target: Path) -> None:
    """Copies weights; half precision becomes float32, since the network that they are used with is
    of float32, and a pipeline of both cannot be called."""
    with safetensors.safe_open(source, "pt") as file:
        names = file.keys()
        kinds = {file.get_slice(name).get_dtype() for name in names}
    if not kinds & {"F16", "BF16"}:
        shutil.copyfile(source, target)
        return
    weights = safetensors.torch.load_file(source)
    whole = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    safetensors.torch.save_file(whole, target, {"format": "pt"})


def _mend_configurations(part: Path) -> None:
    """Removes from the configurations of a part where it lay when it was loaded, and calls its
    weights float32."""
    for path in (part / "config.json", part / "tokenizer_config.json"):
        config = read_json(path) if path.is_file() else {}
        kept = {k: v for k, v in config.items() if k not in ("_name_or_path", "name_or_path")}
        kept |= {name: "float32" for name in ("dtype", "torch_dtype") if kept.get(name)}
        if kept != config:
            write_json(path, kept, sort_keys=True)


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
    """Puts the finished model into ``out``, with what is known of the data's brightness, for
    ``ddim sample --prior data`` and the doctor. model_index.json is written last, so that a
    half-written model cannot be loaded.

    Raises:
        OutputError: If something cannot be written.
    """
    with (
        writing("the model", out),
        tempfile.TemporaryDirectory(prefix=".model.", suffix=".partial", dir=out) as name,
    ):
        partial = Path(name)
        save_model(partial, network, package)
        whole = card | {"weight_hash": weight_hash(partial)}
        write_json(partial / "card.json", whole, sort_keys=True)
        if prior is not None:
            facts = json.dumps({**asdict(prior), "data": card["data"]["name"]}, sort_keys=True)
            (partial / "prior.json").write_text(facts + "\n")
        for stale in ("model_index.json", "prior.json"):
            (out / stale).unlink(missing_ok=True)
        for folder in sorted(p for p in partial.iterdir() if p.is_dir()):
            shutil.rmtree(out / folder.name, ignore_errors=True)
            folder.rename(out / folder.name)
        write_model_card(out, whole, name=out.resolve().name)
        for path in (partial / file for file in _FILES):
            if path.is_file():
                path.replace(out / path.name)
