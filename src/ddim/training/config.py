"""The options of a training run as one frozen value, and named presets of it.

This module imports nothing heavy, since the command line reads its fields to print its help."""

import re
import shlex
from dataclasses import dataclass, fields
from typing import Annotated, Literal, NamedTuple

from ddim.bounds import LARGEST_SEED, MOST_IMAGES, MOST_LEVELS
from ddim.errors import DDIMError
from ddim.options import Needs, Range, check_request, declarations, primitive

__all__ = ["PRESETS", "Pace", "Preset", "TrainConfig", "command_line", "spelled"]

AtLeastOne = Annotated[int, Range(1, 10**12)]
Size = Annotated[int, Range(1, 16384)]
Resolution = Annotated[
    int | str | None,
    Range(1, 16384),
    primitive(lambda word: int(word) if word.isdecimal() else word, metavar="SIDE|WIDTHxHEIGHT"),
]
Interval = Annotated[int, Range(0, 10**12)]
Fraction = Annotated[float, Range(0, 1, below=True)]
Beta = Annotated[
    float,
    Range(0, 1, above=True, below=True),
    Needs(option="beta_schedule", value=("linear", "scaled_linear", "sigmoid", None)),
]
ForText = Needs(option="base")
Preview = Needs(option="preview_every", unless=0)
LEAST_STEPS = 200
"""A new network draws little but noise after fewer optimiser steps."""
MinSNR = Needs(option="weighting", value="min-snr")

_TEXT_OPTIONS = (
    *("train_text_encoder", "caption_column", "caption_dropout", "cache_latents"),
    "preview_guidance_scale",
)

EPSILON_AT_ZERO_SNR = (
    "epsilon prediction cannot be trained at zero terminal SNR, where the input is the answer and "
    "x0 cannot be recovered; use --prediction-type v_prediction, or leave out "
    "--rescale-betas-zero-snr."
)


@dataclass(frozen=True)
class Architecture:
    """The shape of a new unconditional network."""

    block_out_channels: tuple[int, ...] = (32, 64, 128)
    layers_per_block: int = 1
    attention_levels: int = 1
    attention_head_dim: int = 8
    norm_num_groups: int = 8
    dropout: float = 0.0

    def check(self) -> None:
        """Raises a DDIMError if the values do not fit together."""
        if bad := [c for c in self.block_out_channels if c % self.norm_num_groups]:
            raise DDIMError(
                f"--block-out-channels must be multiples of --norm-num-groups, which is "
                f"{self.norm_num_groups}; got {bad[0]}."
            )
        # The middle of the network always has attention.
        narrowest = min(self.block_out_channels[-max(1, self.attention_levels) :])
        if self.attention_head_dim > narrowest:
            raise DDIMError(
                f"--attention-head-dim must be at most {narrowest}, the fewest channels that have "
                f"attention; got {self.attention_head_dim}."
            )


class Pace(NamedTuple):
    """The options that follow from the length of a run, where they are left open."""

    lr_warmup_steps: int
    ema_decay: float
    log_every: int
    preview_every: int


