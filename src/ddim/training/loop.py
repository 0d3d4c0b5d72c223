"""The optimiser steps of a run, as a generator, and the average of the network over them.

The timesteps and the noise of step n follow from (seed, n, process) alone, so that a run that is
resumed from step n continues to the same losses as one that never stopped."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ddim.core.objective import draw_timesteps, loss_weights, offset_noise, training_loss
from ddim.core.schedule import NoiseSchedule
from ddim.errors import DDIMError
from ddim.training.config import TrainConfig
from ddim.training.division import Division, Piece
from ddim.training.draws import Draws, mix
from ddim.training.subject import Subject

__all__ = [
    *("EMA", "Run", "StepResult"),
    *("clip_gradients", "ema_decay_at", "learning_rate_at", "step_loss", "take_steps"),
]


def ema_decay_at(step: int, decay: float) -> float:
    r"""The decay after n updates: :math:`\min(\mathrm{decay}, (1 + n) / (10 + n))`, so that early
    averages forget the start."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """The exponential moving average of a network's parameters, in a float32 copy of it: average <-
    decay average + (1 - decay) parameter.

    Buffers (tables, running statistics) are copied, since the average of two tables means nothing.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
        self.decay = decay
        self._ours: list[Tensor] = list(self.network.parameters())
        self._watch(network)

    def _watch(self, network: nn.Module) -> None:
        """Finds what is averaged, once: that takes longer than to average it."""
        self._seen, self._theirs = network, list[Tensor](network.parameters())
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Moves the average towards the network after optimiser step ``step`` (from 0)."""
        if network is not self._seen:
            self._watch(network)
        ours, theirs = self._ours, self._theirs
        pairs = list(zip(ours, theirs, strict=True))
        if any(a.dtype != b.dtype or a.device != b.device for a, b in pairs):
            theirs = [b.to(a.device, a.dtype) for a, b in pairs]
        torch._foreach_lerp_(ours, theirs, 1 - ema_decay_at(step, self.decay))
        for mine, other in self._buffers:
            mine.copy_(other)


@dataclass(frozen=True, eq=False)
class Run:
    """Everything that a step needs."""

    config: TrainConfig
    accelerator: Accelerator
    division: Division
    subject: Subject
    schedule: NoiseSchedule
    model: nn.Module
    optimizer: Any
    average: EMA

    @property
    def prediction_type(self) -> Any:
        return self.subject.package.scheduler.config.prediction_type

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.steps(self.division.processes)


@dataclass(frozen=True, eq=False)
class StepResult:
    """An optimiser step that was taken."""

    step: int
    """Number of steps taken so far."""
    loss: Tensor
    """Mean over the images of this process. It stays on the device: reading it waits for the
    step."""
    learning_rate: float


def learning_rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """Returns the learning rate of optimiser step ``step`` (from 0) of ``steps``: a linear warm-up,
    then the schedule down to 0."""
    peak, warm_up = config.peak_learning_rate, config.pace(steps).lr_warmup_steps
    if step < warm_up:
        return peak * (step + 1) / warm_up
    if config.lr_schedule == "constant":
        return peak
    part = (step - warm_up) / max(1, steps - warm_up)
    fall = 1 - part if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * part))
    return peak * fall


def take_steps(
    run: Run, batches: Iterator[Any], start: int, network: Callable[..., Any] | None = None
) -> Iterator[StepResult]:
    """Takes the optimiser steps of a run from ``start`` (from 0) on, and yields after each. The
    caller logs, saves, and may stop between two steps. ``network`` is called in place of the run's
    model; it has the same parameters. Raises a DDIMError if a batch cannot be read."""
    network = run.model if network is None else network
    averaged = run.accelerator.unwrap_model(run.model)
    for step in range(start, run.steps):
        rate = learning_rate_at(step, run.steps, run.config)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=run.accelerator.device)
        for turn in range(run.division.each):
            batch = next(batches)
            if isinstance(batch, DDIMError):
                raise batch
            piece = run.division.piece(turn, run.accelerator.process_index)
            loss = _accumulate(run, network, batch, step, piece)
            total += loss / run.division.each
        run.average.update(averaged, step)
        yield StepResult(step + 1, total, rate)


def step_loss(run: Run, network: Any, batch: Any, step: int, piece: Piece) -> Tensor:
    """Returns the mean loss of a batch, whose random numbers follow from the seed, the step and the
    piece of it."""
    config, accelerator, schedule = run.config, run.accelerator, run.schedule
    draws = Draws.at(config.seed, step, piece, accelerator.device)
    x0, condition = run.subject.clean(batch, accelerator.device, draws)

    def draw_noise(count: int) -> Tensor:
        shape = (count, *x0.shape[1:])
        noise = torch.randn(shape, generator=draws.generator, device=x0.device)
        return offset_noise(noise, config.offset_noise, generator=draws.stream(8))

    def draw_levels(count: int) -> Tensor:
        return draw_timesteps(count, len(schedule), generator=draws.stream(5))

    t, noise = draws.own(len(x0), draw_levels), draws.own(len(x0), draw_noise)
    kind, min_snr = run.prediction_type, {"gamma": config.snr_gamma, "floor": config.weight_floor}
    torch.manual_seed(mix(config.seed, 4, *draws.place) + piece.number)  # dropout
    weights = loss_weights(schedule, t, prediction_type=kind, weighting=config.weighting, **min_snr)
    with accelerator.autocast():
        predict = run.subject.predictor(network, condition)
        return training_loss(
            predict, x0, schedule=schedule, t=t, noise=noise, prediction_type=kind, weights=weights
        ).mean()


def clip_gradients(accelerator: Accelerator, optimizer: Any, most: float) -> None:
    """Scales gradients down to the norm ``most``, if that of all of them together is larger.

    On a CPU the norm is looked at, and what lies below is left alone: torch would multiply it by 1,
    which takes as long as the norm."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU)
    if accelerator.device.type != "cpu" or accelerator.distributed_type not in kinds:
        accelerator.clip_grad_norm_(held, most)
        return
    found = [p.grad for p in held if p.grad is not None]
    norm = nn.utils.get_total_norm(found, foreach=True)
    if not float(norm) + 1e-6 < most:  # torch adds as much; NaN is scaled too
        nn.utils.clip_grads_with_norm_(held, most, norm, foreach=True)


def _accumulate(run: Run, network: Any, batch: Any, step: int, piece: Piece) -> Tensor:
    """One forward and backward pass. The optimiser moves the weights in the last pass of a step."""
    accelerator, clip = run.accelerator, run.config.gradient_clip
    with accelerator.accumulate(run.model):
        loss = step_loss(run, network, batch, step, piece)
        accelerator.backward(loss)
        if accelerator.sync_gradients and clip > 0:
            clip_gradients(accelerator, run.optimizer, clip)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return loss.detach()
