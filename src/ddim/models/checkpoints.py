"""Models in diffusers format: where the embedded ones are, and how folders and hub ids are opened.

Weights are read from safetensors; if there are none, from a ``.bin`` file by ``torch.load`` with
``weights_only=True``, which runs no code out of it."""

import json
import math
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from ddim.configuration import PIXEL_MODEL, check_levels, check_options, foreign_family
from ddim.errors import CheckpointError, DDIMError
from ddim.files import file_hash

__all__ = [
    "STABLE_DIFFUSION",
    "embedded_models",
    "fetch_model",
    "find_model",
    "has_scheduler",
    "is_unconditional",
    "load_network",
    "load_pipeline",
    "read_guidance",
    "read_json",
    "read_model_index",
    "read_scheduler_config",
    "resolve_model",
    "weight_hash",
]

_ZOO = Path(__file__).parents[1] / "zoo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
STABLE_DIFFUSION = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    *("TextToImagePipeline", "ImageToImagePipeline"),
)
"""Classes of checkpoints in Stable Diffusion's format."""

_PARTS = "unet scheduler vae vqvae movq text_encoder tokenizer transformer safety_checker".split()
_NOT_FOUND = (
    "RepositoryNotFoundError GatedRepoError EntryNotFoundError RevisionNotFoundError".split()
)
_UNCONDITIONAL = ("DDIMPipeline", "DDPMPipeline", "UnconditionalPipeline", "PNDMPipeline")


def embedded_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in _ZOO.glob("*/model_index.json"))


def resolve_model(model: str | Path) -> Path | str:
    """Looks a model's name up: among the embedded models, then among folders (``./NAME`` is always
    one), else as a hub id, which is returned as it is.

    Raises:
        CheckpointError: If it is none of the three.
    """
    name, path = str(model), Path(model).expanduser()
    known = embedded_models()
    if name in known:
        return _ZOO / name
    if path.is_dir():
        return path
    ours = f"the embedded models are: {', '.join(known)}" if known else "no model is embedded"
    if path.exists():
        what = "a file, and a model is a folder in diffusers format"
        raise CheckpointError(f"{name!r} is {what}; {ours}.")
    if _HUB_ID.fullmatch(name):
        return name
    close = get_close_matches(name, known, n=1)
    guess = f"did you mean {close[0]!r}? Otherwise " if close else ""
    raise CheckpointError(
        f"{name!r} is neither an embedded model nor an existing folder; {guess}give a diffusers "
        f"folder or a hub id; {ours}."
    )


def fetch_model(hub_id: str, **options: Any) -> Path:
    """Downloads a pipeline OWNER/NAME from the hub into Hugging Face's cache, by the options of
    ``diffusers.DiffusionPipeline.download``, and returns the folder there.

    Raises:
        CheckpointError: If the hub cannot be reached, or holds no such pipeline.
    """
    import diffusers

    try:
        return Path(diffusers.DiffusionPipeline.download(hub_id, **options))
    except Exception as error:
        known = ", ".join(embedded_models()) or "none"
        reason = "the hub has no model of that name that can be read without a login"
        if type(error).__name__ not in _NOT_FOUND:
            place = "the hub cannot be reached, or holds no pipeline there"
            reason = f"{place}; check the name and the connection"
        raise CheckpointError(
            f"{hub_id!r} is neither an embedded model ({known}) nor an existing folder, and "
            f"{reason}."
        ) from error


def find_model(model: str | Path, **options: Any) -> Path:
    """The folder of an embedded model, a path, or a hub id (:func:`fetch_model`); a CheckpointError
    says that there is no such model."""
    found = resolve_model(model)
    return found if isinstance(found, Path) else fetch_model(found, **options)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a CheckpointError refuses anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the model's folder is not complete.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({_first_line(error)}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; got {type(content).__name__}.")
    return content


