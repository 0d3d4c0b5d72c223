"""The public names of ``ddim``, each with its module. This stub is the only list of them."""

from .core.denoiser import Clip as Clip, Denoiser as Denoiser, ModelDenoiser as ModelDenoiser
from .core.guidance import guide as guide, guided as guided
from .core.interpolation import (
    interpolate as interpolate,
    interpolate_grid as interpolate_grid,
    lerp as lerp,
    slerp as slerp,
)
from .core.noise import (
    SeededNoise as SeededNoise,
    make_generators as make_generators,
    seeded_randn as seeded_randn,
)
from .core.objective import (
    draw_timesteps as draw_timesteps,
    loss_weights as loss_weights,
    training_loss as training_loss,
)
from .core.oracle import GaussianOracle as GaussianOracle
from .core.prediction import (
    Denoised as Denoised,
    clip_static as clip_static,
    from_x0_eps as from_x0_eps,
    threshold_dynamic as threshold_dynamic,
    to_eps as to_eps,
    to_x0_eps as to_x0_eps,
)
from .core.prior import DataPrior as DataPrior, fit_prior as fit_prior
from .core.sampler import State as State, sample as sample, trajectory as trajectory
from .core.schedule import (
    BETA_SCHEDULES as BETA_SCHEDULES,
    CLEAN as CLEAN,
    NoiseSchedule as NoiseSchedule,
    add_noise as add_noise,
    make_betas as make_betas,
    rescale_zero_terminal_snr as rescale_zero_terminal_snr,
    velocity as velocity,
)
from .core.step import (
    SIGMA_HAT as SIGMA_HAT,
    ddim_step as ddim_step,
    linear_step as linear_step,
    multistep_weight as multistep_weight,
    step_coefficients as step_coefficients,
)
from .core.timesteps import (
    SPACINGS as SPACINGS,
    check_timesteps as check_timesteps,
    reverse_pairs as reverse_pairs,
    select_timesteps as select_timesteps,
    step_pairs as step_pairs,
    truncate_timesteps as truncate_timesteps,
)
from .doctor.findings import Finding as Finding, ModelFacts as ModelFacts
from .doctor.probing import Probe as Probe, probe as probe
from .doctor.report import Diagnosis as Diagnosis, diagnose as diagnose
from .doctor.symptoms import Brightness as Brightness
from .errors import (
    CheckpointError as CheckpointError,
    DataError as DataError,
    DDIMError as DDIMError,
    DivergenceError as DivergenceError,
    OutputError as OutputError,
)
from .fitting.timesteps import (
    Fit as Fit,
    SamplingProblem as SamplingProblem,
    estimate_eps_mean_square as estimate_eps_mean_square,
    fit_timesteps as fit_timesteps,
    geometric_mean as geometric_mean,
    ode_error as ode_error,
)
from .inversion.code_files import load_code as load_code, save_code as save_code
from .inversion.codes import Code as Code, CodeWarning as CodeWarning
from .inversion.ddim import (
    ConvergenceWarning as ConvergenceWarning,
    encodable_timesteps as encodable_timesteps,
    encode_explicit as encode_explicit,
    encode_implicit as encode_implicit,
)
from .inversion.encoding import (
    decode as decode,
    decode_trajectory as decode_trajectory,
    encode as encode,
    reconstruction_error as reconstruction_error,
)
from .inversion.reversible import (
    DriftWarning as DriftWarning,
    ReversibleSampler as ReversibleSampler,
    StatePair as StatePair,
    decode_pair as decode_pair,
    encode_pair as encode_pair,
    reversible_trajectory as reversible_trajectory,
)
from .models.conversion import (
    convert as convert,
    read_state_dict as read_state_dict,
    write_model as write_model,
)
from .models.export import to_diffusers as to_diffusers
from .pipelines.diffusion_pipeline import DiffusionPipeline as DiffusionPipeline
from .pipelines.text_to_image import (
    ImageToImagePipeline as ImageToImagePipeline,
    TextToImagePipeline as TextToImagePipeline,
)
from .pipelines.unconditional import UnconditionalPipeline as UnconditionalPipeline
from .scheduler import DDIMInverseScheduler as DDIMInverseScheduler, DDIMScheduler as DDIMScheduler

__version__: str
