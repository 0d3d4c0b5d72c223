"""A training run, from its configuration to the finished model.

A run is a function of its configuration: the order of the data and all random numbers follow from
the seed. :mod:`ddim.training.loop` takes the steps; here they are logged, validated and saved."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ddim.configuration import noise_schedule
from ddim.core.schedule import NoiseSchedule
from ddim.data.batches import measure_prior
from ddim.data.dataset import ImageData
from ddim.data.sources import load_images
from ddim.errors import DDIMError
from ddim.training.base import Base, open_base
from ddim.training.checkpoint import (
    hold,
    latest_checkpoint,
    load_training_state,
    prune,
    save_checkpoint,
)
from ddim.training.config import TrainConfig
from ddim.training.ema import EMA
from ddim.training.loading import load_batches
from ddim.training.loop import Run, StepResult, take_steps
from ddim.training.monitoring import RunLog, preview, validation_loss
from ddim.training.package import is_published, publish
from ddim.training.process import StopSignals, make_accelerator
from ddim.training.record import card_guidance, make_card, new_record, resume_record
from ddim.training.subject import Subject, pixel_subject

__all__ = ["NonFiniteLossError", "Progress", "TrainResult", "train"]


class NonFiniteLossError(DDIMError):
    """The loss or the weights became NaN or infinite; the message names the step."""


@dataclass(frozen=True)
class Progress:
    """How far a run is, after each logged interval."""

    step: int
    steps: int
    images: int
    loss: float
    images_per_second: float
    seconds_left: float
    validation_loss: float | None = None


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    out: Path
    step: int
    finished: bool
    loss: float | None
    losses: tuple[tuple[int, float], ...]
    """(step, loss) of every step that this call took on this process."""
    is_main_process: bool
    """Whether this is the one process of the run that prints."""
    was_finished: bool = False
    """Whether the model had been written before, so that nothing was left to do."""


def make_subject(config: TrainConfig, base: Base | None) -> tuple[ImageData, Subject]:
    """Opens the data of a run and makes what is trained on them.

    Raises:
        DDIMError: If base, data and configuration do not fit together.
    """
    is_text = base is not None and base.is_text
    if base is not None and not is_text and config.text_options:
        raise DDIMError(
            f"{config.text_options[0]} is for text models, and {config.base} has no text encoder; "
            "leave it out, or take another --base."
        )
    data = load_images(
        config.data,
        split=config.split,
        resolution=config.resolution,
        channels=config.channels or (None if base is None else base.channels),
        center_crop=config.center_crop,
        image_column=config.image_column,
        label_column=config.label_column,
        captions=is_text,
        caption_column=config.caption_column,
    )
    if base is None or not is_text:
        return data, pixel_subject(config, data, base)
    from ddim.training.text import text_subject

    return data, text_subject(config, data, base)


def train(
    config: TrainConfig,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    revision: str | None = None,
) -> TrainResult:
    r"""Trains until ``config.images`` were seen, resuming from the newest checkpoint in
    ``config.out`` if there is one. The folder is held until the run ends.

    The run computes on whatever ``accelerate`` finds: the CPU, one GPU, or the processes of
    ``accelerate launch`` or ``torchrun``.

    Args:
        config: The run.
        on_progress: Called on the main process after each logged interval.
        on_note: Called there with each sentence that the user should read before the run begins.
        revision: The revision of the code, for the model's card.

    Returns:
        How the run ended. ``finished`` is False after SIGINT or SIGTERM, which end it with a
        checkpoint.

    Raises:
        DDIMError: If data, configuration or checkpoint do not fit together, or another run holds
            the folder.
        NonFiniteLossError: If the loss or the weights become NaN or infinite; no checkpoint is
            written from that step on.
    """
    accelerator = make_accelerator(config)
    main, out = accelerator.is_main_process, Path(config.out)
    with hold(out, accelerator):
        base = None if config.base is None else open_base(config.base)
        data, subject = make_subject(config, base)
        if on_note is not None and main:
            for note in subject.notes:
                on_note(note)
        schedule = noise_schedule(subject.package.scheduler.config)  # the levels it samples with
        guidance = card_guidance(config, base, schedule)
        record = new_record(config, data, subject, base, accelerator, revision)
        run, record = _begin(config, accelerator, subject, schedule, record)
        step = int(record["step"])
        if step >= run.steps and is_published(out, run.model, subject.package):
            return TrainResult(out, step, True, record["loss"], (), main, was_finished=True)
        losses = _take_and_follow(run, record, on_progress)
        step = int(record["step"])
        finished = step >= run.steps
        if finished and main:
            # The brightness of latents is unknown, and that of one image has no spread.
            is_pixels = subject.shape == (data.channels, *data.resolution)
            prior = measure_prior(data) if is_pixels and len(data) > 1 else None
            card = make_card(record, config) | guidance
            publish(out, run.average.network, subject.package, card, prior)
        accelerator.wait_for_everyone()
        return TrainResult(out, step, finished, record["loss"], tuple(losses), main)


def _begin(
    config: TrainConfig,
    accelerator: Accelerator,
    subject: Subject,
    schedule: NoiseSchedule,
    record: dict[str, Any],
) -> tuple[Run, dict[str, Any]]:
    """Makes optimiser and average, and restores the newest checkpoint if there is one."""
    network = subject.network.to(accelerator.device)
    average = EMA(network, config.ema_decay)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.peak_learning_rate, weight_decay=config.weight_decay
    )
    found = latest_checkpoint(Path(config.out) / "checkpoints")
    if found is not None:
        record = resume_record(found, record, config)
        load_training_state(
            found,
            network=network,
            averaged=average.network,
            optimizer=optimizer,
            package=subject.package,
        )
        if accelerator.scaler is not None and record.get("scaler"):
            accelerator.scaler.load_state_dict(record["scaler"])
    return Run(config, accelerator, subject, schedule, network, optimizer, average), record


def _take_and_follow(
    run: Run, record: dict[str, Any], on_progress: Callable[[Progress], None] | None
) -> list[tuple[int, float]]:
    """Takes the steps that are left, until a signal stops them, and has each followed.

    Returns:
        (step, loss) of every step; ``record`` is brought up to date.
    """
    config, accelerator, out = run.config, run.accelerator, Path(run.config.out)
    started = time.perf_counter() - float(record["seconds"])
    start, held_out = int(record["step"]), range(*record["held_out"])
    subject = run.subject.prepared(accelerator, out / "latents.bin")
    model, optimizer = accelerator.prepare(run.model, run.optimizer)
    run = replace(run, subject=subject, model=model, optimizer=optimizer)
    images = [i for i in range(record["data"]["images"]) if i not in held_out]
    batches = load_batches(run, images, start)
    with StopSignals() as signals, contextlib.ExitStack() as opened:
        log = None
        if accelerator.is_main_process and start < run.steps:
            log = opened.enter_context(contextlib.closing(RunLog(out / "log", start=start)))
        follower = _Follower(run, record, held_out, log, on_progress, started)
        for result in take_steps(run, batches, start):
            step = result.step
            logged, saved = step % config.log_every == 0, step % config.checkpoint_every == 0
            stopping = signals.agreed(accelerator, meeting=logged or saved)
            saved = saved or stopping or step == run.steps
            follower.follow(result, logged=logged or saved, saved=saved)
            if stopping:
                break
    return follower.losses


class _Follower:
    """Follows the steps of a run: reads the losses, logs, validates, saves and draws previews."""

    def __init__(
        self,
        run: Run,
        record: dict[str, Any],
        held_out: range,
        log: RunLog | None,
        on_progress: Callable[[Progress], None] | None,
        started: float,
    ) -> None:
        self.run, self.record, self.held_out, self.log = run, record, held_out, log
        self.on_progress, self.started = on_progress, started
        self.out, self.root = Path(run.config.out), Path(run.config.out) / "checkpoints"
        self.losses: list[tuple[int, float]] = []
        self._unread: list[StepResult] = []
        self._restart_clock(int(record["step"]))

    def follow(self, result: StepResult, *, logged: bool, saved: bool) -> None:
        """Takes note of a step; ``logged`` and ``saved`` say what is due after it."""
        run, step = self.run, result.step
        self._unread.append(result)
        if logged:
            loss = self._read_losses()
            elapsed = time.perf_counter() - self._clock
            images = (step - self._clock_step) * run.images_per_step
            rate = images / elapsed if elapsed else float("nan")
            self._restart_clock(step)
            held = validation_loss(run, self.held_out) if saved and self.held_out else None
            self._report(result, loss, rate, held)
            if saved:
                self._save(step, loss, held)
                self._restart_clock(step)
        every = run.config.preview_every
        if every and step % every == 0 and run.accelerator.is_main_process:
            preview(run, self.out / "previews" / f"{step:07d}.png")
            self._restart_clock(step)

    def _restart_clock(self, step: int) -> None:
        self._clock, self._clock_step = time.perf_counter(), step

    def _read_losses(self) -> float:
        """Moves the losses to the host, once, and returns their mean.

        Raises:
            NonFiniteLossError: If one is not finite.
        """
        stacked = torch.stack([result.loss for result in self._unread])
        values = self.run.accelerator.reduce(stacked, "mean").tolist()
        read = [(result.step, value) for result, value in zip(self._unread, values, strict=True)]
        for step, value in read:
            self._check_finite("loss", value, step)
        self.losses.extend(read)
        self._unread.clear()
        return float(sum(values) / len(values))

    def _report(self, result: StepResult, loss: float, rate: float, held: float | None) -> None:
        step, steps, per_step = result.step, self.run.steps, self.run.images_per_step
        if self.log is not None:
            self.log.add(
                step,
                loss=loss,
                learning_rate=result.learning_rate,
                images_per_second=rate,
                validation_loss=held,
            )
        if self.on_progress is not None and self.run.accelerator.is_main_process:
            left = (steps - step) * per_step / rate
            self.on_progress(Progress(step, steps, step * per_step, loss, rate, left, held))

    def _save(self, step: int, loss: float, held: float | None) -> None:
        """Writes a checkpoint, unless a number is not finite."""
        run, record = self.run, self.record
        accelerator, parameters = run.accelerator, run.average.network.parameters()
        # A gradient may overflow where the loss did not, and large weights in the network.
        largest = torch.stack([p.abs().max() for p in parameters]).max().item()
        self._check_finite("largest weight", largest, step)
        self._check_finite("held-out loss", held or 0.0, step)
        record |= {
            "step": step,
            "images_seen": step * run.images_per_step,
            "loss": loss,
            "validation_loss": held,
            "seconds": round(time.perf_counter() - self.started, 1),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        }
        best = record["best"]
        if held is not None and (best is None or held < best["validation_loss"]):
            record["best"] = best = {"step": step, "validation_loss": held}
        if accelerator.is_main_process:
            save_checkpoint(
                self.root,
                step,
                network=accelerator.unwrap_model(run.model),
                averaged=run.average.network,
                optimizer=run.optimizer.optimizer,
                record=record,
                package=run.subject.package,
            )
            keep = run.config.keep_checkpoints
            prune(self.root, keep=keep, best=best["step"] if best else None)
        accelerator.wait_for_everyone()

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the {what} became {value} at step {step}; the last good checkpoint is "
                f"{latest_checkpoint(self.root) or 'none'}. "
                "Lower --learning-rate, or use --mixed-precision bf16 or no."
            )
