"""Image files in folders; subfolders are splits or classes."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ddim.data.captions import captions_of_files
from ddim.data.dataset import Columns, Header, Source, in_order
from ddim.data.splits import choose_split, family, no_such_split, split_of
from ddim.errors import DataError
from ddim.files import load_json
from ddim.models.images import open_image

__all__ = ["SHEETS", "SUFFIXES", "Found", "ImageFiles", "open_folder", "walk"]

SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .gif .tif .tiff .pbm .pgm .ppm .pnm .pfm"
    " .avif .avifs .jp2 .j2k .jpx .tga .pcx .qoi .sgi .rgb .ico .icns .psd".split()
)
"""Endings of pictures that Pillow opens by itself."""

_PICTURES = "grid strip path sheet distance reconstruction flaws"
SHEETS = frozenset(f"{_PICTURES} quality-evaluations quality-seconds".split())
"""Names of the grids and plots that this program's commands write beside their ``run.json``."""

_TEXTS = {"", ".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".xml", ".yaml", ".yml"}
_TEXTS |= {".log", ".py", ".lock", ".partial"}
"""Endings of files that nobody takes for pictures; all others that are left out are told."""


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Decodes image files on access."""

    paths: list[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Any:
        from PIL import ImageOps

        return self._read(index, ImageOps.exif_transpose)  # a copy, upright as viewers show it

    def raw(self, index: int) -> bytes:
        """The content of a file."""
        return self.paths[index].read_bytes()

    def header(self, index: int) -> Header:
        """Reads what a file says before its pixels."""
        header: Header = self._read(index, Header.of)
        return header

    def _read(self, index: int, take: Callable[[Any], Any]) -> Any:
        path = self.paths[index]
        try:
            with open_image(path) as picture:
                return take(picture)
        except Exception as error:
            raise _not_an_image(path, error) from error


def _not_an_image(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not an image that can be read ({error}); remove or replace it.")


class Found(NamedTuple):
    """A file, and its place below the folder, by the names of links."""

    path: Path
    parts: tuple[str, ...]


def open_folder(
    source: str, folder: Path, every: list[Found], split: str, columns: Columns
) -> Source:
    """Opens the images among the files of a folder, sorted by path."""
    notes: tuple[str, ...] = ()
    results = {parent for parent in {found.path.parent for found in every} if _is_ours(parent)}
    every = [f for f in every if f.path.parent not in results or f.path.stem not in SHEETS]
    files = [found for found in every if found.path.suffix.lower() in SUFFIXES]
    other = Counter(f.path.suffix.lower() for f in every if f.path.suffix.lower() not in SUFFIXES)
    odd = {suffix: count for suffix, count in sorted(other.items()) if suffix not in _TEXTS}
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in odd.items())
    if kinds:
        notes += (f"files of {source} that are no pictures are left out: {kinds}.",)
    if not files:
        wanted = "such as .png, .jpg or .webp"
        raise DataError(
            f"the folder {source} holds no images that are read, {wanted}"
            + (f"; it holds {kinds}." if kinds else ".")
        )
    files, left_out = _of_split(source, files, split)
    if linked := [found.path for found in files if _leads_out(found.path, folder)]:
        notes += (
            f"pictures of {source} that are links to files elsewhere are read: {len(linked)}, such "
            f"as {linked[0]}.",
        )
    if left_out:
        notes += (
            f"pictures of {source} that lie in no split are left out: {len(left_out)}, such as "
            f"{left_out[0].path}.",
        )
    tops = {found.parts[0] if len(found.parts) > 1 else "" for found in files}
    class_names = None if "" in tops else in_order(tops)
    numbers = {name: number for number, name in enumerate(class_names or ())}
    labels = None if class_names is None else [numbers[found.parts[0]] for found in files]
    paths, captions = [found.path for found in files], None
    if columns.captions:
        beside = [found.path for found in every]
        captions, told = captions_of_files(source, beside, paths, columns.caption)
        notes += told
    return Source(ImageFiles(paths), labels, class_names, captions, paths, notes)


def walk(folder: Path) -> tuple[list[Found], tuple[str, ...]]:
    """Lists the regular files below a folder, sorted, without hidden ones. Links to folders are
    followed, each folder once, so that no loop is without end."""
    found: list[Found] = []
    seen: set[str] = set()
    notes: tuple[str, ...] = ()
    waiting = [folder]
    while waiting:
        start = waiting.pop(0)
        if start != folder:
            real = os.path.realpath(start)
            is_read = real in seen or Path(os.path.realpath(folder)).is_relative_to(real)
            what = "which is read already, and is left out" if is_read else "and is followed"
            notes += (f"{start} is a link to the folder {real}, {what}.",)
            if is_read:
                continue
        for current, names, files in os.walk(start):
            place = Path(current)
            shown = sorted(name for name in names if not name.startswith("."))
            seen.add(os.path.realpath(current))
            waiting += [place / name for name in shown if (place / name).is_symlink()]
            names[:] = [n for n in shown if os.path.realpath(place / n) not in seen]
            paths = (place / name for name in files if not name.startswith("."))
            # A pipe or a device would be read without end.
            found += [Found(p, p.relative_to(folder).parts) for p in paths if p.is_file()]
    return sorted(found), notes


def _leads_out(path: Path, folder: Path) -> bool:
    """Whether a file is a link to one outside of the folder."""
    if not path.is_symlink():
        return False
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _of_split(source: str, files: list[Found], split: str) -> tuple[list[Found], list[Found]]:
    """Returns the files of a split, their places without its folder, and the files of no split."""
    for depth in range(max(len(found.parts) for found in files) - 1):
        inside = [found for found in files if len(found.parts) > depth + 1]
        names = {found.parts[depth] for found in inside}
        kinds = family(names)
        if len(set(kinds.values())) > 1 or (depth == 0 and kinds and len(kinds) == len(names)):
            chosen = choose_split(source, kinds, split) or []
            mine = [f for f in inside if f.parts[depth] in chosen]
            rest = [f for f in files if len(f.parts) < depth + 2 or f.parts[depth] not in kinds]
            return [Found(f.path, f.parts[:depth] + f.parts[depth + 1 :]) for f in mine], rest
        if depth == 0 and (named := sorted(name for name in names if split_of(name))):
            others = ", ".join(sorted(names - {named[0]})[:3])
            raise DataError(
                f"{source} has a folder {named[0]} beside {others}, so it may be a split or a "
                f"class; name {Path(source) / named[0]} as the data, or rename that folder."
            )
    kinds = family({found.path.stem for found in files})
    if len(set(kinds.values())) > 1 and all(found.path.stem in kinds for found in files):
        chosen = choose_split(source, kinds, split) or []
        return [found for found in files if found.path.stem in chosen], []
    if split != "train":
        raise no_such_split(source, [], split)
    return files, []


def _is_ours(folder: Path) -> bool:
    """Whether this program's commands wrote the folder; their grids and plots are not data."""
    path = folder / "run.json"
    try:
        record = load_json(path) if path.exists() else None
    except (OSError, ValueError):
        return False
    protocol = record.get("protocol") if isinstance(record, dict) else None
    return isinstance(protocol, dict) and "command" in protocol
