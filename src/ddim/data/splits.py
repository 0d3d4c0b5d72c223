"""Which split a file or a folder belongs to: a word of its name says so."""

import re
from collections.abc import Collection, Iterable, Mapping

from ddim.errors import DataError

__all__ = ["NoSuchSplit", "choose_split", "family", "no_such_split", "split_of"]

_SPLITS = {
    "train": ("train", "training", "trainset"),
    "test": ("test", "testing", "testset", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "valset", "dev"),
}
_WORDS = {word: split for split, words in _SPLITS.items() for word in words}


class NoSuchSplit(DataError):
    """The data has no split of that name."""


def no_such_split(source: str, splits: Iterable[str], split: str) -> NoSuchSplit:
    """The error for a source that has other splits, or none at all."""
    names = ", ".join(sorted(splits))
    has = f"it has {names}" if names else "it is not divided into splits, so leave out --split"
    return NoSuchSplit(f"{source} has no split {split!r}; {has}.")


def _words(name: str) -> list[str]:
    """The words of a name, which digits, signs and a capital after a small letter divide."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def split_of(name: str) -> str | None:
    """Returns ``train``, ``test`` or ``validation`` if a word of the name says so, in any case:
    ``Training``, ``mnist-train``, ``test_0``, ``val2017``. A name that says two says none."""
    found = {_WORDS[word] for word in _words(name) if word in _WORDS}
    return found.pop() if len(found) == 1 else None


def choose_split(source: str, names: Iterable[str], split: str) -> list[str] | None:
    """Returns those of the names that are of a split; None if no name says a split, and ``train``
    is asked for, which is then all.

    Raises:
        NoSuchSplit: If there are other splits, or none at all.
    """
    names = list(names)
    wanted = _WORDS.get(split.lower(), split.lower())
    splits = {kind for name in names if (kind := split_of(name))}
    other = wanted not in _SPLITS  # a word of its own, such as extra
    chosen = [n for n in names if split_of(n) == wanted or (other and wanted in _words(n))]
    if not chosen and (splits or wanted != "train"):
        raise no_such_split(source, splits, split)
    return chosen or None


def family(names: Collection[str]) -> Mapping[str, str]:
    """Returns the split of each name that says one, if they differ in nothing else, as ``train``
    and ``test`` or ``mnist-train`` and ``mnist-test``; else nothing."""
    kinds = {name: kind for name in names if (kind := split_of(name))}
    rests = {tuple(word for word in _words(name) if word not in _WORDS) for name in kinds}
    return kinds if len(rests) == 1 else {}
