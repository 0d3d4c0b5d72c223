"""What makes diffusers' networks faster and leaves what they compute, but for rounding; and their weights, wherever they lie."""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ddim.errors import DDIMError

__all__ = ["lay_out", "specialize", "weights_of"]

SHORT = 64 * 64
"""Queries times keys up to which attention is a product of small matrices, which a compiler fuses with what is around it."""


def lay_out(*modules: nn.Module) -> None:
    """Lays the weights of convolutions out channels-last, in place: so a CPU convolves faster."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def specialize(network: nn.Module) -> None:
    """Prepares a network for being compiled on a CPU: in place, and its parameters and their names stay.

    Nearest upsampling by 2 and the convolution after it become one transposed convolution, of 16 multiplications for each input
    in place of 36; and short attention no longer calls a kernel made for long sequences.
    """
    for module in network.modules():
        if type(module) is Upsample2D:
            module.__class__ = _OnceUpsample2D
        elif isinstance(module, Attention) and type(module.processor) is AttnProcessor2_0:
            module.set_processor(_ShortAttnProcessor())


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by their names, fetched from where accelerate holds those that it offloaded one by one.

    Raises:
        DDIMError: If the module lies on the meta device and has none.
    """
    state = module.state_dict()
    if not any(tensor.is_meta for tensor in state.values()):
        return state
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    held = get_state_dict_offloaded_model(module)
    missing = [name for name in state if name not in held]
    if missing:
        raise DDIMError(f"the network has no weights for {missing[0]}: it lies on the meta device; load a checkpoint into it first.")
    return {name: held[name] for name in state}


class _OnceUpsample2D(Upsample2D):  # type: ignore[misc]
    """Upsampling and convolution at once, where they are what diffusers makes by default."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - diffusers' own
        conv = self.conv if self.name == "conv" else self.Conv2d_0
        plain = type(conv) is nn.Conv2d and conv.weight.dtype in (torch.float32, torch.float64)  # no adapter; exact sums of weights
        usual = plain and (conv.kernel_size, conv.padding) == ((3, 3), (1, 1)) and self.interpolate and self.norm is None
        doubled = output_size is None or tuple(output_size) == tuple(2 * side for side in hidden_states.shape[-2:])
        if args or options or not (usual and doubled):
            return super().forward(hidden_states, output_size, *args, **options)
        return F.conv_transpose2d(hidden_states, _upsampling_kernel(conv.weight), conv.bias, stride=2, padding=1)


def _upsampling_kernel(weight: Tensor) -> Tensor:
    """[I, O, 4, 4] by which a transposed convolution of stride 2 is nearest upsampling by 2 and a convolution by weight [O, I, 3, 3]."""
    flipped = weight.flip(2, 3)  # a transposed convolution runs backwards; and each input is seen at two rows and two columns
    return torch.stack([F.pad(flipped, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1)]).sum(0).transpose(0, 1)


class _ShortAttnProcessor(AttnProcessor2_0):  # type: ignore[misc]
    """Attention of few tokens by plain products, of more by torch's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = AttnProcessor()

    def __call__(  # diffusers passes only what is named here
        self,
        attn: Any,  # noqa: ANN401 - diffusers' Attention
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Any:  # noqa: ANN401 - diffusers' own
        queries = hidden_states.shape[1] if hidden_states.ndim == 3 else math.prod(hidden_states.shape[2:])
        keys = queries if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        attend = self.plain if queries * keys <= SHORT else super().__call__
        return attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
