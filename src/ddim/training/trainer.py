"""A training run, from its configuration to the finished model.

A run is a function of its configuration: the order of the data and all random numbers follow from
the seed. :mod:`ddim.training.loop` takes the steps, and :mod:`ddim.training.monitoring` follows
them."""

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

from ddim.configuration import noise_schedule
from ddim.core.schedule import NoiseSchedule
from ddim.data.batches import measure_prior
from ddim.data.dataset import ImageData, MixedSizes
from ddim.data.sources import load_images
from ddim.errors import DataError, DDIMError
from ddim.pipelines.networks import prepare_for_training
from ddim.training.base import Base, open_base
from ddim.training.checkpoint import hold, latest_checkpoint, load_training_state
from ddim.training.compilation import reason_against, usable_network
from ddim.training.config import TrainConfig, spelled
from ddim.training.division import divide
from ddim.training.draws import load_batches
from ddim.training.loop import EMA, Run, take_steps
from ddim.training.monitoring import Follower, Progress, RunLog
from ddim.training.network import resolution_for
from ddim.training.package import is_published, publish
from ddim.training.record import (
    begun_on,
    card_guidance,
    make_card,
    new_record,
    read_record,
    resume_record,
)
from ddim.training.stopping import StopSignals
from ddim.training.subject import Subject, match_classes, pixel_subject
from ddim.training.summary import summary

