"""Converts images between tensors in [-1, 1], bytes, Pillow images and picture files."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ddim.errors import DataError, DDIMError
from ddim.files import replacing

__all__ = [
    "ENDINGS",
    "convert_mode",
    "crop_square",
    "fit_picture",
    "from_pictures",
    "from_pil",
    "from_uint8",
    "has_alpha",
    "has_deep_pixels",
    "label_rows",
    "load_image",
    "make_grid",
    "open_image",
    "open_picture",
    "picture_size",
    "save_gif",
    "save_picture",
    "sheet_scale",
    "to_pil",
    "to_uint8",
]


_JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
ENDINGS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": {"format": "WEBP", "lossless": True},
}
"""How Pillow writes pictures, by the ending of their names."""


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Turns images in [-1, 1], [B, C, H, W], into bytes [B, H, W, C]; values outside are clamped,
    halves round up."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        wanted = "shape [B, C, H, W] with 1 or 3 channels"
        raise DDIMError(f"images must have {wanted}; got {list(images.shape)}.")
    scaled = (images.detach().float().clamp(-1, 1) + 1).mul(127.5).add(0.5).floor().clamp(0, 255)
    pixels = scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    result: NDArray[np.uint8] = pixels.cpu().numpy()
    return result


def from_uint8(images: NDArray[np.uint8]) -> Tensor:
    """Turns bytes [B, H, W, C] into images in [-1, 1], [B, C, H, W], float32."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return pixels.float().div(127.5).sub(1).contiguous()


def to_pil(images: NDArray[np.uint8]) -> list[Image.Image]:
    """Turns bytes [B, H, W, C] into Pillow images, grey where C is 1."""
    return [Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images]


def from_pil(pictures: Iterable[Any]) -> NDArray[np.uint8]:
    """Turns Pillow images of one size into bytes [B, H, W, C]."""
    return np.stack([np.atleast_3d(np.asarray(picture)) for picture in pictures])


def from_pictures(images: Any, shape: tuple[int, int, int], *, resize: bool = False) -> Tensor:
    """Turns pictures into images in [-1, 1], [B, C, H, W], float32; tensors keep their dtype.

    Args:
        images: A Pillow image, bytes [H, W, C] or [H, W]; a list of those; bytes [B, H, W, C]; or a
            tensor [B, C, H, W] in [-1, 1].
        shape: (C, H, W) of the result.
        resize: Whether pictures of another size are resized (shorter side) and cut to their centre.
            Tensors are never resized.

    Raises:
        DDIMError: If the size, the channels, the type or the range does not fit; the message says
            what to do.
    """
    channels, height, width = shape
    if isinstance(images, Tensor):
        if tuple(images.shape[1:]) != shape:
            wanted = f"shape [B, {channels}, {height}, {width}]"
            raise DDIMError(f"a tensor of images must have {wanted}; got {list(images.shape)}.")
        in_range = images.numel() == 0 or float(images.abs().max()) <= 1 + 1e-3
        if not images.is_floating_point() or not in_range:
            raise DDIMError(
                f"a tensor of images must be floating-point in [-1, 1]; got {images.dtype} from "
                f"{float(images.min()):.4g} to {float(images.max()):.4g}. Give bytes as an array."
            )
        return images
    pictures = []
    for number, image in enumerate(_listed(images)):
        picture = convert_mode(image, channels)
        if resize:
            picture = fit_picture(picture, height, width)
        if picture.size != (width, height):
            raise DDIMError(
                f"image {number} is {picture.width}x{picture.height} and the model's are "
                f"{width}x{height} (width x height); ask for resizing with resize=True, or bring "
                "it to that size."
            )
        pixels = np.asarray(picture, dtype=np.uint8)
        pictures.append(pixels[..., None] if pixels.ndim == 2 else pixels)
    none = np.empty((0, height, width, channels), np.uint8)
    return from_uint8(np.stack(pictures) if pictures else none)


