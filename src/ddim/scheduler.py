"""DDIM and its inversion as diffusers schedulers: drop-ins that stay on their own grid of levels.

Both are subclasses of diffusers' classes of the same names, with the same options, methods and
configuration files. What differs: a step goes to the neighbour in the list of timesteps,
coefficients come from float64 tables, a zero terminal SNR is exact, lists of your own and a
timestep a sample are accepted, and what cannot work is refused in words.

A step with a tensor timestep gathers its coefficients from a table (:mod:`ddim.core.plan`): no host
reads a device, and ``torch.compile`` sees one graph. Options are read from ``config`` at each step,
since pipelines rewrite it; compiled code keeps those of the last ``set_timesteps`` or eager step.
"""

import copy
import dataclasses
import functools
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import deprecate, logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.compiler import is_compiling

from ddim.configuration import foreign_family, given_options, unknown_options
from ddim.core.denoiser import Clip
from ddim.core.plan import Plan, Table, advance, gather, whole
from ddim.core.prediction import PredictionType, clip_static, prediction_row
from ddim.core.schedule import (
    CLEAN,
    BetaSchedule,
    NoiseSchedule,
    make_betas,
    rescale_zero_terminal_snr,
)
from ddim.core.step import Eta, check_order, multistep_weight, step_coefficients
from ddim.core.timesteps import Spacing, as_levels, check_timesteps, select_timesteps, step_pairs
from ddim.errors import DDIMError

# SchedulerMixin is not used here, but diffusers' pipeline loader looks for it in the module that
# defines a scheduler.
__all__ = [
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDIMSchedulerOutput",
    "SchedulerMixin",
    "as_ddim",
    "fitted_timesteps",
    "to_diffusers",
]

# A child of diffusers' logger, so that diffusers' verbosity governs it. What is odd but accepted
# there is logged, not warned
# about: code that turns warnings into errors keeps working.
_logger = logging.get_logger("diffusers.ddim")
_said: set[str] = set()

_Generator = torch.Generator | list[torch.Generator]
_Converted = TypeVar("_Converted")


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _logger.warning(message)


def fitted_timesteps(
    config: Mapping[str, Any], num_inference_steps: int | None
) -> list[int] | None:
    """The list of that many levels among ``config["fitted_timesteps"]``; None where there is none
    of that length.

    Raises:
        DDIMError: If the entry is no list of lists, or the list found is not one of falling levels.
    """
    lists = config.get("fitted_timesteps") or []
    if not isinstance(lists, (list, tuple)) or not all(
        isinstance(levels, (list, tuple)) for levels in lists
    ):
        raise DDIMError(
            "fitted_timesteps must be a list of lists of levels, such as [[999, 500], [999, 700, "
            f"300]]; got {lists!r}."
        )
    found = next((levels for levels in lists if len(levels) == num_inference_steps), None)
    return None if found is None else check_timesteps(found, config["num_train_timesteps"])


