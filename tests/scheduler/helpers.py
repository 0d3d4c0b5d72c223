"""What the tests share: options, exact levels, and diffusers' scheduler beside ours."""

import diffusers
import torch

from ddim.core.schedule import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from ddim.scheduler import DDIMScheduler

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def distance(ours, theirs):
    """The relative error in the norm; equal infinities and NaNs do not occur here."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def exact(**options):
    """What the options mean, in float64, from the core alone."""
    recipe = {k: options[k] for k in ("beta_start", "beta_end") if k in options}
    betas = make_betas(
        options.get("beta_schedule", "linear"), options.get("num_train_timesteps", 1000), **recipe
    )
    betas = rescale_zero_terminal_snr(betas) if options.get("rescale_betas_zero_snr") else betas
    return NoiseSchedule.from_betas(betas, set_alpha_to_one=options.get("set_alpha_to_one", True))


def stock(exactly=False, cls=diffusers.DDIMScheduler, **options):
    """diffusers' scheduler; ``exactly`` gives it float64 levels, so that only its formulae
    remain."""
    scheduler = cls(**options)
    if exactly:
        scheduler.alphas_cumprod = exact(**options).alphas_cumprod
        clean = torch.tensor(exact(**options).final_alpha_cumprod, dtype=torch.float64)
        setattr(
            scheduler,
            "initial_alpha_cumprod"
            if cls is diffusers.DDIMInverseScheduler
            else "final_alpha_cumprod",
            clean,
        )
    return scheduler


def pair(count, exactly=False, **options):
    schedulers = DDIMScheduler(**options), stock(exactly, **options)
    for scheduler in schedulers:
        scheduler.set_timesteps(count)
    return schedulers


def finish(scheduler, network, x, **kwargs):
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **kwargs).prev_sample
    return x


def gaussian(count=2000, mean=0.0, std=1.0):
    """Quantiles of a normal distribution, with exactly its mean and standard deviation; an affine
    sampler keeps the shape."""
    z = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return (mean + std * z / z.std(correction=0))[:, None]


def finished(scheduler, oracle):
    """Mean and standard deviation of what the sampler makes of the exact marginal at its first
    level, with the exact model."""
    t = int(scheduler.timesteps[0])
    start = gaussian(
        mean=float(oracle.schedule.alpha_bar(t).sqrt() * oracle.mean),
        std=float(oracle.variance(t).sqrt()),
    )
    network = oracle.network(scheduler.config.prediction_type)
    x = finish(
        scheduler, lambda x, t: network(x, t % len(oracle.schedule)), start
    )  # -1, the last step too many, reads the last level
    return float(x.mean()), float(x.std(correction=0))


def tiny_unet():
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
