"""``ddim sample``: draws images from a model."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ddim.errors import DDIMError, OutputError

__all__ = ["Command", "defaults", "run"]


@dataclass(frozen=True)
class Command:
    """Draws images from a model with DDIM, one file a seed, a grid, and a record of the run."""

    model: Annotated[str, tyro.conf.Positional] = "fashion-mnist"
    """An embedded model, or a diffusers folder of an unconditional model."""
    steps: int = 50
    """DDIM steps: network evaluations an image."""
    count: int = 16
    """Images: the seeds SEED to SEED+COUNT-1."""
    seed: int = 0
    """Seed of the first image."""
    eta: str = "0"
    """0 is deterministic, 1 is DDPM; or `sigma-hat`."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] = "trailing"
    """Which levels are visited."""
    clip: Literal["none", "static", "dynamic"] = "none"
    """How predicted images are kept in range on the way; the noise is derived again when on."""
    batch_size: int = 16
    """Images sampled together; it never changes an image."""
    out: str = "out/sample"
    """Folder for the pictures."""
    device: str = "cpu"
    """Where to compute, such as cpu or cuda."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Samples what is missing in ``out``, then writes the grid and run.json."""
    if command.count < 1 or command.batch_size < 1:
        raise DDIMError(f"--count and --batch-size must be at least 1; got {command.count} and {command.batch_size}.")
    import numpy as np
    import torch
    from PIL import Image

    from ddim.checkpoints import load_network, resolve_model, weight_hash
    from ddim.denoiser import Clip, ModelDenoiser
    from ddim.images import make_grid, save_png, to_uint8, write_atomically
    from ddim.noise import SeededNoise, check_seeds
    from ddim.sampler import sample
    from ddim.schedule import NoiseSchedule, make_betas, rescale_zero_terminal_snr
    from ddim.step import SIGMA_HAT, Eta, check_eta
    from ddim.timesteps import select_timesteps, step_pairs

    began = time.perf_counter()
    seeds = check_seeds(range(command.seed, command.seed + command.count))
    try:
        eta: Eta = SIGMA_HAT if command.eta == SIGMA_HAT else float(command.eta)
    except ValueError:
        raise DDIMError(f"--eta must be a number or sigma-hat; got {command.eta!r}.") from None
    check_eta(eta)
    folder = resolve_model(command.model)
    network, config = load_network(folder)
    betas = config.get("trained_betas") or make_betas(
        config.get("beta_schedule", "linear"),
        config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 1e-4),
        beta_end=config.get("beta_end", 0.02),
    )
    betas = torch.as_tensor(betas, dtype=torch.float64)
    betas = rescale_zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas
    schedule = NoiseSchedule.from_betas(betas, set_alpha_to_one=config.get("set_alpha_to_one", True))
    timesteps = select_timesteps(len(schedule), command.steps, command.spacing, steps_offset=config.get("steps_offset", 0))
    denoise = ModelDenoiser(network.to(command.device), schedule, config.get("prediction_type", "epsilon"), Clip(command.clip))

    protocol = {
        "model": command.model,
        "weight_hash": weight_hash(folder),
        "sampler": "ddim",
        "timesteps": timesteps,
        "eta": eta,
        "order": 1,
        "clip": command.clip,
        "prior": "standard",
        "dtype": "float32",
    }
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    record = out / "run.json"
    if record.exists():
        before = json.loads(record.read_text()).get("protocol", {})
        changed = [k for k in protocol if before.get(k) != protocol[k]]
        if changed:
            raise OutputError(f"{out} holds samples of another protocol ({', '.join(changed)} differ); use another --out.")

    size = network.config.sample_size
    shape = (network.config.in_channels, *((size, size) if isinstance(size, int) else size))
    missing = [s for s in seeds if not (out / f"{s:06d}.png").exists()] if record.exists() else seeds
    seconds = 0.0
    with torch.inference_mode():
        if missing:
            denoise(SeededNoise(missing[: command.batch_size], shape, device=command.device)(), timesteps[-1])  # warm-up
        for first in range(0, len(missing), command.batch_size):
            part = missing[first : first + command.batch_size]
            noise = SeededNoise(part, shape, device=command.device)
            start = time.perf_counter()
            images = to_uint8(sample(denoise, noise(), step_pairs(timesteps), schedule=schedule, eta=eta, noise=noise))
            seconds += time.perf_counter() - start
            for seed, image in zip(part, images, strict=True):
                save_png(image, out / f"{seed:06d}.png")
    pictures = [np.asarray(Image.open(out / f"{s:06d}.png")) for s in seeds]
    grid = make_grid(np.stack([p[..., None] if p.ndim == 2 else p for p in pictures]))
    save_png(grid, out / "grid.png", scale=max(1, 96 // shape[-1]))
    content = {
        "protocol": protocol,
        "results": [{"seed": s, "file": f"{s:06d}.png"} for s in seeds],
        "seconds": seconds,
        "seconds_total": time.perf_counter() - began,
        "evaluations": len(timesteps),
        "execution": {"count": command.count, "batch_size": command.batch_size, "device": command.device, "compile": False},
        "versions": {"torch": torch.__version__},
    }
    write_atomically(record, json.dumps(content, indent=2) + "\n")
    print(f"{len(missing)} images drawn, {len(seeds) - len(missing)} were there; they are in {out}, together in {out / 'grid.png'}.")
    if missing:
        step = seconds / len(timesteps)
        print(f"{len(timesteps)} steps took {seconds:.1f} s, {1000 * step:.0f} ms a step; 1000 steps would have taken {step * 1000:.0f} s.")