class _Scheduler:
    """What both directions share: the levels, the list of timesteps, and the plan made of both."""

    order = 1
    _inverse = False
    # One call of these reads all options of its kind from a config, as attributes: that is where
    # pipelines write them.
    _recipe = operator.attrgetter(
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "rescale_betas_zero_snr",
        "set_alpha_to_one",
    )
    _options = operator.attrgetter(
        "num_train_timesteps", "prediction_type", "clip_sample", "clip_sample_range"
    )

    config: Any
    _deprecated_kwargs: list[str]
    _internal_dict: Any  # what ``config`` returns
    num_inference_steps: int | None

    def _begin(self) -> None:
        """The end of both constructors; ``config`` is registered by then."""
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self._plan: Plan | None = None
        self._before: tuple[Tensor, Tensor] | None = None
        self._schedule: NoiseSchedule
        self._made_of: tuple[Any, Any] = (None, None)
        self._schedule_key: tuple[int, int] | None = None
        self._signal_tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._levels()
        self._grid: list[int] = []  # the listed levels, falling in both directions
        self._timesteps = self._as_timesteps(
            list(range(self.config.num_train_timesteps))[::-1], None
        )

    # --- levels

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha_bar of all levels, [T], float32 on the CPU; a table that you assign, or edit, is
        the one that is used."""
        return self._alphas_cumprod

    @alphas_cumprod.setter
    def alphas_cumprod(self, table: Tensor) -> None:
        self._alphas_cumprod, self._schedule_key = table, None

    @property
    def _clean_alpha_cumprod(self) -> Tensor:
        """alpha_bar of clean data: 1, or the first level's where ``set_alpha_to_one`` is off."""
        return self._clean

    @_clean_alpha_cumprod.setter
    def _clean_alpha_cumprod(self, value: Tensor) -> None:
        self._clean, self._schedule_key = value, None

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The exact levels, float64: those of the options, unless the public tables say
        otherwise."""
        return self._levels()

    def _levels(self) -> NoiseSchedule:
        """The exact levels: the options' own, unless the public tables say otherwise."""
        if is_compiling():
            return self._schedule
        recipe, trained = self._recipe(self.config), self.config.trained_betas
        if recipe != self._made_of[0] or trained is not self._made_of[1]:
            self._make_levels(recipe, trained)
        table, clean = self._alphas_cumprod, self._clean
        # Inference tensors count no versions; there an edit in place shows when the table is next
        # assigned.
        key = (
            -1 if table.is_inference() else table._version,
            -1 if clean.is_inference() else clean._version,
        )
        if key != self._schedule_key:
            self._schedule, self._schedule_key = (
                self._adopt(table.detach().cpu(), clean.detach().cpu()),
                key,
            )
            self._signal_tables.clear()
        return self._schedule

    def _make_levels(self, recipe: tuple[Any, ...], trained: Iterable[float] | None) -> None:
        count, start, end, kind, rescale, to_one = recipe
        with torch.device("cpu"), torch.inference_mode(False):
            if trained is None:
                betas = make_betas(kind, count, beta_start=start, beta_end=end)
            else:
                betas = torch.as_tensor(np.asarray(trained), dtype=torch.float64)
                if betas.numel() != count:
                    _say_once(
                        f"trained_betas has {betas.numel()} levels, but num_train_timesteps is "
                        f"{count}; only the former can be used."
                    )
            self._sound = bool(((betas >= 0) & (betas <= 1)).all())
            if not self._sound:  # accepted by diffusers; nothing more can be said about it
                _say_once(
                    f"Some betas lie outside [0, 1] (from {float(betas.min()):.4g} to "
                    f"{float(betas.max()):.4g}): this is no schedule."
                )
            betas = rescale_zero_terminal_snr(betas) if rescale else betas
            levels = (1 - betas).cumprod(0)  # not from_betas, which refuses what is no schedule
            self._exact = NoiseSchedule(levels, 1.0 if to_one else float(levels[0]))
            self.betas, self.alphas = betas.float(), (1 - betas).float()
            self.alphas_cumprod = self._exact.alphas_cumprod.float()
            self._clean_alpha_cumprod = (
                torch.tensor(1.0) if to_one else self.alphas_cumprod[0].clone()
            )
        self._made_of = (recipe, trained)

    def _adopt(self, table: Tensor, clean: Tensor) -> NoiseSchedule:
        """Public tables that are the exact ones, rounded, stand for them, also after a move; others
        replace them."""
        exact = self._exact

        def is_rounded(given: Tensor, truth: Tensor) -> bool:
            return given.shape == truth.shape and torch.equal(given, truth.float().to(given.dtype))

        own, own_clean = exact.alphas_cumprod, exact.final_alpha_cumprod
        return NoiseSchedule(
            own if is_rounded(table, own) else table,
            own_clean
            if is_rounded(clean, torch.tensor(own_clean, dtype=torch.float64, device="cpu"))
            else float(clean),
        )

    def register_to_config(self, **kwargs: Any) -> None:
        """Changes options; where they define the levels, the public tables follow at once."""
        if isinstance(betas := kwargs.get("trained_betas"), (Tensor, np.ndarray)):
            kwargs["trained_betas"] = betas.tolist()  # as a file holds them
        kwargs = given_options({**getattr(self, "_internal_dict", {}), **kwargs}, type(self))
        super().register_to_config(**kwargs)  # type: ignore[misc]
        if "_made_of" in self.__dict__:
            self._levels()

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any
    ) -> Any:
        """As diffusers'; but a scheduler of another family (flow matching, EDM) is refused, and the
        ``solver_order`` of another multistep scheduler is not taken over: DDIM stays DDIM unless
        you ask.

        Raises:
            DDIMError: If the configuration is of another family.

        Warns:
            UserWarning: If an option is given by a keyword that no scheduler of the family knows,
                and is not returned as unused either.
        """
        if isinstance(config, Mapping):
            kind = config.get("_class_name")
            known = kind is not None and kind != cls.__name__ and hasattr(diffusers, str(kind))
            if reason := foreign_family({**config, "_class_name": kind if known else None}):
                raise DDIMError(f"DDIM cannot take over this configuration: it is {reason}")
            if "solver_type" in config and kind != cls.__name__:
                config = {name: value for name, value in config.items() if name != "solver_order"}
            names = () if return_unused_kwargs else set(options) - set(cls._deprecated_kwargs)
            unknown = unknown_options(sorted(names), cls, DDIMScheduler._get_compatibles)
            for name, near in unknown.items():
                hint = "" if near is None else f"; did you mean {near!r}?"
                warnings.warn(
                    f"{cls.__name__} has no option {name!r} and ignores it{hint or '.'}",
                    stacklevel=2,
                )
        return super().from_config(config, return_unused_kwargs, **options)  # type: ignore[misc]

    # --- timesteps

    @property
    def timesteps(self) -> Tensor:
        """The list of timesteps, int64 [N]. Assigning another one makes its neighbours the steps; a
        slice keeps the old ones."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor | Sequence[int]) -> None:
        self._timesteps = (
            timesteps
            if isinstance(timesteps, Tensor)
            else torch.as_tensor(np.asarray(timesteps), dtype=torch.int64)
        )
        levels = self._timesteps.tolist()
        levels = levels[::-1] if self._inverse else levels
        start = self._grid.index(levels[0]) if levels and levels[0] in self._grid else 0
        if self._grid[start : start + len(levels)] != levels:
            try:
                self._grid = check_timesteps(levels, self.config.num_train_timesteps)
            except DDIMError as error:
                self._grid = []
                _say_once(
                    "A list of timesteps has no neighbours, so steps go to t - T // N as in "
                    f"diffusers: {error}"
                )
        if self.num_inference_steps is None:
            self.num_inference_steps = max(len(levels), 1)
        self._renew()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Chooses the levels to visit: of ``config.fitted_timesteps`` where that has N, else by
        ``config.timestep_spacing``; or your own.

        Args:
            num_inference_steps: N, a whole number in 1..T: exactly N distinct levels in [0, T).
            device: Where ``timesteps``, and the table of coefficients, are to lie.
            timesteps: Your own levels (a list, array or tensor), falling from noise to data;
                instead of N. The inverse takes the same list, and visits it from data to noise.

        Raises:
            DDIMError: If N or the list is invalid, the spacing or prediction type is unknown, or
                epsilon is predicted at a level whose SNR is 0.

        References:
            Lin et al. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023. Table 2.
            https://arxiv.org/abs/2305.08891
        """
        config = self.config
        total = config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise DDIMError(
                "give either num_inference_steps or a list of timesteps, one of the two."
            )
        if timesteps is not None:
            levels = as_levels(timesteps)
            grid = check_timesteps(
                levels[::-1] if self._inverse and levels[:1] < levels[-1:] else levels, total
            )
        else:
            if isinstance(num_inference_steps, (int, np.integer)) and num_inference_steps > total:
                raise DDIMError(
                    f"`num_inference_steps`: {num_inference_steps} cannot be larger than {total}, "
                    "the number of levels the model was trained on (config.num_train_timesteps)."
                )
            spacing: Spacing = config.timestep_spacing
            grid = fitted_timesteps(vars(config), num_inference_steps) or select_timesteps(
                total,
                num_inference_steps,  # type: ignore[arg-type]
                spacing,
                steps_offset=config.steps_offset,
            )
        self.num_inference_steps, self._grid = len(grid), grid
        self._timesteps = self._as_timesteps(grid, device)
        self._renew()

    def _as_timesteps(self, grid: list[int], device: str | torch.device | None) -> Tensor:
        return torch.from_numpy(np.array(grid[::-1] if self._inverse else grid, dtype=np.int64)).to(
            device
        )

    # --- plan

    def _ready(self, eta: Eta, rederive: bool, x: Tensor) -> tuple[Plan, Table]:
        """The plan for the options of this moment, and its table for such a step."""
        plan = self._plan
        if plan is None or not (is_compiling() or self._is_of_now(plan)):
            plan = self._current()
        table = plan.tables.get((eta, rederive, x.dtype, x.device))
        return plan, plan.table(eta, rederive, x.dtype, x.device) if table is None else table

    def _is_of_now(self, plan: Plan) -> bool:
        """Whether nothing at all has changed since the plan was made: one comparison a step, in
        place of one an option."""
        table, clean = self._alphas_cumprod, self._clean
        try:
            return (
                self._internal_dict.__dict__ == plan.config
                and (table._version, clean._version) == self._schedule_key
                and plan.num_inference_steps == self.num_inference_steps
            )
        except (
            ValueError,
            RuntimeError,
        ):  # two arrays of betas have no truth value, and inference tensors no version
            return False

    def _current(self) -> Plan:
        """The plan for the options of this moment, found by those that matter."""
        if self.num_inference_steps is None:
            raise DDIMError(
                "Number of inference steps is 'None', you need to run 'set_timesteps' after "
                "creating the scheduler"
            )
        plan, schedule = self._plan, self._levels()
        if (
            plan is None
            or plan.schedule is not schedule
            or plan.num_inference_steps != self.num_inference_steps
            or plan.options != self._options(self.config)
        ):
            return self._renew()
        self._plan = plan = dataclasses.replace(plan, config=dict(vars(self.config)))
        return plan

    def _renew(self) -> Plan:
        old, self._plan, self._before = self._plan, None, None
        with torch.device("cpu"), torch.inference_mode(False):
            plan = self._plan = self._make_plan()
        # What was in use is made at once, so that the first step of the next image does not wait,
        # and compiled code finds it.
        usual: tuple[Eta, bool, torch.dtype, torch.device] = (
            0.0,
            False,
            torch.float32,
            self._timesteps.device,
        )
        for eta, rederive, dtype, device in {usual, *(old.tables if old else ())}:
            # Some may be refused for these timesteps or this order, but only if they are asked for.
            if eta == 0 or (plan.multistep is None and (isinstance(eta, str) or eta <= 1)):
                plan.table(eta, rederive, dtype, device)
        return plan

    def _make_plan(self) -> Plan:
        config, schedule, steps = self.config, self._levels(), self.num_inference_steps or 1
        prediction_row(
            config.prediction_type, schedule.alphas_cumprod[:1]
        )  # refuses an unknown type
        neighbour = {
            t: s for t, s in (step_pairs(self._grid) if self._grid else ()) if t < len(schedule)
        }
        stride = max(config.num_train_timesteps // steps, 1)
        lower = schedule.alpha_bar(
            torch.tensor([neighbour.get(t, max(t - stride, CLEAN)) for t in range(len(schedule))])
        )
        source, target = (
            (lower, schedule.alphas_cumprod) if self._inverse else (schedule.alphas_cumprod, lower)
        )
        plan = Plan(
            schedule=schedule,
            options=self._options(config),
            config=dict(vars(config)),
            num_inference_steps=steps,
            prediction_type=config.prediction_type,
            inverse=self._inverse,
            clip=self._clip(),
            listed=frozenset(neighbour),
            source=source,
            target=target,
            multistep=self._multistep(schedule),
        )
        for t in (source == 0).nonzero().flatten().tolist():
            if t in neighbour:
                self._check_solvable(plan, t)
        return plan

    def _multistep(self, schedule: NoiseSchedule) -> Tensor | None:  # noqa: ARG002
        return None

    def _clip(self) -> Callable[[Tensor], Tensor] | None:
        return (
            Clip("static", bound=self.config.clip_sample_range) if self.config.clip_sample else None
        )

    # --- step

    def _transition(
        self,
        plan: Plan,
        table: Table,
        output: Tensor,
        timestep: int | Tensor,
        x: Tensor,
        eta: Eta = 0.0,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The step of either direction: (x_s, x0)."""
        if output.shape != x.shape:
            output = _mean_of(output, x)
        if isinstance(timestep, Tensor):
            at = gather(table.columns, timestep, x)
        elif (
            is_compiling()
        ):  # as an index of a tensor an int stays symbolic: one graph for all timesteps
            at = table.columns.narrow(1, timestep, 1).unbind(0)
        else:
            t = timestep if type(timestep) is int else whole(timestep)
            found = table.at.get(t)
            if found is None:
                self._check_level(plan, t, eta)
                found = table.at[t] = table.columns.narrow(1, t, 1).unbind(0)
            at = found
        return advance(plan, table.mode, at, output, x, noise)

    def _check_level(self, plan: Plan, t: int, eta: Eta) -> None:
        levels = len(plan.schedule)
        if not 0 <= t < levels:
            raise DDIMError(
                f"a timestep must lie in [0, {levels}), the levels the model was trained on; got "
                f"{t}."
            )
        if t in plan.listed:
            return
        self._check_solvable(plan, t)
        if isinstance(eta, float) and eta > 1:
            raise DDIMError(
                f"eta above 1 is for the listed timesteps only; got eta={eta} at t={t}."
            )
        _say_once(
            "A timestep was asked for that is not in the list of set_timesteps; its step goes to t "
            "- T // N, as in diffusers."
        )

    def _check_solvable(self, plan: Plan, t: int) -> None:
        if plan.prediction_type == "epsilon" and plan.source[t] == 0 and self._sound:
            raise DDIMError(
                f"epsilon prediction cannot be used at t={t}: the SNR is 0 there, so x0 = (x_t - "
                "sigma eps) / alpha divides by 0. "
                f"Use v_prediction or sample, or start below {t} (set_timesteps(timesteps=[...]))."
            )

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Returns the sample: a network of this family takes it as it is."""
        return sample

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def _clamp_and_divide(x0: Tensor, bound: float) -> Tensor:
    return clip_static(x0, bound) / bound


def _mean_of(output: Tensor, x: Tensor) -> Tensor:
    """The mean's channels of a network that also predicts a variance; DDIM has no use for the
    others."""
    if output.ndim == x.ndim >= 2 and output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        _say_once(
            "The model's output has twice the channels of the sample: the second half, a learned "
            "variance, is not used."
        )
        return output[:, : x.shape[1]]
    raise DDIMError(
        f"the model's output must have the sample's shape {list(x.shape)} (or twice its channels, "
        "a mean and a learned variance); "
        f"got {list(output.shape)}."
    )


class DDIMScheduler(_Scheduler, diffusers.DDIMScheduler):  # type: ignore[misc]
    r"""Denoises from t to the next timestep of the list, as :mod:`ddim.core.step` does, with
    diffusers' protocol.

    Options, their names and defaults are diffusers'. Beyond them, ``beta_schedule`` knows
    ``sigmoid`` and ``laplace``, and ``timestep_spacing`` ``quadratic``. ``clip_sample`` is True by
    default: right for pixels in [-1, 1], wrong for latents. ``set_alpha_to_one=False`` leaves the
    first level's noise in the finished sample. ``thresholding`` at the default ``sample_max_value``
    of 1.0 is clipping.

    ``solver_order=2`` is the second-order multistep (:func:`ddim.core.step.multistep_weight`): a
    smaller error at the same number of evaluations, at eta = 0. It keeps the prediction of the step
    before, until the next ``set_timesteps``: one scheduler walks one batch at a time through the
    list. The first step, wherever in the list, and the step to clean data are DDIM's. Order 1 keeps
    no state.

    ``fitted_timesteps`` are lists of levels that were fitted to the model at that order
    (:mod:`ddim.fitting.timesteps`): each is visited where as many steps are asked for as it has
    levels. diffusers passes over both options.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Eq. 12 and 16.
        https://arxiv.org/abs/2010.02502

        Lu et al. DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models.
        2022. Algorithm 2. https://arxiv.org/abs/2211.01095
    """

    _options = operator.attrgetter(
        *["num_train_timesteps", "prediction_type", "clip_sample", "clip_sample_range"],
        *["thresholding", "dynamic_thresholding_ratio", "sample_max_value", "solver_order"],
    )
    final_alpha_cumprod = _Scheduler._clean_alpha_cumprod

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
        solver_order: Literal[1, 2] = 1,
        fitted_timesteps: list[list[int]] | None = None,
    ) -> None:
        # not super().__init__(): it would make float32 tables, and refuse two of the schedules
        self._begin()

    def _multistep(self, schedule: NoiseSchedule) -> Tensor | None:
        if check_order(self.config.solver_order) == 1:
            return None
        table = torch.stack(
            [torch.zeros(len(schedule)), torch.full((len(schedule),), CLEAN)]
        ).double()
        grid = torch.tensor([t for t in self._grid if t < len(schedule)], dtype=torch.int64)
        table[1, grid[1:]] = grid[:-1].double()
        table[0, grid[1:-1]] = multistep_weight(
            *(schedule.alpha_bar(levels) for levels in (grid[:-2], grid[1:-1], grid[2:]))
        )
        return table

    def _clip(self) -> Callable[[Tensor], Tensor] | None:
        if not self.config.thresholding:
            return super()._clip()
        ratio, largest = self.config.dynamic_thresholding_ratio, self.config.sample_max_value
        if largest < 1:  # accepted by diffusers, where every threshold is then cut to it
            _say_once(
                f"sample_max_value={largest} is below 1, so thresholding clamps to it and divides "
                "by it at every step."
            )
            return functools.partial(_clamp_and_divide, bound=largest)
        return Clip("dynamic", ratio=ratio, max_value=largest)

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
                generator are given; at order 2, if eta is not 0, or t does not follow the last one
                in the list and starts no new image either. Tensors of timesteps on a device are not
                checked, since that would wait for it: a fraction is cut off there.

        References:
            Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Eq. 12 and 16.
            https://arxiv.org/abs/2010.02502
        """
        eta = eta if isinstance(eta, (float, str)) else float(eta)
        plan, table = self._ready(eta, use_clipped_model_output, sample)
        noise = None if eta == 0 else _draw(model_output, sample, generator, variance_noise)
        x_s, x0 = self._transition(plan, table, model_output, timestep, sample, eta, noise)
        if plan.multistep is not None:
            self._correct(plan, table, timestep, x_s, x0)
        return _result(x_s, x0) if return_dict else (x_s, x0)

    def _correct(
        self, plan: Plan, table: Table, timestep: int | Tensor, x_s: Tensor, x0: Tensor
    ) -> None:
        """Makes DDIM's x_s second order, in place, where the step before was that of the neighbour
        above; keeps x0 for the next."""
        t = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep)
        before, self._before = self._before, (t, x0)
        if (
            before is None
            or before[1].shape != x0.shape
            or plan.multistep is None
            or table.multistep is None
        ):
            return
        if t.numel() == before[0].numel() == 1 and t.device.type == "cpu" and not is_compiling():
            now, last = int(t), int(before[0])
            if now <= last != int(plan.multistep[1, now]) and len(self._grid) > 1:
                self._before = before
                raise DDIMError(
                    f"solver_order=2 goes on from the step before, and t={now} does not follow "
                    f"t={last} in the list of timesteps; call "
                    "set_timesteps before each image, take one scheduler for each batch, or use "
                    "solver_order=1."
                )
        # What is not sure to be the same image's last step counts as none: elsewhere the step stays
        # DDIM's.
        weight, above = gather(table.multistep, t, x0)
        last_t = before[0].to(x0.device, non_blocking=True).reshape(-1, *[1] * (x0.ndim - 1))
        x_s.add_(torch.where(above == last_t, weight, 0.0) * (x0 - before[1]))

    def batch_step_no_noise(
        self,
        model_output: Tensor,
        timesteps: Tensor | Sequence[int],
        sample: Tensor,
        eta: Eta = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:
        """The step of each sample at its own timestep, without the noise (DDIMParallelScheduler's
        protocol).

        Args:
            model_output: Shape [B, C, ...].
            timesteps: One a sample, [B].
            sample: Shape [B, C, ...].
            eta: As in :meth:`step`; the caller adds the noise that it takes from the direction.
            use_clipped_model_output: As in :meth:`step`.

        Returns:
            The mean of x_s, shape [B, C, ...], dtype of the sample.
        """
        eta = eta if isinstance(eta, (float, str)) else float(eta)
        t = (
            timesteps
            if isinstance(timesteps, Tensor)
            else torch.tensor(timesteps, device=sample.device)
        )
        if self.config.solver_order != 1:
            raise DDIMError(
                "samples that are stepped in parallel have no step before them; use solver_order=1."
            )
        plan, table = self._ready(eta, use_clipped_model_output, sample)
        return self._transition(plan, table, model_output, t.flatten(), sample, eta)[0]

    def _get_variance(self, timestep: int | Tensor, prev_timestep: int | Tensor) -> Tensor:
        """The posterior variance of a step between two levels at eta = 1, float32 []; a negative
        level is clean data."""
        schedule = self._levels()
        weights = step_coefficients(
            schedule.alpha_bar(int(timestep)),
            schedule.alpha_bar(max(int(prev_timestep), CLEAN)),
            eta=1.0,
        )
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
            The noisy samples, shape [B, ...], in the samples' dtype. Half precision is computed in
            float32 and rounded once.

        Raises:
            DDIMError: If a level that the host can see is no whole number in [0, T).
        """
        x0, noise, alpha, sigma = self._signal_and_noise(timesteps, original_samples, noise)
        return (x0 * alpha).addcmul_(noise, sigma).to(original_samples.dtype)

    def get_velocity(
        self, sample: Tensor, noise: Tensor, timesteps: int | Sequence[int] | Tensor
    ) -> Tensor:
        r"""The target of v-prediction, :math:`v_t = \alpha_t \epsilon - \sigma_t x_0`; arguments as
        :meth:`add_noise`."""
        x0, noise, alpha, sigma = self._signal_and_noise(timesteps, sample, noise)
        return (noise * alpha).addcmul_(x0, sigma, value=-1).to(sample.dtype)

    def _signal_and_noise(
        self, timesteps: int | Sequence[int] | Tensor, x: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x and noise in one shape, and alpha_t and sigma_t, shaped to multiply them; computed in
        float64, rounded once."""
        schedule = self._levels()
        t = (
            timesteps if isinstance(timesteps, Tensor) else torch.tensor(timesteps, device="cpu")
        ).flatten()
        if t.device.type == "cpu" and not is_compiling() and t.numel():
            if t.is_floating_point() and bool((t != t.round()).any()):
                raise DDIMError(f"timesteps must be whole numbers; got {t.tolist()}.")
            if int(t.min()) < 0 or int(t.max()) >= len(schedule):
                raise DDIMError(
                    f"timesteps must lie in [0, {len(schedule)}), the levels the model was trained "
                    f"on; got {t.tolist()}."
                )
        x, noise = torch.broadcast_tensors(x, noise)  # type: ignore[no-untyped-call]
        if t.numel() > 1 and x.ndim and x.shape[0] == 1:  # one sample at several levels
            x, noise = (y.expand(t.numel(), *y.shape[1:]) for y in (x, noise))
        key = (torch.float64 if x.dtype == torch.float64 else torch.float32, x.device)
        table = self._signal_tables.get(key)
        if table is None:
            alpha_bar = schedule.alphas_cumprod
            table = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()]).to(x.device, key[0])
            if not is_compiling():
                self._signal_tables[key] = table
        alpha, sigma = gather(table, t, x)
        return x, noise, alpha, sigma


def _result(x_s: Tensor, x0: Tensor) -> DDIMSchedulerOutput:
    """``DDIMSchedulerOutput(x_s, x0)``, entry by entry and attribute by attribute, since its
    constructor looks over its own fields and its items set both through two classes: together a
    fifth of a step."""
    result = DDIMSchedulerOutput.__new__(DDIMSchedulerOutput)
    for name, value in (("prev_sample", x_s), ("pred_original_sample", x0)):
        OrderedDict.__setitem__(result, name, value)
        result.__dict__[name] = value
    return result


def _draw(output: Tensor, x: Tensor, generator: _Generator | None, given: Tensor | None) -> Tensor:
    """The noise of a step, as diffusers draws it."""
    if given is not None:
        if generator is not None:
            raise DDIMError(
                "Cannot pass both generator and variance_noise. Please make sure that either "
                "`generator` or `variance_noise` stays `None`."
            )
        return given
    if isinstance(generator, (list, tuple)) and len(generator) != x.shape[0]:
        raise DDIMError(
            f"a list of generators must have one for each of the {x.shape[0]} samples; got "
            f"{len(generator)}."
        )
    drawn: Tensor = randn_tensor(x.shape, generator=generator, device=x.device, dtype=output.dtype)
    return drawn


class DDIMInverseScheduler(_Scheduler, diffusers.DDIMInverseScheduler):  # type: ignore[misc]
    r"""Encodes: moves a sample up from the previous timestep of the list to t, with the model
    called at t on the lower sample.

    With the prediction held fixed it is the exact inverse of :meth:`DDIMScheduler.step`. The first
    step starts from clean data.

    Options are those of :class:`DDIMScheduler` without thresholding, which is accepted and ignored,
    as unknown ones are, with a line in the log. ``clip_sample`` is True by default, as in
    diffusers: turn it off to encode latents.

    References:
        Song, Meng, Ermon. Denoising Diffusion Implicit Models. 2021. Sec. 4.3.
        https://arxiv.org/abs/2010.02502
    """

    _inverse = True
    initial_alpha_cumprod = _Scheduler._clean_alpha_cumprod

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
        **kwargs: Any,
    ) -> None:
        if kwargs.get("set_alpha_to_zero") is not None:
            deprecate(
                "set_alpha_to_zero",
                "1.0.0",
                "Use `set_alpha_to_one` instead of `set_alpha_to_zero`.",
                standard_warn=False,
            )
            self.register_to_config(set_alpha_to_one=kwargs["set_alpha_to_zero"])
        ignored = sorted(set(kwargs) - {"set_alpha_to_zero"})
        if ignored:
            _say_once(f"DDIMInverseScheduler ignores: {', '.join(ignored)}.")
        self._begin()

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
        x_t, x0 = self._transition(*self._ready(0.0, False, sample), model_output, timestep, sample)
        return _result(x_t, x0) if return_dict else (x_t, x0)


def as_ddim(scheduler: Any) -> DDIMScheduler:
    """A :class:`DDIMScheduler` in place of any scheduler of the family, or of a configuration.

    Raises:
        DDIMError: If it is of another family, such as flow matching.
    """
    if isinstance(scheduler, SchedulerMixin):
        scheduler = {
            **given_options(scheduler.config, type(scheduler)),
            "_class_name": type(scheduler).__name__,
        }
    made: DDIMScheduler = DDIMScheduler.from_config(scheduler)
    return made


def to_diffusers(obj: _Converted) -> _Converted:
    """Returns the same scheduler, or the same pipeline, with diffusers' own class: its files load
    without this package.

    Sigmoid and laplace betas are exported as ``trained_betas``. ``solver_order`` and
    ``fitted_timesteps`` stay in the configuration, and diffusers, whose DDIM is of order 1, passes
    over them. Timesteps are not part of a configuration: set them again. Where diffusers would then
    step to other levels (``linspace``, and ``trailing`` where N does not divide T), a warning says
    so.

    Args:
        obj: A scheduler of this module, or a pipeline that holds one; others are returned as they
            are. Models are shared, and the given pipeline keeps its scheduler.

    Returns:
        A new scheduler or pipeline.

    Raises:
        DDIMError: If the spacing is quadratic, which diffusers does not know, or ``obj`` is neither
            scheduler nor pipeline.
    """
    if isinstance(obj, _Scheduler):
        exported_scheduler: _Converted = _export(obj)
        return exported_scheduler
    if isinstance(obj, diffusers.DiffusionPipeline):
        stock = {
            name: _export(part)
            for name, part in obj.components.items()
            if isinstance(part, _Scheduler)
        }
        exported = copy.copy(obj)
        exported.register_modules(**stock)
        return exported
    if isinstance(obj, SchedulerMixin):
        return obj
    raise DDIMError(
        f"only a scheduler or a pipeline can be converted to diffusers; got {type(obj).__name__}."
    )


def _export(scheduler: _Scheduler) -> Any:
    config = dict(scheduler.config)
    known = ("leading", "trailing") if scheduler._inverse else ("leading", "linspace", "trailing")
    if scheduler.config.timestep_spacing not in known:
        raise DDIMError(
            f"diffusers has no {scheduler.config.timestep_spacing!r} timesteps for this scheduler; "
            f"set timestep_spacing to one of {', '.join(known)} before the export."
        )
    schedule = scheduler._levels()
    if not torch.equal(schedule.alphas_cumprod, scheduler._exact.alphas_cumprod):
        warnings.warn(
            "The replaced alphas_cumprod is not part of the configuration, and is not exported.",
            stacklevel=3,
        )
    if config["trained_betas"] is None and config["beta_schedule"] in ("sigmoid", "laplace"):
        # Before the rescale, which the exported class does itself.
        kind, count = config["beta_schedule"], config["num_train_timesteps"]
        betas = make_betas(
            kind, count, beta_start=config["beta_start"], beta_end=config["beta_end"]
        )
        config |= {"trained_betas": betas.tolist(), "beta_schedule": "linear"}
    for name, default in (("solver_order", 1), ("fitted_timesteps", None)):
        if name in config and config[name] == default:
            del config[
                name
            ]  # it says nothing, and diffusers would tell of a key that it does not know
    config["_use_default_values"] = []
    cls = diffusers.DDIMInverseScheduler if scheduler._inverse else diffusers.DDIMScheduler
    stock = cls.from_config(config)
    if scheduler.num_inference_steps is not None:
        stock.set_timesteps(scheduler.num_inference_steps)
        stride = len(scheduler) // scheduler.num_inference_steps
        if stock.timesteps.tolist() != scheduler.timesteps.tolist():
            warnings.warn(
                (
                    "The timesteps that are set are not part of the configuration, and diffusers "
                    "would choose others."
                ),
                stacklevel=3,
            )
        elif any(max(t - stride, CLEAN) != s for t, s in step_pairs(scheduler._grid)):
            warnings.warn(
                f"diffusers steps to t - {stride} whatever the next timestep is, so at "
                f"{scheduler.num_inference_steps} steps with "
                f"{scheduler.config.timestep_spacing!r} spacing it gives other images.",
                stacklevel=3,
            )
        stock = cls.from_config(config)
    return stock
