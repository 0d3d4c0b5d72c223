"""Layouts of weights that :class:`diffusers.UNet2DModel` can take over under other names: which
layout a state dict has, the architecture that its shapes tell, and how its weights are renamed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from ddim.errors import CheckpointError

__all__ = ["LAYOUTS", "Layout", "Renaming", "State", "read_architecture", "rename", "tell_layout"]

Layout = Literal["ddim", "improved-diffusion"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Renaming:
    """How a layout's names become diffusers'.

    Attributes:
        blocks: New names of blocks.
        parts: New names of the parts inside a block.
        num_heads: Heads of attention, by which a joint weight of q, k and v is divided.
    """

    blocks: Mapping[str, str]
    parts: Mapping[str, str]
    num_heads: int


def tell_layout(state: Mapping[str, Tensor]) -> Layout:
    """The layout that the names of the weights tell; a CheckpointError refuses others."""
    if "temb.dense.0.weight" in state:
        return "ddim"
    if "input_blocks.0.0.weight" in state:
        return "improved-diffusion"
    has_init_conv = any(key.endswith("init_conv.weight") for key in state)
    if has_init_conv and any("mid_attn" in key for key in state):
        raise CheckpointError(
            "this is a network of denoising-diffusion-pytorch, whose blocks normalise after the "
            "convolution and whose attention is linear, as in no UNet2DModel; sample it as it is, "
            "with its module as the network of ddim.ModelDenoiser (docs/conversion.md)."
        )
    raise CheckpointError(
        f"the names of the weights are of no layout that can be converted ({', '.join(LAYOUTS)}); "
        f"the first is {next(iter(state))!r}."
    )


def read_architecture(
    state: Mapping[str, Tensor], layout: Layout, *, num_heads: int
) -> tuple[dict[str, Any], Renaming]:
    """The configuration of a ``UNet2DModel``, whose ``sample_size`` is None if it cannot be told,
    and how the weights are renamed. ``num_heads`` is for improved-diffusion.

    Raises:
        CheckpointError: If a weight is missing or misshapen, or the architecture is another one.
    """
    return _read_ddim(state) if layout == "ddim" else _read_improved_diffusion(state, num_heads)


def rename(key: str, weight: Tensor, rules: Renaming) -> State:
    """A weight under its new names: several if q, k and v come as one. Attention's 1x1 convolutions
    become matrices."""
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
        wanted = f"rows for q, k and v of {rules.num_heads} heads"
        raise CheckpointError(f"the weight {key} must have {wanted}; got {list(weight.shape)}.")
    # q, k and v of each head follow one another.
    split = matrix.reshape(rules.num_heads, 3, -1, *matrix.shape[1:]).unbind(1)
    return {
        f"{target}.to_{letter}.{kind}": part.flatten(0, 1)
        for letter, part in zip("qkv", split, strict=True)
    }


def _size(state: Mapping[str, Tensor], key: str, axis: int = 0) -> int:
    if key not in state:
        raise CheckpointError(f"the checkpoint is not complete: it has no {key}.")
    if state[key].ndim <= axis:
        got = f"got shape {list(state[key].shape)}"
        raise CheckpointError(f"the weight {key} must have more than {axis} dimensions; {got}.")
    return state[key].shape[axis]


def _level_width(state: Mapping[str, Tensor], key: str) -> int:
    """The channels of a level, which the norms divide into 32 groups."""
    width = _size(state, key)
    if not width or width % 32:
        wanted = "a multiple of 32 rows, the groups of the norms"
        raise CheckpointError(f"the weight {key} must have {wanted}; got {list(state[key].shape)}.")
    return width


def _highest(state: Mapping[str, Tensor], pattern: str) -> int:
    """The largest number that the pattern's group takes in the names; -1 if it matches none."""
    numbers = [m[1] for key in state if (m := re.match(pattern, key))]
    if any(len(number) > 3 for number in numbers):
        raise CheckpointError(f"the weights are numbered up to {max(numbers, key=len)[:20]}.")
    return max(map(int, numbers), default=-1)


def _unet(channels: list[int], attention: list[bool], **options: Any) -> dict[str, Any]:
    """The configuration of a network, with what both layouts have in common."""
    down = ("AttnDownBlock2D" if there else "DownBlock2D" for there in attention)
    up = ("AttnUpBlock2D" if there else "UpBlock2D" for there in reversed(attention))
    return {
        "block_out_channels": tuple(channels),
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "norm_num_groups": 32,
        # Without it, the middle block has no norm before its attention under scale_shift.
        "attn_norm_num_groups": 32,
        "act_fn": "silu",
        "time_embedding_type": "positional",
        **options,
    }


