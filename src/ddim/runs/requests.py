"""What can be asked of a run: one frozen request for each command, its options declared once.

A field's docstring is its help. Options that several requests share stand in a base class, in
``shared_options``. A request holds words only: nothing here loads torch.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from ddim.bounds import MOST_IMAGES, MOST_LEVELS
from ddim.options import Blank, Choices, Needs, Range
from ddim.runs.shared_options import (
    ENCODERS,
    SAMPLERS,
    SEEDS,
    Class,
    Computed,
    Count,
    Drawn,
    Encoder,
    Folder,
    Measured,
    ModelName,
    Noisy,
    Pictures,
    Plotted,
    Request,
    Rescale,
    Scale,
    Seed,
    Seeds,
    Shared,
    Spaced,
    Spacing,
    StepNumbers,
    Steps,
    Text,
    Walk,
)
from ddim.runs.values import Eta, Etas, Levels
from ddim.training.config import Beta

__all__ = ["ConsistencyRequest", "ConvertRequest", "DecodeRequest", "DoctorRequest"]
__all__ += ["EditRequest", "EncodeRequest", "EvaluateRequest", "FitStepsRequest"]
__all__ += ["InterpolateRequest"]
__all__ += ["ReconstructRequest", "SampleRequest", "StatusRequest", "TableRequest"]


@dataclass(frozen=True, kw_only=True)
class SampleRequest(Text, Noisy, Drawn, Shared, Seeds, Request):
    """Draws images from a model with DDIM: a file for each seed, or archives; a grid of the first
    64; and a record of the run.

    Running again into the same folder draws what is missing, also beside processes that are drawing
    there. The grid shows the images of the last request only.
    """

    count: Annotated[int, Range(1, 2**32)] = 16
    """How many images: the seeds SEED to SEED+COUNT-1."""
    order: Annotated[Literal[1, 2] | None, Needs(option="sampler", value=("ddim", "ddpm"))] = None
    """Order of the solver: 1 is DDIM; 2, its multistep method, is more accurate at the same cost.
    Default: as the model's configuration says."""
    variance: Annotated[Literal["eta", "analytic"], Needs(model="pixels")] = "eta"
    """analytic adds, at eta 0 too, the noise that the prediction's error leaves out. It is measured
    on data first and kept in gamma.json."""
    data: Annotated[str | None, Needs(option="variance", value="analytic")] = None
    """Images for --variance analytic. Default: those that the model was trained on."""
    timesteps: Levels = None
    """The levels, falling, in place of --steps and --spacing; or a JSON file with `timesteps`."""
    sampler: Literal["ddim", "ddpm", "o-belm", "bdia", "edict"] = "ddim"
    """ddpm: sigma-hat noise and static clipping; o-belm, bdia, edict: exactly invertible."""
    clip: Literal["none", "static", "dynamic"] | None = None
    """How predicted images are kept in range between the steps; the noise is then derived again.
    Default: as the model's configuration says."""
    prior: Annotated[str, Needs(model="pixels")] = "standard"
    """What the first noise is drawn from: standard is N(0, I); data uses the data's mean colours
    from the model's prior.json; or a FILE.json that `ddim doctor --prior` wrote."""
    image: Annotated[str | None, Needs(model="text")] = None
    """A picture to start from, in place of noise."""
    strength: Annotated[
        float | None, Range(0, 1, above=True), Needs(option="image", model="text")
    ] = None
    """Share of the steps walked from --image; 1 keeps little or nothing of it. Default: 0.8."""
    class_: Class = None
    """Class of all images, its number or its name. Default: the seed modulo the number of
    classes."""
    batch_size: Count = 16
    store: Literal["files", "webdataset", "parquet", "npz"] = "files"
    """A file a picture, or archives of SHARD_SIZE pictures that train --data and evaluate read."""
    shard_size: Annotated[int | None, Range(1, MOST_IMAGES)] = None
    """Pictures of a shard, which one process draws. Default: 1000 in archives, else BATCH_SIZE."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network. The image between the steps is always float32."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(Noisy, Shared, Seeds, Measured, Computed):
    """Measures a folder of images, an array file, or a model against real images; each number
    stands beside its floor and its spread."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SAMPLES_OR_MODEL")]
    """A folder of pictures (such as `ddim sample` writes), a .npz, or a model: embedded, a
    diffusers folder, or a hub id; no text-to-image model."""
    count: Count | None = None
    """How many samples are measured. Default: all images of a folder, 2048 of a model."""
    store: Literal["files", "webdataset", "parquet", "npz"] | None = None
    """Keep the pictures of a model too: a file each, or archives that train --data and evaluate
    read. Default: they are measured and dropped."""
    picture: Annotated[Literal["png", "jpg", "webp"], Needs(option="store")] = "png"
    """Format of pictures that are kept."""


