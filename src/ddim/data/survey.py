"""Looks at the headers of pictures before a run, so that no stray one ends it late."""

from collections.abc import Callable

from ddim.data.batches import pick
from ddim.data.dataset import Header, Source, mixed_sizes

__all__ = ["survey", "survey_sizes"]

_MOST = 10_000
"""Pictures that are looked at where not every size counts."""


def survey_sizes(name: str, source: Source, *, center_crop: bool) -> None:
    """Checks that pictures have the size of the first; with ``center_crop`` its shorter side.

    Raises:
        DataError: If a picture cannot be read, or has another size.
    """
    items = source.images
    read = getattr(items, "header", None)
    if read is None:
        return
    places = range(len(items)) if source.paths is not None else pick(len(items), _MOST)

    def size(place: int) -> list[int]:  # sorted: EXIF may turn a picture on its side
        header: Header = read(place)
        return [min(header.size)] if center_crop else sorted(header.size)

    wanted = size(0)
    for place in places:
        if size(place) != wanted:
            (width, height), other = items[0].size, items[place].size
            what = f"image {place} of {name}" if source.paths is None else str(source.paths[place])
            raise mixed_sizes(
                f"{what} is {other[0]}x{other[1]} and the first image of {name} {width}x{height} "
                "(width x height)",
                (height, width),
            )


def survey(
    name: str, source: Source, *, channels: int | None, resolution: int | tuple[int, int] | None
) -> tuple[int | None, tuple[str, ...]]:
    """Looks at pictures, or at many of them, and says what becomes of those that are read in part
    or changed.

    Args:
        name: The source, for the sentences.
        source: What was opened.
        channels: Channels of the images. None: those that lose nothing.
        resolution: The size that they are brought to, if they are.

    Returns:
        The channels, 1 if all pictures are grey and 3 if one is not (None for arrays, which are all
        alike), and the sentences.
    """
    items = source.images
    read: Callable[[int], Header] | None = getattr(items, "header", None)
    if read is None or not len(items):
        return channels, ()
    headers = [read(place) for place in pick(len(items), _MOST)]
    grey, notes = sum(header.is_grey for header in headers), []
    if channels is None and 0 < grey < len(headers):
        other = len(headers) - grey
        notes.append(
            f"images of {name} are grey ({grey}) and coloured ({other}); all are read in colour."
        )
    height, width = resolution if isinstance(resolution, tuple) else (resolution or 0,) * 2
    square = height == width  # EXIF may turn a picture on its side
    small = sum(square and min(header.size) < height for header in headers)
    for count, fate in (
        (sum(header.is_clear for header in headers), "that are transparent are laid over white"),
        (sum(header.is_deep for header in headers), "of 16 bits are read by their upper 8"),
        (sum(header.is_moving for header in headers), "of several frames are read by the first"),
        (small, f"smaller than {width}x{height} are enlarged"),
    ):
        if count:
            notes.append(f"images of {name} {fate}: {count}.")
    return channels or (1 if grey == len(headers) else 3), tuple(notes)
