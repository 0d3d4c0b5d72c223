"""The doctor's questions to a scheduler's configuration, each a small function in :data:`CHECKS`.

A check looks at a :class:`Case` and returns a :class:`Finding` or None; its figures come from
:mod:`ddim.doctor.symptoms`. An ``error`` is a NaN, a step that cannot be taken, or images of
nothing. A ``warning`` is a loss that can be seen. ``info`` is a loss smaller than :data:`FAINT`, or
one that depends on how the sampler is called."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ddim.core.denoiser import Denoiser, ModelDenoiser
from ddim.core.oracle import GaussianOracle
from ddim.core.prediction import prediction_row
from ddim.core.schedule import CLEAN, NoiseSchedule
from ddim.core.step import Eta
from ddim.core.timesteps import Pair, check_timesteps, step_pairs
from ddim.doctor.symptoms import (
    Brightness,
    Probe,
    leaked_brightness,
    made_of_noise,
    stock_flaws,
    stock_nan_levels,
    stock_pairs,
)
from ddim.errors import DDIMError

__all__ = [
    "CHECKS",
    "FAINT",
    "OTHER_KEYS",
    "Case",
    "Check",
    "Finding",
    "ModelFacts",
    "Severity",
    "foreign_finding",
    "json_numbers",
]

Severity = Literal["error", "warning", "info"]

FAINT = 0.03
"""The largest predicted error, pixels in [-1, 1], that is information and no warning: four grey
levels of 255."""

_TRAINED_KEYS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("rescale_betas_zero_snr", "prediction_type"),
)
_DATA = (0.5, 0.25)  # mean and std of the Gaussian data on which steps are judged
_DATA_NAME = "N({}, {}^2)".format(*_DATA)

_OTHER_KEYS = """
algorithm_type corrector_order disable_corrector eta euler_at_final final_sigmas_type flow_shift
interpolation_type lambda_min_clipped lower_order_final original_inference_steps predict_x0
predictor_order shift_terminal sigma_max sigma_min skip_prk_steps snr_shift_scale solver_order
solver_p solver_type tau_func time_shift_type timestep_scaling timestep_type use_beta_sigmas
use_dynamic_shifting use_exponential_sigmas use_flow_sigmas use_karras_sigmas use_lu_lambdas
variance_type
predict_epsilon tensor_format timestep_values
fitted_timesteps multistep_order
"""
OTHER_KEYS = frozenset(_OTHER_KEYS.split())
"""Known keys that not every scheduler of the family has: of diffusers' other schedulers, of
diffusers before 0.12, and our own."""

_SONG = "Song, Meng, Ermon 2021, arXiv 2010.02502"
_LIN = "Lin et al. 2023, arXiv 2305.08891"
_SALIMANS = "Salimans, Ho 2022, arXiv 2202.00512"
_SAHARIA = "Saharia et al. 2022, arXiv 2205.11487"
_NEIGHBOURS = "docs/decisions/0001-neighbours-not-strides.md"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or worth knowing.

    Attributes:
        severity: How grave it is; the module says what each means.
        message: What was found, with its numbers.
        consequence: What it does to images.
        evidence: The numbers, by name.
        fix: Configuration keys to change, with their new values.
        retrain: Whether the fix is right only for a network that is trained anew.
        advice: What helps beside the configuration.
        code: The check's code, such as ``DDIM001``.
        reference: Where to read about it.
    """

    severity: Severity
    message: str
    consequence: str
    evidence: dict[str, Any] = field(default_factory=dict)
    fix: dict[str, Any] = field(default_factory=dict)
    retrain: bool = False
    advice: str = ""
    code: str = ""
    reference: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of the network beside its scheduler's configuration; None is unknown.

    Attributes:
        latent: Whether it works on the latents of an autoencoder.
        guided: Whether it is sampled with classifier-free guidance.
        shape: (C, H, W) of its images or latents.
        num_train_timesteps: Number of levels that it was built for.
        training: Configuration of the schedule that noise was added with in training.
    """

    latent: bool | None = None
    guided: bool | None = None
    shape: tuple[int, int, int] | None = None
    num_train_timesteps: int | None = None
    training: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """What the checks look at: a complete configuration, and how it is used.

    Attributes:
        config: With diffusers' values for absent keys, and the spacing that was asked for.
        schedule: Its levels.
        model: What is known of the network.
        brightness: The brightness of the images.
        asked: The number of steps that was asked for; None if none was.
        custom: The list of timesteps that was asked for, or that the configuration was fitted with.
        read: Those of :data:`OTHER_KEYS` that the sampler reads.
        levels: The levels that this package visits.
        stock: The levels that plain diffusers visits; None if it cannot visit such levels.
        eta: The eta that was asked for.
        guidance_scale: The guidance that was asked for.
        guidance_rescale: The rescale of guidance that was asked for.
        probe: What the network's own answers tell.
        training: The complete configuration that noise was added with in training, if it is known.
        training_schedule: Its levels.
    """

    config: dict[str, Any]
    schedule: NoiseSchedule
    model: ModelFacts
    brightness: Brightness
    asked: int | None
    custom: Sequence[int] | None
    read: frozenset[str]
    levels: list[int]
    stock: list[int] | None
    eta: Eta | None
    guidance_scale: float | None
    guidance_rescale: float
    probe: Probe | None
    training: dict[str, Any] | None
    training_schedule: NoiseSchedule | None

    @property
    def last(self) -> int:
        """Level T - 1."""
        return len(self.schedule) - 1

    @property
    def probed(self) -> str | None:
        """The type that the network's own answers tell, if any; it outweighs what files say."""
        return None if self.probe is None else self.probe.prediction_type

    @property
    def steps(self) -> int:
        """N, but at most the number of levels."""
        return len(self.levels)

    @property
    def terminal(self) -> float:
        """alpha_bar at level T - 1."""
        return float(self.schedule.alpha_bar(self.last))

    @property
    def stock_pairs(self) -> list[Pair]:
        """The steps of plain diffusers; none if it cannot visit such levels."""
        return stock_pairs(self.stock or [], len(self.schedule), self.steps)

    def leak(self, t: int) -> tuple[Severity, dict[str, float]]:
        """The error of starting from N(0, I) on level t: its severity, and its numbers."""
        bias, factor = leaked_brightness(self.schedule, t, self.brightness)
        numbers = {
            "level": t,
            "snr": float(self.schedule.snr(t)),
            "sqrt_alpha_bar": float(self.schedule.alpha_bar(t).sqrt()),
            "brightness_bias": bias,
            "brightness_spread": factor,
        }
        return _grade(bias), numbers


