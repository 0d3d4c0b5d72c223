"""The model that a run starts from: an unconditional one, or one in Stable Diffusion's format."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ddim.errors import CheckpointError, DDIMError, first_line, shown_cause
from ddim.models.checkpoints import (
    check_finite,
    configuration_hash,
    find_model,
    is_unconditional,
    read_guidance,
    read_model_index,
    read_network_config,
    read_scheduler_config,
    weight_hash,
)
from ddim.models.facts import read_class_names
from ddim.models.folder import check_links, read_json

__all__ = ["Base", "has_plain_weights", "load_part", "open_base"]

# The parts of Stable Diffusion 1 and 2: the library, the class, and what the part is.
_PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel", "the network"),
    "vae": ("diffusers", "AutoencoderKL", "the autoencoder"),
    "text_encoder": ("transformers", "CLIPTextModel", "the text encoder"),
    "tokenizer": ("transformers", "CLIPTokenizer", "the tokenizer"),
    "scheduler": ("", "", "the noise schedule"),
}


@dataclass(frozen=True)
class Base:
    """A model's folder and the content of its files."""

    name: str
    folder: Path
    index: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    network_config: Mapping[str, Any]
    is_text: bool

    @property
    def channels(self) -> int:
        """Channels of the images that the model makes."""
        path = self.folder / "vae" / "config.json"
        return int((read_json(path) if self.is_text else self.network_config).get("in_channels", 3))

    @property
    def guidance(self) -> dict[str, float]:
        """The guidance that the model's card recommends."""
        return read_guidance(self.folder)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes that the model was trained on; often none."""
        return read_class_names(self.folder)

    @property
    def facts(self) -> dict[str, Any]:
        """What the record of a run says about its base."""
        return {
            "base_class": self.index.get("_class_name"),
            "base_weights": weight_hash(self.folder),
            "base_configuration": configuration_hash(self.folder),
        }


def open_base(name: str) -> Base:
    """Finds a model by an embedded model's name, a folder or a hub id, and checks that it can be
    trained.

    Raises:
        CheckpointError: If there is no such model, a part is missing, or it is of another kind.
    """
    folder = find_model(name)
    index = read_model_index(folder)
    check_links(folder)
    is_text = not is_unconditional(index)
    if is_text:
        _check_parts(name, folder, index)
    elif (kind := _class_of(index, "unet")) != "UNet2DModel":
        message = f"{name} has a network of class {kind}, and only UNet2DModel can be trained."
        raise CheckpointError(message)
    network_config = read_network_config(folder)
    return Base(name, folder, index, read_scheduler_config(folder), network_config, is_text)


def _class_of(index: Mapping[str, Any], part: str) -> Any:
    return (index.get(part) or [None, None])[1]


def _check_parts(name: str, folder: Path, index: Mapping[str, Any]) -> None:
    for part in ("text_encoder_2", "transformer", "prior_prior", "controlnet"):
        if (index.get(part) or [None])[0] is not None:
            raise CheckpointError(
                f"{name} is a {index.get('_class_name')} with a {part}, and only Stable Diffusion "
                "1 and 2 can be trained; train it with diffusers' own scripts."
            )
    for part, (library, kind, what) in _PARTS.items():
        found = _class_of(index, part)
        if found is None or not (folder / part).is_dir():
            raise CheckpointError(
                f"{name} has no {part} ({what}), which a text model needs; complete the folder, or "
                "take another base."
            )
        source = index[part][0]
        if kind and (source, found.removesuffix("Fast")) != (library, kind):
            given = found if source == library else f"{source}.{found}"
            raise CheckpointError(
                f"the {part} of {name} is a {given}, and only {kind} can be trained; train it with "
                "diffusers' own scripts."
            )
    for part in ("vae", "text_encoder"):
        if not has_plain_weights(folder / part):
            raise CheckpointError(
                f"the {part} of {name} has no .safetensors file without a variant, and pickled or "
                "half-precision weights are not copied; save it anew with diffusers."
            )


def has_plain_weights(folder: Path) -> bool:
    """Whether there are weights in safetensors without a variant, such as fp16."""
    return any("." not in path.stem for path in folder.glob("*.safetensors"))


def load_part(base: Base, part: str) -> Any:
    """Loads the autoencoder, text encoder or tokenizer of a text model; weights become float32,
    also those that are stored in half precision. Raises a CheckpointError if its files are damaged
    or its weights not finite, and a DDIMError if transformers is not installed."""
    library, kind = _PARTS[part][0], base.index[part][1]
    try:
        module = importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise DDIMError(
            f"text models need {library}, which is not installed; run: pip install 'ddim[text]'."
        ) from error
    try:
        loaded = getattr(module, kind).from_pretrained(base.folder / part, local_files_only=True)
    except Exception as error:
        reason = f"cannot be loaded ({first_line(error)}); check {base.folder / part}."
        raise CheckpointError(f"the {part} of {base.name} {reason}") from shown_cause(error)
    if not isinstance(loaded, nn.Module):
        return loaded
    check_finite(base.name, dict(loaded.named_parameters()))
    return loaded.float()
