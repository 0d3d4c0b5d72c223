"""Checkpoints of other codebases into diffusers format: the weights renamed, the architecture read
from their shapes.

Two layouts are the same networks as :class:`diffusers.UNet2DModel` under other names: those of
Song's ``ddim`` (and Ho's models in PyTorch) and of OpenAI's ``improved-diffusion``. What a state
dict cannot tell is an option of :func:`convert`. Files are read from safetensors, or by
``torch.load`` with ``weights_only=True``, which runs no code out of them."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ddim.configuration import PIXEL_MODEL, configured_betas, spelled_betas
from ddim.core.schedule import BetaSchedule, NoiseSchedule
from ddim.errors import CheckpointError

__all__ = ["LAYOUTS", "Converted", "Layout", "convert", "read_state_dict", "write_model"]

Layout = Literal["ddim", "improved-diffusion"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

State = dict[str, Tensor]

_MOST_LEVELS = 1000  # what improved-diffusion scales timesteps to


@dataclass(frozen=True, eq=False)
class Converted:
    """A model in the terms of diffusers.

    Attributes:
        layout: What it was.
        unet: Configuration of a ``UNet2DModel``.
        scheduler: Configuration of a ``DDIMScheduler``.
        state: Weights under diffusers' names.
        names: Where each weight came from.
    """

    layout: Layout
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    state: State
    names: dict[str, str]


def read_state_dict(path: Path) -> State:
    """The weights in a file: averaged ones where it holds both, names without ``module.``.

    Args:
        path: safetensors; or a pickled state dict, or the five-element list of a training run of
            Song's code (model, optimiser, epoch, step, averaged weights), or a dict of ours or
            others with such a state under ``ema`` or ``model``.

    Raises:
        CheckpointError: If the file is missing or damaged, would have to run code, or holds no
            weights.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}; give a file of weights.")
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = (
            "it holds more than tensors, and reading that would run code out of the file; save its "
            "state_dict alone"
            if re.search(r"Unsupported (global|class)|GLOBAL", str(error))
            else f"it is damaged or no file of weights ({type(error).__name__})"
        )
        raise CheckpointError(f"{path} cannot be read: {why}.") from error
    if isinstance(content, (list, tuple)):
        content = content[4] if len(content) == 5 else content[0] if content else None
    for name in ("ema", "ema_model", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    weights = (
        {re.sub(r"^module\.", "", str(k)): v for k, v in content.items() if isinstance(v, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not weights:
        raise CheckpointError(
            f"{path} holds no weights by name; a state dict, or a training checkpoint with one, is "
            "needed."
        )
    return weights


def convert(
    state: Mapping[str, Tensor],
    *,
    layout: Layout | None = None,
    sample_size: int | None = None,
    num_heads: int | None = None,
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
    num_train_timesteps: int = 1000,
    beta_schedule: BetaSchedule = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> Converted:
    """Renames a state dict, and tells the configurations of network and scheduler.

    Args:
        state: From :func:`read_state_dict`.
        layout: One of :data:`LAYOUTS`; None: told by the names.
        sample_size: Side of the images; None: told by where the attention is (at 16x16), for the
            layout ``ddim`` only.
        num_heads: Heads of attention of improved-diffusion, whose default is 4.
        prediction_type: What the network predicts.
        num_train_timesteps: T. improved-diffusion tells its networks t * 1000 / T; above 1000
            levels every (T / 1000)th is kept, where that is a whole number.
        beta_schedule: Of training, with beta_start and beta_end.
        beta_start: First beta.
        beta_end: Last beta.

    Raises:
        CheckpointError: If the layout is unknown or has no equal in ``UNet2DModel``, or a weight is
            missing, left over or misshapen.
    """
    layout = layout or _tell_layout(state)
    unet, rules = (
        _read_ddim(state) if layout == "ddim" else _read_improved_diffusion(state, num_heads or 4)
    )
    unet["sample_size"] = sample_size or unet["sample_size"]
    if unet["sample_size"] is None:
        raise CheckpointError(
            "the weights do not tell the size of the images; give it (--sample-size)."
        )
    renamed: State = {}
    names: dict[str, str] = {}
    for key, weight in state.items():
        for target, tensor in _rename(key, weight, rules).items():
            renamed[target], names[target] = tensor, key
    named: dict[str, Any] = {
        **{"beta_schedule": beta_schedule, "beta_start": beta_start, "beta_end": beta_end},
        "num_train_timesteps": num_train_timesteps,
    }
    betas = spelled_betas(named)
    if layout == "improved-diffusion" and num_train_timesteps != _MOST_LEVELS:
        betas = _thin(configured_betas(named)).tolist()
    if betas is not None:
        named = {"trained_betas": betas, "num_train_timesteps": len(betas)}
    others = {name: PIXEL_MODEL[name] for name in ("clip_sample", "timestep_spacing")}
    scheduler = {"prediction_type": prediction_type, **others, **named}
    return Converted(layout, unet, scheduler, renamed, names)


def write_model(converted: Converted, out: Path) -> None:
    """Writes a folder that plain diffusers opens as a ``DDIMPipeline``, whole or not at all.

    Raises:
        CheckpointError: If the folder exists, or weights and architecture do not fit; the message
            names the weight.
    """
    import diffusers

    if out.exists():
        raise CheckpointError(f"{out} is there already, and is not overwritten; give another name.")
    network = diffusers.UNet2DModel(**converted.unet)
    _check(converted, network.state_dict())
    network.load_state_dict(converted.state)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        diffusers.DDIMPipeline(
            network, diffusers.DDIMScheduler(**converted.scheduler)
        ).save_pretrained(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(converted: Converted, expected: Mapping[str, Tensor]) -> None:
    """Refuses weights that are left over, missing, or of another shape than the architecture
    has."""
    for name, weight in converted.state.items():
        key = converted.names[name]
        if name not in expected:
            raise CheckpointError(
                f"the weight {key} has no place in a UNet2DModel; the checkpoint is of another "
                "architecture."
            )
        if weight.shape != expected[name].shape:
            raise CheckpointError(
                f"the weight {key} must have shape {list(expected[name].shape)}; got "
                f"{list(weight.shape)}."
            )
    missing = sorted(set(expected) - set(converted.state))
    if missing:
        raise CheckpointError(
            f"the checkpoint is not complete: it has nothing for {missing[0]} (and "
            f"{len(missing) - 1} more)."
        )


def _tell_layout(state: Mapping[str, Tensor]) -> Layout:
    if "temb.dense.0.weight" in state:
        return "ddim"
    if "input_blocks.0.0.weight" in state:
        return "improved-diffusion"
    if any(key.endswith("init_conv.weight") for key in state) and any(
        "mid_attn" in key for key in state
    ):
        raise CheckpointError(
            "this is a network of denoising-diffusion-pytorch, whose blocks normalise after the "
            "convolution and whose attention is linear, "
            "as in no UNet2DModel; sample it as it is, with its module as the network of "
            "ddim.ModelDenoiser (docs/conversion.md)."
        )
    raise CheckpointError(
        f"the names of the weights are of no layout that can be converted ({', '.join(LAYOUTS)}); "
        f"the first is {next(iter(state))!r}."
    )


@dataclass(frozen=True)
class _Renaming:
    """How a layout's names become diffusers': blocks first, then the parts inside; and what happens
    to attention's weights."""

    blocks: Mapping[str, str]
    parts: Mapping[str, str]
    num_heads: int


def _rename(key: str, weight: Tensor, rules: _Renaming) -> dict[str, Tensor]:
    """The weight under its new names: more than one where q, k and v come as one; attention's 1x1
    convolutions become matrices."""
    prefix = max((p for p in rules.blocks if key.startswith(p + ".")), key=len, default=None)
    if prefix is None:
        return {key: weight}
    part, _, kind = key[len(prefix) + 1 :].rpartition(".")
    target, inner = rules.blocks[prefix], rules.parts.get(part, part)
    name = ".".join(filter(None, (target, inner, kind)))
    if "attentions" not in target or inner == "group_norm":
        return {name: weight}
    matrix = weight.flatten(1) if weight.ndim > 2 and set(weight.shape[2:]) == {1} else weight
    if inner != "qkv":
        return {name: matrix}
    if not matrix.ndim or matrix.shape[0] % (3 * rules.num_heads):
        raise CheckpointError(
            f"the weight {key} must have rows for q, k and v of {rules.num_heads} heads; got "
            f"{list(weight.shape)}."
        )
    # Each head has its q, k and v in a row.
    split = matrix.reshape(rules.num_heads, 3, -1, *matrix.shape[1:]).unbind(1)
    return {
        f"{target}.to_{letter}.{kind}": part.flatten(0, 1)
        for letter, part in zip("qkv", split, strict=True)
    }


def _width(state: Mapping[str, Tensor], key: str, axis: int = 0) -> int:
    """One size of a weight, from which the architecture is told."""
    if key not in state:
        raise CheckpointError(f"the checkpoint is not complete: it has no {key}.")
    if state[key].ndim <= axis:
        raise CheckpointError(
            f"the weight {key} must have more than {axis} dimensions; got shape "
            f"{list(state[key].shape)}."
        )
    return state[key].shape[axis]


def _level_width(state: Mapping[str, Tensor], key: str) -> int:
    """The width of a level, of which the norms make 32 groups."""
    width = _width(state, key)
    if not width or width % 32:
        raise CheckpointError(
            f"the weight {key} must have a multiple of 32 rows, the groups of the norms; got "
            f"{list(state[key].shape)}."
        )
    return width


def _unet(channels: list[int], attention: list[bool], **options: Any) -> dict[str, Any]:
    """What both layouts have in common."""
    return {
        "block_out_channels": tuple(channels),
        "down_block_types": tuple(
            "AttnDownBlock2D" if there else "DownBlock2D" for there in attention
        ),
        "up_block_types": tuple(
            "AttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attention)
        ),
        "norm_num_groups": 32,
        # else the middle block has no norm before its attention under scale_shift
        "attn_norm_num_groups": 32,
        "act_fn": "silu",
        "time_embedding_type": "positional",
        **options,
    }


def _read_ddim(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], _Renaming]:
    """The architecture of Song's code; its attention has one head, and is where the side is 16."""
    levels = 1 + max(
        (int(m[1]) for key in state if (m := re.match(r"down\.(\d+)\.", key))), default=-1
    )
    blocks = 1 + max(
        (int(m[1]) for key in state if (m := re.match(r"down\.0\.block\.(\d+)\.", key))), default=-1
    )
    if not levels or not blocks:
        raise CheckpointError("the checkpoint is not complete: it has no down.0.block.0.")
    if levels > 1 and "down.0.downsample.conv.weight" not in state:
        raise CheckpointError(
            "a network with resamp_with_conv=False, which halves its images by averaging, has no "
            "equal in UNet2DModel."
        )
    attention = [f"down.{level}.attn.0.q.weight" in state for level in range(levels)]
    renaming = {
        "temb.dense.0": "time_embedding.linear_1",
        "temb.dense.1": "time_embedding.linear_2",
        "norm_out": "conv_norm_out",
    }
    renaming |= {
        "mid.block_1": "mid_block.resnets.0",
        "mid.attn_1": "mid_block.attentions.0",
        "mid.block_2": "mid_block.resnets.1",
    }
    for level in range(levels):
        for side, place, count in (("down", level, blocks), ("up", levels - 1 - level, blocks + 1)):
            for block in range(count):
                renaming[f"{side}.{level}.block.{block}"] = f"{side}_blocks.{place}.resnets.{block}"
                renaming[f"{side}.{level}.attn.{block}"] = (
                    f"{side}_blocks.{place}.attentions.{block}"
                )
            renaming[f"{side}.{level}.{side}sample"] = f"{side}_blocks.{place}.{side}samplers.0"
    parts = {
        "temb_proj": "time_emb_proj",
        "nin_shortcut": "conv_shortcut",
        "norm": "group_norm",
        "proj_out": "to_out.0",
    }
    parts |= {letter: f"to_{letter}" for letter in "qkv"}
    unet = _unet(
        [_level_width(state, f"down.{level}.block.0.conv1.weight") for level in range(levels)],
        attention,
        in_channels=_width(state, "conv_in.weight", 1),
        out_channels=_width(state, "conv_out.weight"),
        layers_per_block=blocks,
        sample_size=16 * 2 ** attention.index(True) if True in attention else None,
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return unet, _Renaming(renaming, parts, 1)


def _read_improved_diffusion(
    state: Mapping[str, Tensor], num_heads: int
) -> tuple[dict[str, Any], _Renaming]:
    """The architecture of OpenAI's code, whose blocks are numbered through."""
    renaming = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
    }
    renaming |= {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    renaming |= {
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
    }
    renaming |= {"middle_block.2": "mid_block.resnets.1"}
    channels: list[int] = []
    attention: list[bool] = []
    level = block = layers = 0
    for number in range(
        1, 1 + max(int(m[1]) for key in state if (m := re.match(r"input_blocks\.(\d+)\.", key)))
    ):
        place = f"input_blocks.{number}"
        if f"{place}.0.in_layers.2.weight" in state:
            width = _level_width(state, f"{place}.0.in_layers.2.weight")
            if block == 0:
                channels.append(width)
                attention.append(f"{place}.1.qkv.weight" in state)
            elif width != channels[-1]:
                raise CheckpointError(
                    f"{place} is {width} wide on a level of {channels[-1]}: residual blocks that "
                    "halve their images (resblock_updown) "
                    "are of guided-diffusion, which is not converted."
                )
            renaming |= {
                f"{place}.0": f"down_blocks.{level}.resnets.{block}",
                f"{place}.1": f"down_blocks.{level}.attentions.{block}",
            }
            layers, block = block + 1, block + 1
        else:
            if f"{place}.0.op.weight" not in state:
                raise CheckpointError(
                    f"{place} is neither a residual block nor a strided convolution, so no "
                    "UNet2DModel has it."
                )
            renaming[f"{place}.0"] = f"down_blocks.{level}.downsamplers.0"
            level, block = level + 1, 0
    if not channels:
        raise CheckpointError("the checkpoint is not complete: it has no input_blocks.1.0.")
    for number in range((layers + 1) * (level + 1)):
        up, block = divmod(number, layers + 1)
        place, has = f"output_blocks.{number}", attention[level - up]
        renaming[f"{place}.0"] = f"up_blocks.{up}.resnets.{block}"
        if has:
            renaming[f"{place}.1"] = f"up_blocks.{up}.attentions.{block}"
        if block == layers and up < level:
            renaming[f"{place}.{2 if has else 1}"] = f"up_blocks.{up}.upsamplers.0"
    parts = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
    }
    parts |= {
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
        "norm": "group_norm",
        "proj_out": "to_out.0",
        "op": "conv",
    }
    attended = {width for width, has in zip(channels, attention, strict=True) if has} | {
        channels[-1]
    }
    if num_heads > 1 and len(attended) > 1:
        raise CheckpointError(
            f"{num_heads} heads of attention at {sorted(attended)} channels are heads of different "
            "widths, which UNet2DModel has not; "
            "only networks with one head, or with attention at one width, can be converted "
            "(--num-heads says how many there are)."
        )
    scale_shift = _width(state, "input_blocks.1.0.emb_layers.1.weight") == 2 * channels[0]
    unet = _unet(
        channels,
        attention,
        in_channels=_width(state, "input_blocks.0.0.weight", 1),
        out_channels=_width(state, "out.2.weight"),
        layers_per_block=layers,
        sample_size=None,
        attention_head_dim=None if num_heads == 1 else channels[-1] // num_heads,
        norm_eps=1e-5,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        num_class_embeds=_width(state, "label_emb.weight") if "label_emb.weight" in state else None,
    )
    return unet, _Renaming(renaming, parts, num_heads)


def _thin(betas: Tensor) -> Tensor:
    """Betas of 1000 levels out of T: the levels at which a network that is told t * 1000 / T is
    told a whole number."""
    if len(betas) % _MOST_LEVELS:
        raise CheckpointError(
            f"improved-diffusion tells its networks t * {_MOST_LEVELS} / T, which at "
            f"T={len(betas)} is no whole number often enough; "
            f"only multiples of {_MOST_LEVELS} levels can be converted."
        )
    table = NoiseSchedule.from_betas(betas).alphas_cumprod[:: len(betas) // _MOST_LEVELS]
    return 1 - table / torch.cat([table.new_ones(1), table[:-1]])