@dataclass(frozen=True)
class Check:
    """One question to a case."""

    code: str
    reference: str
    find: Callable[[Case], Finding | None]

    def __call__(self, case: Case) -> Finding | None:
        """The finding, with the check's code and reference; None if all is well."""
        found = self.find(case)
        evidence = json_numbers(found.evidence) if found else {}
        return found and replace(found, code=self.code, reference=self.reference, evidence=evidence)

    @property
    def title(self) -> str:
        """What is looked for, in a sentence."""
        return " ".join(str(self.find.__doc__).split())


CHECKS: dict[str, Check] = {}
"""All checks by code. A new one is a function under :func:`_check`, and a test that plants it."""

_Find = Callable[[Case], Finding | None]


def _check(code: str, reference: str) -> Callable[[_Find], _Find]:
    def register(find: _Find) -> _Find:
        CHECKS[code] = Check(code, reference, find)
        return find

    return register


def _grade(error: float) -> Severity:
    return "info" if abs(error) < FAINT else "warning"


@_check("DDIM001", f"{_LIN}, Sec. 3.1")
def _terminal_snr(case: Case) -> Finding | None:
    """The last level keeps signal: its SNR is above zero."""
    if case.terminal == 0:
        return None
    severity, numbers = case.leak(case.last)
    fix: dict[str, Any] = {"rescale_betas_zero_snr": True}
    if case.config["prediction_type"] == "epsilon":
        fix["prediction_type"] = "v_prediction"
    small = "This is too little to be seen."
    return Finding(
        severity,
        f"The terminal SNR is {numbers['snr']:.4g}, not 0: level {case.last} keeps "
        f"{numbers['sqrt_alpha_bar']:.4g} of the image (sqrt of alpha-bar).",
        "The network reads the noise's mean colour as the image's: brightness is off by "
        f"{numbers['brightness_bias']:+.3f}, and its spread between images is "
        f"{numbers['brightness_spread']:.3f} of what it should be.",
        numbers,
        fix,
        retrain=True,
        advice=small if severity == "info" else _against_a_leak(case.model, fix),
    )


