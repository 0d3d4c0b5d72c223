"""Opens a model of the shelf: checkpoints in one file become a folder first, once."""

import hashlib
import shlex
import threading
from pathlib import Path
from typing import NamedTuple

from ddim.errors import CheckpointError
from ddim.files import write_text
from ddim.models.conversion import convert, read_state_dict, write_model
from ddim.studio.shelf import Shelf

__all__ = ["Made", "Opened", "made_from", "open_model"]

_LOCK = threading.Lock()
_COMMAND = ".made-by"
"""A file beside a folder that a checkpoint was converted to: the command that makes such a one."""
_SAVE = "from ddim import DiffusionPipeline as D; D.from_single_file({!r}).save_pretrained({!r})"


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
            command = _convert(path, folder)
            write_text(folder.parent / _COMMAND, shlex.join(command))
    return Opened(name, str(folder))


class Made(NamedTuple):
    """How a person makes the folder of a checkpoint in one file that the page has opened."""

    command: str
    folder: str
    """The name of the folder that the command makes, below the one where it is called."""


def made_from(model: str) -> Made | None:
    """How the folder of a model came to be that :func:`open_model` made; None for another."""
    told = Path(model).parent / _COMMAND
    return Made(told.read_text(), _beside(Path(model))) if told.is_file() else None


def _beside(folder: Path) -> str:
    return f"./{folder.name}"


def _convert(path: Path, folder: Path) -> list[str]:
    """Converts a checkpoint; returns the words of the command that does the same."""
    try:
        write_model(convert(read_state_dict(path)), folder)
        return ["ddim", "convert", str(path), _beside(folder)]
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
        return ["python", "-c", _SAVE.format(str(path), _beside(folder))]
