"""Options of a call and the configuration of a scheduler, resolved to a route."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypedDict, Unpack

import torch

from ddim.configuration import configured_timesteps, select_clip
from ddim.core.checks import check_choice
from ddim.core.denoiser import Clip
from ddim.core.prediction import to_x0_eps
from ddim.core.route import Route, make_route
from ddim.core.schedule import NoiseSchedule
from ddim.core.step import Eta, check_order
from ddim.core.timesteps import SPACINGS, Spacing, check_timesteps, step_pairs, truncate_timesteps
from ddim.errors import DDIMError
from ddim.inversion.ddim import encodable_timesteps
from ddim.inversion.reversible import REVERSIBLE, Reversible, ReversibleSampler, check_start
from ddim.scheduler import DDIMScheduler
from ddim.scheduler_base import GridScheduler

__all__ = [
    "ClipOption",
    "RouteOptions",
    "Sampler",
    "reconfigured",
    "resolve_clip",
    "resolve_route",
    "resolve_timesteps",
]

ClipOption = Clip | Literal["none", "static", "dynamic"] | None
Sampler = Literal["ddim"] | Reversible


class RouteOptions(TypedDict, total=False):
    """What :func:`resolve_route` takes beside the number of steps."""

    timestep_spacing: Spacing | None
    """Default: the fitted timesteps of the configuration if it has N of them, otherwise its
    spacing."""
    timesteps: Sequence[int] | None
    """The levels themselves, in place of N and a spacing."""
    strength: float | None
    """For image to image: the share of the steps that are walked, the last ones."""
    encodable: bool
    """Whether levels without signal are moved to the level below, as encoders need."""
    eta: Eta
    """0 deterministic (the default), 1 DDPM, ``"sigma-hat"`` the paper's larger noise."""
    order: int | None
    """Of the solver. Default: the configuration's."""
    clip: ClipOption
    """How the predicted x0 is kept in range. Default: as the configuration says."""
    sampler: Sampler
    """``ddim`` (the default), or an exactly invertible one."""
    analytic: bool
    """Whether the variance is the analytic one, to be measured later. Default: False."""
    eps_mean_square: Mapping[int, float] | None
    """The measured values of the analytic variance."""


def resolve_route(
    schedule: NoiseSchedule,
    config: Any,
    num_inference_steps: int | None = None,
    *,
    own_order: int = 1,
    **options: Unpack[RouteOptions],
) -> Route:
    """Checks, without calling the network, that these options can give a finite image, and makes
    the route of them.

    Args:
        schedule: The levels that the configuration describes.
        config: A scheduler's configuration, with DDIM's options as attributes.
        num_inference_steps: N. Default: 50.
        own_order: The solver's order that the configuration says, for which its fitted timesteps
            are.
        **options: Those of :class:`RouteOptions`.

    Raises:
        DDIMError: If options exclude each other or are invalid, eta is too large for these levels,
            or the prediction has no solution at a level.
    """
    asked, sampler = options.get("order"), options.get("sampler", "ddim")
    check_choice("sampler", sampler, ("ddim", *REVERSIBLE))
    order = check_order(own_order if asked is None else asked)
    spacing, timesteps = options.get("timestep_spacing"), options.get("timesteps")
    is_fitted = order == own_order
    levels = resolve_timesteps(schedule, config, num_inference_steps, spacing, timesteps, is_fitted)
    if (strength := options.get("strength")) is not None:
        levels = truncate_timesteps(levels, strength)
    if options.get("encodable"):
        levels = encodable_timesteps(schedule, levels)
    if sampler != "ddim":
        check_start(schedule, levels, ReversibleSampler(sampler))
    route = make_route(
        schedule,
        step_pairs(levels),
        eta=options.get("eta", 0.0),
        order=order,
        clip=resolve_clip(config, options.get("clip")),
        sampler=sampler,
        analytic=options.get("analytic", False),
        eps_mean_square=options.get("eps_mean_square"),
    )
    alpha_bar_t = schedule.alpha_bar(torch.tensor(levels))
    nothing = torch.zeros_like(alpha_bar_t)
    to_x0_eps(nothing, nothing, alpha_bar_t=alpha_bar_t, prediction_type=config.prediction_type)
    if sampler != "ddim":
        _check_exact(route, asked)
    return route


