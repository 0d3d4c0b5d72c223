"""Models in diffusers format: where the embedded ones lie, and how a folder is opened."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ddim.errors import CheckpointError

__all__ = ["embedded_models", "load_network", "read_json", "resolve_model", "weight_hash"]

_ZOO = Path(__file__).parent / "zoo"
_FAMILY = ("DDIM", "DDPM", "PNDM", "DPMSolver", "Euler", "LMS", "Heun", "UniPC", "KDPM2", "DEIS", "LCM", "TCD")


def embedded_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in _ZOO.glob("*/model_index.json"))


def resolve_model(model: str) -> Path:
    """The folder of an embedded model's name, or of a path.

    Raises:
        CheckpointError: If it is neither.
    """
    if model in embedded_models():
        return _ZOO / model
    if (Path(model) / "model_index.json").is_file():
        return Path(model)
    what = "a folder without model_index.json" if Path(model).is_dir() else "not an existing folder"
    raise CheckpointError(f"{model!r} is {what}; give a diffusers folder, or one of the embedded models: {', '.join(embedded_models())}.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: If it is missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; got {type(content).__name__}.")
    return content


def load_network(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The UNet2DModel of an unconditional checkpoint, and its scheduler's configuration.

    Raises:
        CheckpointError: If a part is missing or damaged, the pipeline is of another kind, or its scheduler is of another family.
    """
    import diffusers

    network_class = read_json(folder / "model_index.json").get("unet", [None, None])[1]
    if network_class != "UNet2DModel":
        raise CheckpointError(f"{folder} is no unconditional model: its network is {network_class}, and UNet2DModel is needed.")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    kind = str(scheduler.get("_class_name", ""))
    if "FlowMatch" in kind or not kind.startswith(_FAMILY):
        raise CheckpointError(
            f"{folder} is sampled by {kind or 'an unnamed scheduler'}, which is not of the DDIM family; use diffusers' own pipeline for it."
        )
    try:
        network = diffusers.UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True).eval()
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the network in {folder / 'unet'} cannot be loaded ({first}).") from error
    return network, scheduler


def weight_hash(folder: Path) -> str:
    """First 16 hex digits of the SHA-256 over the network's safetensors files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted((folder / "unet").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
