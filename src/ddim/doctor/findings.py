"""What the doctor looks at, a :class:`Case`, and what it says of it, a :class:`Finding`.

An ``error`` is a NaN, a step that cannot be taken, or images of nothing. A ``warning`` is a loss
that can be seen. ``info`` is a loss smaller than :data:`FAINT`, or one that depends on how the
sampler is called."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from ddim.core.checks import check_kind, check_shape, check_whole, wrong_argument
from ddim.core.denoiser import Denoiser
from ddim.core.oracle import GaussianOracle
from ddim.core.schedule import NoiseSchedule
from ddim.core.step import Eta
from ddim.core.timesteps import Pair
from ddim.doctor.probing import Probe
from ddim.doctor.symptoms import Brightness, leaked_brightness, made_of_noise, stock_pairs

__all__ = [
    "ASKS",
    "DATA",
    "DATA_NAME",
    "FAINT",
    "GREY_LEVEL",
    "LIN",
    "NEIGHBOURS",
    "SALIMANS",
    "SONG",
    "Case",
    "Check",
    "Finding",
    "ModelFacts",
    "Severity",
    "grade",
    "json_numbers",
    "made_of_data",
    "mean_std",
    "register",
]

Severity = Literal["error", "warning", "info"]

FAINT = 0.03
"""The largest predicted error, pixels in [-1, 1], that is information and no warning: four grey
levels of 255."""
GREY_LEVEL = 2 / 255
"""A fix whose figures gain less than this is not proposed."""

DATA = (0.5, 0.25)
"""Mean and std of the Gaussian data on which steps are judged."""
DATA_NAME = "brightness {} +- {}".format(*DATA)

SONG = "Song, Meng, Ermon 2021, arXiv 2010.02502"
LIN = "Lin et al. 2023, arXiv 2305.08891"
SALIMANS = "Salimans, Ho 2022, arXiv 2202.00512"
ASKS = "--data PICTURES --probe asks them"
"""How the doctor learns of weights what no file says."""
NEIGHBOURS = "`python -m pydoc ddim.core.timesteps`"


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
        diffusers_only: Whether it is a defect of plain diffusers that this package does not have.
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
    diffusers_only: bool = False
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

    Raises:
        DDIMError: If a size or a number of levels is none, or ``training`` no configuration.
    """

    latent: bool | None = None
    guided: bool | None = None
    shape: tuple[int, int, int] | None = None
    num_train_timesteps: int | None = None
    training: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.shape is not None and len(check_shape("shape", self.shape)) != 3:
            raise wrong_argument("shape", "be (C, H, W)", self.shape)
        if self.num_train_timesteps is not None:
            check_whole("num_train_timesteps", self.num_train_timesteps, least=1)
        check_kind("training", self.training, (Mapping, type(None)), "a configuration (a dict)")


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
        read: Those of :data:`ddim.doctor.reading.OTHER_KEYS` that the sampler reads.
        levels: The levels that this package visits.
        stock: The levels that plain diffusers visits; None if it cannot visit such levels.
        eta: The eta that was asked for.
        guidance_scale: The guidance that was asked for.
        guidance_rescale: The rescale of guidance that was asked for.
        probe: What the network's own answers tell.
        refusal: The sentence with which this package refuses to sample; None if it samples.
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
    refusal: str | None

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

    def leak(self, t: int) -> tuple[Severity, dict[str, Any]]:
        """The error of starting from N(0, I) on level t: its severity, and its numbers."""
        bias, factor = leaked_brightness(self.schedule, t, self.brightness)
        numbers = {
            "level": t,
            "snr": float(self.schedule.snr(t)),
            "sqrt_alpha_bar": float(self.schedule.alpha_bar(t).sqrt()),
            "brightness_bias": bias,
            "brightness_spread": factor,
        }
        # Of pure noise that is taken for an image with more signal than noise, noise is left.
        return "error" if numbers["snr"] > 1 else grade(bias), numbers


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


_Find = Callable[[Case], Finding | None]


def register(checks: dict[str, Check]) -> Callable[[str, str], Callable[[_Find], _Find]]:
    """A decorator for questions, which takes a code and a reference and adds a check to a dict."""

    def check(code: str, reference: str) -> Callable[[_Find], _Find]:
        def add(find: _Find) -> _Find:
            checks[code] = Check(code, reference, find)
            return find

        return add

    return check


def grade(error: float) -> Severity:
    return "info" if abs(error) < FAINT else "warning"


def json_numbers(value: Any) -> Any:
    """The same value with null for NaN and infinities, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: json_numbers(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_numbers(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def made_of_data(case: Case, pairs: Sequence[Pair]) -> tuple[float, float]:
    """Mean and std of the images that these steps make of the data :data:`DATA` at the first level,
    with a perfect network."""
    oracle = GaussianOracle(case.schedule, *DATA)
    return mean_std(oracle.denoise, case.schedule, pairs, oracle, case.levels[0])


def mean_std(
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