def resolve_timesteps(
    schedule: NoiseSchedule,
    config: Any,
    num_inference_steps: int | None,
    spacing: Spacing | None,
    timesteps: Sequence[int] | None,
    is_fitted: bool,
) -> list[int]:
    """The levels that a call with these options visits; ``is_fitted`` lets the fitted timesteps of
    the configuration take part."""
    if timesteps is None:
        count = 50 if num_inference_steps is None else num_inference_steps
        # As schedulers do, whose trained_betas may be more than the levels of training.
        total = min(len(schedule), config.num_train_timesteps)
        return configured_timesteps(
            vars(config), count, total=total, spacing=spacing, use_fitted=is_fitted
        )
    if num_inference_steps is not None or spacing is not None:
        raise DDIMError(
            "timesteps say which levels are visited; leave out num_inference_steps and "
            "timestep_spacing, or timesteps."
        )
    return check_timesteps(timesteps, len(schedule))


def resolve_clip(config: Any, clip: ClipOption = None) -> Clip:
    """How the predicted x0 is kept in range, by a call's option or else by the configuration."""
    return clip if isinstance(clip, Clip) else select_clip(vars(config), clip)


@contextmanager
def reconfigured(
    schedulers: Sequence[Any], spacing: Spacing | None, order: int | None
) -> Iterator[None]:
    """While held, the configurations of schedulers say this spacing and order, for a loop that is
    not ours; a DDIMError refuses what a scheduler has not."""
    if spacing is not None:
        check_choice("timestep_spacing", spacing, SPACINGS)
    changes: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    for scheduler in schedulers:
        changed: dict[str, Any] = {} if spacing is None else {"timestep_spacing": spacing}
        if order is not None and isinstance(scheduler, DDIMScheduler):
            changed["multistep_order"] = check_order(order)
        elif order is not None and not isinstance(scheduler, GridScheduler):
            kind = type(scheduler).__name__
            raise DDIMError(f"order is ddim.DDIMScheduler's, and the scheduler is a {kind}.")
        config = dict(scheduler.config)
        if unknown := [name for name in changed if name not in config]:
            kind = type(scheduler).__name__
            raise DDIMError(f"a {kind} has no {unknown[0]}; leave it out.")
        is_own = spacing is None and all(config[name] == changed[name] for name in changed)
        if not is_own and config.get("fitted_timesteps"):
            changed["fitted_timesteps"] = None
        kept = [name for name in (*changed, "_use_default_values") if changed and name in config]
        changes.append((scheduler, changed, {name: config[name] for name in kept}))
    try:
        for scheduler, changed, _ in changes:
            scheduler.register_to_config(**changed)
        yield
    finally:
        for scheduler, _, before in changes:
            scheduler.register_to_config(**before)


def _check_exact(route: Route, order: int | None) -> None:
    """Refuses what a sampler that can be run backwards cannot have."""
    sampler, kind = route.sampler, route.clip.kind
    if route.eta != 0:
        raise DDIMError(f"{sampler} is deterministic, and needs eta 0; got eta={route.eta}.")
    if route.analytic:
        raise DDIMError(
            f"{sampler} is deterministic, and the analytic variance draws noise; leave out one of "
            "them."
        )
    if order == 2:
        raise DDIMError(f"{sampler} is a solver of its own; leave out order 2, or the sampler.")
    if kind != "none":
        raise DDIMError(
            f"{sampler} cannot be run backwards through clipping; use clip none (got {kind})."
        )
