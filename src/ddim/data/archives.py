"""Images in tar archives, as the package ``webdataset`` writes and reads them.

The files of a sample have one name and several endings: ``0001.png``, ``0001.cls``, ``0001.txt``,
``0001.json``. The archives are indexed once, and each picture is then read from its place, so that
data may be larger than memory and are shuffled like any others."""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ddim.data.dataset import Columns, EncodedImages, Source
from ddim.data.folders import SUFFIXES
from ddim.data.splits import choose_split
from ddim.errors import DataError, first_line
from ddim.files import parse_json

__all__ = ["open_archives"]

_LARGEST_FACTS = 2**20
"""Bytes of a label, a caption or a JSON text; larger ones are none."""


class _Place(NamedTuple):
    """Where the bytes of a file lie."""

    archive: int
    offset: int
    size: int
    name: str


@dataclass(frozen=True, eq=False)
class _Pictures(EncodedImages):
    """Decodes the pictures of archives on access."""

    archives: Sequence[Path]
    places: Sequence[_Place]

    def __len__(self) -> int:
        return len(self.places)

    def raw(self, index: int) -> bytes:
        """The encoded picture."""
        return _bytes_at(self.archives, self.places[index])

    def undecodable(self, index: int, error: Exception) -> DataError:
        place = self.places[index]
        return DataError(
            f"{place.name} in {self.archives[place.archive]} is not an image that can be read "
            f"({first_line(error)}); remove or replace it."
        )


def open_archives(source: str, archives: Sequence[Path], split: str, columns: Columns) -> Source:
    """Opens the archives of a split as one data set, in the order of their names.

    A sample's label is in its ``.cls`` file, else the ``class`` or ``label`` of its ``.json``; its
    caption in ``.txt``, else the ``caption``, ``text`` or ``prompt`` of its ``.json``. Samples
    without a picture are left out, and told.

    Raises:
        DataError: If an archive is damaged, compressed, or holds no picture.
    """
    chosen = choose_split(source, [path.stem for path in archives], split)
    archives = [path for path in archives if chosen is None or path.stem in chosen]
    pictures: list[_Place] = []
    labels: list[int | None] = []
    captions: list[str | None] = []
    others = 0
    for number, path in enumerate(archives):
        for sample in _samples(number, path):
            found = next((place for end, place in sample.items() if f".{end}" in SUFFIXES), None)
            if found is None:
                others += 1
                continue
            facts = _facts(archives, sample)
            pictures.append(found)
            labels.append(_label(archives, sample, facts))
            captions.append(_caption(archives, sample, facts) if columns.captions else None)
    if not pictures:
        raise DataError(f"{source} holds no pictures in its archives; look into one with tar -t.")
    notes: tuple[str, ...] = (
        (f"samples of {source} without a picture are left out: {others}.",) if others else ()
    )
    has_labels = all(label is not None for label in labels)
    if not has_labels and any(label is not None for label in labels):
        missing = sum(label is None for label in labels)
        notes += (f"labels of {source} are left out, since {missing} samples have none.",)
    if columns.captions and None in captions:
        missing = sum(caption is None for caption in captions)
        raise DataError(f"{missing} samples of {source} have no caption; each needs a .txt file.")
    return Source(
        _Pictures(archives, pictures),
        [label for label in labels if label is not None] if has_labels else None,
        captions=[c for c in captions if c is not None] if columns.captions else None,
        notes=notes,
    )


def _samples(number: int, path: Path) -> list[dict[str, _Place]]:
    """The samples of an archive: the place of each file by its ending."""
    samples: dict[str, dict[str, _Place]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile() or member.name.split("/")[-1].startswith("."):
                    continue
                if member.offset_data + member.size > size or member.issparse():
                    raise tarfile.ReadError("it ends within a file")
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                place = _Place(number, member.offset_data, member.size, member.name)
                samples.setdefault(f"{folder}/{stem}", {})[ending.lower()] = place
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as a plain tar archive ({first_line(error)}); fetch or write "
            "it again, without compression."
        ) from error
    return list(samples.values())


def _bytes_at(archives: Sequence[Path], place: _Place) -> bytes:
    with archives[place.archive].open("rb") as file:
        file.seek(place.offset)
        return file.read(place.size)


def _text(archives: Sequence[Path], place: _Place | None) -> str | None:
    if place is None or place.size > _LARGEST_FACTS:
        return None
    return _bytes_at(archives, place).decode("utf-8", "replace").strip()


def _facts(archives: Sequence[Path], sample: dict[str, _Place]) -> dict[str, Any]:
    """The content of a sample's JSON file, if it has one."""
    text = _text(archives, sample.get("json"))
    if text is None:
        return {}
    try:
        facts = parse_json(text)
    except ValueError as error:
        path, name = archives[sample["json"].archive], sample["json"].name
        raise DataError(f"{name} in {path} is no JSON ({first_line(error)}); mend it.") from error
    return facts if isinstance(facts, dict) else {}


def _label(
    archives: Sequence[Path], sample: dict[str, _Place], facts: dict[str, Any]
) -> int | None:
    text = _text(archives, sample.get("cls"))
    if text is not None:
        if not text.isdigit():
            path, name = archives[sample["cls"].archive], sample["cls"].name
            raise DataError(f"{name} in {path} must hold the number of a class; got {text[:30]!r}.")
        return int(text)
    given = (facts.get(key) for key in ("class", "label"))
    return next((v for v in given if isinstance(v, int) and not isinstance(v, bool)), None)


def _caption(
    archives: Sequence[Path], sample: dict[str, _Place], facts: dict[str, Any]
) -> str | None:
    text = _text(archives, sample.get("txt"))
    given = (text, *(facts.get(key) for key in ("caption", "text", "prompt")))
    return next((value for value in given if isinstance(value, str)), None)
