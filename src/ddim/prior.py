r"""A start for sampling that knows the data's brightness: the half of the zero-SNR fix that needs no training.

A schedule whose last level keeps signal, :math:`\bar\alpha > 0`, was trained on noise that still holds a trace of each image, most
of all its mean colour. Sampling that starts from N(0, I) tells the network that all images are grey. Drawing instead

.. math:: x_T \sim N(\sqrt{\bar\alpha}\,\mu,\; \bar\alpha\,\Sigma + (1 - \bar\alpha)\,I)

tells it what it was trained on. Here :math:`\mu` is the mean colour and :math:`\Sigma` the covariance of the images' mean colours;
everything but the mean colour is left as N(0, I) has it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim.errors import DDIMError

__all__ = ["DataPrior", "fit_prior"]


@dataclass(frozen=True)
class DataPrior:
    """The distribution of the images' mean colours, pixels in [-1, 1].

    Attributes:
        mean: Of each channel, C numbers.
        covariance: Of the channels' means over an image, C rows of C numbers.
    """

    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        channels = len(self.mean)
        if not channels or [len(row) for row in self.covariance] != [channels] * channels:
            raise DDIMError("a prior needs the mean of each channel, and a covariance of as many rows and columns.")
        matrix = torch.tensor(self.covariance, dtype=torch.float64)
        sound = bool(torch.isfinite(torch.tensor(self.mean)).all() and torch.isfinite(matrix).all() and torch.equal(matrix, matrix.T))
        if not sound or float(torch.linalg.eigvalsh(matrix).min()) < -1e-9:
            raise DDIMError("a prior's mean must be finite and its covariance symmetric, with no negative eigenvalue.")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "DataPrior":
        """Reads ``mean`` and ``covariance`` from the contents of a prior.json, whose other keys are for people.

        Raises:
            DDIMError: If they are missing or no covariance.
        """
        try:
            return cls(tuple(map(float, content["mean"])), tuple(tuple(map(float, row)) for row in content["covariance"]))
        except (KeyError, TypeError, ValueError) as error:
            raise error if isinstance(error, DDIMError) else DDIMError(f"a prior needs the keys mean and covariance ({error}).") from None

    def start(self, z: Tensor, alpha_bar: Tensor) -> Tensor:
        """Turns standard normal noise into x_T, image by image.

        Args:
            z: Shape [B, C, H, W].
            alpha_bar: The level at which sampling starts, shape [], float64, in [0, 1).

        Returns:
            x_T, shape and dtype of z; z itself, up to rounding, where alpha_bar is 0.

        Raises:
            DDIMError: If the images have another number of channels.
        """
        if z.shape[1] != len(self.mean):
            raise DDIMError(f"the prior is of images with {len(self.mean)} channels; the model makes images of {z.shape[1]}.")
        pixels = z.shape[2:].numel()
        mean, covariance = (torch.tensor(value, dtype=torch.float64) for value in (self.mean, self.covariance))
        factor = torch.linalg.cholesky(alpha_bar * covariance + (1 - alpha_bar) / pixels * torch.eye(len(mean), dtype=torch.float64))
        drawn = z.mean((2, 3))  # its covariance is I / pixels
        wanted = (alpha_bar.sqrt() * mean).to(drawn) + drawn @ (pixels**0.5 * factor.T).to(drawn)
        x_t: Tensor = z + (wanted - drawn)[:, :, None, None]
        return x_t


def fit_prior(images: Iterable[Tensor]) -> DataPrior:
    """Measures the prior over batches of images [B, C, H, W] in [-1, 1].

    Raises:
        DDIMError: If there are fewer than two images.
    """
    colours = torch.cat([batch.double().mean((2, 3)) for batch in images] or [torch.empty(0, 1)])
    if len(colours) < 2:
        raise DDIMError(f"a prior needs at least 2 images; got {len(colours)}.")
    covariance = colours.T.cov().reshape(colours.shape[1], -1)
    return DataPrior(tuple(colours.mean(0).tolist()), tuple(tuple(row) for row in ((covariance + covariance.T) / 2).tolist()))
