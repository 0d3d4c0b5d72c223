"""Denoising diffusion implicit models: schedules, parametrisations, timesteps, the step, samplers, and a drop-in scheduler.

Names are loaded when they are first used, so that ``import ddim`` needs neither torch nor diffusers.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "schedule": ("BETA_SCHEDULES", "CLEAN", "NoiseSchedule", "add_noise", "make_betas", "rescale_zero_terminal_snr", "velocity"),
    "prediction": ("Denoised", "clip_static", "from_x0_eps", "threshold_dynamic", "to_eps", "to_x0_eps"),
    "timesteps": ("SPACINGS", "check_timesteps", "reverse_pairs", "select_timesteps", "step_pairs", "truncate_timesteps"),
    "noise": ("SeededNoise", "make_generators", "seeded_randn"),
    "step": ("SIGMA_HAT", "ddim_step", "linear_step", "step_coefficients"),
    "denoiser": ("Clip", "Denoiser", "ModelDenoiser"),
    "objective": ("draw_timesteps", "loss_weights", "training_loss"),
    "sampler": ("State", "sample", "trajectory"),
    "oracle": ("GaussianOracle",),
    "scheduler": ("DDIMInverseScheduler", "DDIMScheduler", "to_diffusers"),
    "errors": ("CheckpointError", "DDIMError", "DataError", "OutputError"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(["__version__", *_HOME_OF])


def __getattr__(name: str) -> object:
    """Loads a public name from its module (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ddim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ddim.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
