r"""The training loop.

A run is a function of its configuration: the order of the data, the timesteps and the noise of step
n follow from (seed, n, process) alone, so a run that is resumed from step n continues to the same
losses as one that never stopped."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ddim.configuration import noise_schedule
from ddim.core.denoiser import ModelDenoiser
from ddim.core.noise import seeded_randn
from ddim.core.objective import draw_timesteps, loss_weights, offset_noise, training_loss
from ddim.core.sampler import sample
from ddim.core.schedule import NoiseSchedule
from ddim.core.timesteps import select_timesteps, step_pairs
from ddim.data.batches import measure_prior
from ddim.data.dataset import ImageData
from ddim.data.sources import load_images
from ddim.errors import DDIMError
from ddim.files import write_text
from ddim.models.images import make_grid, save_png, to_uint8
from ddim.training.base import Base, open_base
from ddim.training.checkpoint import (
    check_out,
    is_published,
    latest_checkpoint,
    load_training_state,
    prune,
    publish,
    resume_record,
    save_checkpoint,
)
from ddim.training.config import TrainConfig, command_line
from ddim.training.draws import Draws, Place, mix
from ddim.training.ema import EMA
from ddim.training.process import RunLog, StopSignals, make_accelerator
from ddim.training.subject import Subject, pixel_subject

__all__ = ["NonFiniteLossError", "Progress", "TrainResult", "learning_rate_at", "train"]


class NonFiniteLossError(DDIMError):
    """The loss or the weights became NaN or infinite; the message names the step."""


@dataclass(frozen=True)
class Progress:
    """What the caller is told after each logged interval."""

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
    """Whether this is the process that speaks, of those that ran together."""
    was_finished: bool = False
    """Whether there was nothing left to do: the model had been written before."""


def make_subject(config: TrainConfig, base: Base | None) -> tuple[ImageData, Subject]:
    """The data of a run, and what is trained on them.

    Raises:
        DDIMError: If base, data and configuration do not fit together.
    """
    is_text = base is not None and base.is_text
    if base is not None and not is_text and config.text_options:
        given = config.text_options[0]
        raise DDIMError(
            f"{given} is of text models, and {config.base} has no text encoder; leave it out, or "
            "take another --base."
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


def learning_rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of optimiser step ``step`` (from 0) of ``steps``: a linear warm-up, then
    the schedule to 0."""
    peak = config.peak_learning_rate
    if step < config.lr_warmup_steps:
        return peak * (step + 1) / config.lr_warmup_steps
    if config.lr_schedule == "constant":
        return peak
    part = (step - config.lr_warmup_steps) / max(1, steps - config.lr_warmup_steps)
    fall = 1 - part if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * part))
    return peak * fall


class _Batches(Sampler[list[int]]):
    """The images of every batch from step ``start`` on: epoch after epoch of permutations, each
    process its own share."""

    def __init__(
        self,
        images: Sequence[int],
        config: TrainConfig,
        *,
        start: int,
        stop: int,
        rank: int,
        world: int,
    ) -> None:
        self.images, self.config, self.start, self.stop, self.rank, self.world = (
            images,
            config,
            start,
            stop,
            rank,
            world,
        )
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[list[int]]:
        size = self.config.batch_size
        for batch in range(
            self.start * self.config.gradient_accumulation,
            self.stop * self.config.gradient_accumulation,
        ):
            first = (batch * self.world + self.rank) * size
            yield [self._index(first + i) for i in range(size)]

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.images))
        if self._epoch != epoch:
            self._epoch = epoch
            self._order = torch.randperm(
                len(self.images),
                generator=torch.Generator().manual_seed(mix(self.config.seed, epoch, 1)),
            )
        return self.images[int(self._order[offset])]