def read_model_index(folder: Path) -> dict[str, Any]:
    """The pipeline's index: its class, and the class of each part, perhaps of a network alone.

    Raises:
        CheckpointError: If the folder is no model.
    """
    path = folder / "model_index.json"
    if path.is_file():
        index = read_json(path)
        for name in _PARTS:
            value = index.get(name)
            if value is not None and not (isinstance(value, list) and len(value) == 2):
                wanted = f"the library and the class of {name} in a list of two"
                raise CheckpointError(f"{path} must name {wanted}; got {value!r}.")
        return index
    if (folder / "config.json").is_file():
        return {"unet": ["diffusers", read_json(folder / "config.json").get("_class_name")]}
    unfinished = sorted(p for p in folder.glob("checkpoints/*") if p.name.isdigit())
    known = ", ".join(embedded_models()) or "none"
    hint = f"a model in diffusers format has that file; the embedded models are: {known}"
    if unfinished:
        hint = f"it is a training run that has not finished: take {unfinished[-1]}"
    raise CheckpointError(f"{folder} is a folder without model_index.json; {hint}.")


def read_guidance(folder: Path) -> dict[str, float]:
    """The values of ``guidance_scale`` and ``guidance_rescale`` in a model's card, if it has them.

    Raises:
        CheckpointError: If the card is damaged, or a value is not a finite number.
    """
    path = folder / "card.json"
    card = read_json(path) if path.is_file() else {}
    names = ("guidance_scale", "guidance_rescale")
    found: dict[str, float] = {name: card[name] for name in names if name in card}
    for name, value in found.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise CheckpointError(f"{path} must hold a finite number as {name}; got {value!r}.")
    return found


def is_unconditional(index: Mapping[str, Any]) -> bool:
    """Whether an index (:func:`read_model_index`) lists a network and a scheduler only."""
    lists = {name: value for name, value in index.items() if isinstance(value, list)}
    parts = {name for name, value in lists.items() if name[0] != "_" and value[:1] != [None]}
    is_plain = (index.get("unet") or [None, None])[1] == "UNet2DModel"
    is_pipeline = index.get("_class_name") in _UNCONDITIONAL
    return is_pipeline or (parts <= {"unet", "scheduler"} and is_plain)


def has_scheduler(folder: Path) -> bool:
    """Whether the folder says which noise schedule its network was trained with."""
    return (_part(folder, "scheduler") / "scheduler_config.json").is_file()


