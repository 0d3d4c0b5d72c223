"""The options of a training run as one frozen value, and named presets of it.

This module imports nothing heavy, since the command line reads its fields to print its help."""

import math
import shlex
from dataclasses import dataclass, fields
from typing import Literal

from ddim.errors import DDIMError

__all__ = ["PRESETS", "Preset", "TrainConfig", "command_line"]

# The least value of each number; what is not listed has a rule of its own below.
_AT_LEAST = {
    1: (
        *("block_out_channels", "layers_per_block", "attention_head_dim", "norm_num_groups"),
        *("num_train_timesteps", "images", "batch_size", "gradient_accumulation"),
        *("checkpoint_every", "keep_checkpoints", "preview_count", "preview_steps", "log_every"),
    ),
    0: (
        *("validation_images", "attention_levels", "weight_floor", "offset_noise"),
        *("preview_guidance_scale", "lr_warmup_steps", "weight_decay", "gradient_clip", "seed"),
        *("preview_every", "workers"),
    ),
}

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
                f"block_out_channels must be multiples of norm_num_groups={self.norm_num_groups}; "
                f"got {bad[0]}."
            )
        # The middle of the network always has attention.
        narrowest = min(self.block_out_channels[-max(1, self.attention_levels) :])
        if self.attention_head_dim > narrowest:
            raise DDIMError(
                f"attention_head_dim must be at most {narrowest}, the fewest channels that have "
                f"attention; got {self.attention_head_dim}."
            )


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
    from_scratch: bool = False
    """Start with new weights. The network has the base's shape, or the one that block_out_channels
    to dropout describe if any of them is given."""
    train_text_encoder: bool = False
    """Train the base's text encoder together with the network."""
    caption_dropout: float = 0.1
    """Fraction of captions that are replaced by the empty one. Guidance needs it."""
    cache_latents: Literal["no", "memory", "disk"] = "no"
    """Encode every image (and its mirror image) once, before the run. `disk` keeps the latents in
    OUT while the run lasts; they take 8 bytes per latent element."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations twice."""

    split: str = "train"
    """Split of the data set to train on."""
    resolution: int | None = None
    """Resize the shorter side to this and cut out the centre square (never a random one). Default:
    all images must have one size already."""
    center_crop: bool = False
    """Cut out the centre square without resizing. With a resolution this happens anyway."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour. Default: as the base or, without one, the first image."""
    horizontal_flip: bool = False
    """Mirror a random half of the images."""
    image_column: str | None = None
    """Column of parquet or hub data that holds the images. Default: the first one that does."""
    label_column: str | None = None
    """Column of labels. Default: label, labels, fine_label or class."""
    caption_column: str | None = None
    """Column of captions in a table or in a folder's metadata file. Default: text, caption,
    captions or prompt."""
    class_conditional: bool = False
    """Train a class-conditional model on the data's labels."""
    validation_images: int = 512
    """Number of images that are held out, picked at random, of each class its share; at most a
    tenth of the data. The loss on them chooses the best checkpoint. 0: none."""

    block_out_channels: tuple[int, ...] | None = None
    """Channels of a new network at each resolution, from full to lowest. Default: 32,64,128."""
    layers_per_block: int | None = None
    """Residual blocks at each resolution. Default: 1."""
    attention_levels: int | None = None
    """Number of resolutions with attention, counted from the lowest. Default: 1."""
    attention_head_dim: int | None = None
    """Channels of an attention head. Default: 8."""
    norm_num_groups: int | None = None
    """Groups of the group normalisation; must divide every entry of block_out_channels. Default:
    8."""
    dropout: float | None = None
    """Dropout in the residual blocks. Default: 0."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    """What the network predicts. Default: as the base, or epsilon."""
    num_train_timesteps: int | None = None
    """Number T of levels of the noise schedule. Default: as the base, or 1000."""
    beta_schedule: (
        Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] | None
    ) = None
    """Noise schedule. It replaces the base's, rescaling included. Default: as the base, or
    linear."""
    beta_start: float | None = None
    """First beta of linear, scaled_linear and sigmoid. Default: as the base, or 0.0001."""
    beta_end: float | None = None
    """Last beta of linear, scaled_linear and sigmoid. Default: as the base, or 0.02."""
    rescale_betas_zero_snr: bool = False
    """Rescale the schedule to zero terminal SNR; a base that does so keeps it. Needs v_prediction
    or sample."""
    offset_noise: float = 0.0
    """Standard deviation of a random constant that is added to the noise of each image and channel,
    such as 0.1. No sampler draws such noise, and zero terminal SNR makes it unnecessary."""
    weighting: Literal["uniform", "min-snr"] = "uniform"
    """Weights of the levels in the loss."""
    snr_gamma: float = 5.0
    """SNR at which min-snr saturates."""
    weight_floor: float = 0.01
    """Smallest weight under min-snr at a level without signal, so that the terminal level of a
    zero-SNR schedule is still trained; elsewhere the weights are the paper's."""

    images: int = 300_000
    """Length of the run, as the number of images seen, repetitions included."""
    batch_size: int = 64
    """Images per forward pass and process."""
    gradient_accumulation: int = 1
    """Forward passes per optimiser step."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW. Default: 0.0004 for a new network, 0.00001 for a base's
    weights."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate falls to 0 after the warm-up."""
    lr_warmup_steps: int = 500
    """Optimiser steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient. 0: no limit."""
    ema_decay: float = 0.9995
    """Decay of the exponential moving average of the parameters, which is the model that is
    sampled. 0: no averaging."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the network's forward pass. Noise, targets and the loss stay float32."""
    compile: bool = False
    """Compile the network with torch.compile: minutes at the start, then faster steps. Changing it
    on resuming changes the rounding."""
    seed: int = 0
    """Seed of the weights, the order of the data, the timesteps and the noise."""

    checkpoint_every: int = 1000
    """Optimiser steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep, besides the best one."""
    preview_every: int = 0
    """Optimiser steps between preview grids (OUT/previews). 0: none."""
    preview_count: int = 16
    """Images in a preview."""
    preview_steps: int = 25
    """DDIM steps of a preview."""
    preview_guidance_scale: float = 7.5
    """Guidance scale of the previews of a text model. 1: off."""
    log_every: int = 50
    """Optimiser steps between log entries (OUT/log, for tensorboard)."""
    workers: int = 0
    """Processes that load images. 0: the training process itself."""

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
        if not self.out:
            raise DDIMError("out must name a folder; got an empty name.")
        for least, names in _AT_LEAST.items():
            for name in names:
                value = getattr(self, name)
                values = value if isinstance(value, tuple) else (value,)
                if value is not None and not (values and min(values) >= least):  # also NaN
                    raise DDIMError(f"{name} must be at least {least}; got {value}.")
        for name in ("peak_learning_rate", "snr_gamma"):
            if not (value := getattr(self, name)) > 0:
                raise DDIMError(f"{name.removeprefix('peak_')} must be above 0; got {value}.")
        for field in fields(TrainConfig):
            if isinstance(value := getattr(self, field.name), float) and math.isinf(value):
                raise DDIMError(f"{field.name} must be finite; got {value}.")
        if (levels := self.num_train_timesteps or 0) > 1_000_000:  # as `ddim sample` takes it
            raise DDIMError(f"num_train_timesteps must be at most 1000000; got {levels}.")
        if self.seed >= 2**32:
            raise DDIMError(f"seed must lie in 0..2**32 - 1; got {self.seed}.")
        start = 1e-4 if self.beta_start is None else self.beta_start
        end = 0.02 if self.beta_end is None else self.beta_end
        if not 0 < start <= end < 1:
            given = f"beta_start={start}, beta_end={end}"
            raise DDIMError(f"betas must rise within (0, 1); got {given}.")
        for name in ("ema_decay", "dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise DDIMError(f"{name} must lie in [0, 1); got {getattr(self, name)}.")
        if not 0 <= self.caption_dropout <= 1:
            raise DDIMError(f"caption_dropout must lie in [0, 1]; got {self.caption_dropout}.")
        kind = self.prediction_type or ("epsilon" if self.base is None else None)
        if self.rescale_betas_zero_snr and kind == "epsilon":
            raise DDIMError(EPSILON_AT_ZERO_SNR)
        self._check_base()
        if self.base is None or self.from_scratch:
            self.architecture.check()

    def _check_base(self) -> None:
        if self.base is None and self.from_scratch:
            raise DDIMError(
                "from_scratch needs a model whose configuration is taken; name it by --base, or "
                "leave it out."
            )
        if self.base is None and self.text_options:
            raise DDIMError(
                f"{self.text_options[0]} is for text models; name one by --base, or leave it out."
            )
        if self.base is not None and not self.from_scratch and self.shape_options:
            raise DDIMError(
                f"{self.shape_options[0]} is for a new network, and the base has one; add "
                "--from-scratch, or leave it out."
            )


def command_line(config: TrainConfig, *, processes: int = 1) -> str:
    """Returns the shell command that trains this configuration, with the options that differ from
    their defaults."""
    # torchrun, since accelerate launch starts a single process if there are no GPUs.
    launch = ["torchrun", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    words = [*launch, "ddim", "train"]
    for field in fields(TrainConfig):
        value = getattr(config, field.name)
        if value != field.default:
            words.append(f"--{field.name.replace('_', '-')}")
            if value is not True:
                words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return shlex.join(words)


@dataclass(frozen=True)
class Preset:
    """The options of an embedded model or an example, and a note on what they give."""

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