def _against_a_leak(model: ModelFacts, fix: Mapping[str, Any]) -> str:
    """Advice: train a model of text or latents; start any other from a prior of pixels."""
    if model.latent or model.guided:
        kind = " --prediction-type v_prediction" if "prediction_type" in fix else ""
        command = f"ddim train --base MODEL --data CAPTIONED{kind} --rescale-betas-zero-snr"
        return f"In Stable Diffusion's format: {command}."
    where = "" if model.guided is False else ", for a model of pixels and without text"
    what = "ddim sample --prior data, which starts from noise that holds the data's mean colour"
    return f"Without training{where}: {what}."


@_check("DDIM002", f"{_LIN}, Sec. 3.3")
def _first_level(case: Case) -> Finding | None:
    """The first visited level is not T-1."""
    first = case.levels[0]
    if first == case.last:
        return None
    severity, numbers = case.leak(first)
    return Finding(
        severity,
        f"{case.steps} steps start at level {first}, not at {case.last}: SNR {numbers['snr']:.4g} "
        f"instead of {float(case.schedule.snr(case.last)):.4g}.",
        f"The network takes pure noise for level {first}: brightness is off by "
        f"{numbers['brightness_bias']:+.3f}, and its spread is "
        f"{numbers['brightness_spread']:.3f} of what it should be.",
        {"steps": case.steps, **numbers},
        {} if case.custom else {"timestep_spacing": "trailing"},
        advice=f"Begin the list with {case.last}." if case.custom else "",
    )


@_check("DDIM003", f"{_SONG}, App. D.2")
def _bad_list(case: Case) -> Finding | None:
    """Levels are repeated, missing, out of order or outside [0, T)."""
    if case.custom is not None:
        return _bad_custom_list(case, case.custom)
    outside = [t for t in case.stock or [] if t > case.last]
    if not outside:
        return None
    return Finding(
        "error",
        f"Level {outside[0]} does not exist: for {case.steps} steps plain diffusers adds "
        f"steps_offset to the last level, {case.last}.",
        "It stops with an IndexError there.",
        {"steps": case.steps, "outside": outside},
        {"timestep_spacing": "trailing"},
        advice="ddim.DDIMScheduler leaves the offset out there.",
    )


def _bad_custom_list(case: Case, custom: Sequence[int]) -> Finding | None:
    try:
        check_timesteps(custom, len(case.schedule))
    except DDIMError as error:
        message = f"The list of timesteps cannot be sampled: {error}"
        return Finding("error", message, "Sampling is refused.", {"timesteps": list(custom)})
    if case.asked in (None, len(custom)):
        return None
    return Finding(
        "error",
        f"{case.asked} steps were asked for, but the list of timesteps has {len(custom)}.",
        "Sampling visits fewer or more levels than were asked for.",
        {"steps": case.asked, "timesteps": len(custom)},
        advice="Give the list alone.",
    )


