"""What the commands of the latent space share: the images to encode, and the pictures they write."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddim.errors import DDIMError, OutputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ddim.pipelines import UnconditionalPipeline

__all__ = ["clear_folder", "read_images", "scaled"]


def read_images(
    pipe: "UnconditionalPipeline",
    files: Sequence[str] | None,
    data: str | None,
    *,
    split: str = "test",
    count: int | None = None,
    resize: bool = False,
    fixed: int | None = None,
) -> "tuple[Tensor, list[int] | None]":
    """Images in [-1, 1] of the model's size, from files or a data set, and their classes where the model knows classes.

    Raises:
        DDIMError: If neither or both are given, an image does not fit, or a class is missing.
    """
    import numpy as np

    from ddim.errors import DataError
    from ddim.images import from_pictures, open_picture
    from ddim.training.data import load_images

    if (files is None) == (data is None):
        raise DDIMError("give images as files (--images a.png,b.png) or as a data set (--data), one of the two.")
    shape, labels = pipe.image_shape, None
    if files is not None:
        pictures = [open_picture(file) for file in files]
        try:
            x0 = from_pictures(pictures, shape, resize=resize)
        except DDIMError as error:
            raise DataError(f"{', '.join(files)}: {error}") from error
    else:
        assert data is not None
        found = load_images(data, split=split, channels=shape[0], resolution=shape[1] if resize and shape[1] == shape[2] else None)
        if count is not None and count > len(found):
            raise DataError(f"{data} has {len(found)} images in its split {split}, and --count asks for {count}.")
        items = [found[i] for i in range(len(found) if count is None else count)]
        x0 = from_pictures(np.stack([image.permute(1, 2, 0).numpy() for image, _ in items]), shape)
        labels = [label for _, label in items] if found.class_names else None
    classes = pipe.unet.config.get("num_class_embeds")
    if not classes:
        if fixed is not None:
            raise DDIMError(f"--class is of no use: the model was trained without classes; got {fixed}.")
        return x0, None
    if fixed is not None:
        labels = [fixed] * len(x0)
    if labels is None:
        raise DDIMError(f"the model is class-conditional: name the images' class with --class, from 0 to {classes - 1}.")
    return x0, labels


def clear_folder(out: Path, protocol: dict[str, Any]) -> None:
    """Makes the folder of results, or refuses one that holds those of another protocol or of nobody knows what.

    Raises:
        OutputError: If so.
    """
    from ddim.cli._run import check_protocol

    before = check_protocol(out, protocol)
    if before is None and out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} holds files and no run.json of this command; use another --out, or delete that folder.")
    out.mkdir(parents=True, exist_ok=True)


def scaled(images: "NDArray[np.uint8]") -> int:
    """How far small pictures are enlarged in a sheet for people: to about 96 pixels."""
    return max(1, 96 // int(images.shape[2]))