@dataclass(frozen=True, kw_only=True)
class TableRequest(Plotted, Measured, Shared, Spaced, Seeds, Request):
    """Measures a model at every eta and number of steps: quality, time, and the ratio of both to
    DDPM.

    Each finished cell is kept. Running again into the same folder measures what is missing, and
    other etas and steps too.
    """

    eta: Etas = (0.0, 0.2, 0.5, 1.0, "sigma-hat")
    """0 is deterministic, 1 is DDPM's posterior, sigma-hat the larger noise of DDPM."""
    steps: StepNumbers = (10, 20, 50, 100, 1000)
    """Numbers of steps, which are network evaluations an image."""
    clip: Literal["none", "static", "dynamic"] | None = None
    """How predicted images are kept in range. Default: as the model's configuration says."""
    count: Count = 2048
    """Images of a cell: the seeds SEED to SEED+COUNT-1, the same in every cell."""
    long_count: Count | None = None
    """Images of the cells of more than 100 steps. Every cell is measured on that many too, for the
    ratios. Default: COUNT."""
    repeats: Annotated[int, Range(1, 1000)] = 1
    """How often each cell is drawn, from other seeds; from 2 on, the spread is over these."""
    timing_rounds: Annotated[int, Range(0, 1000)] = 0
    """Rounds in which each cell of the folder draws one more batch, in turn, for times that can be
    compared; 0 keeps the cells' own times."""

    @property
    def counts(self) -> tuple[int, int]:
        """Images of a cell, and of a cell of many steps."""
        return self.count, self.count if self.long_count is None else self.long_count


@dataclass(frozen=True, kw_only=True)
class ReconstructRequest(Plotted, Pictures, Shared, Spaced, Folder, Request):
    """Measures how images come back from their codes, for each method and number of steps: a table,
    a plot and a sheet.

    What is measured is kept. Running again into the same folder adds other methods and steps.
    """

    data: str
    """Images: a folder, a .npz, IDX files, parquet, digits, fashion-mnist, or a hub dataset id."""
    count: Count = 256
    """How many images, from SEED on."""
    steps: StepNumbers = (10, 20, 50, 100)
    """Numbers of steps, the same each way."""
    method: Annotated[tuple[str, ...], Choices(ENCODERS)] = ("ddim", "fixed-point", "o-belm")
    """Encoders: ddim, fixed-point, o-belm, bdia, edict."""


@dataclass(frozen=True, kw_only=True)
class ConsistencyRequest(Plotted, Spaced, Folder, Seeds, Request):
    """Draws the same latents with other steps and samplers, and measures how far each result is
    from that of the longest trajectory.

    With 1000 steps among them, that distance is the ODE error: mean squared error per dimension,
    pixels in [0, 1], no clipping.
    """

    count: Count = 8
    """How many latents: the seeds SEED to SEED+COUNT-1."""
    steps: StepNumbers = (10, 20, 50, 100, 1000)
    """Numbers of steps. The others are compared with DDIM of the largest."""
    sampler: Annotated[tuple[str, ...], Choices(SAMPLERS)] = ("ddim",)
    """ddim, ddim-2 (its second order), o-belm, bdia, edict."""


@dataclass(frozen=True, kw_only=True)
class InterpolateRequest(Walk, Drawn, Request):
    """Draws the path between two seeds or two images, or with --grid the square between four."""

    seeds: Annotated[tuple[int, ...] | None, SEEDS, Needs(without="images")] = None
    """Two seeds; four with --grid: top left, top right, bottom left, bottom right."""
    images: tuple[str, ...] | None = None
    """As many picture files, in place of seeds; they are encoded first."""
    count: Annotated[int, Range(2, 1000)] = 11
    """Pictures of the path, or of each side of a grid, the ends included."""
    grid: bool = False
    """A square between four corners in place of a path."""
    interpolation: Literal["spherical", "linear"] = "spherical"
    """spherical stays where latents lie; linear leaves it, for comparison."""
    method: Annotated[Encoder, Needs(option="images")] = "fixed-point"
    """How images are encoded. The codes of fixed-point look most like noise; those of o-belm and
    bdia give the ends back exactly."""
    class_: Class = None
    """Class of all pictures, its number or its name; class-conditional models need it."""
    resize: Annotated[bool, Needs(option="images")] = False
    """Resize images of another size (shorter side) and crop them in the centre."""
    gif: Annotated[bool, Needs(without="grid")] = False
    """Write the path as an animation, there and back, too."""