@_check("DDIM004", _NEIGHBOURS)
def _off_the_grid(case: Case) -> Finding | None:
    """Plain diffusers steps off its own list of levels."""
    ours, theirs = step_pairs(case.levels), case.stock_pairs
    off = len(set(theirs) - set(ours))
    if case.custom is not None or case.stock is None or not off:
        return None
    oracle, total = GaussianOracle(case.schedule, *_DATA), len(case.schedule)
    (their_mean, their_std), (mean, std) = (
        _mean_std(oracle.denoise, case.schedule, pairs, oracle, case.levels[0])
        for pairs in (theirs, ours)
    )
    error = math.hypot(their_mean - mean, their_std - std)
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    below = max((n for n in divisors if n <= case.steps), default=1)
    above = min((n for n in divisors if n >= case.steps), default=total)
    return Finding(
        _grade(error),
        f"Plain diffusers leaves the grid at {off} of {len(theirs)} steps: it goes to t - "
        f"{total // case.steps}, not to the next level.",
        f"On data {_DATA_NAME} with a perfect network it makes N({their_mean:.3f}, "
        f"{their_std:.3f}^2); steps to the next level make N({mean:.3f}, {std:.3f}^2): off by "
        f"{error:.3f}.",
        {
            **{"steps": case.steps, "off": off, "diffusers": [their_mean, their_std]},
            **{"ddim": [mean, std], "data": list(_DATA), "error": error},
        },
        {} if case.config["timestep_spacing"] == "trailing" else {"timestep_spacing": "trailing"},
        advice="ddim.DDIMScheduler goes to the next level for every number of steps; in plain "
        f"diffusers take trailing with {below} or {above} steps.",
    )


@_check("DDIM005", _NEIGHBOURS)
def _minus_one(case: Case) -> Finding | None:
    """Plain diffusers visits a timestep of -1."""
    if case.stock is None or CLEAN not in case.stock:
        return None
    return Finding(
        "error",
        f"For {case.steps} steps plain diffusers makes {len(case.stock)} timesteps, the last "
        "being -1, which reads the noisiest level.",
        "The finished image is taken for pure noise and predicted once more: the images collapse "
        "to their mean.",
        {"steps": case.steps, "timesteps": len(case.stock), "last": CLEAN},
        advice=f"Use ddim.DDIMScheduler, which keeps the first {case.steps}, or another number of "
        "steps.",
    )


@_check("DDIM006", f"{_LIN}, Sec. 3.4")
def _epsilon_at_zero_snr(case: Case) -> Finding | None:
    """Epsilon prediction at zero terminal SNR."""
    if case.terminal > 0 or case.config["prediction_type"] != "epsilon":
        return None
    # If the network is known to predict something else, or was trained on these betas, then the
    # schedule is right.
    trained = case.training_schedule
    is_right = (
        case.probed != "epsilon"
        if case.probed
        else trained is not None and float(trained.alpha_bar(len(trained) - 1)) == 0
    )
    can_undo = case.config["rescale_betas_zero_snr"] and not is_right
    return Finding(
        "error",
        "The terminal SNR is 0 and the network predicts epsilon: x0 = (x_t - sigma eps) / alpha "
        f"divides by 0 at level {case.last}.",
        "Plain diffusers makes NaN, or with clipping images that start from signs; at that level "
        "the training loss teaches nothing.",
        {"level": case.last, "alpha_bar": 0.0},
        {"rescale_betas_zero_snr": False} if can_undo else {},
        advice=f"If it was trained on these betas, keep them and start below {case.last} "
        "(timesteps of your own), or train with v_prediction.",
    )


@_check("DDIM007", f"{_LIN}, Sec. 3.3")
def _leading_at_zero_snr(case: Case) -> Finding | None:
    """A zero-SNR schedule whose last level is never visited (leading)."""
    is_leading = case.custom is None and case.config["timestep_spacing"] == "leading"
    if case.terminal > 0 or not is_leading or case.levels[0] == case.last:
        return None
    severity, numbers = case.leak(case.levels[0])
    return Finding(
        severity,
        f"The schedule ends at SNR 0, but leading never visits level {case.last}: sampling starts "
        f"at {case.levels[0]}, SNR {numbers['snr']:.4g}.",
        "The rescaled schedule has no effect: the one level whose input is pure noise is skipped.",
        numbers,
        {"timestep_spacing": "trailing"},
    )


