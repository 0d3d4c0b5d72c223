"""Models in diffusers format: where the embedded ones are, and how folders and hub ids are opened.

Weights are read from safetensors; if there are none, from a ``.bin`` file by ``torch.load`` with
``weights_only=True``, which runs no code out of it."""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from ddim.configuration import PIXEL_MODEL, check_keys, check_levels, check_options, foreign_family
from ddim.errors import CheckpointError, DDIMError, first_line, shown_cause
from ddim.files import file_hash
from ddim.models.folder import check_files, check_index, lasting_options, part_names, read_json

__all__ = [
    "STABLE_DIFFUSION",
    "check_finite",
    "configuration_hash",
    "embedded_models",
    "fetch_model",
    "find_model",
    "has_scheduler",
    "is_unconditional",
    "load_network",
    "load_pipeline",
    "outline_network",
    "read_guidance",
    "read_model_index",
    "read_network_config",
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

_STEM = "diffusion_pytorch_model"
_PICTURED = ("unet", "text_encoder", "tokenizer", "vae")
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


def read_model_index(folder: Path, *, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The pipeline's index: its class, and the class of each part, perhaps of a network alone. All
    that opens a folder reads it here first, since :mod:`ddim.models.folder` checks the folder.

    Args:
        folder: The model's.
        given: The options of ``from_pretrained``, by which a user may answer for other code.

    Raises:
        CheckpointError: If the folder is no model, or names what is not opened.
    """
    path, config = folder / "model_index.json", folder / "config.json"
    if path.is_file() or config.is_file():
        is_network = not path.is_file()
        kind = read_json(config).get("_class_name") if is_network else None
        index = {"unet": ["diffusers", kind]} if is_network else read_json(path)
        check_index(index, config if is_network else path, given=given)
        check_files(folder, index, given=given)
        return index
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
        check_keys(config)
        check_options(config)
        check_levels(config)
    except DDIMError as error:
        raise CheckpointError(f"{path} cannot be used: {error} Correct that file.") from error
    return config


def outline_network(folder: Path) -> Any:
    """The network of a model without its weights: its configuration, and shapes on torch's device
    ``meta``. A CheckpointError says what :func:`load_network` would say of the configuration."""
    kind, config = _network_class(folder), read_network_config(folder)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return kind.from_config(config).eval()
    except Exception as error:
        raise _misfit(_part(folder, "unet"), error) from shown_cause(error)


def read_network_config(folder: Path) -> dict[str, Any]:
    """The configuration of a model's network, of a pipeline's folder or the network's own."""
    return read_json(_part(folder, "unet") / "config.json")


def _network_class(folder: Path) -> Any:
    import diffusers

    index = read_model_index(folder)
    name = (index.get("unet") or [None, None])[1]
    kind = getattr(diffusers, str(name), None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        found = f"its index says unet = {name!r}, and UNet2DModel would do"
        raise CheckpointError(f"{folder} has no network that diffusers knows: {found}.")
    return kind


def _misfit(place: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the network in {place} cannot be loaded: weights and config.json do not fit "
        f"({_reason(error)})."
    )


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
    from diffusers.utils import is_accelerate_available

    kind, place = _network_class(folder), _part(folder, "unet")
    read_network_config(folder)  # says what is wrong with it
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
        raise _misfit(place, error) from shown_cause(error)
    if missing := report["missing_keys"]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the weights in {place} are not complete: {sorted(missing)[0]}{more} missing; "
            "config.json is of another network."
        )
    network.register_to_config(_name_or_path=place.name)  # no path of this machine, to be saved
    return network.eval()


def check_finite(name: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Checks that the weights of a model are finite numbers.

    Raises:
        CheckpointError: The first weight that is not, or became infinite in its type.
    """
    for key, weight in weights.items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            what = f"the weight {key} of {name} is NaN or infinite in {weight.dtype}"
            raise CheckpointError(f"{what}; copy or download the model again, or train it anew.")


def load_pipeline(
    load: Callable[..., Any], folder: Path, index: Mapping[str, Any], **options: Any
) -> Any:
    """Opens a pipeline of diffusers by ``load``, the ``from_pretrained`` of its class; ``index`` is
    what :func:`read_model_index` found and checked.

    Raises:
        CheckpointError: If a part is missing, the scheduler's family is not DDIM's, or diffusers
            cannot open it.
    """
    kind = index.get("_class_name")
    if options.get("scheduler") is None:
        read_scheduler_config(folder)  # refuses another family before gigabytes are read
    for name in part_names(index):
        if name not in options and not (folder / name).is_dir():
            index_says = "its model_index.json lists one; copy or download the checkpoint again"
            raise CheckpointError(f"{folder} has no {name}, and {index_says}.")
    if "torch_dtype" in options:  # the older name, which makes diffusers warn
        options["dtype"] = options.pop("torch_dtype")
    if folder.parent.name != "snapshots":  # it was named as a folder, so no hub is asked for more
        options.setdefault("local_files_only", True)
    try:
        with warnings.catch_warnings():  # torch's on pickles ask for a report to its authors
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return load(folder, **options)
    except ImportError as error:
        raise CheckpointError(
            f"opening a {kind} needs more than is installed; run: pip install 'ddim[text]' "
            f"({_reason(error)})."
        ) from error
    except Exception as error:  # its parts are opened by many libraries, each with its own errors
        for path in (file for name in part_names(index) for file in (folder / name).glob("*.*")):
            _check_weights(path)
        why = _reason(error)
        raise CheckpointError(f"{folder} cannot be opened as a {kind} ({why}).") from shown_cause(
            error
        )


def weight_hash(folder: Path, *, variant: str | None = None) -> str:
    """First 16 hex digits of the SHA-256 of the weight files that are loaded, shards in the order
    of their names: those of the network, then of a text model's text encoder and autoencoder.

    Raises:
        CheckpointError: If the network has no weights.
    """
    files = _weight_files(folder, variant=variant)
    for part, stem in (("text_encoder", "model"), ("vae", _STEM)):
        place = folder / part
        files += _files_of(place, stem, variant) or _files_of(place, stem, None)
    return file_hash(files)


_OF_TOKENIZER = ("*.json", "*.txt", "*.model", "*.bpe", "*.spm")


def configuration_hash(folder: Path) -> str:
    """First 16 hex digits of a SHA-256 of what makes a picture beside weights and schedule: the
    configurations of network, text encoder and autoencoder, and the tokenizer's files."""
    digest = hashlib.sha256()
    for name in _PICTURED:
        place = _part(folder, name) if name == "unet" else folder / name
        named = ("config.json",) if name != "tokenizer" else _OF_TOKENIZER
        for path in sorted(file for pattern in named for file in place.glob(pattern)):
            content = path.read_bytes()
            if path.name in ("config.json", "tokenizer_config.json"):
                content = json.dumps(lasting_options(read_json(path)), sort_keys=True).encode()
            digest.update(f"{name}/{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def _part(folder: Path, name: str) -> Path:
    """The folder of a part: its own, or the pipeline's in the oldest checkpoints."""
    return folder / name if (folder / name).is_dir() else folder


def _weight_files(folder: Path, *, variant: str | None = None) -> list[Path]:
    place = _part(folder, "unet")
    if found := _files_of(place, _STEM, variant):
        return found
    stem = f"{_STEM}{'.' + variant if variant else ''}"
    raise CheckpointError(f"{place} holds no weights: {stem}.safetensors is missing.")


def _files_of(place: Path, stem: str, variant: str | None) -> list[Path]:
    """The weight files of that name, as the libraries choose them: safetensors, whole or in shards,
    else pickled ones. diffusers prefers shards, and transformers a whole file."""
    end, is_diffusers = f".{variant}" if variant else "", stem == _STEM
    for name, kind in ((stem, "safetensors"), (stem if is_diffusers else "pytorch_model", "bin")):
        path, index = place / f"{name}{end}.{kind}", place / f"{name}.{kind}.index{end}.json"
        named = read_json(index).get("weight_map", {}) if index.is_file() else {}
        shards = sorted({place / str(file) for file in named.values()})
        whole = [path] if path.is_file() else []
        lone = sorted(place.glob(f"{name}{end}-*-of-*.{kind}"))
        if found := (shards or whole if is_diffusers else whole or shards) or lone:
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
                f"{path} is damaged or cut off ({_reason(error)}); copy or download it again."
            ) from error


def _reason(error: BaseException) -> str:
    """The first sentence of an error's text; more is about arguments that users do not pass."""
    return re.split(r"\. (?=[A-Z])", first_line(error))[0].rstrip(".: ")
