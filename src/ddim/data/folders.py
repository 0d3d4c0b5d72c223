"""Image files in folders; subfolders are splits or classes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddim.data.captions import captions_of_files
from ddim.data.dataset import Columns, Source, no_such_split, one_size_advice
from ddim.errors import DataError

__all__ = ["SHEETS", "SPLITS", "SUFFIXES", "ImageFiles", "open_folder"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

SPLITS = ("train", "test", "val", "valid", "validation")
"""Names of subfolders that are splits and not classes."""

_PICTURES = "grid strip path sheet distance reconstruction flaws"
SHEETS = frozenset(f"{_PICTURES} quality-evaluations quality-seconds".split())
"""Names of the grids and plots that this program's commands write beside their ``run.json``."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Decodes image files on access."""

    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Any:
        from PIL import Image, ImageOps

        path = self.paths[index]
        try:
            with Image.open(path) as picture:
                return ImageOps.exif_transpose(picture)  # a copy, upright as viewers show it
        except Exception as error:
            raise _not_an_image(path, error) from error

    def raw(self, index: int) -> bytes:
        """The content of a file."""
        return self.paths[index].read_bytes()

    def check_sizes(self, source: str, *, center_crop: bool) -> None:
        """Reads the header of every file, so that a stray size ends a run before it starts and not
        hours into it.

        Raises:
            DataError: If a file has another size than the first.
        """
        from PIL import Image

        first: list[int] | None = None
        for index, path in enumerate(self.paths):
            try:
                with Image.open(path) as picture:  # sorted: EXIF may turn it on its side
                    size = [min(picture.size)] if center_crop else sorted(picture.size)
            except Exception as error:
                raise _not_an_image(path, error) from error
            first = first or size
            if size != first:
                sizes = ["x".join(map(str, self[number].size)) for number in (index, 0)]
                raise DataError(
                    f"{path} is {sizes[0]} and the first image of {source} {sizes[1]} (width x "
                    f"height); {one_size_advice(min(first))}."
                )


def _not_an_image(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not an image that can be read ({error}); remove or replace it.")


def open_folder(source: str, folder: Path, split: str, columns: Columns) -> Source:
    """Finds the images of a folder, sorted by path."""
    found = [p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES]
    ours = {parent for parent in {p.parent for p in found} if _holds_results(parent)}
    files = sorted(
        (path, path.relative_to(folder).parts)
        for path in found
        if (path.parent not in ours or path.stem not in SHEETS)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not files:
        raise DataError(f"the folder {source} holds no images ({', '.join(sorted(SUFFIXES))}).")
    tops = {parts[0] if len(parts) > 1 else "" for _, parts in files}
    if tops <= set(SPLITS):
        if split not in tops:
            raise no_such_split(source, tops, split)
        files = [(p, parts[1:]) for p, parts in files if parts[0] == split]
        tops = {parts[0] if len(parts) > 1 else "" for _, parts in files}
    elif split != "train":
        raise no_such_split(source, [], split)
    class_names = None if "" in tops else tuple(sorted(tops))
    labels = None if class_names is None else [class_names.index(parts[0]) for _, parts in files]
    paths, captions = [p for p, _ in files], None
    if columns.captions:
        captions = captions_of_files(source, folder, paths, columns.caption)
    return Source(ImageFiles(paths), labels, class_names, captions, paths)


def _holds_results(folder: Path) -> bool:
    """Whether this program's commands wrote the folder; their grids and plots are not data."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    protocol = record.get("protocol") if isinstance(record, dict) else None
    return isinstance(protocol, dict) and "command" in protocol