@_check("DDIM008", f"{_SONG}, Eq. 16")
def _eta_nan(case: Case) -> Finding | None:
    """An eta that gives NaN in plain diffusers."""
    eta = 1.0 if case.eta is None else case.eta
    if isinstance(eta, str) or eta == 0 or "snr_shift_scale" in case.read:  # CogVideoX ignores eta
        return None
    levels = stock_nan_levels(case.config, case.stock_pairs, eta)
    if not levels:
        return None
    return Finding(
        "info" if case.eta is None else "error",
        f"With eta={eta:g} and {case.steps} steps, plain diffusers makes NaN from level "
        f"{levels[0]} on.",
        "1 - alpha_bar - std^2 is "
        f"{'below 0 there' if eta > 1 else '0 there, and in float32 rounds below it'}, and its "
        "root is NaN.",
        {"eta": eta, "levels": levels},
        advice="Use an eta of at most 1."
        if eta > 1
        else "ddim.DDIMScheduler computes it in float64, where it is 0; or use eta=0.",
    )


@_check("DDIM009", f"{_SONG}, Sec. 4.3")
def _clipping(case: Case) -> Finding | None:
    """clip_sample on latents, or where images are encoded."""
    if not case.config["clip_sample"]:
        return None
    latent, bound = case.model.latent, case.config["clip_sample_range"]
    message = f"clip_sample is on: the predicted image is clamped to +-{bound:g}"
    evidence = {"clip_sample_range": bound, "latent": latent}
    off = {"clip_sample": False}
    if latent:
        message += ", and the model works on latents."
        return Finding("warning", message, "Latents reach far beyond it.", evidence, off)
    lost = "Where it clamps, an encoding of images is not undone by decoding"
    if "Inverse" in case.config["_class_name"]:
        return Finding("warning", f"{message}.", f"{lost}.", evidence, off)
    return Finding(
        "info",
        f"{message}.",
        f"{lost}; images drawn from noise keep their range by it.",
        evidence,
        advice="Turn it off to encode images, or if they come out in range without it.",
    )


@_check("DDIM010", f"{_SONG}, Eq. 12")
def _residual_noise(case: Case) -> Finding | None:
    """set_alpha_to_one=False leaves noise in the finished image."""
    left = math.sqrt(1 - case.schedule.final_alpha_cumprod)
    if case.config["set_alpha_to_one"] or left == 0:
        return None
    return Finding(
        _grade(left),
        "set_alpha_to_one is off: the last step ends at level 0, where noise of std "
        f"{left:.4g} is left.",
        "The finished image keeps that noise.",
        {"residual_std": left},
        {"set_alpha_to_one": True},
    )


@_check("DDIM011", f"{_SALIMANS}, Sec. 4")
def _ill_posed(case: Case) -> Finding | None:
    """The prediction type cannot be solved for the image at a visited level, or hardly."""
    kind = case.config["prediction_type"]
    levels = [*case.levels, *([CLEAN] if "Inverse" in case.config["_class_name"] else [])]
    alpha_bar = case.schedule.alpha_bar(torch.tensor(levels))
    p, q = prediction_row(kind, alpha_bar)
    determinants = (alpha_bar.sqrt() * q - (1 - alpha_bar).sqrt() * p).abs()
    smallest, place = (value.item() for value in determinants.min(0))
    level = levels[int(place)]
    if smallest > 1e-3 or (smallest == 0 and kind == "epsilon"):
        return None
    clipped = smallest > 0 and (case.config["clip_sample"] or case.config["thresholding"])
    factor = "infinitely" if smallest == 0 else f"{1 / smallest:.4g} times"
    return Finding(
        "error" if smallest == 0 else "info" if clipped else "warning",
        f"{kind} prediction has determinant {smallest:.4g} at level "
        f"{level}{' (clean data)' if level == CLEAN else ''}.",
        f"The network's error is multiplied {factor} there"
        f"{'; clipping, which is on, holds the image in range' if clipped else ''}.",
        {"level": level, "determinant": smallest},
        advice="Clip the predicted image, if it is one of pixels (clip_sample); v_prediction, with "
        "determinant 1, needs training.",
    )


