"""What both schedulers share: options read at each step, public tables, a list of timesteps that
steps follow, and the plan made of all three."""

import contextlib
import dataclasses
import inspect
import json
import operator
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor
from torch.compiler import is_compiling

from ddim.configuration import (
    check_levels,
    check_options,
    configured_betas,
    configured_timesteps,
    did_you_mean,
    foreign_family,
    given_options,
    own_options,
    select_clip,
    spelled_betas,
    unknown_options,
    without_own_defaults,
)
from ddim.core.checks import check_number, shown
from ddim.core.plan import Before, Plan, Table, advance, make_plan
from ddim.core.schedule import NoiseSchedule, as_table, whole
from ddim.core.step import Eta
from ddim.core.tables import Tables, gather
from ddim.core.timesteps import as_levels, check_timesteps
from ddim.errors import DDIMError

__all__ = ["GridScheduler", "log_once"]

# A child of diffusers' logger, so that diffusers' verbosity governs it. What is odd but accepted
# there is logged, not warned about: code that turns warnings into errors keeps working.
_logger = logging.get_logger("diffusers.ddim")
_logged: set[str] = set()


def log_once(message: str, kind: str = "") -> None:
    """Logs what is odd but accepted by diffusers, at its first occurrence, or that of its kind."""
    if (kind or message) not in _logged:
        _logged.add(kind or message)
        _logger.warning(message)