class _Loadable(Dataset[tuple[Tensor, int]]):
    """Examples by lists of indices. An error comes as a value: one raised in a worker would have
    its traceback for its message."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]] | DDIMError:
        try:
            return [self.examples[i] for i in indices]
        except DDIMError as error:
            return error


def _collate(items: list[tuple[Tensor, int]] | DDIMError) -> Any:
    return items if isinstance(items, DDIMError) else default_collate(items)


def _draw(x0: Tensor, draws: Draws, config: TrainConfig, levels: int) -> tuple[Tensor, Tensor]:
    """The timesteps of clean data and their noise."""
    t = draw_timesteps(len(x0), levels, generator=draws.stream(5))
    noise = torch.randn(x0.shape, generator=draws.generator, device=x0.device)
    return t, offset_noise(noise, config.offset_noise, generator=draws.stream(8))


@torch.no_grad()
def validation_loss(
    network: nn.Module,
    subject: Subject,
    indices: range,
    config: TrainConfig,
    schedule: NoiseSchedule,
    device: torch.device,
) -> float:
    """The unweighted loss over held-out images, with the same noise and evenly spread timesteps
    every time."""
    generator = torch.Generator().manual_seed(mix(config.seed, 2))
    size = min(
        128, 4 * config.batch_size
    )  # without gradients there is room for more than is trained on
    total = 0.0
    for first in range(0, len(indices), size):
        part = indices[first : first + size]
        x0, condition = subject.clean(
            default_collate([subject.examples[i] for i in part]), device, None
        )
        t = ((torch.arange(first, first + len(part)) * 2 + 1) * len(schedule)) // (2 * len(indices))
        noise = torch.randn(x0.shape, generator=generator).to(device)
        kind = subject.package.scheduler.config.prediction_type
        losses = training_loss(
            subject.predictor(network, condition),
            x0,
            schedule=schedule,
            t=t,
            noise=noise,
            prediction_type=kind,
        )
        total += float(losses.sum())
    return total / len(indices)


@torch.no_grad()
def preview(
    network: nn.Module,
    subject: Subject,
    config: TrainConfig,
    schedule: NoiseSchedule,
    device: torch.device,
    path: Path,
) -> None:
    """Samples a grid from fixed seeds and writes it as a PNG, with the captions of a text model as
    a text file beside it."""
    predict, captions = subject.preview(network, config.preview_count, device)
    denoise = ModelDenoiser(predict, schedule, subject.package.scheduler.config.prediction_type)
    x_t = seeded_randn(subject.shape, range(config.preview_count)).to(device)
    steps = min(config.preview_steps, len(schedule))
    x0 = sample(
        denoise,
        x_t,
        step_pairs(select_timesteps(len(schedule), steps, "trailing")),
        schedule=schedule,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(make_grid(to_uint8(subject.images(x0))), path)
    if captions:
        write_text(path.parent / "captions.txt", "".join(f"{caption}\n" for caption in captions))


def train(
    config: TrainConfig,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    revision: str | None = None,
) -> TrainResult:
    r"""Trains until ``config.images`` were seen, resuming from the newest checkpoint in
    ``config.out`` if there is one.

    Runs on whatever ``accelerate`` finds: the CPU, one GPU, or the processes of ``accelerate
    launch`` or ``torchrun``.

    Args:
        config: The run.
        on_progress: Called on the main process after each logged interval.
        on_note: Called there with each sentence that the user should read before the run begins.
        revision: Of the code, for the model's card.

    Returns:
        How the run ended. ``finished`` is False after SIGINT or SIGTERM, which end it with a
        checkpoint.

    Raises:
        DDIMError: If data, configuration or checkpoint do not fit together.
        NonFiniteLossError: If the loss or the weights become NaN or infinite; no checkpoint is
            written from that step on.
    """
    accelerator = make_accelerator(config)
    out, root = Path(config.out), Path(config.out) / "checkpoints"
    check_out(out)
    base = None if config.base is None else open_base(config.base)
    data, subject = make_subject(config, base)
    if on_note is not None and accelerator.is_main_process:
        for note in subject.notes:
            on_note(note)

    scheduler = subject.package.scheduler.config
    schedule = noise_schedule(scheduler)  # the same levels that the written scheduler samples with
    guidance = _guidance(config, base, schedule)
    network = subject.network.to(accelerator.device)
    average = EMA(network, config.ema_decay)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.peak_learning_rate, weight_decay=config.weight_decay
    )
    per_step = config.batch_size * config.gradient_accumulation * accelerator.num_processes
    steps = -(-config.images // per_step)

    step, record = 0, _new_record(config, data, subject, base, accelerator, revision)
    record["parameters"] = sum(p.numel() for p in network.parameters())
    found = latest_checkpoint(root)
    if found is not None:
        record = resume_record(found, record, config)
        step = int(record["step"])
        load_training_state(
            found,
            network=network,
            averaged=average.network,
            optimizer=optimizer,
            package=subject.package,
        )
        if accelerator.scaler is not None and record.get("scaler"):
            accelerator.scaler.load_state_dict(record["scaler"])
    if step >= steps and is_published(out, network, subject.package):
        return TrainResult(
            out, step, True, record["loss"], (), accelerator.is_main_process, was_finished=True
        )

    started = time.perf_counter()
    subject = subject.prepared(accelerator, out / "latents.bin")
    model, optimizer = accelerator.prepare(network, optimizer)
    compiled = torch.compile(model) if config.compile else model
    validation = range(*record["held_out"])
    training = [i for i in range(len(data)) if i not in validation]
    batches = _Batches(
        training,
        config,
        start=step,
        stop=steps,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    loader = iter(
        DataLoader(
            _Loadable(subject.examples),
            batch_sampler=batches,
            num_workers=config.workers,
            collate_fn=_collate,
            pin_memory=accelerator.device.type == "cuda",
        )
    )

    losses: list[tuple[int, float]] = []
    pending: list[tuple[int, Tensor]] = []
    last_loss: float | None = record.get("loss")
    clock, clock_step = time.perf_counter(), step
    seconds_before = float(record["seconds"])

    def flush() -> float:
        """Moves the pending losses to the host, once, and refuses to go on from one that is not
        finite."""
        values = accelerator.reduce(torch.stack([loss for _, loss in pending]), "mean").tolist()
        for (number, _), value in zip(pending, values, strict=True):
            if not math.isfinite(value):
                raise _not_finite("loss", value, number, root)
        losses.extend((number, value) for (number, _), value in zip(pending, values, strict=True))
        pending.clear()
        return float(sum(values) / len(values))

    with StopSignals() as stop, contextlib.ExitStack() as opened:
        logged = accelerator.is_main_process and step < steps
        log = (
            opened.enter_context(contextlib.closing(RunLog(out / "log", start=step)))
            if logged
            else None
        )
        asked_to_stop = False
        while step < steps and not asked_to_stop:
            total = torch.zeros((), device=accelerator.device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, steps, config)
            for part in range(config.gradient_accumulation):
                batch = next(loader)
                if isinstance(batch, DDIMError):
                    raise batch
                place: Place = (step, part, accelerator.process_index)
                draws = Draws.at(config.seed, place, accelerator.device)
                x0, condition = subject.clean(batch, accelerator.device, draws)
                t, noise = _draw(x0, draws, config, len(schedule))
                torch.manual_seed(mix(config.seed, 4, *place))  # dropout
                with accelerator.accumulate(model), accelerator.autocast():
                    loss = training_loss(
                        subject.predictor(compiled, condition),
                        x0,
                        schedule=schedule,
                        t=t,
                        noise=noise,
                        prediction_type=scheduler.prediction_type,
                        weights=loss_weights(
                            schedule,
                            t,
                            prediction_type=scheduler.prediction_type,
                            weighting=config.weighting,
                            gamma=config.snr_gamma,
                            floor=config.weight_floor,
                        ),
                    ).mean()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and config.gradient_clip > 0:
                        accelerator.clip_grad_norm_(model.parameters(), config.gradient_clip)
                    optimizer.step()
                    optimizer.zero_grad()
                total += loss.detach() / config.gradient_accumulation
            average.update(accelerator.unwrap_model(model), step)
            step += 1
            pending.append((step, total))

            asked_to_stop = stop.received is not None
            if (
                accelerator.num_processes > 1
            ):  # all processes must leave at one step: they agree where they meet anyway
                logging = step % config.log_every == 0 or step % config.checkpoint_every == 0
                asked_to_stop = logging and bool(
                    accelerator.reduce(
                        torch.tensor(float(asked_to_stop), device=accelerator.device), "sum"
                    )
                    > 0
                )
            at_end = step == steps or asked_to_stop
            due = at_end or step % config.checkpoint_every == 0
            if step % config.log_every == 0 or due:
                last_loss = flush()
                elapsed = time.perf_counter() - clock
                rate = (step - clock_step) * per_step / elapsed if elapsed else float("nan")
                clock, clock_step = time.perf_counter(), step
                held = None
                if due and validation:
                    held = validation_loss(
                        average.network, subject, validation, config, schedule, accelerator.device
                    )
                if log is not None:
                    log.add(
                        step,
                        loss=last_loss,
                        learning_rate=learning_rate_at(step - 1, steps, config),
                        images_per_second=rate,
                        validation_loss=held,
                    )
                if on_progress is not None and accelerator.is_main_process:
                    on_progress(
                        Progress(
                            step,
                            steps,
                            step * per_step,
                            last_loss,
                            rate,
                            (steps - step) * per_step / rate,
                            held,
                        )
                    )
                if due:
                    largest = (
                        torch.stack([p.abs().max() for p in average.network.parameters()])
                        .max()
                        .item()
                    )
                    if not math.isfinite(largest):  # a gradient may overflow where the loss did not
                        raise _not_finite("largest weight", largest, step, root)
                    if held is not None and not math.isfinite(
                        held
                    ):  # huge weights overflow in the network
                        raise _not_finite("held-out loss", held, step, root)
                    record |= {
                        "step": step,
                        "images_seen": step * per_step,
                        "loss": last_loss,
                        "validation_loss": held,
                    }
                    record["seconds"] = round(seconds_before + time.perf_counter() - started, 1)
                    record["scaler"] = (
                        accelerator.scaler.state_dict() if accelerator.scaler is not None else None
                    )
                    if held is not None and (
                        record["best"] is None or held < record["best"]["validation_loss"]
                    ):
                        record["best"] = {"step": step, "validation_loss": held}
                    if accelerator.is_main_process:
                        save_checkpoint(
                            root,
                            step,
                            network=accelerator.unwrap_model(model),
                            averaged=average.network,
                            optimizer=optimizer.optimizer,
                            record=record,
                            package=subject.package,
                        )
                        prune(
                            root,
                            keep=config.keep_checkpoints,
                            best=record["best"]["step"] if record["best"] else None,
                        )
                    accelerator.wait_for_everyone()
                    clock = time.perf_counter()
            if (
                config.preview_every
                and step % config.preview_every == 0
                and accelerator.is_main_process
            ):
                preview(
                    average.network,
                    subject,
                    config,
                    schedule,
                    accelerator.device,
                    out / "previews" / f"{step:07d}.png",
                )
                clock, clock_step = time.perf_counter(), step

    finished = step >= steps
    if finished and accelerator.is_main_process:
        pixels = subject.shape == (
            data.channels,
            *data.resolution,
        )  # of latents no brightness is known
        prior = measure_prior(data) if pixels and len(data) > 1 else None  # one image has no spread
        publish(out, average.network, subject.package, _card(record, config) | guidance, prior)
    accelerator.wait_for_everyone()
    return TrainResult(out, step, finished, last_loss, tuple(losses), accelerator.is_main_process)


def _not_finite(what: str, value: float, step: int, root: Path) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"the {what} became {value} at step {step}; the last good checkpoint is "
        f"{latest_checkpoint(root) or 'none'}. "
        "Lower --learning-rate, or use --mixed-precision bf16 or no."
    )


def _card(record: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """What a model's card says of its run."""
    names = (
        "config",
        "data",
        "base",
        "step",
        "images_seen",
        "loss",
        "validation_loss",
        "seconds",
        "parameters",
        "processes",
        "device",
    )
    return {
        "command": command_line(config, processes=record["processes"]),
        **{name: record[name] for name in (*names, "revisions", "versions")},
    }


