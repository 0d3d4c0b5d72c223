"""Options that several requests share: their types with the ranges, and the base classes of
requests.

A field's docstring is its help. Nothing here loads torch.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import tyro

from ddim.bounds import LARGEST_SEED, MOST_IMAGES, MOST_LEVELS
from ddim.figures import FORMATS
from ddim.options import Blank, Choices, Needs, Range
from ddim.runs.values import ClassName, Eta

__all__ = ["Class", "Computed", "Count", "Drawn", "ENCODERS", "Encoder", "First", "Folder"]
__all__ += ["Measured", "ModelName", "Noisy", "Pictures", "Plotted"]
__all__ += ["Request", "Rescale", "SAMPLERS", "SEEDS", "Scale", "Seed", "Seeds", "Shared"]
__all__ += ["Spaced"]
__all__ += ["Spacing", "StepNumbers", "Steps", "Text", "Walk"]

SEEDS = Range(0, LARGEST_SEED)

Spacing = Literal["leading", "linspace", "trailing", "quadratic"]
Encoder = Literal["o-belm", "bdia", "edict", "fixed-point", "ddim"]
ENCODERS: tuple[str, ...] = get_args(Encoder)
SAMPLERS = ("ddim", "ddim-2", "o-belm", "bdia", "edict")
Count = Annotated[int, Range(1, MOST_IMAGES)]
Steps = Annotated[int, Range(1, MOST_LEVELS), Needs(without="timesteps")]
StepNumbers = Annotated[tuple[int, ...], Range(1, MOST_LEVELS)]
Seed = Annotated[int, SEEDS]
First = Annotated[int, Range(0, MOST_IMAGES), Needs(option="data")]
Scale = Annotated[float | None, Range(0, 1000), Needs(model="text")]
Rescale = Annotated[float | None, Range(0, 1), Needs(model="text")]
ModelName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")]
Class = Annotated[
    ClassName, tyro.conf.arg(name="class"), Range(0, MOST_LEVELS), Needs(model="classes")
]


@dataclass(frozen=True, kw_only=True)
class Computed:
    """Where and how a run computes."""

    batch_size: Count = 64
    """Images that are computed together. It changes images by rounding only: at most one grey level
    in float32, a few in half precision."""
    device: str = "auto"
    """Where to compute: cpu, cuda, ...; auto takes an accelerator where there is one."""


@dataclass(frozen=True, kw_only=True)
class Request(Computed):
    """What every run on a model has."""

    model: ModelName = "fashion-mnist"
    """An embedded model, a folder in diffusers format, or a hub id."""


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Images by their seeds."""

    seed: Seed = 0
    """Seed of the first image."""
    compile: bool = False
    """Compile the network first: this takes a minute, and then each step is faster."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Work that any number of processes share: the same command, started again here or on another
    machine that sees the folder, takes what is free."""

    threads: Annotated[int | None, Range(1, 1024)] = None
    """Threads that each process computes with. Another number adds in another order, which may
    change the last bits, so a folder keeps to one. Default: the folder's, else 1 where several
    processes share the work, else all cores."""
    workers: Annotated[int, Range(1, 1024)] = 1
    """Processes to start on this machine; they share its accelerators."""
    lease: Annotated[float, Range(1, 86_400)] = 60.0
    """Seconds without a sign of life after which work that another process holds is taken over."""
    engine: Literal["processes", "ray"] = "processes"
    """What gives out the work: nothing but the folder, or a Ray cluster, whose machines see it."""
    ray_address: Annotated[str | None, Needs(option="engine", value="ray")] = None
    """The cluster, such as auto or ray://HOST:10001. Default: one on this machine, for this run."""


@dataclass(frozen=True, kw_only=True)
class Spaced:
    """How levels are chosen."""

    spacing: Annotated[Spacing | None, Needs(without="timesteps")] = None
    """How the levels are spaced. Default: as the model's configuration says, fitted ones first."""


@dataclass(frozen=True, kw_only=True)
class Walk(Spaced):
    """Which levels a trajectory visits."""

    steps: Steps | None = None
    """Number of steps, which is the number of network evaluations an image. Default: 50."""


@dataclass(frozen=True, kw_only=True)
class Noisy(Walk):
    """A trajectory that may draw noise."""

    eta: Annotated[Eta, Needs(option="sampler", value="ddim")] = None
    """0 is deterministic (the default), 1 DDPM's posterior, sigma-hat DDPM's larger noise."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Results in a folder."""

    out: str | None = None
    """Folder for the results. Default: out/COMMAND-MODEL-HASH, of the options that the results
    depend on: the same command goes on there, and no other."""
    overwrite: bool = False
    """Start anew in a folder of earlier results; the files that its run.json lists are deleted."""


@dataclass(frozen=True, kw_only=True)
class Drawn(Folder):
    """Pictures in a folder."""

    picture: Literal["png", "jpg", "webp"] = "png"
    """Format of the pictures. png and webp keep every pixel; jpg changes them a little, and so the
    numbers that are measured on them."""


@dataclass(frozen=True, kw_only=True)
class Plotted:
    """Results that are plotted."""

    plot_format: Annotated[tuple[str, ...], Choices(FORMATS)] = ("png",)
    """Formats of the plots: png, pdf, svg; several separated by commas."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Prompts and guidance."""

    prompt: Annotated[list[str], tyro.conf.UseAppendAction, Needs(model="text")] = field(
        default_factory=list
    )
    """What the images show. Give it again for more prompts, or FILE.txt with one prompt a line."""
    negative_prompt: Annotated[str | None, Blank(), Needs(model="text")] = None
    """What guidance leads away from. Default: the empty text."""
    guidance_scale: Scale = None
    """Strength of guidance; 1 or less is off. Default: the model card's, else 7.5."""
    guidance_rescale: Rescale = None
    """How far the contrast of guided predictions is brought back to that of unguided ones, from 0
    to 1. Default: the model card's, else 0."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images of a data set that are encoded."""

    split: Annotated[str | None, Needs(option="data")] = None
    """Split of the data set. Default: test where there is one, else train."""
    seed: First = 0
    """Number of the first image of the data set, counted from 0."""
    resize: bool = False
    """Resize images of another size (shorter side) and crop them in the centre."""
    class_: Class = None
    """Class of all images, its number or its name. Default: the data's own."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the network. The states are always float64."""


@dataclass(frozen=True, kw_only=True)
class Measured(Folder):
    """Real images to compare with, and the metrics."""

    reference: str
    """Real images: folder, .npz, IDX files, parquet, digits, fashion-mnist, or a hub dataset id."""
    split: str = "train"
    """Split of the reference."""
    resize: bool = False
    """Resize reference images of another size (shorter side) and crop them in the centre."""
    metrics: tuple[str, ...] | None = None
    """METRIC-EXTRACTOR each, such as fd-fashion,kid-pixels; the first is the quality of ratios and
    plots. Default: a panel that fits the images."""
    weights: tuple[str, ...] = ()
    """NAME=PATH each: weights of the extractors inception, dinov2 and efficientnet-lite0."""
