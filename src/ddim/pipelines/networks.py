"""What makes diffusers' networks faster and leaves what they compute, but for rounding; and their
weights, wherever they lie."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ddim.errors import DDIMError

__all__ = [
    "copy_if_replayed",
    "is_compiled",
    "prepare_for_compiling",
    "prepare_layers",
    "weights_of",
]

SHORT = 64 * 64
"""Queries times keys up to which attention is a product of small matrices, which a compiler fuses
with what is around it."""

PLACES = 256
"""Places of all images from which on to upsample and convolve at once saves more than to sum its
weights costs."""

EXACT = (torch.float32, torch.float64)
"""Where other sums than diffusers' and torch's own are made: those of half precision would round,
and its exponentials overflow."""

LARGE, SMALL_MAP = 2**17, 1024
"""Numbers of a tensor from which on, and places of an image up to which, several operators
normalize faster than torch's kernel, which in images of fewer places goes through the channels of a
group by themselves."""


def prepare_layers(*modules: nn.Module) -> None:
    """Lays the weights of convolutions out channels-last, which a CPU convolves faster: in place,
    and parameters and names stay.

    With them go nearest upsampling by 2 and its convolution, which become one transposed
    convolution of 16 multiplications for each input in place of 36, and normalizations, which go by
    rows where that is faster than torch's kernel for that layout. Memory that one layer frees stays
    for the next, up to 64 MiB of the process."""
    _keep_freed_memory()
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            elif type(layer) is Upsample2D:
                layer.__class__ = _OnceUpsample2D
            elif type(layer) is nn.GroupNorm:
                layer.__class__ = _RowsGroupNorm


def prepare_for_compiling(network: nn.Module) -> None:
    """Prepares a network for being compiled on a CPU, in place: as :func:`prepare_layers`, and short
    attention no longer calls a kernel made for long sequences."""
    prepare_layers(network)
    for module in network.modules():
        if isinstance(module, Attention) and type(module.processor) is AttnProcessor2_0:
            module.set_processor(_ShortAttnProcessor())


@cache
def _keep_freed_memory() -> None:
    """Frees a block of the size up to which glibc adapts: from then on it takes blocks of that size
    from its heap, and keeps twice as much of what was freed there, where it returned either to the
    kernel, which clears memory anew. Other allocators do not mind."""
    torch.empty(2**25 - 2**14, dtype=torch.uint8, device="cpu")


def is_compiled(network: Any) -> bool:
    """Whether torch compiles what is called: in place, by a module around it, or by a function in
    place of its ``forward``."""
    in_place = getattr(network, "_compiled_call_impl", None) is not None
    return (
        in_place
        or hasattr(network, "_orig_mod")
        or hasattr(getattr(network, "forward", None), "_torchdynamo_orig_callable")
    )


def copy_if_replayed(output: Tensor, network: Any) -> Tensor:
    """A network's output as a tensor that its next call leaves alone, which one of a compiled
    network on a GPU need not be: a graph of kernels that is replayed writes to the same memory each
    time."""
    return output.clone() if output.is_cuda and is_compiled(network) else output


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by their names, fetched from where accelerate holds those
    that it offloaded one by one.

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
        raise DDIMError(
            f"the network has no weights for {missing[0]}: it lies on the meta device; load a "
            "checkpoint into it first."
        )
    return {name: held[name] for name in state}


class _OnceUpsample2D(Upsample2D):  # type: ignore[misc]
    """Upsampling and convolution at once, where they are what diffusers makes by default."""

    def forward(
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **options: Any
    ) -> Any:
        conv = self.conv if self.name == "conv" else self.Conv2d_0
        doubled = output_size is None or tuple(output_size) == tuple(
            2 * side for side in hidden_states.shape[-2:]
        )
        worth = hidden_states.shape[0] * hidden_states.shape[2] * hidden_states.shape[3] >= PLACES
        if (
            args
            or options
            or not (
                doubled and worth and self.interpolate and self.norm is None and _is_plain(conv)
            )
        ):
            return super().forward(hidden_states, output_size, *args, **options)
        return F.conv_transpose2d(
            hidden_states, _upsampling_kernel(conv.weight), conv.bias, stride=2, padding=1
        )


def _is_plain(conv: Any) -> bool:
    """Whether a layer is no more than a padded 3x3 convolution of weights that are here, on a CPU,
    and whose sums do not round.

    No adapter, hook or method of its own stands in it, nor does it pad with anything but zeros, as
    what makes tiles asks for."""
    if (
        type(conv) is not nn.Conv2d
        or conv.weight.device.type != "cpu"
        or conv.weight.dtype not in EXACT
    ):
        return False
    if torch.is_autocast_enabled("cpu"):  # it would sum the weights in half precision
        return False
    usual = (
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.padding_mode,
    )
    if usual != ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
        return False
    hooks = (
        conv._forward_hooks,
        conv._forward_pre_hooks,
        conv._backward_hooks,
        conv._backward_pre_hooks,
    )
    return (
        not any(hooks) and "forward" not in conv.__dict__ and "_conv_forward" not in conv.__dict__
    )


_ROWS = torch.tensor(
    [[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], device="cpu"
)  # wherever this module is first imported
"""[3, 4]: the rows of a transposed convolution's kernel that a row of a convolution's goes to. Each
input is seen at two rows, and a transposed convolution runs backwards."""
_TAPS = torch.kron(_ROWS, _ROWS)
"""[9, 16]: the same of rows and columns."""


def _upsampling_kernel(weight: Tensor) -> Tensor:
    """[I, O, 4, 4] by which a transposed convolution of stride 2 is nearest upsampling by 2 and a
    convolution by weight [O, I, 3, 3]."""
    summed = weight.reshape(-1, 9) @ _TAPS.to(weight)
    return summed.view(*weight.shape[:2], 4, 4).transpose(0, 1)


class _RowsGroupNorm(nn.GroupNorm):
    """Normalizes rows of all channels, which is what lies together channels-last: compiled, or
    where torch's kernel goes through groups of few channels by themselves."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        exact = input.device.type == "cpu" and input.dtype in EXACT
        if not (
            exact
            and self.affine
            and input.ndim > 2
            and (torch.compiler.is_compiling() or self._is_slow(input))
        ):
            return super().forward(input)
        rows = input.flatten(2).transpose(1, 2)
        count, _, channels = rows.shape

        def mean(x: Tensor) -> Tensor:  # [B, groups, 1]
            return x.mean(1).view(count, self.num_groups, -1).mean(2, keepdim=True)

        def stored(
            x: Tensor,
            # a compiler would compute it again for every number; where there is memory, it reads there
        ) -> Tensor:
            return x.reshape(count, 1, channels).as_strided(
                (count, 1, channels), (channels, channels, 1)
            )

        centre = mean(rows)
        spread = (mean(rows * rows) - centre * centre).clamp_(min=0)
        scale = (spread + self.eps).rsqrt() * self.weight.view(
            self.num_groups, -1
        )  # [B, groups, channels of one]
        shift = self.bias.view(self.num_groups, -1) - centre * scale
        return (
            torch.addcmul(stored(shift), rows, stored(scale)).transpose(1, 2).reshape(input.shape)
        )

    def _is_slow(self, x: Tensor) -> bool:
        """Whether torch's kernel is: of many small images that lie channels-last, where a group's
        channels fill no vector of numbers."""
        width = self.num_channels // self.num_groups
        if (
            width >= 16
            or width == 8
            or x.ndim != 4
            or x.numel() < LARGE
            or x.shape[2] * x.shape[3] >= SMALL_MAP
        ):
            return False
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _ShortAttnProcessor(AttnProcessor2_0):  # type: ignore[misc]
    """Plain attention of few tokens by products of small matrices, and all other by torch's
    kernel."""

    def __call__(  # diffusers passes only what is named here
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Any:
        tokens = (
            hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        )
        pairs = (
            tokens.shape[1]
            * (tokens if encoder_hidden_states is None else encoder_hidden_states).shape[1]
        )
        if (
            pairs > SHORT
            or hidden_states.dtype not in EXACT
            or attention_mask is not None
            or any(getattr(attn, name) for name in _MORE)
        ):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb
            )
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        given = tokens if encoder_hidden_states is None else encoder_hidden_states
        mixed = _attend(attn.to_q(tokens), attn.to_k(given), attn.to_v(given), heads=attn.heads)
        for layer in attn.to_out:
            mixed = layer(mixed)
        if hidden_states.ndim == 4:
            mixed = mixed.transpose(1, 2).reshape(hidden_states.shape)
        return (
            mixed + hidden_states if attn.residual_connection else mixed
        ) / attn.rescale_output_factor


_MORE = ("spatial_norm", "norm_q", "norm_k", "norm_cross")
"""What an attention layer of diffusers may do beside, and torch's kernel is left with. To compute
scores or softmax in float32, as many ask for, is no more: it is for half precision, and diffusers'
processor of torch's kernel heeds it nowhere."""


def _attend(query: Tensor, key: Tensor, value: Tensor, *, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of [B, tokens, heads * D].

    Scores lie [keys, queries]: their sums over keys then run over whole rows at a time, which a
    compiler vectorizes, and it is the few outputs that are divided by them."""
    count, width = query.shape[0], query.shape[2] // heads

    def split(x: Tensor) -> Tensor:
        return x.reshape(count, -1, heads, width).transpose(1, 2).reshape(count * heads, -1, width)

    query, key, value = split(query), split(key * width**-0.5), split(value)
    scores = torch.bmm(key, query.transpose(1, 2))
    weights = (scores - scores.amax(1, keepdim=True)).exp()
    mixed = torch.bmm(value.transpose(1, 2).contiguous(), weights) / weights.sum(
        1, keepdim=True
    )  # [B * heads, D, queries]
    return mixed.reshape(count, heads * width, -1).transpose(1, 2)
