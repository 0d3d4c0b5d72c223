"""The optimiser steps of a run, as a generator.

The timesteps and the noise of step n follow from (seed, n, process) alone, so that a run that is
resumed from step n continues to the same losses as one that never stopped."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddim.core.objective import draw_timesteps, loss_weights, offset_noise, training_loss
from ddim.core.schedule import NoiseSchedule
from ddim.errors import DDIMError
from ddim.training.config import TrainConfig
from ddim.training.draws import Draws, Place, mix
from ddim.training.ema import EMA
from ddim.training.subject import Subject

__all__ = ["Run", "StepResult", "learning_rate_at", "take_steps"]


@dataclass(frozen=True, eq=False)
class Run:
    """Everything that a step needs."""

    config: TrainConfig
    accelerator: Accelerator
    subject: Subject
    schedule: NoiseSchedule
    model: nn.Module
    optimizer: Any
    average: EMA

    @property
    def images_per_step(self) -> int:
        """Images that all processes together take in one optimiser step."""
        forward = self.config.batch_size * self.config.gradient_accumulation
        return forward * int(self.accelerator.num_processes)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return -(-self.config.images // self.images_per_step)


@dataclass(frozen=True, eq=False)
class StepResult:
    """An optimiser step that was taken."""

    step: int
    """Number of steps taken so far."""
    loss: Tensor
    """Mean loss of the images of this process. It stays on the device, since to read it is to wait
    for the step to end."""
    learning_rate: float


def learning_rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """Returns the learning rate of optimiser step ``step`` (from 0) of ``steps``: a linear warm-up,
    then the schedule down to 0."""
    peak = config.peak_learning_rate
    if step < config.lr_warmup_steps:
        return peak * (step + 1) / config.lr_warmup_steps
    if config.lr_schedule == "constant":
        return peak
    part = (step - config.lr_warmup_steps) / max(1, steps - config.lr_warmup_steps)
    fall = 1 - part if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * part))
    return peak * fall


def take_steps(run: Run, batches: Iterator[Any], start: int) -> Iterator[StepResult]:
    """Takes the optimiser steps of a run from ``start`` (from 0) on, and yields after each. The
    caller logs, saves, and may stop between two steps.

    Raises:
        DDIMError: If a batch cannot be read.
    """
    network = torch.compile(run.model) if run.config.compile else run.model
    for step in range(start, run.steps):
        rate = learning_rate_at(step, run.steps, run.config)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=run.accelerator.device)
        for part in range(run.config.gradient_accumulation):
            batch = next(batches)
            if isinstance(batch, DDIMError):
                raise batch
            loss = _accumulate(run, network, batch, (step, part, run.accelerator.process_index))
            total += loss / run.config.gradient_accumulation
        run.average.update(run.accelerator.unwrap_model(run.model), step)
        yield StepResult(step + 1, total, rate)


def _accumulate(run: Run, network: Any, batch: Any, place: Place) -> Tensor:
    """One forward and backward pass. The optimiser moves the weights in the last pass of a step."""
    config, accelerator, schedule = run.config, run.accelerator, run.schedule
    kind = run.subject.package.scheduler.config.prediction_type
    draws = Draws.at(config.seed, place, accelerator.device)
    x0, condition = run.subject.clean(batch, accelerator.device, draws)
    t, noise = _draw(x0, draws, config, len(schedule))
    torch.manual_seed(mix(config.seed, 4, *place))  # dropout
    with accelerator.accumulate(run.model), accelerator.autocast():
        weights = loss_weights(
            schedule,
            t,
            prediction_type=kind,
            weighting=config.weighting,
            gamma=config.snr_gamma,
            floor=config.weight_floor,
        )
        loss = training_loss(
            run.subject.predictor(network, condition),
            x0,
            schedule=schedule,
            t=t,
            noise=noise,
            prediction_type=kind,
            weights=weights,
        ).mean()
        accelerator.backward(loss)
        if accelerator.sync_gradients and config.gradient_clip > 0:
            accelerator.clip_grad_norm_(run.model.parameters(), config.gradient_clip)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return loss.detach()


def _draw(x0: Tensor, draws: Draws, config: TrainConfig, levels: int) -> tuple[Tensor, Tensor]:
    """Draws a timestep and noise for each clean sample."""
    t = draw_timesteps(len(x0), levels, generator=draws.stream(5))
    noise = torch.randn(x0.shape, generator=draws.generator, device=x0.device)
    return t, offset_noise(noise, config.offset_noise, generator=draws.stream(8))
