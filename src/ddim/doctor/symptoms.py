r"""Measures what a schedule and a list of timesteps do to images, for the doctor's findings.

Everything is measured on Gaussian data, for which the best network is known
(:class:`ddim.core.oracle.GaussianOracle`). On such data a DDIM run is an affine map of the noise it
starts from, so two runs tell the mean and the spread of all images exactly. The bias of other
images is that of their covariance; their spread shrinks less, since a network makes images, not
averages. Notation: :mod:`ddim.core.schedule`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddim.core.checks import check_kind, check_number, check_samples, check_whole, wrong_argument
from ddim.core.denoiser import Denoiser
from ddim.core.oracle import GaussianOracle
from ddim.core.prediction import Denoised
from ddim.core.prior import DataPrior
from ddim.core.schedule import CLEAN, NoiseSchedule, make_betas
from ddim.core.timesteps import Pair
from ddim.errors import DDIMError

__all__ = [
    "Brightness",
    "Modes",
    "check_images",
    "leaked_brightness",
    "made_of_noise",
    "predict_brightness",
    "MOST_COUNTS",
    "stock_flaws",
    "stock_nan_levels",
    "stock_pairs",
    "stock_timesteps",
]

_COARSE = 32  # the covariance is taken of images of at most this side


class Modes(NamedTuple):
    """Directions in which images vary independently, and what each adds to the mean grey level;
    [K], float64. Noise has variance 1 along each."""

    mean: Tensor
    std: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Brightness:
    """The distribution of images' mean grey levels, pixels in [-1, 1].

    Attributes:
        mean: Mean over all images.
        std: Standard deviation between images.
        dimensions: C H W: the more values in an image, the less noise hides its brightness.
        measured: How the rest of the image varies with it, by :meth:`of_images`; None if it is
            taken to be independent of the rest.

    Raises:
        DDIMError: If mean or std are no numbers, std is negative, or dimensions is below 1.
    """

    mean: float
    std: float
    dimensions: int
    measured: Modes | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_number("mean", self.mean)
        check_number("std", self.std, least=0)
        check_whole("dimensions", self.dimensions, least=1)

    @classmethod
    def of(cls, prior: DataPrior, dimensions: int) -> "Brightness":
        """The brightness of images whose mean colours are known."""
        check_kind("prior", prior, DataPrior, "a DataPrior, which fit_prior gives")
        count, std = len(prior.mean), sum(map(sum, prior.covariance)) ** 0.5
        return cls(sum(prior.mean) / count, std / count, dimensions)

    @classmethod
    def of_images(cls, images: Tensor) -> "Brightness":
        """The brightness of these images, [B, C, H, W] in [-1, 1], with the covariance of all their
        pixels.

        A network tells an image's brightness from all of the noise: on Fashion-MNIST that halves
        what the constant component alone predicts. Images with sides above 32 are averaged down,
        which changes little: brightness is told by coarse structure.

        Raises:
            DDIMError: If these are no images, or fewer than two.
        """
        check_images(images)
        if len(images) < 2:
            raise DDIMError(f"the brightness of images needs at least 2; got {len(images)}.")
        fold = min(-(-max(images.shape[2:]) // _COARSE), *images.shape[2:])
        # Times fold, so that noise keeps variance 1.
        rows = torch.nn.functional.avg_pool2d(images.double(), fold).mul(fold).flatten(1)
        weights = torch.full(rows.shape[1:], 1 / (rows.shape[1] * fold), dtype=torch.float64)
        mean = rows.mean(0)
        # Along directions in which no image deviates the mean is the best prediction.
        _, singular, basis = torch.linalg.svd(rows - mean, full_matrices=False)
        std = singular / (len(images) - 1) ** 0.5
        bright = rows @ weights
        modes = Modes(basis @ mean, std, basis @ weights)
        return cls(float(bright.mean()), float(bright.std()), images[0].numel(), modes)

    @property
    def modes(self) -> Modes:
        """The directions that brightness depends on: without images, the constant one alone."""
        if self.measured is not None:
            return self.measured
        root = self.dimensions**0.5
        numbers = ([self.mean * root], [self.std * root], [1 / root])
        return Modes(*torch.tensor(numbers, dtype=torch.float64))

    def oracle(self, schedule: NoiseSchedule) -> GaussianOracle:
        """The exact denoiser along the modes, of samples [K, ...]."""
        # Where no image deviates: a width that is nothing beside the noise, and still a Gaussian.
        return GaussianOracle(schedule, self.modes.mean, self.modes.std.clamp(min=1e-12))

    def change(self, mean: Tensor, std: Tensor) -> tuple[float, float]:
        """The bias, and the factor on the spread, of images with these means and spreads [K]."""
        weight = self.modes.weight
        made, bias = float((weight * std).norm()), float(weight @ (mean - self.modes.mean))
        bias = 0.0 if abs(bias) < 1e-12 else bias  # rounding has either sign, and so had its text
        return bias, made / self.std if self.std else math.inf


def check_images(images: Any) -> None:
    """Refuses what are no images, or latents of them, [B, C, H, W]."""
    check_samples(images=images)
    if images.ndim != 4:
        raise wrong_argument("images", "have shape [B, C, H, W]", images)


_MOST_MAPS = 2**20
"""Steps times modes that are computed at a time."""


def made_of_noise(
    denoise: Denoiser, schedule: NoiseSchedule, pairs: Sequence[Pair], *, mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and std, each [K], of the images that DDIM makes of noise N(mean, std^2), for a denoiser
    that is affine in x_t [K n, 2], row k + K i of which lies at the i-th of n levels, t [K n]. A
    step may begin at another level than the one before reached, as diffusers' do.

    Each step is an affine map. Maps of neighbouring steps are put together, pair by pair, so that a
    million steps are some twenty operations."""
    modes, size = len(mean), max(1, _MOST_MAPS // len(mean))
    factor, shift = torch.ones_like(std), torch.zeros_like(mean)
    levels = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for t, s in (part.T for part in torch.split(levels, size)):
        x0, eps = denoise(ends.expand(modes * len(t), 2), t.repeat_interleave(modes))
        alpha_bar_s = schedule.alpha_bar(s).repeat_interleave(modes)[:, None]
        x = (alpha_bar_s.sqrt() * x0 + (1 - alpha_bar_s).sqrt() * eps).reshape(len(t), modes, 2)
        steepness, offset = _joined(x[..., 1] - x[..., 0], x[..., 0])
        factor, shift = steepness * factor, steepness * shift + offset
    return factor * mean + shift, factor * std


def _joined(steepness: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The map that the maps x -> steepness x + offset, each [N, K], come to one after the other."""
    while len(steepness) > 1:
        rest = len(steepness) // 2 * 2
        first, second = steepness[:rest:2], steepness[1:rest:2]
        joined, moved = second * first, second * offset[:rest:2] + offset[1:rest:2]
        steepness = torch.cat([joined, steepness[rest:]])
        offset = torch.cat([moved, offset[rest:]])
    return steepness[0], offset[0]


def predict_brightness(
    schedule: NoiseSchedule, pairs: Sequence[Pair], brightness: Brightness
) -> tuple[float, float]:
    """How sampling from N(0, I) over these pairs changes brightness: the bias of the mean grey
    level, and the factor on its spread between images; (0, 1) is correct."""
    oracle, zero = brightness.oracle(schedule), torch.zeros_like(brightness.modes.mean)

    def denoise(x_t: Tensor, t: int | Tensor) -> Denoised:
        count = len(x_t) // len(zero)
        moments = (torch.as_tensor(value).repeat(count) for value in (oracle.mean, oracle.std))
        return GaussianOracle(schedule, *moments).denoise(x_t, t)

    return brightness.change(*made_of_noise(denoise, schedule, pairs, mean=zero, std=zero + 1))


def leaked_brightness(
    schedule: NoiseSchedule, t: int, brightness: Brightness
) -> tuple[float, float]:
    r"""The same for infinitely many steps from level t: the cost of starting from N(0, I) there.

    If brightness is taken to be independent of the rest of the image, then with :math:`s =
    \mathrm{std}\sqrt{d}` over d dimensions the bias is
    :math:`-\mathrm{std}\,\alpha_t\,\mathrm{mean}\sqrt{d} / \sqrt{V_t}` and the factor :math:`1 /
    \sqrt{V_t}`, :math:`V_t = \alpha_t^2 s^2 + \sigma_t^2`; else the same along each mode, summed.

    References:
        Lin et al. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023. Sec. 3.1 (the
        leak, without this formula). https://arxiv.org/abs/2305.08891
    """
    zero, one = (
        brightness.oracle(schedule).flow(torch.full_like(brightness.modes.mean, start), t, CLEAN)
        for start in (0.0, 1.0)
    )
    return brightness.change(zero, one - zero)


MOST_COUNTS = 4000
"""Numbers of steps that are tried, since the time for all of them grows with their square."""


def stock_timesteps(total: int, count: int, spacing: str, *, steps_offset: int = 0) -> list[int]:
    """The list of plain diffusers, which can hold -1 or T, or N + 1 entries."""
    return [int(t) for t in _stock_levels(total, count, spacing, steps_offset)]


def _stock_levels(
    total: int, count: int, spacing: str, steps_offset: int
) -> "np.ndarray[Any, np.dtype[np.int64]]":
    if spacing == "leading":
        levels = np.arange(count)[::-1] * float(total // count) + steps_offset
    elif spacing == "linspace":
        levels = np.linspace(0, total - 1, count).round()[::-1]
    else:
        levels = np.round(np.arange(total, 0, -total / count)) - 1
    return levels.astype(np.int64)


def stock_flaws(total: int, spacing: str, *, steps_offset: int = 0) -> tuple[list[int], list[int]]:
    """The numbers of steps, from 1 to T and at most :data:`MOST_COUNTS`, at which plain diffusers
    leaves its own list of levels, and at which it visits -1."""
    off, minus_one = [], []
    for count in range(1, min(total, MOST_COUNTS) + 1):
        levels = _stock_levels(total, count, spacing, steps_offset)
        if levels[-1] == CLEAN:
            minus_one.append(count)
        if (np.maximum(levels - total // count, CLEAN) != np.append(levels[1:], CLEAN)).any():
            off.append(count)
    return off, minus_one


def stock_pairs(timesteps: Sequence[int], total: int, count: int) -> list[Pair]:
    """The steps of plain diffusers: to t - T // N. Its -1 reads the table's last entry."""
    return [(min(t, total - 1) % total, max(t - total // count, CLEAN)) for t in timesteps]


def stock_nan_levels(config: Mapping[str, Any], pairs: Sequence[Pair], eta: float) -> list[int]:
    """The levels from which a step of plain diffusers (:func:`stock_pairs`) gives NaN at this eta,
    by its float32 arithmetic, for a complete configuration."""
    table = _stock_table(config)
    final = torch.tensor(1.0) if config["set_alpha_to_one"] else table[0]
    t, s = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    alpha_bar_t, alpha_bar_s = table[t], torch.where(s >= 0, table[s], final)
    variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
    direction = (1 - alpha_bar_s - (eta * variance**0.5) ** 2) ** 0.5
    found: list[int] = t[direction.isnan()].tolist()
    return found


def _stock_table(config: Mapping[str, Any]) -> Tensor:
    """alpha_bar as diffusers computes it, whose last bit decides if a radicand rounds below 0."""
    first, last, count = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["trained_betas"] is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    elif config["beta_schedule"] == "linear":
        betas = torch.linspace(first, last, count, dtype=torch.float32)
    elif config["beta_schedule"] == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, count, dtype=torch.float32) ** 2
    else:
        betas = make_betas(config["beta_schedule"], count, beta_start=first, beta_end=last).float()
    if config["rescale_betas_zero_snr"]:
        alpha = (1.0 - betas).cumprod(0).sqrt()
        alpha_0, alpha_t = alpha[0].clone(), alpha[-1].clone()
        alpha = (alpha - alpha_t) * (alpha_0 / (alpha_0 - alpha_t))
        alpha_bar = alpha**2
        betas = 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return (1.0 - betas).cumprod(0)
