"""What the commands of the latent space share: images to encode, folders of results, what is told,
and the network's calls."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddim.cli._model import check_class
from ddim.errors import DataError, DDIMError, OutputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ddim.cli._run import RunRecord
    from ddim.pipelines.unconditional import UnconditionalPipeline

__all__ = [
    "NetworkCalls",
    "Pictures",
    "begin_run",
    "beyond",
    "check_first",
    "check_images",
    "note_levels",
    "read_images",
    "scaled",
    "tell_unsolved",
    "unsolved_steps",
]


class Pictures(NamedTuple):
    """Images to encode."""

    x0: "Tensor"
    """In [-1, 1], [B, C, H, W], of the model's size."""
    labels: list[int] | None
    """Their classes, where the model knows classes."""
    data: dict[str, Any]
    """What a protocol says of them: where they are from, and the hash of their pixels."""


def check_images(files: Sequence[str] | None, data: str | None) -> None:
    """Refuses images that are not given or not there, before a model is loaded for them.

    Raises:
        DDIMError: If neither or both are given, or there is no such file.
    """
    from ddim.data.sources import check_source
    from ddim.models.images import open_picture

    if (files is None) == (data is None):
        raise DDIMError(
            "give images as files (--images a.png,b.png) or as a data set (--data), one of the two."
        )
    for file in files or ():
        open_picture(file)
    if data is not None:
        check_source(data)


def check_first(seed: int, *, files: bool = False) -> None:
    """Refuses a --seed that is the number of no image.

    Raises:
        DDIMError: If it is negative, or given although all files are taken.
    """
    if seed < 0 or (files and seed):
        what = (
            "counts the images of --data, and files are all taken; leave it out"
            if files
            else "must be 0 or more, the number of an image"
        )
        raise DDIMError(f"--seed {what}; got {seed}.")


def beyond(total: int, first: int, count: int | None) -> str | None:
    """In words, which images --seed and --count ask for, where there are not so many; None where
    all are there."""
    if count is None:
        return f"image {first}" if 0 < first >= total else None
    return f"images {first} to {first + count - 1}" if first + count > total else None


def read_images(
    pipe: "UnconditionalPipeline",
    files: Sequence[str] | None,
    data: str | None,
    *,
    split: str | None = None,
    first: int = 0,
    count: int | None = None,
    resize: bool = False,
    fixed: int | None = None,
) -> Pictures:
    """Images of the model's size, from files or a data set; of its split ``test`` where it has one
    and none is named.

    Of a data set those with the numbers from ``first`` on, ``count`` of them or all.

    Raises:
        DDIMError: If an image does not fit, or a class is missing.
    """
    import numpy as np
    import torch

    from ddim.data.sources import load_test_images
    from ddim.inversion.codes import fingerprint
    from ddim.models.images import from_pictures, open_picture

    shape, labels = pipe.image_shape, None
    if files is not None:
        pictures = [open_picture(file) for file in files]
        source: dict[str, Any] = {}
        singles = []
        for file, picture in zip(files, pictures, strict=True):
            if not resize:
                _check_size(f"{file} is", picture.size, shape)
            try:
                singles.append(from_pictures(picture, shape, resize=resize))
            except DDIMError as error:
                raise DataError(f"{file}: {error}") from error
        x0 = torch.cat(singles) if singles else from_pictures([], shape)
    else:
        assert data is not None
        found, split = load_test_images(
            data, split=split, channels=shape[0], resolution=shape[1:] if resize else None
        )
        if missing := beyond(len(found), first, count):
            asked = (
                f"--seed and --count ask for the {missing}"
                if first
                else f"--count asks for {count}"
            )
            raise DataError(f"{data} has {len(found)} images in its split {split}, and {asked}.")
        _check_size(f"the images of {data} are", found.resolution[::-1], shape)
        items = [found[i] for i in range(first, len(found) if count is None else first + count)]
        x0 = from_pictures(np.stack([image.permute(1, 2, 0).numpy() for image, _ in items]), shape)
        labels = [label for _, label in items] if found.class_names else None
        source = {"name": data, "split": split}
    classes = check_class(pipe, fixed, required=labels is None)
    if fixed is not None:
        labels = [fixed] * len(x0)
    return Pictures(x0, labels if classes else None, {**source, "images": fingerprint(x0)})


def _check_size(what: str, size: tuple[int, int], shape: tuple[int, int, int]) -> None:
    width, height = shape[:0:-1]
    if size != (width, height):
        told = (
            f"{what} {size[0]}x{size[1]} and the model's images {width}x{height} (width x height)"
        )
        raise DataError(f"{told}; give --resize, or bring all to that size.")


def begin_run(out: Path, protocol: dict[str, Any], execution: dict[str, Any]) -> "RunRecord":
    """Makes the folder of results, and says in it what it is for, so that what an interrupted run
    leaves is known.

    Returns:
        What an earlier run of the same protocol recorded there; else an empty record.

    Raises:
        OutputError: If the folder holds results of another protocol, or of nobody knows what.
    """
    from ddim.cli._run import NAME, RunRecord, check_protocol, read_run, versions, write_run

    there = read_run(out)
    results = out.is_dir() and any(
        p.name != NAME and not p.name.startswith(".") for p in out.iterdir()
    )
    if there is None and results:
        raise OutputError(
            f"{out} holds files and no run.json of this command; use another --out, or delete that "
            "folder."
        )
    before = check_protocol(
        out, protocol, empty=there is not None and not there.results and not results
    )
    if before is not None:
        return before
    record = RunRecord(
        protocol,
        results=[],
        seconds=0.0,
        seconds_total=0.0,
        evaluations=0,
        execution=execution,
        versions=versions(),
    )
    out.mkdir(parents=True, exist_ok=True)
    write_run(out, record)
    return record


class NetworkCalls:
    """Counts what a network is called for while it is held by ``with``, in images."""

    def __init__(self, pipe: "UnconditionalPipeline") -> None:
        self.images = 0
        self._network = pipe.unet

    def __enter__(self) -> "NetworkCalls":
        self._hook = self._network.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, network: object, inputs: "tuple[Tensor, ...]") -> None:
        self.images += len(inputs[0])

    def each(self, count: int) -> float:
        """Calls for each of so many images: a whole number, but for images that were encoded in
        different numbers."""
        return self.images // count if self.images % count == 0 else self.images / count


@contextlib.contextmanager
def unsolved_steps() -> Iterator[list[str]]:
    """Collects what implicit encoders tell of steps that they could not solve; other warnings go
    on."""
    from ddim.inversion.ddim import ConvergenceWarning

    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        yield told
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            told.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def tell_unsolved(steps: Sequence[str]) -> str:
    """The sentence about what :func:`unsolved_steps` collected, to be put behind others; empty for
    nothing."""
    if not steps:
        return ""
    count = "1 step was" if len(steps) == 1 else f"{len(steps)} steps were"
    return f" {count} not solved to the tolerance; use more steps, or method o-belm."


def note_levels(asked: Sequence[int], used: Sequence[int]) -> None:
    """Says in one line where codes lie, if that is not the first level that was asked for."""
    if used[0] != asked[0]:
        print(
            f"note: level {asked[0]} has zero SNR and holds nothing of an image; the codes lie at "
            f"level {used[0]}."
        )


def scaled(images: "NDArray[np.uint8]") -> int:
    """How far small pictures are enlarged in a sheet for people: to about 96 pixels."""
    return max(1, 96 // int(images.shape[2]))
