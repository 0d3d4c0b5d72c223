r"""A drop-in for diffusers' ``DDIMScheduler`` whose steps go to the next timestep of the list, not one stride down.

The protocol is diffusers': construct or ``from_config``, ``set_timesteps``, ``step``. Beyond it: quadratic and custom
timesteps, refusals in place of silent NaN, ``eta="sigma-hat"``, and noise coefficients computed before the cast.
"""

from collections.abc import Sequence
from typing import Any, cast

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # diffusers' loader looks for this name in this module
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddim.errors import DDIMError
from ddim.prediction import clip_static, threshold_dynamic, to_eps, to_x0_eps
from ddim.schedule import NoiseSchedule, add_noise, velocity
from ddim.step import Eta, ddim_step
from ddim.timesteps import check_timesteps, select_timesteps, step_pairs

__all__ = ["DDIMScheduler", "DDIMSchedulerOutput", "SchedulerMixin"]


class DDIMScheduler(diffusers.DDIMScheduler):  # type: ignore[misc]
    """diffusers' ``DDIMScheduler`` with neighbours for strides; constructor, configuration and saving are inherited.

    Options are read from ``self.config`` at call time, since pipelines rewrite it after construction.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Eq. 12. https://arxiv.org/abs/2010.02502
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | Tensor | np.ndarray | None = None,
    ) -> None:
        """Chooses the levels to visit.

        Args:
            num_inference_steps: N, in 1..T, spaced as ``config.timestep_spacing`` says (quadratic too).
            device: Where ``self.timesteps`` is put.
            timesteps: A custom falling list of levels, in place of N.

        Raises:
            DDIMError: If both or neither are given, either is invalid, or epsilon prediction would start at zero SNR.
        """
        total = len(self.alphas_cumprod)
        if (num_inference_steps is None) == (timesteps is None):
            raise DDIMError("give either num_inference_steps or timesteps, not both and not neither.")
        if timesteps is None:
            levels = select_timesteps(
                total, cast(int, num_inference_steps), self.config.timestep_spacing, steps_offset=self.config.steps_offset
            )
        else:
            levels = check_timesteps(timesteps.tolist() if isinstance(timesteps, (Tensor, np.ndarray)) else timesteps, total)
        if self.config.prediction_type == "epsilon":
            silent = [t for t in levels if float(self.alphas_cumprod[t]) == 0]
            if silent:
                raise DDIMError(
                    f"epsilon prediction cannot be used at t={silent[0]}: terminal SNR is 0, so x0 = (x_t - sigma eps) / alpha "
                    "divides by 0. "
                    f"Use v_prediction, or start below {silent[0]}."
                )
        self.num_inference_steps = len(levels)
        self.timesteps = torch.tensor(levels, dtype=torch.int64, device=device)
        self._next = dict(step_pairs(levels))

    def _schedule(self) -> NoiseSchedule:
        """The levels in float64, kept until someone replaces the public tables."""
        key = (id(self.alphas_cumprod), id(self.betas), self.config.set_alpha_to_one)
        kept: tuple[Any, NoiseSchedule] | None = getattr(self, "_kept", None)
        if kept is not None and kept[0] == key:
            return kept[1]
        replaced = not torch.allclose(self.alphas_cumprod.cpu(), (1 - self.betas.cpu()).cumprod(0), rtol=1e-4, atol=1e-7)
        table = self.alphas_cumprod.double().cpu() if replaced else (1 - self.betas.double().cpu()).cumprod(0)
        schedule = NoiseSchedule(table, 1.0 if self.config.set_alpha_to_one else float(table[0]))
        self._kept = (key, schedule)
        return schedule

    def _target(self, t: int) -> int:
        """The next timestep of the list; for a level that was never in it, one stride down, as diffusers does."""
        if t in self._next:
            return self._next[t]
        return max(t - len(self.alphas_cumprod) // self.num_inference_steps, -1)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: Eta = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Moves ``sample`` from ``timestep`` to its neighbour in the list.

        Args:
            model_output: The network's raw output, shape [B, ...].
            timestep: One level, or one a sample, shape [B].
            sample: x_t, shape [B, ...].
            eta: 0 deterministic, 1 DDPM, or ``"sigma-hat"``.
            use_clipped_model_output: Whether eps is derived again from the clipped x0.
            generator: Of the noise, one or one a sample; used only where eta is not 0.
            variance_noise: The noise itself, in place of a generator.
            return_dict: Whether to return an object or a tuple.

        Returns:
            The sample at the next level, and the predicted x0, both in ``sample``'s dtype.

        Raises:
            ValueError: If timesteps are not set, or shapes, levels or options do not fit.
        """
        if self.num_inference_steps is None or not hasattr(self, "_next"):
            raise ValueError("Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler")
        if model_output.shape != sample.shape:
            raise DDIMError(
                f"model_output and sample must have one shape; got {list(model_output.shape)} and {list(sample.shape)}. "
                "If the network also predicts a variance, pass the mean's channels only."
            )
        levels = torch.as_tensor(timestep, dtype=torch.int64).cpu()
        if bool((levels < 0).any()) or bool((levels >= len(self.alphas_cumprod)).any()):
            raise DDIMError(f"timestep must lie in [0, {len(self.alphas_cumprod)}); got {levels.tolist()}.")
        targets = torch.tensor([self._target(int(t)) for t in levels.flatten()]).reshape(levels.shape)
        levels, targets = (x.reshape(()) if x.numel() == 1 else x for x in (levels, targets))
        schedule = self._schedule()
        alpha_bar_t, alpha_bar_s = schedule.alpha_bar(levels), schedule.alpha_bar(targets)

        x0, eps = to_x0_eps(model_output, sample, alpha_bar_t=alpha_bar_t, prediction_type=self.config.prediction_type)
        if self.config.thresholding:
            x0 = threshold_dynamic(x0, ratio=self.config.dynamic_thresholding_ratio, max_value=self.config.sample_max_value)
        elif self.config.clip_sample:
            x0 = clip_static(x0, self.config.clip_sample_range)
        if use_clipped_model_output:
            eps = to_eps(x0, sample, alpha_bar_t=alpha_bar_t)
        noise = None
        if eta != 0:
            if variance_noise is not None and generator is not None:
                raise ValueError(
                    "Cannot pass both generator and variance_noise. Please make sure that either "
                    "`generator` or `variance_noise` stays `None`."
                )
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype)
        previous = ddim_step(x0, eps, alpha_bar_t=alpha_bar_t, alpha_bar_s=alpha_bar_s, eta=eta, noise=noise).to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=x0) if return_dict else (previous, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Noises data to levels, coefficients computed in float64 before the cast; see :func:`ddim.schedule.add_noise`."""
        return add_noise(self._schedule(), original_samples, noise, _integers(timesteps))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """The target of v-prediction; see :func:`ddim.schedule.velocity`."""
        return velocity(self._schedule(), sample, noise, _integers(timesteps))


def _integers(timesteps: int | Tensor) -> Tensor:
    """Levels as integers; LEDITS++ passes whole numbers in a float tensor."""
    levels = torch.as_tensor(timesteps)
    if levels.is_floating_point() and bool((levels != levels.round()).any()):
        raise DDIMError(f"timesteps must be whole numbers; got {levels.tolist()}.")
    whole = levels.to(torch.int64)
    if bool((whole < 0).any()):
        raise DDIMError(f"timesteps of training noise must be at least 0; got {whole.tolist()}.")
    return whole.reshape(()) if whole.numel() == 1 else whole
