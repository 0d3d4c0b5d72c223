"""Looks at the headers of pictures before a run, so that no stray one ends it late."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from ddim.data.batches import pick
from ddim.data.dataset import Header, MixedSizes, Source, mixed_sizes

__all__ = ["survey"]

_MOST = 10_000
"""Pictures that are looked at where not every size counts."""

_FATES = {
    "is_clear": "that are transparent are laid over white",
    "is_deep": "of 16 bits are read by their upper 8",
    "is_moving": "of several frames are read by the first",
}


def survey(
    name: str,
    source: Source,
    *,
    channels: int | None,
    resolution: int | tuple[int, int] | None,
    center_crop: bool = False,
) -> tuple[int | None, tuple[str, ...]]:
    """Looks at pictures, and says what becomes of those that are read in part or changed.

    Args:
        name: The source, for the sentences.
        source: What was opened.
        channels: Channels of the images. None: those that lose nothing.
        resolution: The size that they are brought to. None: they must all have the size of the
            first; with ``center_crop`` its shorter side.
        center_crop: Whether the centre square is cut out without resizing.

    Returns:
        The channels, 1 if all pictures are grey and 3 if one is not (None where only the images
        themselves can tell), and the sentences.

    Raises:
        DataError: If a picture cannot be read, or has another size.
    """
    items = source.images
    read: Callable[[int], Header] | None = getattr(items, "header", None)
    if isinstance(items, np.ndarray) and len(items):
        own = 1 if items.ndim == 3 or items.shape[3] == 1 else 3
        return channels or own, _read_otherwise(name, own, channels)
    if read is None or not len(items):
        return channels, ()
    height, width = resolution if isinstance(resolution, tuple) else (resolution or 0,) * 2
    every = resolution is None and source.paths is not None
    places = range(len(items)) if every else pick(len(items), _MOST)
    wanted, found = _size(read(0), center_crop), Counter[str]()
    for place in places:
        header = read(place)
        if resolution is None and _size(header, center_crop) != wanted:
            raise _stray(name, source, place)
        found.update(kind for kind in ("is_grey", *_FATES) if getattr(header, kind))
        if height == width and resolution is not None:  # EXIF may turn a picture on its side
            found["is_small"] += min(header.size) < height
            found["is_large"] += min(header.size) > height
    grey, notes = found["is_grey"], []
    if channels is None and 0 < grey < len(places):
        kinds = f"grey ({grey}) and coloured ({len(places) - grey})"
        notes.append(f"images of {name} are {kinds}; all are read in colour.")
    for kind, fate in (
        *_FATES.items(),
        ("is_small", f"smaller than {width}x{height} are enlarged"),
        ("is_large", f"larger than {width}x{height} are made smaller"),
    ):
        if found[kind]:
            notes.append(f"images of {name} {fate}: {found[kind]}.")
    own = 1 if grey == len(places) else 3
    return channels or own, (*notes, *_read_otherwise(name, own, channels))


def _size(header: Header, center_crop: bool) -> list[int]:
    """What must be the same in all pictures; sorted, since EXIF may turn one on its side."""
    return [min(header.size)] if center_crop else sorted(header.size)


def _stray(name: str, source: Source, place: int) -> MixedSizes:
    """The error for a picture whose size is not that of the first."""
    (width, height), other = source.images[0].size, source.images[place].size
    what = f"image {place} of {name}" if source.paths is None else str(source.paths[place])
    return mixed_sizes(
        f"{what} is {other[0]}x{other[1]} and the first image of {name} {width}x{height} "
        "(width x height)",
        (height, width),
    )


def _read_otherwise(name: str, own: int, channels: int | None) -> tuple[str, ...]:
    if channels in (None, own):
        return ()
    read = "coloured, and read as grey" if own == 3 else "grey, and read in colour"
    return (f"the images of {name} are {read}.",)
