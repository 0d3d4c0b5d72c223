"""Follows the steps of a run: its log, the loss on held-out images, checkpoints and previews."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from ddim.configuration import select_clip
from ddim.core.denoiser import ModelDenoiser
from ddim.core.noise import seeded_randn
from ddim.core.objective import training_loss
from ddim.core.sampler import sample
from ddim.core.timesteps import select_timesteps, step_pairs
from ddim.errors import DDIMError
from ddim.files import write_text
from ddim.models.images import make_grid, save_picture, to_uint8
from ddim.training.checkpoint import latest_checkpoint, prune, save_checkpoint
from ddim.training.draws import mix
from ddim.training.loop import Run, StepResult

__all__ = ["Follower", "NonFiniteLossError", "Progress", "RunLog", "preview", "validation_loss"]


_LEAST_SIDE = 128
"""Pixels of a preview's images that are large enough to be seen."""

_EARLY = 5
"""Steps after which the first progress tells how long the run takes."""


class NonFiniteLossError(DDIMError):
    """The loss or the weights became NaN or infinite."""


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
    preview: Path | None = None
    """The newest preview grid."""


class RunLog:
    """Scalars for tensorboard, and the same as lines of JSON that any tool reads."""

    def __init__(self, folder: Path, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.writer = SummaryWriter(str(folder), purge_step=start + 1)
        path = folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A killed run has logged steps that are now taken again; its last line may be cut off.
        whole = (line for line in lines if line.endswith("\n"))
        write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= start))
        self.lines = path.open("a")

    def add(self, step: int, **values: float | None) -> None:
        """Adds a line; values that are None are left out."""
        given = {name: value for name, value in values.items() if value is not None}
        for name, value in given.items():
            self.writer.add_scalar(name, value, step)
        self.lines.write(json.dumps({"step": step, **given}) + "\n")
        self.lines.flush()

    def add_picture(self, step: int, picture: NDArray[np.uint8]) -> None:
        """Adds a preview grid, bytes [H, W, C]."""
        self.writer.add_image("preview", picture, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
        self.lines.close()


@torch.no_grad()
def validation_loss(run: Run, indices: Sequence[int]) -> float:
    """Returns the unweighted loss of the averaged network over held-out images, with the same noise
    and evenly spread timesteps every time."""
    schedule, device, kind = run.schedule, run.accelerator.device, run.prediction_type
    generator = torch.Generator().manual_seed(mix(run.config.seed, 2))
    size = min(128, 4 * run.config.batch_size)  # without gradients, more fits than in training
    total = 0.0
    for first in range(0, len(indices), size):
        part = indices[first : first + size]
        examples = default_collate([run.subject.examples[i] for i in part])
        x0, condition = run.subject.clean(examples, device, None)
        t = ((torch.arange(first, first + len(part)) * 2 + 1) * len(schedule)) // (2 * len(indices))
        noise = torch.randn(x0.shape, generator=generator).to(device)
        predict = run.subject.predictor(run.average.network, condition)
        losses = training_loss(
            predict, x0, schedule=schedule, t=t, noise=noise, prediction_type=kind
        )
        total += float(losses.sum())
    return total / len(indices)


@torch.no_grad()
def preview(run: Run, path: Path) -> NDArray[np.uint8]:
    """Samples a grid from fixed seeds with the averaged network, as the saved model is sampled, and
    writes it as a PNG; the captions of a text model go into a text file beside it.

    Returns:
        The grid, bytes [H, W, C]. Each pixel of small images is enlarged to a square."""
    config, schedule, subject = run.config, run.schedule, run.subject
    device = run.accelerator.device
    predict, captions = subject.preview(run.average.network, config.preview_count, device)
    clip = select_clip(subject.package.scheduler.config)
    denoise = ModelDenoiser(predict, schedule, run.prediction_type, clip)
    x_t = seeded_randn(subject.shape, range(config.preview_count)).to(device)
    steps = min(config.preview_steps, len(schedule))
    pairs = step_pairs(select_timesteps(len(schedule), steps, "trailing"))
    x0 = sample(denoise, x_t, pairs, schedule=schedule)
    path.parent.mkdir(parents=True, exist_ok=True)
    images = to_uint8(subject.images(x0))
    scale = max(1, _LEAST_SIDE // max(images.shape[1:3]))
    grid = make_grid(images.repeat(scale, axis=1).repeat(scale, axis=2))
    save_picture(grid, path)
    if captions:
        write_text(path.parent / "captions.txt", "".join(f"{caption}\n" for caption in captions))
    return grid


class Follower:
    """Follows the steps of a run, and brings its record up to date."""

    def __init__(
        self,
        run: Run,
        record: dict[str, Any],
        log: RunLog | None,
        on_progress: Callable[[Progress], None] | None,
        started: float,
    ) -> None:
        self.run, self.record, self.held_out = run, record, record["held_out_images"]
        self.log, self.on_progress, self.started = log, on_progress, started
        self.out, self.root = Path(run.config.out), Path(run.config.out) / "checkpoints"
        self.losses: list[tuple[int, float]] = []
        self._unread: list[StepResult] = []
        self._preview: Path | None = None
        done = int(record["step"])
        self._first = done + 1
        self._pace = run.config.pace(run.steps)
        self._restart_clock(done)
        self._restart_estimate(done)

    def follow(self, result: StepResult, *, stopping: bool) -> None:
        """Takes note of a step: what is due after it is logged, drawn and saved. The last one
        before the run stops is always saved."""
        run, step = self.run, result.step
        is_last = step == run.steps
        saved = step % run.config.checkpoint_every == 0 or stopping or is_last
        is_early = step + 1 == self._first + _EARLY
        every = self._pace.preview_every
        drawn = every > 0 and (step % every == 0 or is_last)
        # A preview is drawn only after the losses were looked at, which may have become NaN.
        logged = step % self._pace.log_every == 0 or is_early or saved or drawn
        self._unread.append(result)
        if logged:
            loss = self._read_losses()
            elapsed = time.perf_counter() - self._clock
            images = (step - self._clock_step) * run.division.images
            rate = images / elapsed if elapsed else float("nan")
            self._restart_clock(step)
            held = validation_loss(run, self.held_out) if saved and self.held_out else None
            self._report(result, loss, rate, held)
            if saved:
                self._save(step, loss, held)
                self._restart_clock(step)
        if drawn and run.accelerator.is_main_process:
            self._draw(step)
        if step == self._first:  # which takes longer than the others
            self._restart_clock(step)
        if step == self._first or is_early:  # the first few are slower than the rest
            self._restart_estimate(step)

    def _draw(self, step: int) -> None:
        self._preview = self.out / "previews" / f"{step:07d}.png"
        grid = preview(self.run, self._preview)
        if self.log is not None:
            self.log.add_picture(step, grid)
        self._restart_clock(step)

    def _restart_clock(self, step: int) -> None:
        self._clock, self._clock_step = time.perf_counter(), step

    def _restart_estimate(self, step: int) -> None:
        """Has what is left be estimated by the steps after this one."""
        self._estimated_from = time.perf_counter(), step

    def _read_losses(self) -> float:
        """Moves the losses to the host, once, checks them, and returns their mean."""
        stacked = torch.stack([result.loss for result in self._unread])
        values = self.run.accelerator.reduce(stacked, "mean").tolist()
        read = [(result.step, value) for result, value in zip(self._unread, values, strict=True)]
        for step, value in read:
            self._check_finite("loss", value, step)
        self.losses.extend(read)
        self._unread.clear()
        return float(sum(values) / len(values))

    def _report(self, result: StepResult, loss: float, rate: float, held: float | None) -> None:
        step, steps, per_step = result.step, self.run.steps, self.run.division.images
        if self.log is not None:
            values = {"loss": loss, "learning_rate": result.learning_rate}
            self.log.add(step, **values, images_per_second=rate, validation_loss=held)
        if self.on_progress is not None and self.run.accelerator.is_main_process:
            began, first = self._estimated_from  # all since then, checkpoints and previews too
            left = (steps - step) * (time.perf_counter() - began) / (step - first)
            images, path = step * per_step, self._preview
            # A terminal that was closed does not end the run.
            with contextlib.suppress(OSError):
                self.on_progress(Progress(step, steps, images, loss, rate, left, held, path))

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
            "images_seen": step * run.division.images,
            "loss": loss,
            "validation_loss": held,
            "seconds": round(time.perf_counter() - self.started, 1),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        }
        best = record["best"]
        if held is not None and (best is None or held < best["validation_loss"]):
            record["best"] = best = {"step": step, "validation_loss": held}
        if accelerator.is_main_process:
            save_checkpoint(self.root, step, run, record)
            best_step = best["step"] if best else None
            prune(self.root, keep=run.config.keep_checkpoints, best=best_step)
        accelerator.wait_for_everyone()

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            last = latest_checkpoint(self.root) or "none"
            raise NonFiniteLossError(
                f"the {what} became {value} at step {step}; the last good checkpoint is {last}. "
                "Lower --learning-rate, or use --mixed-precision bf16 or no."
            )