@dataclass(frozen=True)
class TrainConfig:
    """Trains an unconditional, class-conditional or text-conditional model, and writes a folder
    that diffusers loads too."""

    data: str
    """A folder of images, a .npz, IDX files, a .parquet, `digits`, `fashion-mnist`, `fashion-text`,
    or a hub dataset id."""
    out: str
    """Folder for the model, its checkpoints and its log. The same command resumes from the last
    checkpoint there."""

    base: str | None = None
    """Model to start from: an embedded one, a folder or a hub id. One in Stable Diffusion's format
    is trained on the captions of the data."""
    from_scratch: Annotated[bool, Needs(option="base")] = False
    """Start with new weights. The network has the base's shape, or the one that
    --block-out-channels to --dropout describe if any of them is given."""
    train_text_encoder: Annotated[bool, ForText] = False
    """Train the base's text encoder together with the network."""
    caption_dropout: Annotated[float, Range(0, 1), ForText] = 0.1
    """Fraction of captions that are replaced by the empty one. Guidance needs it."""
    cache_latents: Annotated[Literal["no", "memory", "disk"], ForText] = "no"
    """Encode every image (and its mirror image) once, before the run. `disk` keeps the latents in
    OUT while the run lasts; they take 8 bytes per latent element."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations twice."""

    split: str = "train"
    """Split of the data set to train on."""
    resolution: Resolution = None
    """Side of a square, such as 64, or WIDTHxHEIGHT, such as 96x64. Images are resized to cover it,
    and the centre is cut out. Default: all images must have one size already."""
    center_crop: bool = False
    """Cut out the centre square without resizing. With a resolution this happens anyway."""
    random_crop: Annotated[bool, Needs(without="center_crop")] = False
    """Cut images at a random place, drawn anew each time, instead of the centre; without a
    resolution, the largest square. Held-out images are cut in the centre."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour. Default: as the base or, without one, colour if an image is
    coloured."""
    horizontal_flip: bool = False
    """Mirror a random half of the images."""
    image_column: str | None = None
    """Column of parquet or hub data that holds the images. Default: the first one that does."""
    label_column: Annotated[str | None, Needs(option="class_conditional")] = None
    """Column of labels. Default: label, labels, fine_label or class."""
    caption_column: Annotated[str | None, ForText] = None
    """Column of captions in a table or in a folder's metadata file. Default: text, caption,
    captions or prompt."""
    class_conditional: bool = False
    """Train a class-conditional model on the data's labels."""
    validation_images: Interval = 512
    """Number of images that are held out, picked at random, of each class its share; at most a
    tenth of the data. The loss on them chooses the best checkpoint. 0: none."""

    block_out_channels: Annotated[tuple[int, ...] | None, Range(1, 16384)] = None
    """Channels of a new network at each resolution, from full to lowest. Default: 32,64,128."""
    layers_per_block: Annotated[int | None, Range(1, 100)] = None
    """Residual blocks at each resolution. Default: 1."""
    attention_levels: Annotated[int | None, Range(0, 100)] = None
    """Number of resolutions with attention, counted from the lowest. Default: 1."""
    attention_head_dim: Size | None = None
    """Channels of an attention head. Default: 8."""
    norm_num_groups: Size | None = None
    """Groups of the group normalisation; must divide every entry of --block-out-channels.
    Default: 8."""
    dropout: Fraction | None = None
    """Dropout in the residual blocks. Default: 0."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    """What the network predicts. Default: as the base, or epsilon."""
    num_train_timesteps: Annotated[int | None, Range(1, MOST_LEVELS)] = None
    """Number T of levels of the noise schedule. Default: as the base, or 1000."""
    beta_schedule: (
        Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] | None
    ) = None
    """Noise schedule. It replaces the base's, rescaling included. Default: as the base, or
    linear."""
    beta_start: Beta | None = None
    """First beta of linear, scaled_linear and sigmoid. Default: as the base, or 0.0001."""
    beta_end: Beta | None = None
    """Last beta of linear, scaled_linear and sigmoid. Default: as the base, or 0.02."""
    clip_sample: Literal["on", "off"] | None = None
    """Whether the predicted image is clipped to the range of pixels when the model is sampled.
    Default: as the base, or on for epsilon alone."""
    rescale_betas_zero_snr: bool = False
    """Rescale the schedule to zero terminal SNR; a base that does so keeps it. Needs v_prediction
    or sample."""
    offset_noise: Annotated[float, Range(0, 10)] = 0.0
    """Standard deviation of a random constant that is added to the noise of each image and channel,
    such as 0.1. No sampler draws such noise, and zero terminal SNR makes it unnecessary."""
    weighting: Literal["uniform", "min-snr"] = "uniform"
    """Weights of the levels in the loss."""
    snr_gamma: Annotated[float, Range(0, 10**6, above=True), MinSNR] = 5.0
    """SNR at which min-snr saturates."""
    weight_floor: Annotated[float, Range(0, 1), MinSNR] = 0.01
    """Smallest weight under min-snr at a level without signal, so that the terminal level of a
    zero-SNR schedule is still trained; elsewhere the weights are the paper's."""

    images: AtLeastOne = 300_000
    """Length of the run, as the number of images seen, repetitions included."""
    batch_size: Annotated[int, Range(1, MOST_IMAGES)] = 64
    """Images per forward pass and process."""
    gradient_accumulation: Annotated[int, Range(1, MOST_IMAGES)] = 1
    """Forward passes per optimiser step."""
    learning_rate: Annotated[float | None, Range(0, 100, above=True)] = None
    """Peak learning rate of AdamW. Default: 0.0004 for a new network, 0.00001 for a base's
    weights."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate falls to 0 after the warm-up."""
    lr_warmup_steps: Interval | None = None
    """Optimiser steps over which the learning rate rises from 0. Default: a tenth of the run, at
    most 500."""
    weight_decay: Annotated[float, Range(0, 100)] = 0.0
    """Decoupled weight decay."""
    gradient_clip: Annotated[float, Range(0, 10**6)] = 1.0
    """Largest norm of the gradient. 0: no limit."""
    ema_decay: Fraction | None = None
    """Decay of the exponential moving average of the parameters, which is the model that is
    sampled. 0: no averaging. Default: a horizon of a tenth of the run, at most 0.9995."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the network's forward pass. Noise, targets and the loss stay float32."""
    compile: bool = False
    """Compile the network with torch.compile: minutes at the start, then faster steps, on a GPU. It
    is used only if its first gradients are right. Changing it on resuming changes the rounding."""
    seed: Annotated[int, Range(0, LARGEST_SEED)] = 0
    """Seed of the weights, the order of the data, the timesteps and the noise."""

    checkpoint_every: AtLeastOne = 1000
    """Optimiser steps between checkpoints."""
    keep_checkpoints: AtLeastOne = 2
    """Number of newest checkpoints to keep, besides the best one."""
    preview_every: Interval | None = None
    """Optimiser steps between preview grids (OUT/previews); the last step has one too. 0: none.
    Default: a tenth of the run, at least 5,000 images."""
    preview_count: Annotated[int, Range(1, 1000), Preview] = 16
    """Images in a preview."""
    preview_steps: Annotated[int, Range(1, MOST_LEVELS), Preview] = 25
    """DDIM steps of a preview."""
    preview_guidance_scale: Annotated[float, Range(0, 1000), Preview, ForText] = 7.5
    """Guidance scale of the previews of a text model. 1: off."""
    log_every: AtLeastOne | None = None
    """Optimiser steps between log entries (OUT/log, for tensorboard). Default: a twentieth of the
    run, at most 50."""
    workers: Annotated[int, Range(0, 1000)] = 0
    """Processes that load images. 0: the training process itself."""

    @property
    def size(self) -> int | tuple[int, int] | None:
        """The resolution as a side, or as height and width; raises a DDIMError if it is neither."""
        if not isinstance(self.resolution, str):
            return self.resolution
        found = re.fullmatch("([0-9]{1,5})x([0-9]{1,5})", self.resolution)
        width, height = (int(side) for side in found.groups()) if found else (0, 0)
        if not 1 <= min(width, height) <= max(width, height) <= 16384:
            raise DDIMError(
                "--resolution must be a side such as 64, or WIDTHxHEIGHT such as 96x64, from 1 to "
                f"16384; got {self.resolution!r}."
            )
        return height, width

    def steps(self, processes: int) -> int:
        """Optimiser steps of the whole run."""
        return -(-self.images // (self.batch_size * self.gradient_accumulation * processes))

    def pace(self, steps: int) -> Pace:
        """The options that are left open, for a run of so many steps."""
        apart = -(-5000 * steps // self.images)  # steps that take 5,000 images
        previews = max(1, min(10, steps // apart))
        open_ones = Pace(
            min(500, steps // 10),
            min(0.9995, max(0.0, 1 - 10 / steps)),
            max(1, min(50, steps // 20)),
            -(-steps // previews),
        )
        given = {name: getattr(self, name) for name in Pace._fields}
        return open_ones._replace(**{n: value for n, value in given.items() if value is not None})

    def shortness(self, steps: int) -> str | None:
        """A sentence, if a run of so many steps cannot teach a new network anything."""
        if steps >= LEAST_STEPS or (self.base is not None and not self.from_scratch):
            return None
        images = 5 * LEAST_STEPS * -(-self.images // steps)
        return (
            f"a new network learns little in {steps} optimiser steps, and will draw noise; give "
            f"--images {images} or more, or a smaller --batch-size."
        )

    @property
    def shape_options(self) -> list[str]:
        """The options that were given for the shape of a new network."""
        return [f.name for f in fields(Architecture) if getattr(self, f.name) is not None]

    @property
    def architecture(self) -> Architecture:
        """The shape of a network that is made without a base."""
        return Architecture(**{name: getattr(self, name) for name in self.shape_options})

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 4e-4 if self.base is None or self.from_scratch else 1e-5

    @property
    def text_options(self) -> list[str]:
        """The options for text models that are not at their defaults."""
        changed = (f.name for f in fields(TrainConfig) if getattr(self, f.name) != f.default)
        return [name for name in changed if name in _TEXT_OPTIONS]

    def __post_init__(self) -> None:
        check_request(self)
        _ = self.size
        if self.random_crop and self.cache_latents != "no":
            raise DDIMError(
                "--random-crop cuts an image elsewhere each time, and --cache-latents encodes it "
                "once; leave out one of the two."
            )
        start = 1e-4 if self.beta_start is None else self.beta_start
        end = 0.02 if self.beta_end is None else self.beta_end
        if start > end:
            raise DDIMError(f"betas must rise; got --beta-start {start}, --beta-end {end}.")
        kind = self.prediction_type or ("epsilon" if self.base is None else None)
        if self.rescale_betas_zero_snr and kind == "epsilon":
            raise DDIMError(EPSILON_AT_ZERO_SNR)
        if self.base is not None and not self.from_scratch and self.shape_options:
            raise DDIMError(
                f"{spelled(self.shape_options[0])} is for a new network, and the base has one; add "
                "--from-scratch, or leave it out."
            )
        if self.base is None or self.from_scratch:
            self.architecture.check()


def spelled(name: str) -> str:
    """An option of a configuration as the command line spells it."""
    return declarations(TrainConfig)[name].option


def command_line(config: TrainConfig, *, processes: int = 1) -> str:
    """Returns the shell command that trains this configuration, with the options that differ from
    their defaults."""
    # torchrun, since accelerate launch starts a single process if there are no GPUs.
    launch = ["torchrun", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    words = [*launch, "ddim", "train"]
    for field in fields(TrainConfig):
        value = getattr(config, field.name)
        if value != field.default:
            words.append(spelled(field.name))
            if value is not True:
                words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return shlex.join(words)


@dataclass(frozen=True)
class Preset:
    """The options of an embedded model, an example or a recipe, and a note on what they give. Those
    of a recipe leave ``data`` open."""

    options: dict[str, object]
    note: str


# Common to the three text models that differ in prediction type and terminal SNR.
_FASHION_TEXT: dict[str, object] = {
    "data": "fashion-text",
    "base": "fashion-text",
    "from_scratch": True,
    "cache_latents": "memory",
    "caption_dropout": 0.1,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "images": 150_000,
    "batch_size": 32,
    "learning_rate": 8e-4,
    "lr_warmup_steps": 300,
    "ema_decay": 0.999,
    "checkpoint_every": 500,
}

PRESETS: dict[str, Preset] = {
    "few-pictures": Preset(
        {
            "resolution": 28,
            "block_out_channels": (32, 64, 64),
            "prediction_type": "v_prediction",
            "images": 25_600,
            "batch_size": 32,
            "learning_rate": 2e-3,
            "validation_images": 0,
        },
        note="A few hundred pictures of your own (give --data), at 28x28: minutes on two cores.",
    ),
    "fashion-mnist": Preset(
        {
            "data": "fashion-mnist",
            "block_out_channels": (32, 64, 128),
            "layers_per_block": 1,
            "attention_levels": 1,
            "images": 700_000,
            "batch_size": 32,
            "learning_rate": 5e-4,
            "lr_schedule": "cosine",
            "lr_warmup_steps": 500,
            "ema_decay": 0.9995,
            "checkpoint_every": 500,
            "preview_every": 2000,
            "clip_sample": "off",
        },
        note="The embedded model: 2.7 M parameters, 28x28, epsilon, linear betas.",
    ),
    "fashion-text": Preset(
        _FASHION_TEXT
        | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "images": 400_000},
        note=(
            "The embedded text model: 2.5 M parameters, 16x16 latents, v-prediction, zero terminal "
            "SNR."
        ),
    ),
    "fashion-text-v": Preset(
        _FASHION_TEXT | {"prediction_type": "v_prediction"},
        note="Its twin without zero terminal SNR.",
    ),
    "fashion-text-epsilon": Preset(
        _FASHION_TEXT | {"prediction_type": "epsilon"}, note="Its twin without v-prediction, too."
    ),
    "digits": Preset(
        {
            "data": "digits",
            "block_out_channels": (32, 64),
            "images": 150_000,
            "batch_size": 64,
            "learning_rate": 1e-3,
            "lr_warmup_steps": 100,
            "ema_decay": 0.998,
            "validation_images": 128,
        },
        note="Real 8x8 digits out of scikit-learn: minutes on a laptop.",
    ),
}
