r"""A start for sampling that knows the data's brightness: the half of the zero-SNR fix that needs
no training.

A schedule whose last level keeps signal, :math:`\bar\alpha > 0`, was trained on noise that still
holds a trace of each image, most of all its mean colour. Sampling that starts from N(0, I) tells
the network that all images are grey. Drawing instead

.. math:: x_T \sim N(\sqrt{\bar\alpha}\,\mu,\; \bar\alpha\,\Sigma + (1 - \bar\alpha)\,I)

tells it what it was trained on. Here :math:`\mu` is the mean image and :math:`\Sigma` the
covariance of the images' mean colours; what else differs between images is left as N(0, I) has it.
The whole mean image is needed, not its colour alone: where an image is bright says how bright it
is, and a start that is flat there says something else."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim.core.checks import check_alpha_bar, check_kind, check_samples, wrong_argument
from ddim.errors import DDIMError

__all__ = ["DataPrior", "fit_prior"]


@dataclass(frozen=True)
class DataPrior:
    """The distribution of the images' mean colours, pixels in [-1, 1].

    Attributes:
        mean: The mean of each channel, C numbers.
        covariance: The covariance of the channels' means over an image, C rows of C numbers.
        image: The mean image, C x H x W numbers; None if it is not known: flat in each channel.
    """

    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    image: tuple[tuple[tuple[float, ...], ...], ...] | None = None

    def __post_init__(self) -> None:
        try:
            mean, matrix = _tensor(self.mean), _tensor(self.covariance)
            is_square = mean.ndim == 1 and len(mean) > 0 and matrix.shape == (len(mean),) * 2
        except (TypeError, ValueError, RuntimeError, OverflowError):
            is_square = False
        if not is_square:
            what = "the mean of each channel, and a covariance of as many rows and columns"
            raise DDIMError(f"a prior needs {what}.")
        is_finite = bool(torch.isfinite(mean).all() and torch.isfinite(matrix).all())
        is_symmetric = torch.equal(matrix, matrix.T)
        if not (is_finite and is_symmetric) or float(torch.linalg.eigvalsh(matrix).min()) < -1e-9:
            what = "finite, and its covariance symmetric, with no negative eigenvalue"
            raise DDIMError(f"a prior's mean must be {what}.")
        if self.image is None:
            return
        channels = len(self.mean)
        if not isinstance(self.image, (tuple, list)):
            raise wrong_argument("image", "be a mean image of numbers, or None", self.image)
        heights = {len(plane) for plane in self.image}
        widths = {len(row) for plane in self.image for row in plane}
        if len(self.image) != channels or len(heights) != 1 or len(widths) != 1 or 0 in widths:
            raise DDIMError(
                f"a prior's mean image must have {channels} channels of rows of one length."
            )
        offset = _tensor(self.image).mean((1, 2)) - mean
        if not bool((offset.abs() < 1e-3).all()):
            raise DDIMError(
                "a prior's mean image must be finite, and of the mean colour of the prior."
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "DataPrior":
        """Reads ``mean``, ``covariance`` and perhaps ``image`` from the content of a prior.json."""
        check_kind("content", content, Mapping, "the content of a prior.json (a dict)")
        try:
            image = content.get("image")
            return cls(
                tuple(map(float, content["mean"])),
                _rows(content["covariance"]),
                None if image is None else tuple(_rows(plane) for plane in image),
            )
        except DDIMError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DDIMError(f"a prior needs the keys mean and covariance ({error}).") from None

    def describe(self) -> dict[str, Any]:
        """What a run's record says of it; the long mean image by 16 hex digits of a SHA-256."""
        digest = hashlib.sha256(json.dumps(self.image).encode()).hexdigest()[:16]
        return {
            "mean": list(self.mean),
            "covariance": [list(row) for row in self.covariance],
            "image": None if self.image is None else digest,
        }

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Checks that a model's images, of ``shape`` (C, H, W), can start from this prior.

        Raises:
            DDIMError: If they have other channels, or another size than the mean image.
        """
        if shape[0] != len(self.mean):
            own = f"the prior is of images with {len(self.mean)} channels"
            raise DDIMError(f"{own}; the model makes images of {shape[0]}.")
        size = shape[1:] if self.image is None else (len(self.image[0]), len(self.image[0][0]))
        if shape[1:] != size:
            raise DDIMError(
                f"the prior's mean image is {size[0]}x{size[1]}; the model makes images of "
                f"{shape[1]}x{shape[2]}."
            )

    def start(self, z: Tensor, alpha_bar: Tensor) -> Tensor:
        """Turns standard normal noise z [B, C, H, W] into x_T, image by image, for a start at the
        level alpha_bar in [0, 1), shape [], float64; 0 leaves z as it is, up to rounding.

        Raises:
            DDIMError: If z are no images, alpha_bar is no level, or the images have other channels,
                or another size than the mean image.
        """
        check_samples(z=z)
        check_alpha_bar(alpha_bar=alpha_bar)
        if z.ndim != 4:
            raise wrong_argument("z", "have shape [B, C, H, W]", z)
        if alpha_bar.numel() != 1:
            raise wrong_argument("alpha_bar", "be one level", alpha_bar)
        self.check_shape(tuple(z.shape[1:]))
        pixels = z.shape[2:].numel()
        mean, covariance = _tensor(self.mean), _tensor(self.covariance)
        identity = torch.eye(len(mean), dtype=torch.float64)
        factor = torch.linalg.cholesky(alpha_bar * covariance + (1 - alpha_bar) / pixels * identity)
        drawn = z.mean((2, 3))  # its covariance is I / pixels
        wanted = (alpha_bar.sqrt() * mean).to(drawn) + drawn @ (pixels**0.5 * factor.T).to(drawn)
        x_t: Tensor = z + (wanted - drawn)[:, :, None, None]
        if self.image is None:
            return x_t
        image = _tensor(self.image)
        return x_t + (alpha_bar.sqrt() * (image - image.mean((1, 2), keepdim=True))).to(x_t)


def _tensor(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _rows(rows: Iterable[Iterable[Any]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in rows)


def fit_prior(images: Iterable[Tensor]) -> DataPrior:
    """Measures the prior over batches of images [B, C, H, W] in [-1, 1]; the mean image to four
    decimals, which is all that shows.

    Raises:
        DDIMError: If these are no images, or fewer than two.
    """
    colours, total = [], torch.zeros((), dtype=torch.float64)
    if not hasattr(images, "__iter__"):
        raise wrong_argument("images", "be batches of images, [B, C, H, W] each", images)
    for batch in images:
        check_samples(images=batch)
        if batch.ndim != 4:
            raise wrong_argument("images", "be batches of shape [B, C, H, W]", batch)
        colours.append(batch.double().mean((2, 3)))
        total = total + batch.double().sum(0)
    count = sum(map(len, colours))
    if count < 2:
        raise DDIMError(f"a prior needs at least 2 images; got {count}.")
    every = torch.cat(colours)
    covariance = every.T.cov().reshape(every.shape[1], -1)
    image = (total / count).round(decimals=4).tolist()
    return DataPrior(
        tuple(every.mean(0).tolist()),
        _rows(((covariance + covariance.T) / 2).tolist()),
        tuple(_rows(plane) for plane in image),
    )