@_check("DDIM012", f"{_SAHARIA}, Sec. 2.3")
def _idle_thresholding(case: Case) -> Finding | None:
    """Thresholding that does nothing."""
    limit = case.config["sample_max_value"]
    if not case.config["thresholding"] or limit > 1:
        return None
    message = f"thresholding is on with sample_max_value {limit:g}: "
    if limit == 1:
        message += "the threshold lies between 1 and that, so it is always 1."
        consequence = "It is plain clipping to +-1, at the cost of a sort."
    else:
        message += "a threshold of at least 1 is cut to that."
        effect = "contrast grows at every step"
        consequence = f"Each predicted image is clamped to that and divided by it: {effect}."
    return Finding(
        "warning",
        message,
        consequence,
        {"sample_max_value": limit},
        {"thresholding": False, "clip_sample": not case.model.latent},
        advice="For dynamic thresholding of pixels raise sample_max_value, for example to 1.5 or "
        "more.",
    )


@_check("DDIM013", f"{_LIN}, Sec. 3.4")
def _unrescaled_guidance(case: Case) -> Finding | None:
    """Guidance without rescale on a zero-SNR model."""
    scale = case.guidance_scale
    guided = case.model.guided is not False if scale is None else scale > 1
    unusable = case.terminal > 0 or case.config["prediction_type"] == "epsilon"
    if unusable or not guided or case.guidance_rescale > 0:
        return None
    return Finding(
        "info",
        "The model has zero terminal SNR: classifier-free guidance needs guidance_rescale with it.",
        "Without it guided images are over-exposed.",
        {"guidance_scale": scale, "guidance_rescale": case.guidance_rescale},
        advice="Sample with guidance_rescale=0.7 (ddim sample --guidance-rescale 0.7).",
    )


@_check("DDIM014", f"{_LIN}, Table 2")
def _idle_offset(case: Case) -> Finding | None:
    """steps_offset is ignored by the spacing."""
    offset, spacing = case.config["steps_offset"], case.config["timestep_spacing"]
    # diffusers' pipelines with text want 1 for every spacing, and replace any other value by it.
    wanted = (0, 1) if case.model.guided is not False else (0,)
    if offset in wanted or spacing == "leading":
        return None
    return Finding(
        "info",
        f"steps_offset is {offset}, which {spacing} ignores.",
        "Images do not change; readers of the configuration expect a shift that is not there.",
        {"steps_offset": offset},
        {"steps_offset": int(bool(case.model.guided))},
    )


@_check("DDIM015", f"{_SONG}, Sec. 2")
def _betas_length(case: Case) -> Finding | None:
    """trained_betas are of another length than num_train_timesteps."""
    stated, given = case.config["num_train_timesteps"], len(case.schedule)
    if stated == given:
        return None
    lost = (
        "asks for levels that do not exist"
        if given < stated
        else "never visits the noisiest levels"
    )
    return Finding(
        "error" if given < stated else "warning",
        f"trained_betas has {given} levels, and num_train_timesteps says {stated}.",
        f"Plain diffusers {lost}.",
        {"trained_betas": given, "num_train_timesteps": stated},
        {"num_train_timesteps": given},
    )


