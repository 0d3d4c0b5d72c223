"""What a run shows on its way: its log, the loss on held-out images, and previews."""

import json
from pathlib import Path

import torch
from torch.utils.data import default_collate

from ddim.core.denoiser import ModelDenoiser
from ddim.core.noise import seeded_randn
from ddim.core.objective import training_loss
from ddim.core.sampler import sample
from ddim.core.timesteps import select_timesteps, step_pairs
from ddim.files import write_text
from ddim.models.images import make_grid, save_png, to_uint8
from ddim.training.draws import mix
from ddim.training.loop import Run

__all__ = ["RunLog", "preview", "validation_loss"]


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
        given = {k: v for k, v in values.items() if v is not None}
        for name, value in given.items():
            self.writer.add_scalar(name, value, step)
        self.lines.write(json.dumps({"step": step, **given}) + "\n")
        self.lines.flush()

    def close(self) -> None:
        """Closes both files."""
        self.writer.close()
        self.lines.close()


@torch.no_grad()
def validation_loss(run: Run, indices: range) -> float:
    """Returns the unweighted loss of the averaged network over held-out images, with the same noise
    and evenly spread timesteps every time."""
    config, schedule, device = run.config, run.schedule, run.accelerator.device
    generator = torch.Generator().manual_seed(mix(config.seed, 2))
    size = min(128, 4 * config.batch_size)  # without gradients, more fits than in training
    total = 0.0
    for first in range(0, len(indices), size):
        part = indices[first : first + size]
        examples = default_collate([run.subject.examples[i] for i in part])
        x0, condition = run.subject.clean(examples, device, None)
        t = ((torch.arange(first, first + len(part)) * 2 + 1) * len(schedule)) // (2 * len(indices))
        losses = training_loss(
            run.subject.predictor(run.average.network, condition),
            x0,
            schedule=schedule,
            t=t,
            noise=torch.randn(x0.shape, generator=generator).to(device),
            prediction_type=run.subject.package.scheduler.config.prediction_type,
        )
        total += float(losses.sum())
    return total / len(indices)


@torch.no_grad()
def preview(run: Run, path: Path) -> None:
    """Samples a grid from fixed seeds with the averaged network and writes it as a PNG; the
    captions of a text model go into a text file beside it."""
    config, schedule, subject = run.config, run.schedule, run.subject
    device = run.accelerator.device
    predict, captions = subject.preview(run.average.network, config.preview_count, device)
    denoise = ModelDenoiser(predict, schedule, subject.package.scheduler.config.prediction_type)
    x_t = seeded_randn(subject.shape, range(config.preview_count)).to(device)
    steps = min(config.preview_steps, len(schedule))
    pairs = step_pairs(select_timesteps(len(schedule), steps, "trailing"))
    x0 = sample(denoise, x_t, pairs, schedule=schedule)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(make_grid(to_uint8(subject.images(x0))), path)
    if captions:
        write_text(path.parent / "captions.txt", "".join(f"{caption}\n" for caption in captions))