def read_scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler's configuration; DDPM's for a folder that holds a network alone.

    Raises:
        CheckpointError: If it is missing or damaged, holds an invalid value, or belongs to another
            family than DDIM's: flow matching, EDM, ...
    """
    path = _part(folder, "scheduler") / "scheduler_config.json"
    if not path.is_file() and not (folder / "model_index.json").is_file():
        return {"_class_name": "DDIMScheduler", **PIXEL_MODEL}
    config = read_json(path)
    if reason := foreign_family(config):
        raise CheckpointError(f"{path} is {reason}")
    try:
        check_options(config)
        check_levels(config)
    except DDIMError as error:
        raise CheckpointError(f"{path} cannot be used: {error} Correct that file.") from error
    return config


def load_network(
    folder: Path, *, dtype: torch.dtype | None = None, variant: str | None = None
) -> Any:
    """The network of a model, in evaluation mode on the CPU.

    Args:
        folder: A pipeline's folder, or the network's own.
        dtype: Type of the weights. Default: float32.
        variant: Variant of the weight files, such as ``fp16``.

    Raises:
        CheckpointError: If a file is missing or damaged, or weights and configuration do not fit
            together.
    """
    import diffusers
    from diffusers.utils import is_accelerate_available

    index = read_model_index(folder)
    name = (index.get("unet") or [None, None])[1]
    kind = getattr(diffusers, str(name), None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        found = f"its index says unet = {name!r}, and UNet2DModel would do"
        raise CheckpointError(f"{folder} has no network that diffusers knows: {found}.")
    place = _part(folder, "unet")
    read_json(place / "config.json")
    for path in _weight_files(folder, variant=variant):
        _check_weights(path)
    try:
        # Without accelerate, weights are drawn before they are read.
        with torch.random.fork_rng(devices=[]):
            network, report = kind.from_pretrained(
                place,
                dtype=dtype,
                variant=variant,
                output_loading_info=True,
                low_cpu_mem_usage=is_accelerate_available(),
                local_files_only=True,
            )
    except Exception as error:
        raise CheckpointError(
            f"the network in {place} cannot be loaded: weights and config.json do not fit "
            f"({_first_line(error)})."
        ) from error
    if missing := report["missing_keys"]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the weights in {place} are not complete: {sorted(missing)[0]}{more} missing; "
            "config.json is of another network."
        )
    return network.eval()


def load_pipeline(load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    """Opens a pipeline of diffusers by ``load``, the ``from_pretrained`` of its class.

    Raises:
        CheckpointError: If a part is missing, the scheduler's family is not DDIM's, or diffusers
            cannot open it.
    """
    index = read_model_index(folder)
    kind = index.get("_class_name")
    if options.get("scheduler") is None:
        read_scheduler_config(folder)  # refuses another family before gigabytes are read
    for name, value in index.items():
        present = isinstance(value, list) and value[:1] != [None] and name not in options
        if present and not name.startswith("_") and not (folder / name).is_dir():
            index_says = "its model_index.json lists one; copy or download the checkpoint again"
            raise CheckpointError(f"{folder} has no {name}, and {index_says}.")
    if "torch_dtype" in options:  # the older name, which makes diffusers warn
        options["dtype"] = options.pop("torch_dtype")
    try:
        return load(folder, **options)
    except ImportError as error:
        raise CheckpointError(
            f"opening a {kind} needs more than is installed; run: pip install 'ddim[text]' "
            f"({_first_line(error)})."
        ) from error
    except (OSError, ValueError) as error:
        why = _first_line(error)
        raise CheckpointError(f"{folder} cannot be opened as a {kind} ({why}).") from error


def weight_hash(folder: Path, *, variant: str | None = None) -> str:
    """First 16 hex digits of the SHA-256 of a model's weight files, shards in the order of their
    names: those of the network, then of a text model's text encoder and autoencoder.

    Raises:
        CheckpointError: If the network has no weights.
    """
    end = f".{variant}" if variant else ""
    files = _weight_files(folder, variant=variant)
    for part, stem in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        files += _files_of(folder / part, f"{stem}{end}") or _files_of(folder / part, stem)
    return file_hash(files)


def _part(folder: Path, name: str) -> Path:
    """The folder of a part: its own, or the pipeline's in the oldest checkpoints."""
    return folder / name if (folder / name).is_dir() else folder


def _weight_files(folder: Path, *, variant: str | None = None) -> list[Path]:
    place = _part(folder, "unet")
    stem = f"diffusion_pytorch_model{'.' + variant if variant else ''}"
    if found := _files_of(place, stem):
        return found
    raise CheckpointError(f"{place} holds no weights: {stem}.safetensors is missing.")


def _files_of(place: Path, stem: str) -> list[Path]:
    """The weight files of that name: safetensors, whole or in shards, else pickled ones."""
    for kind in ("safetensors", "bin"):
        for pattern in (f"{stem}.{kind}", f"{stem}-*-of-*.{kind}"):
            if found := sorted(place.glob(pattern)):
                return found
    return []


def _check_weights(path: Path) -> None:
    """Raises CheckpointError if a file is cut off, or is a pointer to its contents."""
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        advice = "run `git lfs pull` where the model was cloned"
        raise CheckpointError(f"{path} is only a pointer of git-lfs; {advice}.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is damaged or cut off ({_first_line(error)}); copy or download it again."
            ) from error


def _first_line(error: BaseException) -> str:
    """The first sentence of an error's text; more is about arguments that users do not pass."""
    lines = str(error).strip().splitlines()
    return re.split(r"\. (?=[A-Z])", lines[0])[0].rstrip(".: ") if lines else type(error).__name__