def picture_size(images: Any) -> tuple[int, int]:
    """(H, W) of the first of the images that :func:`from_pictures` takes; (0, 0) if there is none.

    Raises:
        DDIMError: If these are no images.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4:
            got = list(images.shape)
            raise DDIMError(f"a tensor of images must have shape [B, C, H, W]; got {got}.")
        return int(images.shape[2]), int(images.shape[3])
    listed = _listed(images)
    return (listed[0].height, listed[0].width) if listed else (0, 0)


def _listed(images: Any) -> list[Image.Image]:
    """One picture, a list of them, or an array of them, as a list of Pillow images."""
    pictures = []
    is_batch = isinstance(images, np.ndarray) and images.ndim == 4
    several = images if is_batch or isinstance(images, (list, tuple)) else [images]
    for number, image in enumerate(several):
        if isinstance(image, np.ndarray):
            channels = image.shape[2:]  # none in a grey image [H, W]
            if image.dtype != np.uint8 or image.ndim < 2 or channels not in ((), (1,), (3,), (4,)):
                raise DDIMError(
                    f"an array of images must hold bytes, [B, H, W, C]; image {number} is "
                    f"{image.dtype} {list(image.shape)}."
                )
            image = Image.fromarray(image[..., 0] if channels == (1,) else image)
        if not isinstance(image, Image.Image):
            raise DDIMError(
                f"images must be Pillow images, arrays of bytes, or a tensor; image {number} is a "
                f"{type(image).__name__}."
            )
        pictures.append(image)
    return pictures


def has_deep_pixels(picture: Image.Image) -> bool:
    """Whether a picture has whole numbers of more than 8 bits."""
    mode: str = picture.mode
    return mode == "I" or mode.startswith("I;16")


def has_alpha(picture: Image.Image) -> bool:
    """Whether a picture has an alpha channel, or a colour that stands for none."""
    return picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info


def convert_mode(picture: Image.Image, channels: int) -> Image.Image:
    """Converts a picture of any mode to grey (1 channel) or colour (3): it is laid over white if it
    has an alpha channel, and 16 bits are cut to their upper 8. A DataError refuses pixels whose
    range is unknown: floating-point ones, and whole numbers that are not of 16 bits."""
    if picture.mode == "F":
        what = "floating-point pixels of unknown range"
        raise DataError(f"the image has {what}; convert it to 8 bits.")
    if has_deep_pixels(picture):
        values = np.asarray(picture)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535 or 0 < high < 256:
            raise DataError(
                f"the image has whole numbers from {low} to {high}, and 16 bits reach from 0 to "
                "65535, so its white is unknown; convert it to 8 bits."
            )
        picture = Image.fromarray((values // 256).astype(np.uint8))  # convert("L") would cut off
    if has_alpha(picture):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    try:
        return picture.convert("L" if channels == 1 else "RGB")
    except ValueError:  # such as LAB
        what = f"pixels of mode {picture.mode}, which Pillow does not convert"
        raise DataError(f"the image has {what}; save it as RGB.") from None


def fit_picture(
    picture: Image.Image, height: int, width: int, *, place: tuple[float, float] | None = None
) -> Image.Image:
    """Resizes a picture so that it covers height x width, and cuts out the centre; or what lies at
    a ``place`` (x, y) from (0, 0), the upper left, to below (1, 1), the lower right."""
    if picture.size == (width, height):
        return picture
    scale = max(height / picture.height, width / picture.width)
    grown = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    picture = picture.resize(grown, Image.Resampling.LANCZOS)
    left, top = picture.width - width, picture.height - height
    if place is None:
        left, top = left // 2, top // 2
    else:
        left, top = int(place[0] * (left + 1)), int(place[1] * (top + 1))
    return picture.crop((left, top, left + width, top + height))


def crop_square(picture: Image.Image, *, place: tuple[float, float] | None = None) -> Image.Image:
    """Cuts the largest square out of a picture's centre, or at a place (:func:`fit_picture`)."""
    side = min(picture.size)
    return fit_picture(picture, side, side, place=place)


FORMATS = (
    "PNG JPEG MPO WEBP BMP DIB GIF TIFF PPM AVIF JPEG2000 TGA PCX QOI SGI ICO ICNS PSD"
).split()
"""Formats that Pillow decodes by itself. EPS, which it hands to Ghostscript, is none of them: a
file's content decides about its format, not its name."""


def open_image(file: Path | str | BinaryIO) -> Image.Image:
    """Opens a picture as Pillow does, of :data:`FORMATS` alone; only its header is read yet."""
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def open_picture(path: Path | str) -> Image.Image:
    """Reads a picture file, turned upright as viewers show it; a DataError refuses other files."""
    if not os.path.isfile(path):  # a pipe or a device would be read without end
        if not os.path.exists(path):
            raise DataError(f"there is no picture at {path}.")
        raise DataError(f"{path} is not a picture, but no regular file; give a PNG or JPEG file.")
    try:
        with open_image(path) as picture:
            return ImageOps.exif_transpose(picture)  # a copy
    # Pillow reports a damaged PNG as a SyntaxError, and refuses what claims too many pixels.
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} is not a picture, or is damaged ({str(error).splitlines()[0]}); give a PNG or "
            "JPEG file."
        ) from error


