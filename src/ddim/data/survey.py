"""Looks at the headers of pictures before a run, so that no stray one ends it late."""

from ddim.data.batches import pick
from ddim.data.dataset import Header, Source, mixed_sizes

__all__ = ["survey_colour", "survey_sizes"]

_MOST = 10_000
"""Pictures of a table, or without a look at their sizes, that are opened."""


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


def survey_colour(name: str, source: Source) -> tuple[int | None, tuple[str, ...]]:
    """Returns the channels that lose nothing, 1 if all pictures are grey and 3 if one is not, and
    what to tell of it; None for arrays, which are all alike."""
    items = source.images
    read = getattr(items, "header", None)
    if read is None or not len(items):
        return None, ()
    places = pick(len(items), _MOST)
    grey = sum(read(place).is_grey for place in places)
    if grey in (0, len(places)):
        return 1 if grey else 3, ()
    other = len(places) - grey
    return 3, (f"{grey} images of {name} are grey and {other} coloured; all are read in colour.",)
