"""DDIM and its inversion as diffusers schedulers: drop-ins that stay on their own grid of levels.

Both are subclasses of diffusers' classes of the same names, with the same options, methods and
configuration files. What differs: a step goes to the neighbour in the list of timesteps,
coefficients come from float64 tables, a zero terminal SNR is exact, lists of your own and a
timestep a sample are accepted, and what cannot work is refused in words.

A step with a tensor timestep gathers its coefficients from a table (``ddim.core.plan``): no host
reads a device, and ``torch.compile`` sees one graph. Options are read from ``config`` at each step,
since pipelines rewrite it; compiled code keeps those of the last ``set_timesteps`` or eager step.
"""

import functools
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import deprecate
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.compiler import is_compiling

from ddim.configuration import check_levels, did_you_mean, given_options, select_clip
from ddim.core.checks import check_number, check_samples, wrong_argument
from ddim.core.plan import Before, Plan, Table, correct
from ddim.core.prediction import PredictionType, clip_static
from ddim.core.schedule import CLEAN, BetaSchedule
from ddim.core.step import Eta, unchecked_coefficients
from ddim.core.timesteps import Spacing
from ddim.errors import DDIMError
from ddim.scheduler_base import GridScheduler, log_once

# SchedulerMixin is not used here, but diffusers' pipeline loader looks for it in the module that
# defines a scheduler.
__all__ = [
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDIMSchedulerOutput",
    "SchedulerMixin",
    "as_ddim",
]

_Generator = torch.Generator | list[torch.Generator]


def _clamp_and_divide(x0: Tensor, bound: float) -> Tensor:
    return clip_static(x0, bound) / bound