@_check("DDIM016", f"{_SONG}, Sec. 4.2")
def _too_many_steps(case: Case) -> Finding | None:
    """More steps than levels."""
    total = len(case.schedule)
    if case.asked is None or case.asked <= total:
        return None
    return Finding(
        "error",
        f"{case.asked} steps were asked for, and there are {total} levels.",
        "Sampling is refused; the other findings are for all levels.",
        {"steps": case.asked, "levels": total},
        advice=f"Use at most {total} steps.",
    )


@_check("DDIM017", f"{_SONG}, Sec. 2")
def _other_total(case: Case) -> Finding | None:
    """The schedule has another number of levels than the model."""
    total = len(case.schedule)
    known = case.model.num_train_timesteps or (case.training or {}).get("num_train_timesteps")
    if known is None or known == total:
        return None
    return Finding(
        "error",
        f"The schedule has {total} levels, and the model was trained on {known}.",
        "The network is given levels that mean other amounts of noise to it, or that it never saw.",
        {"schedule": total, "model": known},
        {"num_train_timesteps": known} if case.config["trained_betas"] is None else {},
    )


@_check("DDIM019", "docs/doctor.md")
def _other_training(case: Case) -> Finding | None:
    """The model was trained with another noise schedule or prediction type than it is sampled
    with."""
    training, there, here = case.training, case.training_schedule, case.schedule
    if training is None or there is None or len(there) != len(here):
        return None
    kind, trained_kind = case.config["prediction_type"], training["prediction_type"]
    is_same = torch.allclose(there.alphas_cumprod, here.alphas_cumprod, atol=1e-6)
    if kind == trained_kind and is_same:
        return None
    oracle, pairs, first = GaussianOracle(there, *_DATA), step_pairs(case.levels), case.levels[0]
    right_mean, right_std = _mean_std(oracle.denoise, there, pairs, oracle, first)
    mean = std = math.inf  # if epsilon prediction divides by zero
    if kind != "epsilon" or bool((here.alpha_bar(torch.tensor(case.levels)) > 0).all()):
        mixed = ModelDenoiser(oracle.network(trained_kind), here, kind)
        mean, std = _mean_std(mixed, here, pairs, oracle, first)
    keys = [key for key in _TRAINED_KEYS if training[key] != case.config[key]]
    denied = []  # keys of which the network's own answers say otherwise
    if case.probed not in (None, trained_kind):
        denied.append("prediction_type")
        if case.probed == "epsilon":
            denied.append("rescale_betas_zero_snr")
    return Finding(
        "error" if kind != trained_kind else _grade(math.hypot(mean - right_mean, std - right_std)),
        f"The model was trained with {', '.join(f'{k}={_short(training[k])}' for k in keys)}, and "
        f"is sampled with {', '.join(f'{k}={_short(case.config[k])}' for k in keys)}.",
        f"On data {_DATA_NAME} a perfect network that is sampled so makes N({mean:.3f}, "
        f"{std:.3f}^2) instead of N({right_mean:.3f}, {right_std:.3f}^2).",
        {"mixed": [mean, std], "right": [right_mean, right_std]},
        {key: training[key] for key in keys if key not in denied},
    )


@_check("DDIM020", _NEIGHBOURS)
def _steps_not_given(case: Case) -> Finding | None:
    """The number of steps was not given."""
    if case.asked is not None or case.custom is not None:
        return None
    total, spacing = len(case.schedule), case.config["timestep_spacing"]
    offset = case.config["steps_offset"]
    off, minus_one = stock_flaws(total, spacing, steps_offset=offset) if case.stock else ([], [])
    return Finding(
        "info",
        f"The number of steps is not given; {case.steps} are assumed.",
        f"With {spacing}, plain diffusers leaves its grid for {len(off)} of {total} possible "
        f"numbers, and visits -1 for {len(minus_one)}.",
        {"assumed": case.steps, "off_the_grid": len(off), "minus_one": minus_one[:10]},
        advice="Give the number that you sample with.",
    )


