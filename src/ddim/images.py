"""Between tensors in [-1, 1], bytes, and picture files."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ddim.errors import DataError, DDIMError

__all__ = ["from_uint8", "load_image", "make_grid", "save_png", "to_pil", "to_uint8", "write_atomically"]


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Turns images in [-1, 1], [B, C, H, W], into bytes [B, H, W, C]; values outside are clamped, halves round up."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DDIMError(f"images must have shape [B, C, H, W] with 1 or 3 channels; got {list(images.shape)}.")
    scaled = (images.detach().float().clamp(-1, 1) + 1).mul(127.5).add(0.5).floor().clamp(0, 255)
    result: NDArray[np.uint8] = scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return result


def from_uint8(images: NDArray[np.uint8]) -> Tensor:
    """Turns bytes [B, H, W, C] into images in [-1, 1], [B, C, H, W], float32."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_pil(images: NDArray[np.uint8]) -> list[Image.Image]:
    """Turns bytes [B, H, W, C] into Pillow images, grey where C is 1."""
    return [Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images]


def load_image(path: Path | str) -> NDArray[np.uint8]:
    """Reads a picture file as bytes [H, W, C], C being 1 for grey pictures and 3 for all others.

    Raises:
        DataError: If there is no such file, or it is no picture.
    """
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L" if picture.mode in ("1", "L", "I;16") else "RGB"))
    except FileNotFoundError:
        raise DataError(f"there is no picture at {path}.") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # Pillow reports a damaged PNG as a SyntaxError
        raise DataError(f"{path} is not a picture, or is damaged ({str(error).splitlines()[0]}); give a PNG or JPEG file.") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def make_grid(images: NDArray[np.uint8], *, columns: int | None = None, padding: int = 2, background: int = 255) -> NDArray[np.uint8]:
    """Lays images [B, H, W, C] out in rows: one picture [H', W', C].

    Args:
        images: At least one.
        columns: Images a row; None: about as many columns as rows.
        padding: Pixels between and around images.
        background: Grey level of the padding and of empty places.
    """
    count, height, width, channels = images.shape
    if count == 0:
        raise DDIMError("a grid needs at least one image; got none.")
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = -(-count // columns)
    grid = np.full((rows * (height + padding) + padding, columns * (width + padding) + padding, channels), background, np.uint8)
    for i, image in enumerate(images):
        top, left = padding + i // columns * (height + padding), padding + i % columns * (width + padding)
        grid[top : top + height, left : left + width] = image
    return grid


def save_png(image: NDArray[np.uint8] | Image.Image, path: Path | str, *, scale: int = 1) -> None:
    """Writes one image, bytes [H, W, C] or Pillow's, as a PNG, whole or not at all; ``scale`` enlarges each pixel to a square."""
    picture = image if isinstance(image, Image.Image) else to_pil(image[None])[0]
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    with _replacing(path) as partial:
        picture.save(partial, format="PNG")


def write_atomically(path: Path | str, content: str) -> None:
    """Writes a text file, whole or not at all."""
    with _replacing(path) as partial:
        partial.write_text(content, encoding="utf-8")


@contextlib.contextmanager
def _replacing(path: Path | str) -> Iterator[Path]:
    """A name to write under; what is there takes the place of ``path`` at the end, and vanishes on an error."""
    partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
