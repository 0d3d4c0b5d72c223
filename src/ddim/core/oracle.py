r"""Gaussian data, for which everything is known in closed form.

For data :math:`x_0 \sim N(\mu, s^2)`, elementwise, the sample at level t is :math:`N(\alpha_t \mu,
V_t)` with :math:`V_t = \alpha_t^2 s^2 + \sigma_t^2`. The best possible prediction and the exact
flow of the ODE follow, so that every sampler, spacing and inverter can be measured against the
truth with no network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.core.prediction import Denoised, PredictionType, from_x0_eps
from ddim.core.schedule import NoiseSchedule, as_factor
from ddim.errors import DDIMError

__all__ = ["GaussianOracle"]


@dataclass(frozen=True, eq=False)
class GaussianOracle:
    """Exact predictions and the exact flow for independent Gaussian data.

    Attributes:
        schedule: The levels.
        mean: Of the data, a number; or one a sample, shape [B], float64.
        std: Of the data, a number of at least 0; or one a sample.
    """

    schedule: NoiseSchedule
    mean: float | Tensor = 0.0
    std: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if not bool(torch.as_tensor(self.std >= 0).all()):
            raise DDIMError(f"std must be at least 0; got {self.std}.")

    def variance(self, t: int | Tensor) -> Tensor:
        """V_t, the variance of a sample at level t; float64, shape of t."""
        alpha_bar = self.schedule.alpha_bar(t)
        return alpha_bar * self.std**2 + 1 - alpha_bar

    def denoise(self, x_t: Tensor, t: int | Tensor) -> Denoised:
        r"""The posterior means E[x0 | x_t] and E[eps | x_t], a
        :class:`~ddim.core.denoiser.Denoiser`.

        .. math:: \epsilon = \sigma_t (x_t - \alpha_t \mu) / V_t,
            \qquad x_0 = \mu + \alpha_t s^2 (x_t - \alpha_t \mu) / V_t
        """
        alpha_bar = self.schedule.alpha_bar(t)
        alpha, sigma, variance = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), self.variance(t)
        centred = x_t - as_factor(alpha * self.mean, x_t)
        mean = as_factor(torch.as_tensor(self.mean, dtype=torch.float64), x_t)
        x0 = mean + as_factor(alpha * self.std**2 / variance, x_t) * centred
        return Denoised(x0, as_factor(sigma / variance, x_t) * centred)

    def network(
        self, prediction_type: PredictionType = "epsilon"
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A perfect network of the given parametrisation: (x_t, t) -> prediction."""

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            alpha_bar_t = self.schedule.alpha_bar(t)
            x0, eps = self.denoise(x_t, t)
            return from_x0_eps(x0, eps, alpha_bar_t=alpha_bar_t, prediction_type=prediction_type)

        return predict

    def flow(self, x_t: Tensor, t: int | Tensor, s: int | Tensor) -> Tensor:
        r"""Where the exact ODE carries x_t from level t to level s.

        .. math:: x_s = \alpha_s \mu + \sqrt{V_s / V_t}\,(x_t - \alpha_t \mu)
        """
        alpha_t, alpha_s = self.schedule.alpha_bar(t).sqrt(), self.schedule.alpha_bar(s).sqrt()
        ratio = (self.variance(s) / self.variance(t)).sqrt()
        centred = x_t - as_factor(alpha_t * self.mean, x_t)
        return as_factor(alpha_s * self.mean, x_t) + as_factor(ratio, x_t) * centred

    def draw(
        self, shape: tuple[int, ...], *, t: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws from the exact marginal at level t, float64."""
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        alpha = self.schedule.alpha_bar(t).sqrt()
        return as_factor(alpha * self.mean, z) + as_factor(self.variance(t).sqrt(), z) * z
