"""What the files of a model say about it, without its weights."""

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddim.core.prior import DataPrior
from ddim.doctor.findings import ModelFacts
from ddim.errors import CheckpointError, DDIMError
from ddim.models.checkpoints import (
    STABLE_DIFFUSION,
    configuration_hash,
    find_model,
    has_scheduler,
    is_unconditional,
    read_model_index,
    read_network_config,
    resolve_model,
    weight_hash,
)
from ddim.models.folder import read_json
from ddim.models.single_file import read_declaration

__all__ = ["FoundModel", "ScheduleSource"]
__all__ += ["read_class_names", "read_model", "read_source", "spread_labels"]

_CONFIG = "scheduler_config.json"
_TRAINED = (
    "num_train_timesteps beta_schedule beta_start beta_end prediction_type rescale_betas_zero_snr"
)


@dataclass(frozen=True)
class FoundModel:
    """What the configuration files of a model say.

    Attributes:
        name: As it was asked for.
        folder: Where it lies.
        is_text: Whether it makes images of prompts.
        classes: Number of classes of its network; 0 without classes.
        has_scheduler: Whether it comes with a noise schedule.
        empty: Classes that it was trained on no image of, as its card says.
        class_names: Names of its classes, as its card or its index says; empty without names.
    """

    name: str
    folder: Path
    is_text: bool
    classes: int
    has_scheduler: bool
    empty: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()

    @property
    def kinds(self) -> set[str]:
        """What options may need of it."""
        kinds = {"text" if self.is_text else "pixels"}
        return kinds | {"classes"} if self.classes and not self.is_text else kinds

    def hashes(self) -> dict[str, str]:
        """What tells it from other models, in a protocol."""
        return {
            "weight_hash": weight_hash(self.folder),
            "configuration_hash": configuration_hash(self.folder),
        }

    def find_class(self, given: int | str | None, *, required: bool = False) -> int | None:
        """The number of a class that was given for all images, by its number or its name.

        Raises:
            DDIMError: If the model does not know it, or if it is required and missing.
        """
        if isinstance(given, str) and self.classes:
            given = self._class_named(given)
        span = f"from 0 to {self.classes - 1}"
        if given is not None and (isinstance(given, str) or not 0 <= given < self.classes):
            none = f"has no effect: {self.name} was trained without classes"
            raise DDIMError(f"--class {f'must be {span}' if self.classes else none}; got {given}.")
        if given is None and required and self.classes:
            what = "name the images' class with --class"
            raise DDIMError(f"the model is class-conditional: {what}, {span}.")
        return given

    def _class_named(self, given: str) -> int:
        """The class whose name, or one of whose names (``tench, Tinca tinca``), is this one."""
        asked, found = given.casefold(), list[int]()
        for number, names in enumerate(names.casefold() for names in self.class_names):
            if asked in (names, *(name.strip() for name in names.split(","))):
                found.append(number)
        if len(found) == 1:
            return found[0]
        if found:
            several = " and ".join(map(str, found))
            raise DDIMError(f"--class {given!r} means the classes {several}; give the number.")
        if not self.class_names:
            message = f"{self.name} does not name its classes; give a number; got {given!r}."
            raise DDIMError(f"--class: {message}")
        spelled = {name.casefold(): repr(name) for name in self.class_names}
        near = [spelled[name] for name in difflib.get_close_matches(asked, spelled, 3, cutoff=0)]
        message = f"--class must be a number or a name such as {', '.join(near)}; got {given!r}."
        raise DDIMError(message)

    def labels_of(self, seeds: Iterable[int], given: int | None = None) -> list[int] | None:
        """The classes of the images of seeds: the given one for all, else one after the other,
        without empty ones; None for a model without classes."""
        if not self.classes:
            return None
        if given is not None:
            return [given for _ in seeds]
        return spread_labels(seeds, self.classes, self.empty)

    def read_prior(self, name: str) -> DataPrior | None:
        """What x_T is drawn from: None for ``standard``, which is N(0, I); the model's prior.json
        for ``data``; else a file.

        Raises:
            DDIMError: If there is no such file.
        """
        if name == "standard":
            return None
        path = self.folder / "prior.json" if name == "data" else Path(name)
        if not path.is_file():
            raise DDIMError(
                f"there is no prior at {path}; measure one with `ddim doctor {self.name} --data "
                "DATA --prior FILE.json`, and give --prior FILE.json."
            )
        return DataPrior.from_dict(read_json(path))

    def trained_on(self) -> str:
        """The data that the model was trained on, as its card says.

        Raises:
            DDIMError: If it has no card, or the card does not say.
        """
        path = self.folder / "card.json"
        config = read_json(path).get("config") if path.is_file() else None
        source = config.get("data") if isinstance(config, dict) else None
        if source is None:
            raise DDIMError(
                f"{self.name} does not say what it was trained on; name images for --variance "
                "analytic with --data."
            )
        return str(source)


def spread_labels(numbers: Iterable[int], classes: int, empty: Collection[int]) -> list[int]:
    """The classes of numbered images, one class after the other, without empty ones."""
    drawn = [label for label in range(classes) if label not in empty]
    return [drawn[number % len(drawn)] for number in numbers]


