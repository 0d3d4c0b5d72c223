"""What makes diffusers' networks faster and leaves what they compute, but for rounding; and their weights, wherever they lie."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ddim.errors import DDIMError

__all__ = ["is_compiled", "kept", "lay_out", "specialize", "weights_of"]

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


def is_compiled(network: Any) -> bool:  # noqa: ANN401 - any callable
    """Whether torch compiles what is called: in place, by a module around it, or by a function in place of its ``forward``."""
    in_place = getattr(network, "_compiled_call_impl", None) is not None
    return in_place or hasattr(network, "_orig_mod") or hasattr(getattr(network, "forward", None), "_torchdynamo_orig_callable")


def kept(output: Tensor, network: Any) -> Tensor:  # noqa: ANN401 - any callable
    """A network's output as a tensor that its next call leaves alone, which one of a compiled network on a GPU need not be: a graph of
    kernels that is replayed writes to the same memory each time."""
    return output.clone() if output.is_cuda and is_compiled(network) else output


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
    """Plain attention of few tokens by products of small matrices, and all other by torch's kernel."""

    def __call__(  # diffusers passes only what is named here
        self,
        attn: Any,  # noqa: ANN401 - diffusers' Attention
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Any:  # noqa: ANN401 - diffusers' own
        tokens = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        pairs = tokens.shape[1] * (tokens if encoder_hidden_states is None else encoder_hidden_states).shape[1]
        exact = hidden_states.dtype in (torch.float32, torch.float64)  # sums of exponentials overflow in half precision
        if pairs > SHORT or not exact or attention_mask is not None or any(getattr(attn, name) for name in _MORE):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        given = tokens if encoder_hidden_states is None else encoder_hidden_states
        mixed = _attend(attn.to_q(tokens), attn.to_k(given), attn.to_v(given), heads=attn.heads)
        for layer in attn.to_out:
            mixed = layer(mixed)
        if hidden_states.ndim == 4:
            mixed = mixed.transpose(1, 2).reshape(hidden_states.shape)
        return (mixed + hidden_states if attn.residual_connection else mixed) / attn.rescale_output_factor


_MORE = ("spatial_norm", "norm_q", "norm_k", "norm_cross")
"""What an attention layer of diffusers may do beside, and torch's kernel is left with. To compute scores or softmax in float32, as many
ask for, is no more: it is for half precision, and diffusers' processor of torch's kernel heeds it nowhere."""


def _attend(query: Tensor, key: Tensor, value: Tensor, *, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of [B, tokens, heads * D].

    Scores lie [keys, queries]: their sums over keys then run over whole rows at a time, which a compiler vectorizes, and it is the
    few outputs that are divided by them.
    """
    count, width = query.shape[0], query.shape[2] // heads

    def split(x: Tensor) -> Tensor:
        return x.reshape(count, -1, heads, width).transpose(1, 2).reshape(count * heads, -1, width)

    query, key, value = split(query), split(key * width**-0.5), split(value)
    scores = torch.bmm(key, query.transpose(1, 2))
    weights = (scores - scores.amax(1, keepdim=True)).exp()
    mixed = torch.bmm(value.transpose(1, 2).contiguous(), weights) / weights.sum(1, keepdim=True)  # [B * heads, D, queries]
    return mixed.reshape(count, heads * width, -1).transpose(1, 2)
