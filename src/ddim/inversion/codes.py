"""Code files: latents of images in safetensors, with what is needed to decode them."""

from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open

from ddim.errors import DataError, DDIMError
from ddim.files import replacing
from ddim.inversion.encoding import Code

__all__ = ["load_code", "save_code"]


def save_code(code: Code, path: Path | str) -> None:
    """Writes a code, whole or not at all."""
    with replacing(path) as partial:
        safetensors.torch.save_file(code.tensors(), partial, metadata=code.metadata())


def load_code(path: Path | str) -> Code:
    """Reads a code.

    Raises:
        DataError: If there is no such file, or it is damaged or no code.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Code.from_tensors(tensors, file.metadata())
    except FileNotFoundError:
        raise DataError(f"there is no code at {path}.") from None
    except (SafetensorError, OSError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".: ")
        raise DataError(f"{path} is no code, or is damaged or cut off ({first}).") from error
    except DDIMError as error:
        raise DataError(f"{path}: {error}") from error