def load_image(path: Path | str) -> NDArray[np.uint8]:
    """Reads a picture file as bytes [H, W, C], where C is 1 for grey pictures and 3 for all others;
    raises as :func:`open_picture`."""
    picture = open_picture(path)
    pixels = np.asarray(picture.convert("L" if picture.mode in ("1", "L", "I;16") else "RGB"))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def make_grid(
    images: NDArray[np.uint8],
    *,
    columns: int | None = None,
    padding: int = 2,
    background: int = 255,
) -> NDArray[np.uint8]:
    """Lays images [B, H, W, C], at least one, out in rows: one picture [H', W', C].

    ``columns`` are by default about as many as rows. ``padding`` pixels of grey level
    ``background`` lie between and around images, and fill empty places."""
    count, height, width, channels = images.shape
    if count == 0:
        raise DDIMError("a grid needs at least one image; got none.")
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    down, across = height + padding, width + padding  # from one image to the next
    size = (rows * down + padding, columns * across + padding, channels)
    grid = np.full(size, background, np.uint8)
    for i, image in enumerate(images):
        top, left = padding + i // columns * down, padding + i % columns * across
        grid[top : top + height, left : left + width] = image
    return grid


def label_rows(
    images: NDArray[np.uint8],
    labels: Sequence[str],
    *,
    columns: Sequence[str] = (),
    scale: int = 1,
    padding: int = 2,
) -> NDArray[np.uint8]:
    """Lays images [B, H, W, C] out in as many rows as there are labels, each row under its label,
    and under all the labels of the columns: one picture [H', W', 3]. ``scale`` enlarges each pixel
    of the images to a square."""
    from PIL import ImageDraw, ImageFont

    images = images.repeat(scale, 1).repeat(scale, 2)
    count, font = len(images) // len(labels), ImageFont.load_default(12)
    across = images.shape[2] + padding
    longest = max(int(font.getlength(label)) for label in labels)
    width = max(longest, count * across) + 2 * padding

    def strip(texts: Sequence[str]) -> NDArray[np.uint8]:
        drawn = Image.new("RGB", (width, 18), "white")
        for place, text in enumerate(texts):
            where = (padding + place * across, 2)
            ImageDraw.Draw(drawn).text(where, text, fill="black", font=font)
        return np.asarray(drawn)

    rows = [strip(columns)] if columns else []
    for number, label in enumerate(labels):
        part = images[number * count : (number + 1) * count]
        row = make_grid(part, columns=count, padding=padding)
        row = np.broadcast_to(row, (*row.shape[:2], 3))
        margin = ((0, 0), (0, width - row.shape[1]), (0, 0))
        rows += [strip([label]), np.pad(row, margin, constant_values=255)]
    return np.concatenate(rows)


def save_picture(
    image: NDArray[np.uint8] | Image.Image, path: Path | str, *, scale: int = 1, sync: bool = False
) -> None:
    """Writes one image, bytes [H, W, C] or Pillow's, in the format that the ending of its name
    says, whole or not at all; ``scale`` enlarges each pixel to a square; ``sync`` as in
    :func:`~ddim.files.replacing`.

    A JPEG changes pixels a little. A DDIMError refuses endings that are none of ENDINGS.
    """
    kind = Path(path).suffix.lower()
    if kind not in ENDINGS:
        message = f"the name of a picture must end in one of {', '.join(ENDINGS)}; got {path}."
        raise DDIMError(message)
    picture = image if isinstance(image, Image.Image) else to_pil(image[None])[0]
    if scale > 1:
        picture = picture.resize(
            (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
        )
    with replacing(path, sync=sync) as partial:
        picture.save(partial, **ENDINGS[kind])


def save_gif(images: NDArray[np.uint8], path: Path, *, scale: int = 1) -> None:
    """Writes bytes [B, H, W, C] as an animation, there and back, whole or not at all."""
    frames = [p.resize((p.width * scale, p.height * scale), 0) for p in to_pil(images)]
    frames += frames[-2:0:-1]
    with replacing(path) as partial:
        frames[0].save(
            partial, format="GIF", save_all=True, append_images=frames[1:], duration=120, loop=0
        )


def sheet_scale(images: NDArray[np.uint8]) -> int:
    """How far small pictures are enlarged in a sheet for people: to about 96 pixels."""
    return max(1, 96 // int(images.shape[2]))
