"""The models that the page may open: those of the package, the one that the studio was started
with, and those of one folder. A visitor names one of this list, so no other file is read."""

from dataclasses import dataclass
from pathlib import Path

from ddim.errors import CheckpointError, DDIMError
from ddim.models.checkpoints import embedded_models, resolve_model

__all__ = ["Shelf"]

CHECKPOINTS = (".safetensors", ".pth", ".pt", ".ckpt")
"""Endings of checkpoints in one file."""
_DEEPEST = 3
_MOST = 200


@dataclass(frozen=True)
class Shelf:
    """The models that can be chosen.

    Attributes:
        first: The model that the studio was started with.
        folder: Whose models can be chosen, too; None for none.
    """

    first: str
    folder: Path | None = None

    def check(self) -> None:
        """Raises a DDIMError if there is no such model, or no such folder."""
        if not _is_checkpoint(Path(self.first).expanduser()):
            resolve_model(self.first)
        if self.folder is not None and not self.folder.is_dir():
            raise DDIMError(f"--folder must be a folder with models; got {self.folder}.")

    def names(self) -> list[str]:
        """All models, the first one first."""
        found = [] if self.folder is None else [str(path) for path in self._walk(self.folder, 0)]
        return list(dict.fromkeys([self.first, *embedded_models(), *found[:_MOST]]))

    def find(self, name: object) -> str:
        """The name of a model of the shelf.

        Raises:
            CheckpointError: If it is not one of them.
        """
        if name not in self.names():
            where = "" if self.folder is None else f", or lies in {self.folder}"
            raise CheckpointError(
                f"the page opens models that it lists{where}; got {str(name)[:80]!r}. Start the "
                "studio as `ddim studio MODEL`, or with --folder, to have it there."
            )
        return str(name)

    def is_file(self, name: str) -> bool:
        """Whether a model is a checkpoint in one file."""
        return name not in embedded_models() and _is_checkpoint(Path(name).expanduser())

    def _walk(self, folder: Path, depth: int) -> list[Path]:
        """Models in a folder and below; links that lead out of it are passed over."""
        assert self.folder is not None
        root, found = self.folder.resolve(), list[Path]()
        try:
            entries = sorted(folder.iterdir())[:_MOST]
        except OSError:  # a folder that may not be read holds no model for us
            return []
        for path in entries:
            if path.name.startswith(".") or not path.resolve().is_relative_to(root):
                continue
            if path.is_dir() and (path / "model_index.json").is_file():
                found.append(path)
            elif path.is_dir() and depth < _DEEPEST and not (folder / "config.json").is_file():
                found += self._walk(path, depth + 1)
            elif _is_checkpoint(path) and not (folder / "config.json").is_file():
                found.append(path)
        return found


def _is_checkpoint(path: Path) -> bool:
    return path.suffix in CHECKPOINTS and path.is_file()