def _read_ddim(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], Renaming]:
    """Song's code, whose attention has one head and is where images are 16x16."""
    levels = 1 + _highest(state, r"down\.(\d+)\.")
    blocks = 1 + _highest(state, r"down\.0\.block\.(\d+)\.")
    if not levels or not blocks:
        raise CheckpointError("the checkpoint is not complete: it has no down.0.block.0.")
    if levels > 1 and "down.0.downsample.conv.weight" not in state:
        what = "a network with resamp_with_conv=False, which halves its images by averaging"
        raise CheckpointError(f"{what}, has no equal in UNet2DModel.")
    attention = [f"down.{level}.attn.0.q.weight" in state for level in range(levels)]
    names = {
        "temb.dense.0": "time_embedding.linear_1",
        "temb.dense.1": "time_embedding.linear_2",
        "norm_out": "conv_norm_out",
        "mid.block_1": "mid_block.resnets.0",
        "mid.attn_1": "mid_block.attentions.0",
        "mid.block_2": "mid_block.resnets.1",
    }
    for level in range(levels):
        for side, place, count in (("down", level, blocks), ("up", levels - 1 - level, blocks + 1)):
            target = f"{side}_blocks.{place}"
            for block in range(count):
                names[f"{side}.{level}.block.{block}"] = f"{target}.resnets.{block}"
                names[f"{side}.{level}.attn.{block}"] = f"{target}.attentions.{block}"
            names[f"{side}.{level}.{side}sample"] = f"{target}.{side}samplers.0"
    parts = {
        "temb_proj": "time_emb_proj",
        "nin_shortcut": "conv_shortcut",
        "norm": "group_norm",
        "proj_out": "to_out.0",
        **{letter: f"to_{letter}" for letter in "qkv"},
    }
    unet = _unet(
        [_level_width(state, f"down.{level}.block.0.conv1.weight") for level in range(levels)],
        attention,
        in_channels=_size(state, "conv_in.weight", 1),
        out_channels=_size(state, "conv_out.weight"),
        layers_per_block=blocks,
        sample_size=16 * 2 ** attention.index(True) if True in attention else None,
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return unet, Renaming(names, parts, 1)


_IMPROVED_BLOCKS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_IMPROVED_PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "op": "conv",
}


def _read_improved_diffusion(
    state: Mapping[str, Tensor], num_heads: int
) -> tuple[dict[str, Any], Renaming]:
    """OpenAI's code, which numbers its blocks across levels."""
    channels, attention, layers, down = _read_input_blocks(state)
    attended = {width for width, has in zip(channels, attention, strict=True) if has}
    attended.add(channels[-1])  # the middle block
    if num_heads > 1 and len(attended) > 1:
        raise CheckpointError(
            f"{num_heads} heads of attention at {sorted(attended)} channels are heads of different "
            "widths, which UNet2DModel does not have; only networks with one head, or with "
            "attention at one width, can be converted (--num-heads says how many there are)."
        )
    names = {**_IMPROVED_BLOCKS, **down, **_name_output_blocks(attention, layers)}
    scale_shift = _size(state, "input_blocks.1.0.emb_layers.1.weight") == 2 * channels[0]
    unet = _unet(
        channels,
        attention,
        in_channels=_size(state, "input_blocks.0.0.weight", 1),
        out_channels=_size(state, "out.2.weight"),
        layers_per_block=layers,
        sample_size=None,
        attention_head_dim=None if num_heads == 1 else channels[-1] // num_heads,
        norm_eps=1e-5,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        num_class_embeds=_size(state, "label_emb.weight") if "label_emb.weight" in state else None,
    )
    return unet, Renaming(names, _IMPROVED_PARTS, num_heads)


def _read_input_blocks(
    state: Mapping[str, Tensor],
) -> tuple[list[int], list[bool], int, dict[str, str]]:
    """Channels and attention of each level, residual blocks a level, and the blocks' new names."""
    channels: list[int] = []
    attention: list[bool] = []
    names: dict[str, str] = {}
    level = block = layers = 0
    for number in range(1, 1 + _highest(state, r"input_blocks\.(\d+)\.")):
        place = f"input_blocks.{number}"
        if f"{place}.0.in_layers.2.weight" in state:
            width = _level_width(state, f"{place}.0.in_layers.2.weight")
            if block == 0:
                channels.append(width)
                attention.append(f"{place}.1.qkv.weight" in state)
            elif width != channels[-1]:
                raise CheckpointError(
                    f"{place} is {width} wide on a level of {channels[-1]}: residual blocks that "
                    "halve their images (resblock_updown) are of guided-diffusion, which is not "
                    "converted."
                )
            names[f"{place}.0"] = f"down_blocks.{level}.resnets.{block}"
            names[f"{place}.1"] = f"down_blocks.{level}.attentions.{block}"
            layers = block = block + 1
        elif f"{place}.0.op.weight" in state:
            names[f"{place}.0"] = f"down_blocks.{level}.downsamplers.0"
            level, block = level + 1, 0
        else:
            what = "neither a residual block nor a strided convolution"
            raise CheckpointError(f"{place} is {what}, so no UNet2DModel has it.")
    if not channels:
        raise CheckpointError("the checkpoint is not complete: it has no input_blocks.1.0.")
    return channels, attention, layers, names


def _name_output_blocks(attention: list[bool], layers: int) -> dict[str, str]:
    """The new names of the output blocks, which go through the levels in reverse."""
    names = {}
    for up, has_attention in enumerate(reversed(attention)):
        for block in range(layers + 1):
            place = f"output_blocks.{up * (layers + 1) + block}"
            names[f"{place}.0"] = f"up_blocks.{up}.resnets.{block}"
            if has_attention:
                names[f"{place}.1"] = f"up_blocks.{up}.attentions.{block}"
            if block == layers and up < len(attention) - 1:
                names[f"{place}.{1 + has_attention}"] = f"up_blocks.{up}.upsamplers.0"
    return names