class GridScheduler:
    """The levels, the list of timesteps, and the plan made of both."""

    order = 1
    _inverse = False
    _exported: type
    """The class of diffusers that is written into a saved folder."""
    # One call of these reads all options of its kind from a config, as attributes: that is where
    # pipelines write them.
    _level_options = operator.attrgetter(
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"),
        *("rescale_betas_zero_snr", "set_alpha_to_one"),
    )
    _step_options = operator.attrgetter(
        "num_train_timesteps", "prediction_type", "clip_sample", "clip_sample_range"
    )

    config: Any
    _deprecated_kwargs: list[str]
    _internal_dict: Any  # what ``config`` returns
    num_inference_steps: int | None
    betas: Tensor
    alphas: Tensor

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Refuses options that there are not, with the name that was meant."""
        parameters = inspect.signature(cls).parameters
        strange = [name for name in options if name not in parameters]
        if strange and "kwargs" not in parameters:
            hint = did_you_mean(strange[0], parameters) or f"; it has {', '.join(parameters)}."
            raise TypeError(f"{cls.__name__} has no option {strange[0]!r}{hint}")
        return super().__new__(cls)

    def _set_up(self) -> None:
        """The end of both constructors; ``config`` is registered by then."""
        # Saving a pipeline reads it of the object: the file then opens without this package.
        self.__module__ = self._exported.__module__
        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self._tables: Tables
        self._made_of: tuple[Any, Any] = (None, None)  # the options that _tables are of
        self._plan: Plan | None = None
        self._planned: tuple[Any, ...] = ()  # the options that _plan is of, and its step count
        self._config_seen: dict[str, Any] = {}  # all that config said when _plan was looked up
        self._before: Before | None = None  # order 2: the step before
        self._reached: int | None = None  # the level, by a step whose timestep the host knows
        self._left: Before | None = None  # that of a walk that another thread has replaced
        self._read_levels()
        self._grid: list[int] = []  # the listed levels, falling in both directions
        self._timesteps = self._as_timesteps(list(range(len(self)))[::-1], None)

    # --- levels

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha_bar of all levels, [T], float32 on the CPU; it may be assigned or edited."""
        return self._tables.alphas_cumprod

    @alphas_cumprod.setter
    def alphas_cumprod(self, table: Any) -> None:
        if not isinstance(table, Tensor):
            table = as_table("alphas_cumprod", table)
        self._tables = dataclasses.replace(self._tables, alphas_cumprod=table, versions=None)

    @property
    def _clean_alpha_cumprod(self) -> Tensor:
        """alpha_bar of clean data: 1, or that of level 0 if ``set_alpha_to_one`` is off."""
        return self._tables.clean

    @_clean_alpha_cumprod.setter
    def _clean_alpha_cumprod(self, value: Tensor | float) -> None:
        if not isinstance(value, Tensor):
            value = check_number("alpha_bar of clean data", value, least=0, most=1)
            value = torch.tensor(value, device="cpu")
        self._tables = dataclasses.replace(self._tables, clean=value, versions=None)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The exact levels, float64: the options', unless the public tables were replaced."""
        return self._read_levels().schedule

    def _read_levels(self) -> Tables:
        """The tables of the options of this moment."""
        if is_compiling():
            return self._tables
        options, trained = self._level_options(self.config), self.config.trained_betas
        if options != self._made_of[0] or trained is not self._made_of[1]:
            self._make_tables()
            self._made_of = (options, trained)
        self._tables = self._tables.current()
        return self._tables

    def _make_tables(self) -> None:
        config = self.config
        with torch.device("cpu"), torch.inference_mode(False):
            betas = configured_betas(vars(config))
            if betas.numel() != config.num_train_timesteps:
                stated = f"but num_train_timesteps is {config.num_train_timesteps}"
                log_once(f"trained_betas has {betas.numel()} levels, {stated}.")
            rescale, to_one = config.rescale_betas_zero_snr, config.set_alpha_to_one
            self._tables = Tables.from_betas(betas, rescale=rescale, set_alpha_to_one=to_one)
        if not self._tables.is_valid:  # accepted by diffusers; nothing more can be said about it
            span = f"from {float(betas.min()):.4g} to {float(betas.max()):.4g}"
            log_once(f"Some betas lie outside [0, 1] ({span}): this is no schedule.")
        self.betas, self.alphas = self._tables.betas, self._tables.alphas

    def register_to_config(self, **kwargs: Any) -> None:
        """Changes options, all checked; the public tables follow those of the levels at once."""
        for name, value in kwargs.items():
            if isinstance(value, (Tensor, np.ndarray, np.generic)):
                kwargs[name] = value.tolist()  # as a file holds it
        options = {**getattr(self, "_internal_dict", {}), **kwargs}
        check_options(options, as_diffusers=True)
        super().register_to_config(**given_options(options, type(self)))  # type: ignore[misc]
        if "_made_of" in self.__dict__:
            self._read_levels()

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **options: Any
    ) -> Any:
        """As diffusers'; files of ours that say ``solver_order`` are read as ``multistep_order``.

        A DDIMError refuses the configuration of another family (flow matching, EDM); a warning
        names a keyword that no scheduler of the family knows and that is not returned as unused.
        """
        if isinstance(config, Mapping):
            kind = config.get("_class_name")
            # A class that diffusers does not have is judged by its options, unless its name tells.
            known = hasattr(diffusers, str(kind)) or "Flow" in str(kind)
            if reason := foreign_family({**config, "_class_name": kind if known else None}):
                raise DDIMError(f"DDIM cannot take over this configuration: it is {reason}")
            if "solver_order" in options:
                log_once("solver_order is another scheduler's; DDIM's order is multistep_order.")
            config = own_options(config)
            names = () if return_unused_kwargs else set(options) - set(cls._deprecated_kwargs)
            family = diffusers.DDIMScheduler._get_compatibles
            for message in unknown_options(sorted(names), cls, family):
                warnings.warn(message, stacklevel=2)
        return super().from_config(config, return_unused_kwargs, **options)  # type: ignore[misc]

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **options: Any) -> None:
        """As diffusers'; a schedule that only this package knows by name is written as its betas,
        which diffusers reads."""
        saved: Any = self
        if self.config.trained_betas is None and (betas := spelled_betas(vars(self.config))):
            spelled: dict[str, Any] = {"trained_betas": betas, "beta_schedule": "linear"}
            saved = type(self).from_config(self.config, **spelled)
        diffusers.ConfigMixin.save_config(saved, save_directory, push_to_hub, **options)

    def to_json_string(self) -> str:
        """As diffusers', without keys of this package that say nothing."""
        config = without_own_defaults(json.loads(super().to_json_string()))  # type: ignore[misc]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    # --- timesteps

    @property
    def timesteps(self) -> Tensor:
        """The list of timesteps, int64 [N]. Assigning another one makes its neighbours the steps,
        unless it is a slice."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor | Sequence[int]) -> None:
        if not isinstance(timesteps, Tensor):
            timesteps = torch.tensor(as_levels(timesteps), dtype=torch.int64)
        self._timesteps = timesteps
        self._begin_walk()
        levels = self._timesteps.tolist()[:: -1 if self._inverse else 1]
        start = self._grid.index(levels[0]) if levels and levels[0] in self._grid else 0
        if self._grid[start : start + len(levels)] != levels:
            try:
                self._grid = check_timesteps(levels, len(self))
            except DDIMError as error:
                self._grid = []
                steps = "steps go to t - T // N as in diffusers"
                log_once(f"A list of timesteps has no neighbours, so {steps}: {error}")
        if self.num_inference_steps is None:
            self.num_inference_steps = max(len(levels), 1)
        self._remake_plan()

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
            DDIMError: If N or the list is invalid, ``trained_betas`` lack a level, the spacing or
                prediction type is unknown, or epsilon is predicted at a level whose SNR is 0.

        References:
            Lin et al. Common Diffusion Noise Schedules and Sample Steps are Flawed. 2023. Table 2.
            https://arxiv.org/abs/2305.08891
        """
        if timesteps is not None and num_inference_steps is None:
            grid = as_levels(timesteps)
            is_rising = self._inverse and grid[:1] < grid[-1:]
            grid = check_timesteps(grid[::-1] if is_rising else grid, len(self))
        elif timesteps is None and num_inference_steps is not None:
            count = num_inference_steps
            with contextlib.suppress(DDIMError):  # which select_timesteps says in its own words
                count = whole(count)
            if isinstance(count, int) and count > len(self):
                most = f"{len(self)}, the levels of training (config.num_train_timesteps)"
                raise DDIMError(f"`num_inference_steps`: {count} cannot be larger than {most}.")
            grid = configured_timesteps(vars(self.config), count)
        else:
            raise DDIMError("give either num_inference_steps or a list of timesteps.")
        if grid[0] >= len(self._read_levels().schedule):
            check_levels(vars(self.config))
        self.num_inference_steps, self._grid = len(grid), grid
        self._timesteps = self._as_timesteps(grid, device)
        self._begin_walk()
        self._remake_plan()

    def _as_timesteps(self, grid: list[int], device: str | torch.device | None) -> Tensor:
        levels = np.array(grid[::-1] if self._inverse else grid, dtype=np.int64)
        return torch.from_numpy(levels).to(device)

    def _begin_walk(self) -> None:
        self._reached = None
        last, self._before = self._before or self._left, None
        is_own = last is None or last.thread in (None, threading.get_ident())
        self._left = None if is_own else last

    def __getstate__(self) -> dict[str, Any]:
        """A copy goes on from the step before, in any thread."""
        before = None if self._before is None else self._before._replace(thread=None)
        return {**self.__dict__, "_before": before, "_left": None}

    # --- plan

    def _find_plan(self, eta: Eta, rederive: bool, output: Any, x: Any) -> tuple[Plan, Table]:
        """The plan for the options of this moment, and its table for such a step."""
        if not (isinstance(x, Tensor) and isinstance(output, Tensor)):
            _refuse_arguments(output, x)
        plan = self._plan
        if plan is None or not (is_compiling() or self._is_unchanged()):
            plan = self._update_plan()
        table = plan.tables.get((eta, rederive, x.dtype, x.device))
        return plan, plan.table(eta, rederive, x.dtype, x.device) if table is None else table

    def _is_unchanged(self) -> bool:
        """Whether nothing at all has changed since the plan was looked up: one comparison a step,
        in place of one an option."""
        tables = self._tables
        try:
            return (
                self._internal_dict.__dict__ == self._config_seen
                and (tables.alphas_cumprod._version, tables.clean._version) == tables.versions
                and self._planned[1] == self.num_inference_steps
            )
        except (ValueError, RuntimeError):  # an array has no truth value, a tensor no version
            return False

    def _update_plan(self) -> Plan:
        """The plan for the options of this moment, by comparing those that matter."""
        if self.num_inference_steps is None:
            need = "you need to run 'set_timesteps' after creating the scheduler"
            raise DDIMError(f"Number of inference steps is 'None', {need}")
        plan, schedule = self._plan, self._read_levels().schedule
        planned = (self._step_options(self.config), self.num_inference_steps)
        if plan is None or plan.schedule is not schedule or planned != self._planned:
            return self._remake_plan()
        self._config_seen = dict(vars(self.config))
        return plan

    def _remake_plan(self) -> Plan:
        old, self._plan = self._plan, None
        config, tables, count = self.config, self._read_levels(), self.num_inference_steps or 1
        options = {
            "stride": max(len(self) // count, 1),
            "prediction_type": config.prediction_type,
            "inverse": self._inverse,
            "clip": self._clip(),
            "order": self._order_of_steps(),
            "refuses_zero_snr": tables.is_valid,
        }
        plan = self._made_plan(tables.schedule, options)
        if plan.multistep is None:
            self._before = self._left = None
        self._planned = (self._step_options(config), count)
        self._plan, self._config_seen = plan, dict(vars(config))
        # What was in use is made at once, so that the first step of the next image does not wait,
        # and compiled code finds it.
        plan.table(0.0, False, torch.float32, self._timesteps.device)
        for key in old.tables if old else ():
            # Some may be refused for these timesteps or this order, but only if they are asked for.
            if key[0] == 0 or (plan.multistep is None and (isinstance(key[0], str) or key[0] <= 1)):
                plan.table(*key)
        return plan

    def _made_plan(self, schedule: NoiseSchedule, options: dict[str, Any]) -> Plan:
        """The plan for the list of timesteps: one of the last few, with the tables that it has on
        its devices, or a new one."""
        plans: dict[Any, Plan] = self.__dict__.setdefault("_plans", {})
        key = (tuple(self._grid), *options.values())
        plan = plans.pop(key, None)
        if plan is None or plan.schedule is not schedule:
            with torch.device("cpu"), torch.inference_mode(False):
                plan = make_plan(schedule, self._grid, **options)
        plans[key] = plan
        if len(plans) > _PLANS:
            del plans[next(iter(plans))]
        return plan

    def _order_of_steps(self) -> int:
        return 1

    def _clip(self) -> Callable[[Tensor], Tensor] | None:
        return select_clip(vars(self.config), "static") if self.config.clip_sample else None

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
        if not x.is_floating_point():  # as diffusers computes
            x, output = x.float(), output.float()
        if is_compiling():
            # As an index of a tensor an int stays symbolic: one graph for all timesteps.
            at = (
                gather(table.columns, timestep, x)
                if isinstance(timestep, Tensor)
                else table.columns.narrow(1, timestep, 1).unbind(0)
            )
        elif type(timestep) is int:
            at = self._look_up(plan, table, timestep, eta)
        elif not isinstance(timestep, Tensor):
            at = self._look_up(plan, table, whole(timestep), eta)
        elif timestep.dtype == torch.int64 and timestep.ndim == 0 and timestep.is_cpu:
            at = self._look_up(plan, table, int(timestep), eta)
        else:
            at = gather(table.columns, timestep, x)
        return advance(plan, table.mode, at, output, x, noise)

    def _look_up(self, plan: Plan, table: Table, t: int, eta: Eta) -> tuple[Tensor, ...]:
        """The coefficients of a level that the host knows, and a line in the log if it leaves out
        levels of the list."""
        found = table.at.get(t)
        if found is None:
            if not plan.check_level(t, eta):
                off = "A timestep was asked for that is not in the list of set_timesteps"
                log_once(f"{off}; its step goes to t - T // N, as in diffusers.")
            columns = table.columns.narrow(1, t, 1).unbind(0)
            found = table.at[t] = (columns, *plan.ends.get(t, (t, None)))
        at, left, reached = found
        last, self._reached = self._reached, reached
        if left != last and last is not None and (left > last) == self._inverse:
            log_once(
                f"A step leaves level {left}, and the step before reached level {last}: levels of "
                "the list of timesteps were left out, so the network is told another amount of "
                "noise than there is. Visit the whole list; set_timesteps(timesteps=[...]) takes a "
                "list of your own.",
                "levels left out",
            )
        return at

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """Returns the sample: a network of this family takes it as it is."""
        return sample

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


_PLANS = 4
"""Lists of timesteps whose plans a scheduler keeps."""

_ORDER = "The order is step(model_output, timestep, sample)."


def _refuse_arguments(output: Any, x: Any) -> None:
    """Says which argument of a step is no tensor."""
    name, value = ("sample", x) if isinstance(output, Tensor) else ("model_output", output)
    advice = _ORDER
    if hasattr(value, "sample") or isinstance(value, (tuple, Mapping)):
        advice = "Take the tensor out of what the network returned: its .sample, or [0]."
    elif isinstance(value, np.ndarray):
        advice = "torch.from_numpy(...) makes one of an array."
    raise DDIMError(f"{name} must be a tensor; got {shown(value)}. {advice}")


def _mean_of(output: Tensor, x: Tensor) -> Tensor:
    """The mean's channels of a network that also predicts a variance."""
    if output.ndim == x.ndim >= 2 and output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        unused = "the second half, a learned variance, is not used"
        log_once(f"The model's output has twice the channels of the sample: {unused}.")
        return output[:, : x.shape[1]]
    raise DDIMError(
        f"model_output must have the sample's shape {list(x.shape)} (or twice its channels, "
        f"a mean and a learned variance); got {list(output.shape)}. {_ORDER}"
    )
