"""Opens a model of the shelf: checkpoints in one file become a folder first, once."""

import hashlib
import threading
from pathlib import Path
from typing import NamedTuple

from ddim.errors import CheckpointError
from ddim.models.conversion import convert, read_state_dict, write_model
from ddim.studio.shelf import Shelf

__all__ = ["Opened", "open_model"]

_LOCK = threading.Lock()


class Opened(NamedTuple):
    """A model of the shelf."""

    name: str
    """As a person names it."""
    folder: str
    """What a request names: the same, or the folder that a file was converted to."""


def open_model(name: str, shelf: Shelf, work: Path) -> Opened:
    """Opens a model; ``work`` is where the folders of converted files lie.

    Raises:
        CheckpointError: If a file is no checkpoint that can be converted without asking a host.
    """
    if not shelf.is_file(name):
        return Opened(name, name)
    path = Path(name).expanduser()
    about = path.stat()
    key = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
    folder = work / "models" / hashlib.sha256(key.encode()).hexdigest()[:16] / path.stem
    with _LOCK:  # two visitors may choose it at once
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _convert(path, folder)
    return Opened(name, str(folder))


def _convert(path: Path, folder: Path) -> None:
    try:
        write_model(convert(read_state_dict(path)), folder)
    except CheckpointError as refusal:
        if path.suffix != ".safetensors":
            raise
        from ddim.pipelines.diffusion_pipeline import DiffusionPipeline

        try:  # Stable Diffusion's format, whose configuration diffusers looks up
            pipe = DiffusionPipeline.from_single_file(path, local_files_only=True)
        except CheckpointError:
            raise CheckpointError(
                f"{path} is a checkpoint in one file that cannot be opened here ({refusal}) "
                "Open it once with ddim.DiffusionPipeline.from_single_file, save it with "
                "save_pretrained, and start the studio with that folder."
            ) from None
        pipe.save_pretrained(folder)