class DDIMScheduler(GridScheduler, diffusers.DDIMScheduler):  # type: ignore[misc]
    r"""Denoises from t to the next timestep of the list, as :mod:`ddim.core.step` does, with
    diffusers' protocol.

    Options, their names and defaults are diffusers'; beyond them, ``beta_schedule`` knows
    ``sigmoid`` and ``laplace``, and ``timestep_spacing`` ``quadratic``. ``clip_sample`` is True by
    default: right for pixels in [-1, 1], wrong for latents. ``set_alpha_to_one=False`` leaves the
    first level's noise in the finished sample. ``thresholding`` at the default ``sample_max_value``
    of 1.0 is clipping. diffusers passes over the two options that are ours:

    ``multistep_order=2`` is the second-order multistep (:func:`ddim.core.step.multistep_weight`),
    for eta = 0: more accurate at the same cost. It keeps the prediction of the step before until
    the next ``set_timesteps``, so one scheduler walks one batch at a time through the list. The
    first step, wherever in the list, and the step to clean data are DDIM's. Order 1 keeps no state.

    ``fitted_timesteps`` are lists of levels that were fitted to the model at that order
    (:mod:`ddim.fitting.timesteps`); a list of N levels is visited when N steps are asked for.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Eq. 12 and 16.
        https://arxiv.org/abs/2010.02502

        Lu et al. DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models.
        2022. Algorithm 2. https://arxiv.org/abs/2211.01095
    """

    _exported = diffusers.DDIMScheduler
    _step_options = operator.attrgetter(
        *("num_train_timesteps", "prediction_type", "clip_sample", "clip_sample_range"),
        *("thresholding", "dynamic_thresholding_ratio", "sample_max_value", "multistep_order"),
    )
    final_alpha_cumprod = GridScheduler._clean_alpha_cumprod

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Spacing = "leading",
        rescale_betas_zero_snr: bool = False,
        multistep_order: Literal[1, 2] = 1,
        fitted_timesteps: list[list[int]] | None = None,
    ) -> None:
        # not super().__init__(): it would make float32 tables, and refuse two of the schedules
        self._set_up()

    def _order_of_steps(self) -> int:
        order: int = self.config.multistep_order
        return order

    def _clip(self) -> Callable[[Tensor], Tensor] | None:
        if not self.config.thresholding:
            return super()._clip()
        if (largest := self.config.sample_max_value) < 1:
            # Accepted by diffusers, where every threshold is then cut to it.
            effect = "thresholding clamps to it and divides by it at every step"
            log_once(f"sample_max_value={largest} is below 1, so {effect}.")
            return functools.partial(_clamp_and_divide, bound=largest)
        return select_clip(vars(self.config), "dynamic")

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: Eta = 0.0,
        use_clipped_model_output: bool = False,
        generator: _Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        r"""Moves a sample from level t to its neighbour in the list of timesteps; at order 1 with
        no state: any t, in any order.

        Args:
            model_output: What the network predicted, shape [B, C, ...]; with twice the channels,
                the first half is used.
            timestep: t in [0, T): an int, or a tensor of shape [], [1] or [B] (a timestep a
                sample); whole floats pass. One that is not in the list steps to t - T // N.
            sample: x_t, shape [B, C, ...].
            eta: Scales the standard deviation of the noise: 0 deterministic, 1 the DDPM posterior;
                or ``"sigma-hat"``.
            use_clipped_model_output: Whether eps is derived again from the clipped x0, so that both
                decompose x_t.
            generator: Draws the noise, one or a list with one a sample; at eta=0 nothing is drawn.
            variance_noise: The noise itself, shape [B, C, ...], instead of a generator.
            return_dict: Whether to return an object with names, or a tuple.

        Returns:
            ``prev_sample`` (x_s) in the sample's dtype and ``pred_original_sample`` (x0, after
            clipping), shape [B, C, ...].

        Raises:
            DDIMError: If ``set_timesteps`` was not called, shapes do not match, t is a fraction, an
                int t lies outside [0, T), eta is negative or too large, or both noise and a
                generator are given; at order 2, if eta is not 0, or t neither follows the last one
                in the list nor starts a new image, or two threads walk at once. Tensors of
                timesteps on a device are not checked, since that would wait for it: a fraction is
                cut off there.
        """
        eta = eta if isinstance(eta, (float, str)) else float(check_number("eta", eta))
        plan, table = self._find_plan(eta, use_clipped_model_output, model_output, sample)
        noise = None if eta == 0 else _draw(model_output, sample, generator, variance_noise)
        x_s, x0 = self._transition(plan, table, model_output, timestep, sample, eta, noise)
        if plan.multistep is not None:
            self._go_on(plan, table, timestep, x_s, x0)
        return _result(x_s, x0) if return_dict else (x_s, x0)

    def _go_on(
        self, plan: Plan, table: Table, timestep: int | Tensor, x_s: Tensor, x0: Tensor
    ) -> None:
        """Makes x_s second order, in place, by the step before, and keeps this one."""
        t = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep)
        before, left = self._before, self._left
        if not is_compiling() and (last := before or left) and len(plan.ends) > 1:
            last.refuse_other_walk(t, is_kept=last is before)
        if before is not None:
            correct(plan, table, t, x_s, x0, before)
        self._left = None
        self._before = Before(t, x0, None if is_compiling() else threading.get_ident())

    def batch_step_no_noise(
        self,
        model_output: Tensor,
        timesteps: Tensor | Sequence[int],
        sample: Tensor,
        eta: Eta = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:
        """The mean of :meth:`step` for each sample at its own timestep [B], as of diffusers'
        DDIMParallelScheduler; the caller adds the noise that eta takes from the direction."""
        eta = eta if isinstance(eta, (float, str)) else float(check_number("eta", eta))
        try:
            t = timesteps
            if not isinstance(t, Tensor):
                t = torch.as_tensor(t, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise wrong_argument("timesteps", "be whole numbers, one a sample", timesteps) from None
        if self.config.multistep_order != 1:
            raise DDIMError("parallel samples have no step before them; use multistep_order=1.")
        plan, table = self._find_plan(eta, use_clipped_model_output, model_output, sample)
        return self._transition(plan, table, model_output, t.flatten(), sample, eta)[0]

    def _get_variance(self, timestep: int | Tensor, prev_timestep: int | Tensor) -> Tensor:
        """The variance of a step at eta = 1, float32 []; a negative level is clean data."""
        levels = (int(timestep), max(int(prev_timestep), CLEAN))
        weights = unchecked_coefficients(*map(self.noise_schedule.alpha_bar, levels), eta=1.0)
        return (weights.noise**2).float()

    def add_noise(
        self, original_samples: Tensor, noise: Tensor, timesteps: int | Sequence[int] | Tensor
    ) -> Tensor:
        r"""Draws from the forward process: :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`.

        Args:
            original_samples: Clean data, shape [B, ...], or [1, ...] for all.
            noise: Standard normal, shape [B, ...], or [1, ...] for all.
            timesteps: One level, or one a sample, in [0, T). -1 is refused: diffusers would read it
                as T - 1.

        Returns:
            The noisy samples [B, ...] in the samples' dtype; half precision is rounded once.

        Raises:
            DDIMError: If a level that the host can see is no whole number in [0, T).
        """
        check_samples(original_samples=original_samples, noise=noise)
        tables, x0 = self._read_levels(), original_samples
        x, noise, alpha, sigma = tables.signal_and_noise(timesteps, x0, noise)
        return (x * alpha).addcmul_(noise, sigma).to(x0.dtype)

    def get_velocity(
        self, sample: Tensor, noise: Tensor, timesteps: int | Sequence[int] | Tensor
    ) -> Tensor:
        r"""The target of v-prediction, :math:`v_t = \alpha_t \epsilon - \sigma_t x_0`; see
        :meth:`add_noise`."""
        check_samples(sample=sample, noise=noise)
        x0, noise, alpha, sigma = self._read_levels().signal_and_noise(timesteps, sample, noise)
        return (noise * alpha).addcmul_(x0, sigma, value=-1).to(sample.dtype)


def _result(x_s: Tensor, x0: Tensor) -> DDIMSchedulerOutput:
    """``DDIMSchedulerOutput(x_s, x0)``, whose constructor takes a fifth of a step."""
    result = DDIMSchedulerOutput.__new__(DDIMSchedulerOutput)
    for name, value in (("prev_sample", x_s), ("pred_original_sample", x0)):
        OrderedDict.__setitem__(result, name, value)
        result.__dict__[name] = value
    return result


def _draw(output: Tensor, x: Tensor, generator: _Generator | None, given: Tensor | None) -> Tensor:
    """The noise of a step, as diffusers draws it."""
    if given is not None:
        if generator is not None:
            raise DDIMError("Cannot pass both generator and variance_noise; leave out one of them.")
        if not isinstance(given, Tensor) or (given.shape != x.shape and not _fits(given, x)):
            wanted = f"be a tensor of the sample's shape {list(x.shape)}"
            raise wrong_argument("variance_noise", wanted, given)
        return given
    if isinstance(generator, (list, tuple)) and len(generator) not in (1, x.shape[0]):
        wanted = f"one for each of the {x.shape[0]} samples"
        raise DDIMError(f"a list of generators must have {wanted}; got {len(generator)}.")
    listed = generator if isinstance(generator, (list, tuple)) else [generator]
    if generator is not None and not all(isinstance(g, torch.Generator) for g in listed):
        raise wrong_argument("generator", "be a torch.Generator, or a list of them", generator)
    dtype = output.dtype if output.is_floating_point() else torch.get_default_dtype()
    drawn: Tensor = randn_tensor(x.shape, generator=generator, device=x.device, dtype=dtype)
    return drawn


def _fits(noise: Tensor, x: Tensor) -> bool:
    """Whether noise of another shape stands for all samples."""
    sides = zip(noise.shape[::-1], x.shape[::-1], strict=False)
    return noise.ndim <= x.ndim and all(side in (1, own) for side, own in sides)


class DDIMInverseScheduler(GridScheduler, diffusers.DDIMInverseScheduler):  # type: ignore[misc]
    r"""Encodes: moves a sample up from the previous timestep of the list to t, with the model
    called at t on the lower sample.

    With the prediction held fixed it is the exact inverse of :meth:`DDIMScheduler.step`. The first
    step starts from clean data.

    Options are those of :class:`DDIMScheduler` without thresholding and the second order, which are
    accepted and ignored, as unknown ones are, with a line in the log. ``clip_sample`` is True by
    default, as in
    diffusers: turn it off to encode latents.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Sec. 4.3.
        https://arxiv.org/abs/2010.02502
    """

    _inverse = True
    _exported = diffusers.DDIMInverseScheduler
    initial_alpha_cumprod = GridScheduler._clean_alpha_cumprod

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: PredictionType = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: Spacing = "leading",
        rescale_betas_zero_snr: bool = False,
        fitted_timesteps: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("set_alpha_to_zero") is not None:
            advice = "Use `set_alpha_to_one` instead of `set_alpha_to_zero`."
            deprecate("set_alpha_to_zero", "1.0.0", advice, standard_warn=False)
            self.register_to_config(set_alpha_to_one=kwargs["set_alpha_to_zero"])
        ignored = sorted(set(kwargs) - {"set_alpha_to_zero"})
        if ignored:
            known = DDIMInverseScheduler._get_init_keys(DDIMInverseScheduler)
            log_once(
                f"DDIMInverseScheduler ignores: {', '.join(ignored)}"
                f"{did_you_mean(ignored[0], known) or '.'}"
            )
        self._set_up()

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        r"""Moves a sample up to level t from its neighbour below in the list of timesteps. Keeps no
        state.

        .. math:: x_t = \sqrt{\bar\alpha_t}\,\hat x_0 + \sqrt{1 - \bar\alpha_t}\,\hat\epsilon

        x0 and eps come from the sample's own level. ``sample`` prediction has no eps at clean data
        (diffusers divides by 0): the first step reads it at t, the level that the network was told.

        Args:
            model_output: What the network predicted at t for the lower sample, shape [B, C, ...].
            timestep: t, the level to reach: an int, or a tensor of shape [], [1] or [B].
            sample: x at the level below t, shape [B, C, ...].
            return_dict: Whether to return an object with names, or a tuple.

        Returns:
            ``prev_sample`` (x_t) and ``pred_original_sample`` (x0), shape [B, C, ...], in the
            sample's dtype.

        Raises:
            DDIMError: If ``set_timesteps`` was not called, shapes do not match, or an int t lies
                outside [0, T).
        """
        found = self._find_plan(0.0, False, model_output, sample)
        x_t, x0 = self._transition(*found, model_output, timestep, sample)
        return _result(x_t, x0) if return_dict else (x_t, x0)


def as_ddim(scheduler: Any) -> DDIMScheduler:
    """A :class:`DDIMScheduler` in place of any scheduler of the family, or of a configuration; a
    DDIMError refuses another family, such as flow matching, and ``trained_betas`` that lack levels.
    """
    if not isinstance(scheduler, (SchedulerMixin, Mapping)):
        wanted = "be a scheduler of the DDIM family, such as ddim.DDIMScheduler()"
        raise wrong_argument("scheduler", f"{wanted}, or its configuration", scheduler)
    if isinstance(scheduler, SchedulerMixin):
        kind = type(scheduler)
        scheduler = {**given_options(scheduler.config, kind), "_class_name": kind.__name__}
    made: DDIMScheduler = DDIMScheduler.from_config(scheduler)
    check_levels(made.config)
    return made