@_check("DDIM021", f"{_SALIMANS}, Sec. 4")
def _probed_type(case: Case) -> Finding | None:
    """The network's answers are of another prediction type than the configuration says."""
    stated = case.config["prediction_type"]
    if case.probe is None or case.probe.prediction_type == stated:
        return None
    found, errors = case.probe.prediction_type, case.probe.errors
    listed = ", ".join(f"{kind} {error:.3f}" for kind, error in errors.items())
    evidence = {"errors": errors, "probed": found}
    message = f"The configuration says {stated}, and the network's answers are "
    if found is None:
        message += f"of no known type (relative errors: {listed})."
        consequence = "The network is not trained, or not on these images."
        return Finding("warning", message, consequence, evidence)
    fix: dict[str, Any] = {"prediction_type": found}
    if found == "epsilon" and case.terminal == 0 and case.config["rescale_betas_zero_snr"]:
        fix["rescale_betas_zero_snr"] = False
    message += f"those of {found} (relative errors: {listed})."
    consequence = "Its output is taken for another quantity: the images are noise."
    return Finding("error", message, consequence, evidence, fix)


@_check("DDIM022", f"{_LIN}, Sec. 5.2")
def _probed_end(case: Case) -> Finding | None:
    """The network was never trained at level T-1."""
    if case.probe is None or case.probe.trained_at_end is not False:
        return None
    evidence = case.probe.evidence
    message = (
        f"The network was not trained at level {case.last} of this schedule: its relative error is "
        f"{evidence['error_at_end']:.3f} there and {evidence['error_below']:.3f} just below"
    )
    following = evidence.get("brightness_following_noise")
    if following is not None:
        share = f"{following:.2f} of the images' spread"
        message += f", and its brightness follows the noise's ({share})"
    return Finding(
        "warning",
        f"{message}.",
        "The first step, which sets an image's brightness, is guesswork.",
        dict(evidence),
        {"rescale_betas_zero_snr": True} if case.terminal == 0 else {},
        retrain=True,
        advice="Sample with the schedule that it was trained with.",
    )


@_check("DDIM023", "docs/decisions/0024-keys-that-the-doctor-knows.md")
def _idle_keys(case: Case) -> Finding | None:
    """Keys that DDIM does not read."""
    known = sorted(OTHER_KEYS & set(case.config) - case.read)
    if not known:
        return None
    idle = {key: case.config[key] for key in known}
    listed = ", ".join(f"{key}={_short(value)}" for key, value in idle.items())
    message = f"DDIM does not read {listed}: other schedulers or versions do."
    if idle.get("predict_epsilon") is False and case.config["prediction_type"] == "epsilon":
        consequence = "The network predicts the image, and its answer is read as noise."
        return Finding("error", message, consequence, idle, {"prediction_type": "sample"})
    consequence = "Images do not change, unless they are expected to be that scheduler's."
    return Finding("info", message, consequence, idle)


def foreign_finding(kind: str, reason: str) -> Finding:
    """The finding about a scheduler that no check applies to; ``reason`` ends a sentence."""
    return Finding(
        "warning",
        f"This is {reason}",
        "No other check applies to it.",
        {"scheduler": kind},
        code="DDIM018",
        reference="Lipman et al. 2023, arXiv 2210.02747; Karras et al. 2022, arXiv 2206.00364",
    )


def json_numbers(value: Any) -> Any:
    """The same value with null for NaN and infinities, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: json_numbers(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_numbers(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean_std(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    pairs: Sequence[Pair],
    oracle: GaussianOracle,
    first: int,
) -> tuple[float, float]:
    """Mean and std of the images that these steps make of the oracle's data at the first level."""
    start = oracle.mean * float(oracle.schedule.alpha_bar(first).sqrt())
    mean, std = torch.tensor([start], dtype=torch.float64), oracle.variance(first).sqrt().reshape(1)
    mean, std = made_of_noise(denoise, schedule, pairs, mean=mean, std=std)
    return float(mean), float(std)


def _short(value: object) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else str(value)