@dataclass(frozen=True, kw_only=True)
class EditRequest(Walk, Drawn, Request):
    """Edits a picture by words: encodes it under the prompt that describes it, and decodes its code
    under another. What the prompts share stays where it was."""

    model: ModelName = "fashion-text"
    """A checkpoint in Stable Diffusion's format: an embedded model, a folder, or a hub id."""
    prompt: str
    """What the picture shows."""
    to: str
    """What it is to show."""
    image: str | None = None
    """The picture. Default: one is drawn from the prompt."""
    resize: Annotated[bool, Needs(option="image")] = False
    """Resize a picture of another size (shorter side) and crop it in the centre."""
    seed: Annotated[Seed, Needs(without="image")] = 0
    """Seed of the picture that is drawn."""
    guidance_scale: Scale = None
    """Strength of guidance of the edit; codes are made without. Default: the model card's, else
    7.5."""


@dataclass(frozen=True, kw_only=True)
class EncodeRequest(Pictures, Walk, Shared, Request):
    """Turns images into one code file, which `ddim decode` turns back; OUT.run.json beside it says
    how it was made. With --shard-size into a folder of them, whose work processes share."""

    images: Annotated[tuple[str, ...] | None, Needs(without="data")] = None
    """Picture files."""
    data: str | None = None
    """A data set in place of files, as `ddim train --data` takes it."""
    count: Annotated[Count | None, Needs(option="data")] = None
    """How many images of the data set, from SEED on. Default: all."""
    method: Encoder | None = None
    """o-belm, bdia and edict come back exactly, fixed-point nearly; ddim is the paper's own.
    Default: o-belm; bdia at zero terminal SNR, where the codes of o-belm are no noise."""
    shard_size: Annotated[int | None, Range(1, MOST_IMAGES), Needs(option="data")] = None
    """Codes of a file in a folder of them; one process makes a file. Default: one file of all."""
    out: str | None = None
    """The file to write, which must not exist; with --shard-size a folder. Default:
    code.safetensors; of a folder out/encode-MODEL-HASH, of the options that the codes depend
    on."""
    overwrite: Annotated[bool, Needs(option="shard_size")] = False
    """Start anew in a folder of earlier codes; the files that its run.json lists are deleted."""


@dataclass(frozen=True, kw_only=True)
class DecodeRequest(Walk, Drawn, Request):
    """Turns codes back into pictures: a file for each image, and a grid of the first 64."""

    code: str = "code.safetensors"
    """The file or the folder that `ddim encode` wrote."""
    seed: Annotated[int, Range(0, MOST_IMAGES)] = 0
    """Number of the first image of the code, counted from 0."""
    count: Count | None = None
    """How many images, from SEED on. Default: all."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the network, as it was for encoding. The states are always float64."""


@dataclass(frozen=True, kw_only=True)
class FitStepsRequest(Text, Request):
    """Finds the levels at which a few steps of a model come nearest to its own images of many
    steps, and says by how much.

    The result goes into a JSON file for `ddim sample --timesteps`. No data is needed.
    """

    steps: Steps = 10
    """How many levels to choose, which are network evaluations an image."""
    order: Literal[1, 2] | None = None
    """1 is DDIM, 2 its multistep method. Default: as the model's configuration says."""
    count: Annotated[int, Range(1, 10_000)] = 32
    """Images that the search looks at, all of them together."""
    held_out: Annotated[int, Range(2, MOST_IMAGES)] = 32
    """Other images, on which the result is compared with every spacing."""
    exact: bool = False
    """Measure the held-out errors against DDIM at all of the model's levels, which is their
    definition, instead of 100 steps of order 2, which are nearly the same and ten times as fast."""
    evaluations: Annotated[int, Range(0, MOST_IMAGES)] = 300
    """About how many network evaluations on all COUNT images the search may make."""
    seed: Seed = 1_000_000
    """Seed of the first image; far from the seeds that images are drawn and measured with."""
    batch_size: Count = 16
    out: str = "steps.json"
    """The file for the result; it must not exist."""


