"""Reads captions of image files, in the layouts of Hugging Face's imagefolder and of fine-tuning
scripts."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ddim.errors import DataError, first_line

__all__ = ["CAPTION_COLUMNS", "TABLES", "captions_of_files", "one_caption", "read_prompts"]

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
"""Usual names of a column of captions, tried in this order."""


TABLES = ("metadata.jsonl", "metadata.csv")
"""Names of files with a caption for each image, tried in this order."""


def captions_of_files(
    source: str, files: Sequence[Path], paths: list[Path], column: str | None
) -> tuple[list[str] | None, tuple[str, ...]]:
    """Reads captions from the metadata tables among ``files`` or, without any, from ``NAME.txt``
    beside each image; returns None if there are no captions, and what was left out of them."""
    found = [path for path in files if path.name in TABLES]
    tables = sorted(found, key=lambda path: (path.parent, TABLES.index(path.name)))
    if tables:
        return _captions_of_tables(source, tables, paths, column)
    texts = [p.with_suffix(".txt") for p in paths]
    there = [t.is_file() for t in texts]
    if not any(there):
        return None, ()
    if not all(there):
        first = texts[there.index(False)]
        raise DataError(
            f"{there.count(False)} of {len(paths)} images of {source} have no caption: {first} is "
            "missing; an empty file will do."
        )
    try:
        captions = [text.read_text(encoding="utf-8-sig").strip().splitlines() for text in texts]
    except ValueError as error:
        message = f"a caption of {source} is not UTF-8 text ({error}); save it as UTF-8."
        raise DataError(message) from error
    several = sum(len(lines) > 1 for lines in captions)
    note = f"captions of {source} of several lines are read by the first: {several}."
    return [lines[0].strip() if lines else "" for lines in captions], (note,) if several else ()


def _captions_of_tables(
    source: str, tables: list[Path], paths: list[Path], column: str | None
) -> tuple[list[str], tuple[str, ...]]:
    """The first caption of each image, and how many rows are left out."""
    rows: dict[str, str] = {}
    again = 0
    for table in tables:
        for name, text in _read_metadata(table, column):
            again += name in rows
            rows.setdefault(name, text)
    names = [os.path.normpath(path) for path in paths]
    missing = [path for path, name in zip(paths, names, strict=True) if name not in rows]
    if missing:
        raise DataError(
            f"{tables[0]} has no row for {len(missing)} of {len(paths)} images of {source}, "
            f"such as {missing[0]}; add it, or move the image away."
        )
    notes = [f"rows that name an image again are left out: {again}."] if again else []
    if others := sum(not os.path.isfile(name) for name in rows):
        notes.append(f"rows that name an image that is not there are left out: {others}.")
    about = ", ".join(map(str, tables))
    return [rows[name] for name in names], tuple(f"{about}: {note}" for note in notes)


def _read_metadata(path: Path, column: str | None) -> Iterator[tuple[str, str]]:
    """Yields the image's path and the caption of each row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            is_csv = path.suffix == ".csv"
            rows = list(
                csv.DictReader(file) if is_csv else map(json.loads, filter(str.strip, file))
            )
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        message = f"{path} cannot be read ({first_line(error)}); write one row per image."
        raise DataError(message) from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{path} must hold one row per image with file_name and a caption; got "
            f"{'nothing' if not rows else 'other values'}."
        )
    names = list(rows[0])
    caption = column or next((c for c in CAPTION_COLUMNS if c in names), None)
    if "file_name" not in names or caption not in names:
        raise DataError(
            f"{path} must have columns file_name and {column or 'text (or --caption-column)'}; it "
            f"has {', '.join(map(str, names))}."
        )
    for number, row in enumerate(rows, 1):
        text = one_caption(row.get(caption), f"row {number} of {path}")
        yield os.path.normpath(path.parent / str(row.get("file_name"))), text


def one_caption(value: Any, where: str) -> str:
    """Returns a caption as it was written, or the first of several."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if not isinstance(first, str):
        raise DataError(f"{where} has no caption but {first!r}; an empty text will do.")
    return first


def read_prompts(given: Sequence[str]) -> list[str]:
    """Returns prompts as given; ``FILE.txt`` stands for the lines of that file that are not empty.

    Raises:
        DataError: If there is no such file, or it holds no prompt.
    """
    prompts = []
    for text in given:
        if not text.endswith(".txt"):
            prompts.append(text)
            continue
        try:
            if Path(text).exists() and not Path(text).is_file():
                raise OSError("it is a folder, a pipe or a device")
            lines = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"--prompt {text}: a text that ends in .txt is a file of prompts, and it cannot be "
                f"read ({error})."
            ) from error
        if not any(line.strip() for line in lines):
            raise DataError(f"--prompt {text}: the file holds no prompt; write one in a line.")
        prompts += [line.strip() for line in lines if line.strip()]
    return prompts