__all__ = ["TrainResult", "train"]


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
    shortness: str | None = None
    """A sentence, if the run was too short to teach the network anything."""


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Finds where a run computes: the CPU, one GPU, or the processes that were launched together.
    Raises a DDIMError if its precision cannot be used there."""
    # A plugin, since accelerate launch overrides the plain argument by its own default.
    accumulation = GradientAccumulationPlugin(num_steps=config.gradient_accumulation)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # Otherwise, processes that are launched without a GPU would not find each other.
            cpu=not torch.accelerator.is_available(),
            gradient_accumulation_plugin=accumulation,
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
        )
    except ValueError as error:
        raise DDIMError(
            f"--mixed-precision {config.mixed_precision} cannot be used here ({error}); use no."
        ) from error
    # accelerate would silently compute in float32.
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise DDIMError(
            "--mixed-precision fp16 needs a GPU, and this run is on the CPU; use bf16 or no."
        )
    return accelerator


def make_subject(config: TrainConfig, base: Base | None) -> tuple[ImageData, Subject]:
    """Opens the data of a run and makes what is trained on them. Raises a DDIMError if base, data
    and configuration do not fit together."""
    is_text = base is not None and base.is_text
    if base is not None and not is_text and config.text_options:
        raise DDIMError(
            f"{spelled(config.text_options[0])} is for text models, and {config.base} has no text "
            "encoder; leave it out, or take another --base."
        )
    try:
        data = load_images(
            config.data,
            split=config.split,
            resolution=config.size,
            channels=config.channels or (None if base is None else base.channels),
            center_crop=config.center_crop or config.random_crop,
            image_column=config.image_column,
            label_column=config.label_column,
            captions=is_text,
            caption_column=config.caption_column,
        )
    except MixedSizes as error:
        side = min(error.size)
        advice = (
            f"bring all to one size with --resolution {resolution_for(config, base, (side, side))}"
        )
        raise DataError(f"{error.what}; {advice}.") from error
    if base is None or not is_text:
        if base is not None and config.class_conditional and not config.from_scratch:
            data = match_classes(data, base)
        return data, pixel_subject(config, data, base)
    from ddim.training.text import text_subject

    return data, text_subject(config, data, base)


def train(
    config: TrainConfig,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_start: Callable[[Sequence[str]], None] | None = None,
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
        on_start: Called there, before the first step, with lines that say what is trained on what.
        revision: The revision of the code, for the model's card.

    Returns:
        How the run ended. ``finished`` is False after SIGINT, SIGTERM or SIGHUP, which end it
        with a checkpoint, or without one before its first step.

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
        note = on_note if main and on_note is not None else _say_nothing
        for sentence in (*data.notes, *subject.notes):
            note(sentence)
        schedule = noise_schedule(subject.package.scheduler.config)  # the levels it samples with
        guidance = card_guidance(config, base, schedule)
        found = latest_checkpoint(out / "checkpoints")
        before = None if found is None else read_record(found)
        processes = accelerator.num_processes if before is None else begun_on(before, config)
        record = new_record(config, data, subject, base, accelerator, revision, processes)
        if before is not None:
            record = resume_record(before, record, config, accelerator.num_processes)
        run = _start_or_resume(config, accelerator, subject, schedule, record, found)
        step = int(record["step"])
        if step >= run.steps and is_published(out, run.model, subject.package):
            return TrainResult(out, step, True, record["loss"], (), main, was_finished=True)
        if (changed := run.division.sentence) is not None:
            note(changed)
        if on_start is not None and main:
            on_start(summary(run, record, data))
        losses = _take_and_follow(run, record, on_progress, note)
        step = int(record["step"])
        finished = step >= run.steps
        if finished and main:
            # The brightness of latents is unknown, and that of one image has no spread.
            prior = None
            if subject.shape == (data.channels, *data.resolution) and len(data) > 1:
                prior = measure_prior(data, mirrored=config.horizontal_flip)
            card = make_card(record, config) | guidance
            publish(out, run.average.network, subject.package, card, prior)
        accelerator.wait_for_everyone()
        short = config.shortness(run.steps) if finished else None
        loss, taken = record["loss"], tuple(losses)
        return TrainResult(out, step, finished, loss, taken, main, shortness=short)


def _start_or_resume(
    config: TrainConfig,
    accelerator: Accelerator,
    subject: Subject,
    schedule: NoiseSchedule,
    record: dict[str, Any],
    found: Path | None,
) -> Run:
    """Makes optimiser and average, and restores the newest checkpoint if there is one."""
    division = divide(config, record["processes"], accelerator.num_processes)
    accelerator.gradient_accumulation_steps = division.each
    network = subject.network.to(accelerator.device)
    if accelerator.device.type == "cpu":
        prepare_for_training(network)
    average = EMA(network, config.pace(config.steps(division.processes)).ema_decay)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.peak_learning_rate,
        weight_decay=config.weight_decay,
        # One kernel for all weights. Under fp16, accelerate scales gradients for the other kind.
        fused=config.mixed_precision != "fp16",
    )
    run = Run(config, accelerator, division, subject, schedule, network, optimizer, average)
    if found is not None:
        load_training_state(found, run)
        if accelerator.scaler is not None and record.get("scaler"):
            accelerator.scaler.load_state_dict(record["scaler"])
    return run


def _say_nothing(sentence: str) -> None:
    pass


def _compile(run: Run, batch: Any, start: int, note: Callable[[str], None]) -> Callable[..., Any]:
    """Compiles the network if that is worth it, and tries it on the first batch."""
    if (reason := reason_against(run.accelerator.device)) is not None:
        note(reason)
        return run.model
    piece = run.division.piece(0, run.accelerator.process_index)
    network, reason = usable_network(run, batch, start, piece)
    if reason is not None:
        note(reason)
    return network


def _take_and_follow(
    run: Run,
    record: dict[str, Any],
    on_progress: Callable[[Progress], None] | None,
    note: Callable[[str], None],
) -> list[tuple[int, float]]:
    """Takes the steps that are left, until a signal stops them, and brings ``record`` up to date.
    Returns (step, loss) of every step."""
    config, accelerator, out = run.config, run.accelerator, Path(run.config.out)
    started = time.perf_counter() - float(record["seconds"])
    start, held_out = int(record["step"]), set(record["held_out_images"])
    with StopSignals(accelerator.num_processes) as signals, contextlib.ExitStack() as opened:
        subject = run.subject.prepared(accelerator, out / "latents.bin", signals.check)
        if signals.agreed():
            return []
        model, optimizer = accelerator.prepare(run.model, run.optimizer)
        run = replace(run, subject=subject, model=model, optimizer=optimizer)
        images = [i for i in range(record["data"]["images"]) if i not in held_out]
        part: dict[str, Any] = {"images": images, "start": start, "stop": run.steps}
        batches = load_batches(subject.examples, config, accelerator, division=run.division, **part)
        network: Callable[..., Any] = model
        if start < run.steps:
            first = next(batches)
            if isinstance(first, DDIMError):  # before a log is written
                raise first
            batches = itertools.chain([first], batches)
            if config.compile:
                network = _compile(run, first, start, note)
        log = None
        if accelerator.is_main_process and start < run.steps:
            log = opened.enter_context(contextlib.closing(RunLog(out / "log", start=start)))
        follower = Follower(run, record, log, on_progress, started)
        for result in take_steps(run, batches, start, network):
            stopping = signals.agreed()
            follower.follow(result, stopping=stopping)
            if stopping:
                break
    return follower.losses