@dataclass(frozen=True, kw_only=True)
class DoctorRequest:
    """Examines a scheduler's configuration: a verdict in one sentence, a line of Python that mends
    it, and every finding with its numbers and what it does to images.

    Needs no weights. Exits with 1 if there is an error.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A scheduler_config.json, a model's folder, a checkpoint in one safetensors file (its header
    is read), an embedded model, a hub id, or the folder or card.json of a training run."""
    steps: Steps | None = None
    """Number of steps that you sample with. Default: 50, and a finding that says so."""
    spacing: Annotated[Spacing | None, Needs(without="timesteps")] = None
    """How the levels are spaced. Default: as the configuration says."""
    timesteps: Levels = None
    """The levels themselves, in place of --steps and --spacing."""
    eta: Eta = None
    """The eta that you sample with."""
    guidance_scale: Scale = None
    """The guidance that you sample with. Default: the model card's."""
    guidance_rescale: Rescale = None
    """The rescale of guidance that you sample with. Default: the model card's, else 0."""
    latent: bool = False
    """The model works on latents. A model's folder says this by itself."""
    data: str | None = None
    """Training data, as of `ddim train`: brightness is predicted for these images. For a model of
    latents, what --probe calls it on."""
    brightness: Annotated[tuple[float, ...] | None, Range(-1, 1), Needs(without="data")] = None
    """MEAN,STD of the images' mean grey levels, pixels in [-1, 1], in place of --data."""
    prior: Annotated[str | None, Needs(option="data")] = None
    """Write the mean colours of --data into this file, for `ddim sample --prior`."""
    probe: Annotated[bool, Needs(option="data")] = False
    """Call the network on --data: what does it predict, and how was its last level trained? Needs
    the weights of a model of pixels, or of one in Stable Diffusion's format."""
    fix: str | None = None
    """Write a corrected configuration into this new file, or into a folder, which DIR/ makes; what
    needs training is left as it is."""
    plot: str | None = None
    """Draw log-SNR, visited levels and step sizes of each spacing into this new file, a .png,
    .pdf or .svg."""
    show: str | None = None
    """Draw the same seeds as the model is configured, and with each fix that needs no training,
    into this new file, a .png, .jpg or .webp. Needs the weights."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction, Needs(option="show", model="text")] = (
        field(default_factory=list)
    )
    """What the images of --show show, for a text-to-image model: each seed under each prompt."""
    negative_prompt: Annotated[str | None, Blank(), Needs(option="show", model="text")] = None
    """What guidance leads away from. Default: the empty text."""
    seed: Annotated[Seed, Needs(option="show")] = 0
    """Seed of the first image of --show."""
    count: Annotated[int, Range(1, 16), Needs(option="show")] = 8
    """How many seeds --show draws."""
    device: Annotated[str, Needs(option="show", alternative="probe")] = "auto"
    """Where --show and --probe compute: cpu, cuda, ...; auto takes an accelerator where there is
    one."""
    json: bool = False
    """Print JSON on standard output in place of the report."""
    strict: bool = False
    """Exit with 1 on a warning too."""


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """Converts a checkpoint of ermongroup/ddim or openai/improved-diffusion; no code in the file is
    run."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Weights: safetensors, a state dict, or a training checkpoint (its average is taken)."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the model; it must not exist."""
    layout: Literal["ddim", "improved-diffusion"] | None = None
    """Where the checkpoint is from. Default: told by the names of its weights."""
    sample_size: Annotated[int | None, Range(1, 16384)] = None
    """Side of the images. Default: told by the attention at 16x16, for ddim only."""
    num_heads: Annotated[
        int | None, Range(1, 1024), Needs(option="layout", value=("improved-diffusion", None))
    ] = None
    """Heads of attention of improved-diffusion. Default: 4."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    """What the network predicts."""
    num_train_timesteps: Annotated[int, Range(1, MOST_LEVELS)] = 1000
    """Levels of the noise schedule it was trained with."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = (
        "linear"
    )
    """Noise schedule it was trained with; improved-diffusion's cosine is squaredcos_cap_v2."""
    beta_start: Beta = 1e-4
    """First beta of linear, scaled_linear and sigmoid; as improved-diffusion does, both betas of
    its linear schedule are scaled by 1000 over the number of levels."""
    beta_end: Beta = 0.02
    """Last beta of linear, scaled_linear and sigmoid."""


@dataclass(frozen=True, kw_only=True)
class StatusRequest:
    """Says how far a run is that processes share: what is done and in hand, the rate and the time
    left, and who works on it. On a terminal it goes on until all is done.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The folder of the results."""
    json: bool = False
    """Print JSON on standard output, once."""
    once: bool = False
    """Print the state once, on a terminal too."""