def read_model(name: str) -> FoundModel:
    """Reads what a model's configuration files say; a CheckpointError says that there is none."""
    folder = find_model(name)
    is_text = read_model_index(folder).get("_class_name") in STABLE_DIFFUSION
    unet = read_network_config(folder)
    classes = unet.get("num_class_embeds")
    kind = unet.get("class_embed_type")
    if not is_text and kind is not None and not classes:
        what = f"conditioned on {kind} embeddings, not on numbered classes"
        raise DDIMError(f"{name} is {what}; give its class_labels from Python.")
    count = classes if type(classes) is int else 0
    empty = _empty_classes(folder, count)
    names = read_class_names(folder) if count else ()
    named = names if len(names) == count else ()
    return FoundModel(name, folder, is_text, count, has_scheduler(folder), empty, named)


def read_class_names(folder: Path) -> tuple[str, ...]:
    """The names of a model's classes, in order: those of its card, or ``id2label`` of its index, as
    diffusers' DiT has it. Empty if they do not say any."""
    names = _card_data(folder).get("classes")
    if isinstance(names, list) and names:
        return tuple(map(str, names))
    path = folder / "model_index.json"
    labels = read_json(path).get("id2label") if path.is_file() else None
    if not isinstance(labels, dict):
        return ()
    numbers = [str(number) for number in range(len(labels))]
    return tuple(str(labels[number]) for number in numbers) if set(numbers) == set(labels) else ()


def _card_data(folder: Path) -> dict[str, Any]:
    """What a model's card says of its data."""
    path = folder / "card.json"
    data = read_json(path).get("data") if path.is_file() else None
    return data if isinstance(data, dict) else {}


def _empty_classes(folder: Path, count: int) -> tuple[int, ...]:
    """What a card says of classes without images; not all of them can be."""
    found = _card_data(folder).get("empty_classes") if count else None
    empty = {label for label in found if type(label) is int} if isinstance(found, list) else set()
    return tuple(sorted(empty)) if len(empty & set(range(count))) < count else ()


@dataclass(frozen=True)
class ScheduleSource:
    """A configuration, what is known of its network, the model's folder if there is one, and a
    sentence about what a single file declares."""

    config: dict[str, Any]
    model: ModelFacts
    folder: Path | None
    declares: str = ""


def read_source(name: str, *, latent: bool = False) -> ScheduleSource:
    """Reads a scheduler's configuration, and what lies beside it about the model; no weights.

    Args:
        name: A configuration file, a checkpoint in a single safetensors file, a model's folder,
            name or hub id, or a training run's folder or card.
        latent: Whether the model is known to work on latents.

    Raises:
        CheckpointError: If there is no scheduler, or a file is damaged.
    """
    path, training = Path(name).expanduser(), None
    if path.is_file():
        if (said := read_declaration(path)) is not None:
            facts = ModelFacts(latent=True, guided=True, training=said.training)
            return ScheduleSource(said.config, facts, None, said.message)
        content = read_json(path)
        training = _training_schedule(content)
        folder = path.parent.parent if path.parent.name == "scheduler" else path.parent
        config = content if training is None else training
    elif path.suffix == ".json" and not path.exists():
        raise CheckpointError(f"there is no file {path}; check the path.")
    else:
        found = resolve_model(name)
        folder = found if isinstance(found, Path) else _fetch_configurations(found)
        config = read_json(_scheduler_file(folder))
        records = (folder / "card.json", folder / "training" / "record.json")
        record = next((place for place in records if place.is_file()), None)
        training = None if record is None else _training_schedule(read_json(record))
    if not (folder / "model_index.json").is_file():
        return ScheduleSource(config, ModelFacts(latent=latent or None, training=training), None)
    return ScheduleSource(config, _facts(folder, latent, training), folder)


def _scheduler_file(folder: Path) -> Path:
    for place in (folder / "scheduler" / _CONFIG, folder / _CONFIG):
        if place.is_file():
            return place
    read_model_index(folder)  # says what else the folder may be
    raise CheckpointError(f"{folder} holds no scheduler/{_CONFIG}, so no noise schedule to see.")


def _facts(folder: Path, latent: bool, training: dict[str, Any] | None) -> ModelFacts:
    index, place = read_model_index(folder), folder / "unet" / "config.json"
    parts = [index.get(name, [None])[0] for name in ("vae", "vqvae", "movq")]
    latent = latent or any(part is not None for part in parts)
    unet = read_json(place) if place.is_file() else {}
    size: Any = unet.get("sample_size")
    channels: Any = unet.get("in_channels")
    height, width = size if isinstance(size, list) else (size, size)  # checked with the index
    is_known = channels and height and width and not latent
    return ModelFacts(
        latent=latent,
        guided=not is_unconditional(index),
        shape=(channels, height, width) if is_known else None,
        num_train_timesteps=unet.get("num_train_timesteps"),
        training=training,
    )


def _training_schedule(content: dict[str, Any]) -> dict[str, Any] | None:
    """The schedule of a training run, from its card, its record, or its bare options; None if the
    content is something else."""
    options = content.get("config", content)
    if not (isinstance(options, dict) and "beta_schedule" in options and "data" in options):
        return None
    # As `ddim train` writes its scheduler: an option that was not given is recorded with the value
    # that was used, or has diffusers' default.
    given = {name: options[name] for name in _TRAINED.split() if options.get(name) is not None}
    return {"timestep_spacing": "trailing", "clip_sample": False, **given}


def _fetch_configurations(hub_id: str) -> Path:
    """Downloads the configurations of a model of the hub, and no weights."""
    import huggingface_hub

    patterns = ["*.json", "scheduler/*.json", "unet/*.json"]
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(
            f"{hub_id!r} is neither an embedded model nor an existing file or folder, and cannot "
            "be read from the hub; check the name and the connection."
        ) from error
