"""Denoising diffusion implicit models: schedules, parametrisations, timesteps, the step, samplers, and a drop-in scheduler.

Names are loaded when they are first used, so that ``import ddim`` needs neither torch nor diffusers.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that editors and type checkers see what is loaded later
    from ddim.checks import Finding as Finding, Model as Model
    from ddim.codes import load_code as load_code, save_code as save_code
    from ddim.conversion import (
        convert as convert,
        read_state_dict as read_state_dict,
        write_model as write_model,
    )
    from ddim.denoiser import Clip as Clip, Denoiser as Denoiser, ModelDenoiser as ModelDenoiser
    from ddim.doctor import Diagnosis as Diagnosis, diagnose as diagnose
    from ddim.encoding import (
        Code as Code,
        decode as decode,
        decode_trajectory as decode_trajectory,
        encode as encode,
        reconstruction_error as reconstruction_error,
    )
    from ddim.errors import (
        CheckpointError as CheckpointError,
        DataError as DataError,
        DDIMError as DDIMError,
        DivergenceError as DivergenceError,
        OutputError as OutputError,
    )
    from ddim.fitting import (
        Batch as Batch,
        Fit as Fit,
        estimate_gamma as estimate_gamma,
        fit_timesteps as fit_timesteps,
        geometric_mean as geometric_mean,
        ode_error as ode_error,
    )
    from ddim.guidance import guide as guide, guided as guided
    from ddim.interpolation import (
        interpolate as interpolate,
        interpolate_grid as interpolate_grid,
        lerp as lerp,
        slerp as slerp,
    )
    from ddim.inversion import (
        ConvergenceWarning as ConvergenceWarning,
        encodable_timesteps as encodable_timesteps,
        encode_explicit as encode_explicit,
        encode_implicit as encode_implicit,
    )
    from ddim.noise import (
        SeededNoise as SeededNoise,
        make_generators as make_generators,
        seeded_randn as seeded_randn,
    )
    from ddim.objective import (
        draw_timesteps as draw_timesteps,
        loss_weights as loss_weights,
        training_loss as training_loss,
    )
    from ddim.oracle import GaussianOracle as GaussianOracle
    from ddim.pipelines import (
        DiffusionPipeline as DiffusionPipeline,
        UnconditionalPipeline as UnconditionalPipeline,
    )
    from ddim.prediction import (
        Denoised as Denoised,
        clip_static as clip_static,
        from_x0_eps as from_x0_eps,
        threshold_dynamic as threshold_dynamic,
        to_eps as to_eps,
        to_x0_eps as to_x0_eps,
    )
    from ddim.prior import DataPrior as DataPrior, fit_prior as fit_prior
    from ddim.reversible import (
        DriftWarning as DriftWarning,
        ReversibleSampler as ReversibleSampler,
        StatePair as StatePair,
        decode_pair as decode_pair,
        encode_pair as encode_pair,
        reversible_trajectory as reversible_trajectory,
    )
    from ddim.sampler import State as State, sample as sample, trajectory as trajectory
    from ddim.schedule import (
        BETA_SCHEDULES as BETA_SCHEDULES,
        CLEAN as CLEAN,
        NoiseSchedule as NoiseSchedule,
        add_noise as add_noise,
        make_betas as make_betas,
        rescale_zero_terminal_snr as rescale_zero_terminal_snr,
        velocity as velocity,
    )
    from ddim.scheduler import (
        DDIMInverseScheduler as DDIMInverseScheduler,
        DDIMScheduler as DDIMScheduler,
        to_diffusers as to_diffusers,
    )
    from ddim.step import (
        SIGMA_HAT as SIGMA_HAT,
        ddim_step as ddim_step,
        linear_step as linear_step,
        multistep_weight as multistep_weight,
        step_coefficients as step_coefficients,
    )
    from ddim.symptoms import Brightness as Brightness, Probe as Probe, probe as probe
    from ddim.text_to_image import (
        ImageToImagePipeline as ImageToImagePipeline,
        TextToImagePipeline as TextToImagePipeline,
    )
    from ddim.timesteps import (
        SPACINGS as SPACINGS,
        check_timesteps as check_timesteps,
        reverse_pairs as reverse_pairs,
        select_timesteps as select_timesteps,
        step_pairs as step_pairs,
        truncate_timesteps as truncate_timesteps,
    )

__version__ = "0.1.0"

_HOMES = {
    "schedule": (
        "BETA_SCHEDULES",
        "CLEAN",
        "NoiseSchedule",
        "add_noise",
        "make_betas",
        "rescale_zero_terminal_snr",
        "velocity",
    ),
    "prediction": (
        "Denoised",
        "clip_static",
        "from_x0_eps",
        "threshold_dynamic",
        "to_eps",
        "to_x0_eps",
    ),
    "timesteps": (
        "SPACINGS",
        "check_timesteps",
        "reverse_pairs",
        "select_timesteps",
        "step_pairs",
        "truncate_timesteps",
    ),
    "noise": ("SeededNoise", "make_generators", "seeded_randn"),
    "step": ("SIGMA_HAT", "ddim_step", "linear_step", "multistep_weight", "step_coefficients"),
    "denoiser": ("Clip", "Denoiser", "ModelDenoiser"),
    "guidance": ("guide", "guided"),
    "text_to_image": ("ImageToImagePipeline", "TextToImagePipeline"),
    "objective": ("draw_timesteps", "loss_weights", "training_loss"),
    "sampler": ("State", "sample", "trajectory"),
    "interpolation": ("interpolate", "interpolate_grid", "lerp", "slerp"),
    "inversion": (
        "ConvergenceWarning",
        "encodable_timesteps",
        "encode_explicit",
        "encode_implicit",
    ),
    "reversible": (
        "DriftWarning",
        "ReversibleSampler",
        "StatePair",
        "decode_pair",
        "encode_pair",
        "reversible_trajectory",
    ),
    "encoding": ("Code", "decode", "decode_trajectory", "encode", "reconstruction_error"),
    "codes": ("load_code", "save_code"),
    "oracle": ("GaussianOracle",),
    "prior": ("DataPrior", "fit_prior"),
    "symptoms": ("Brightness", "Probe", "probe"),
    "checks": ("Finding", "Model"),
    "conversion": ("convert", "read_state_dict", "write_model"),
    "doctor": ("Diagnosis", "diagnose"),
    "fitting": ("Batch", "Fit", "estimate_gamma", "fit_timesteps", "geometric_mean", "ode_error"),
    "scheduler": ("DDIMInverseScheduler", "DDIMScheduler", "to_diffusers"),
    "pipelines": ("DiffusionPipeline", "UnconditionalPipeline"),
    "errors": ("CheckpointError", "DDIMError", "DataError", "DivergenceError", "OutputError"),
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
