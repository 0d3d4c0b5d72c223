r"""Gaussian data, for which everything is known in closed form.

For data :math:`x_0 \sim N(\mu, s^2)`, elementwise, the sample at level t is :math:`N(\alpha_t \mu,
V_t)` with :math:`V_t = \alpha_t^2 s^2 + \sigma_t^2`. The best possible prediction and the exact
flow of the ODE follow, so that every sampler, spacing and inverter can be measured against the
truth with no network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.core.checks import check_kind, check_number, check_samples, check_shape, wrong_argument
from ddim.core.prediction import Denoised, PredictionType, check_prediction_type, from_x0_eps
from ddim.core.schedule import NoiseSchedule, as_factor, check_schedule

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
        check_schedule(self.schedule)
        for name, least in (("mean", None), ("std", 0)):
            value = getattr(self, name)
            if not (isinstance(value, Tensor) and value.ndim == 1):
                check_number(name, value, least=least)
            elif not bool(value.isfinite().all()) or (least == 0 and bool((value < 0).any())):
                raise wrong_argument(
                    name, "be finite numbers" + " of at least 0" * (least == 0), value
                )

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
        check_samples(x_t=x_t)
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
        check_prediction_type(prediction_type)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            alpha_bar_t = self.schedule.alpha_bar(t)
            x0, eps = self.denoise(x_t, t)
            return from_x0_eps(x0, eps, alpha_bar_t=alpha_bar_t, prediction_type=prediction_type)

        return predict

    def flow(self, x_t: Tensor, t: int | Tensor, s: int | Tensor) -> Tensor:
        r"""Where the exact ODE carries x_t from level t to level s.

        .. math:: x_s = \alpha_s \mu + \sqrt{V_s / V_t}\,(x_t - \alpha_t \mu)
        """
        check_samples(x_t=x_t)
        alpha_t, alpha_s = self.schedule.alpha_bar(t).sqrt(), self.schedule.alpha_bar(s).sqrt()
        ratio = (self.variance(s) / self.variance(t)).sqrt()
        centred = x_t - as_factor(alpha_t * self.mean, x_t)
        return as_factor(alpha_s * self.mean, x_t) + as_factor(ratio, x_t) * centred

    def draw(
        self, shape: tuple[int, ...], *, t: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws from the exact marginal at level t, float64."""
        shape = check_shape("shape", shape)
        if generator is not None:
            check_kind("generator", generator, torch.Generator, "a torch.Generator")
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        alpha = self.schedule.alpha_bar(t).sqrt()
        return as_factor(alpha * self.mean, z) + as_factor(self.variance(t).sqrt(), z) * z