def _guidance(config: TrainConfig, base: Base | None, schedule: NoiseSchedule) -> dict[str, float]:
    """How a text model's card says that it is guided: as its base's; at zero terminal SNR with the
    rescale that such a model needs.

    References:
        Lin et al. Common Diffusion Noise Schedules and Sample Steps Are Flawed. 2023. Sec. 3.4: 7.5
        and 0.7. https://arxiv.org/abs/2305.08891
    """
    if base is None or not base.is_text:
        return {}
    inherited = {} if config.from_scratch else base.guidance
    if float(schedule.alphas_cumprod[-1]) > 0:
        return inherited
    return {
        "guidance_scale": inherited.get("guidance_scale", 7.5),
        "guidance_rescale": inherited.get("guidance_rescale") or 0.7,
    }


def _new_record(
    config: TrainConfig,
    data: ImageData,
    subject: Subject,
    base: Base | None,
    accelerator: Accelerator,
    revision: str | None,
) -> dict[str, Any]:
    import accelerate

    scheduler = (
        subject.package.scheduler.config
    )  # what an option left to its default came out as is recorded too
    settled = {name: scheduler[name] for name in vars(config) if name in scheduler} | {
        "learning_rate": config.peak_learning_rate
    }
    options = asdict(config) | settled | (asdict(config.architecture) if base is None else {})
    options = json.loads(json.dumps(options))  # as a checkpoint gives it back
    del options["out"]
    held_out = min(config.validation_images, len(data) // 10)
    stride = len(data) // max(1, held_out)
    return {
        "config": options,
        "data": {
            "name": data.name,
            "images": len(data),
            "channels": data.channels,
            "resolution": list(data.resolution),
            **subject.facts,
        },
        "base": {} if base is None else base.facts,
        "held_out": [
            0,
            held_out * stride,
            stride,
        ],  # a range spread over the data, which may be sorted by class
        "step": 0,
        "images_seen": 0,
        "seconds": 0.0,
        "loss": None,
        "validation_loss": None,
        "best": None,
        "scaler": None,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "revisions": [{"step": 0, "revision": revision}],
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "accelerate": accelerate.__version__,
        },
    }
