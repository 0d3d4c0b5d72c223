"""What makes diffusers' networks faster and leaves what they compute, but for rounding; and their
weights, wherever they lie."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ddim.errors import DDIMError
from ddim.scheduler_base import log_once

__all__ = [
    "COARSE",
    "acting",
    "copy_if_replayed",
    "is_coarse",
    "is_compiled",
    "mark_loaded",
    "mention_precision",
    "prepare_for_compiling",
    "prepare_walk",
    "weights_of",
]

SHORT = 64 * 64
"""Attention of at most that many queries times keys is computed as products of small matrices,
which a compiler fuses with what is around them."""

PIXELS = 256
"""From that many pixels of all feature maps on, upsampling and convolving at once saves more than
summing its weights costs."""

EXACT = (torch.float32, torch.float64)
"""The dtypes in which sums are reordered: half precision would round them, and overflow in
exponentials."""

LARGE, SMALL_MAP = 2**17, 1024
"""Group norm by rows is faster for tensors of at least LARGE elements with feature maps under
SMALL_MAP pixels, where torch's kernel goes through the channels of a group one by one."""

FAR = 64.0
"""Group norm centres a group before it squares, if its mean square is more than FAR times its
variance: the variance then loses two digits of the seven of float32 by a difference of squares."""


_HOOKS = {"_hf_hook", "_diffusers_hook"}
"""Where accelerate and diffusers keep what moves or casts the weights of a module at its calls."""

COARSE = (
    "the network computes in bfloat16 on a CPU: single pixels may be off by 180 of 255 grey levels "
    "from those in float32"
)
"""What happens there, as the beginning of a sentence."""

_loaded: WeakSet[nn.Module] = WeakSet()
_thread = threading.local()


def mark_loaded(*networks: nn.Module) -> None:
    """Says that networks were loaded here, so that our walks prepare them; a network that a user
    gives is called as it is. The process keeps up to 64 MiB that layers free."""
    _keep_freed_memory()
    _loaded.update(networks)


def prepare_walk(network: nn.Module) -> None:
    """Prepares a network that was loaded here for a walk on a CPU or GPU. What it computes outside
    of :func:`acting`, its parameters and their layout stay.

    Convolutions get a copy of their weights that lies channels-last, made at the first walk and
    renewed at each: as much memory again as their weights take. They get none where a hook moves or
    casts the weights at each call, which is done to save memory. Nearest upsampling by 2 and its
    convolution become one transposed convolution, of 16 multiplications an input in place of 36.
    Group norm goes by rows where that is faster. Two threads may walk at once."""
    if network not in _loaded:
        return
    _swap_layers(network)
    if is_compiled(network):
        return
    layers = list(network.modules())
    is_moving = any(not _HOOKS.isdisjoint(vars(layer)) for layer in layers)
    for layer in layers:
        if isinstance(layer, _LaidConv2d):
            if is_moving:
                layer._laid = None
            else:
                layer.renew()


@contextmanager
def acting(network: nn.Module) -> Iterator[None]:
    """While held by a thread, the layers of a network that :func:`prepare_walk` prepared act in
    their faster forms there."""
    before = getattr(_thread, "acts", False)
    _thread.acts = network in _loaded
    try:
        yield
    finally:
        _thread.acts = before


def _swap_layers(network: nn.Module) -> None:
    for layer in network.modules():
        if (kind := _FASTER.get(type(layer))) is not None:
            layer.__class__ = kind


def prepare_for_compiling(network: nn.Module) -> None:
    """Prepares a network for being compiled on a CPU, in place, for all its calls: the weights of
    convolutions become channels-last, layers take their faster forms, and attention of short
    sequences goes without the kernel that is made for long ones."""
    _keep_freed_memory()
    _swap_layers(network)
    for module in network.modules():
        if isinstance(module, _LaidConv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(module, _Faster):
            module.always = True
        if isinstance(module, Attention) and type(module.processor) is AttnProcessor2_0:
            module.set_processor(_ShortAttnProcessor())


def is_coarse(pipe: Any) -> bool:
    """Whether a pipeline's network computes in bfloat16 on a CPU; see :data:`COARSE`."""
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    is_bfloat16 = getattr(network, "dtype", None) == torch.bfloat16
    return is_bfloat16 and pipe._execution_device.type == "cpu"


def mention_precision(pipe: Any) -> None:
    """Logs, once, that a pipeline :func:`is_coarse`."""
    if is_coarse(pipe):
        log_once(f"{COARSE}; pipe.to(torch.float32) is the way out.")


@cache
def _keep_freed_memory() -> None:
    """Raises glibc's mmap threshold, by freeing a block of the largest size that it adapts to, so
    that freed activations are reused instead of returned to the kernel."""
    torch.empty(2**25 - 2**14, dtype=torch.uint8, device="cpu")


def is_compiled(network: Any) -> bool:
    """Whether torch compiles what is called: in place, by a module around it, or by a function in
    place of its ``forward``."""
    in_place = getattr(network, "_compiled_call_impl", None) is not None
    forward = getattr(network, "forward", None)
    is_wrapped = hasattr(network, "_orig_mod") or hasattr(forward, "_torchdynamo_orig_callable")
    return in_place or is_wrapped


def copy_if_replayed(output: Tensor, network: Any) -> Tensor:
    """The output of a network, copied if the network is compiled and on a GPU: there the next call
    may replay a graph of kernels, which writes to the same memory."""
    return output.clone() if output.is_cuda and is_compiled(network) else output


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by their names, fetched from where accelerate holds those
    that it offloaded one by one. A DDIMError refuses a module on the meta device, without any."""
    state = module.state_dict()
    if not any(tensor.is_meta for tensor in state.values()):
        return state
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    held = get_state_dict_offloaded_model(module)
    if missing := [name for name in state if name not in held]:
        raise DDIMError(
            f"the network has no weights for {missing[0]}: it lies on the meta device; load a "
            "checkpoint into it first."
        )
    return {name: held[name] for name in state}


class _Faster:
    """A layer with a faster form. Copies of it, and its pickles, are of the plain class."""

    always = False
    """Whether the faster form acts in all calls."""
    _plain: type

    def _acts(self) -> bool:
        return torch.compiler.is_compiling() or self.always or getattr(_thread, "acts", False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        ours = ("_laid", "always")
        state = {name: value for name, value in vars(self).items() if name not in ours}
        return object.__new__, (self._plain,), state


class _LaidConv2d(_Faster, nn.Conv2d):
    """A convolution by weights that lie channels-last."""

    _plain = nn.Conv2d
    _laid: tuple[Tensor, int, int, Tensor] | None = None
    """The weight, its version and address when it was copied, and the copy."""

    @torch.no_grad()
    def renew(self) -> None:
        """Copies the weights again, since not every change of them can be seen."""
        weight, before = self.weight, self._laid
        if type(weight) is not nn.Parameter or weight.is_meta or weight.is_inference():
            self._laid = None
            return
        copied = None if before is None else before[3]
        kinds = [None if w is None else (w.shape, w.dtype, w.device) for w in (copied, weight)]
        if copied is None or kinds[0] != kinds[1]:
            copied = torch.empty_like(weight, memory_format=torch.channels_last)
        if weight.stride() == copied.stride():  # as it should be already
            self._laid = None
            return
        copied.copy_(weight)
        self._laid = (weight, weight._version, weight.data_ptr(), copied)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        laid = None if torch.compiler.is_compiling() or not self._acts() else self._laid
        if laid is not None and not (weight.requires_grad and torch.is_grad_enabled()):
            is_same = laid[0] is weight and laid[1] == weight._version
            weight = laid[3] if is_same and laid[2] == weight.data_ptr() else weight
        result: Tensor = super()._conv_forward(x, weight, bias)
        return result


class _OnceUpsample2D(_Faster, Upsample2D):  # type: ignore[misc]
    """Upsampling and convolution at once, where they are what diffusers makes by default."""

    _plain = Upsample2D

    def forward(
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **options: Any
    ) -> Any:
        conv = self.conv if self.name == "conv" else self.Conv2d_0
        count, _, height, width = hidden_states.shape
        doubled = output_size is None or tuple(output_size) == (2 * height, 2 * width)
        worth = doubled and count * height * width >= PIXELS and not (args or options)
        fits = self._acts() and self.interpolate and self.norm is None
        if not (worth and fits and _is_plain(conv)):
            return super().forward(hidden_states, output_size, *args, **options)
        kernel = _upsampling_kernel(conv.weight)
        return F.conv_transpose2d(hidden_states, kernel, conv.bias, stride=2, padding=1)


def _is_plain(conv: Any) -> bool:
    """Whether a layer is no more than a 3x3 convolution, padded with zeros, of weights that are
    here, on a CPU, and whose sums do not round: no adapter, hook or method of its own stands in it.
    """
    if type(conv) not in (nn.Conv2d, _LaidConv2d) or conv.weight.device.type != "cpu":
        return False
    if conv.weight.dtype not in EXACT or torch.is_autocast_enabled("cpu"):  # half-precision sums
        return False
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    if shape != ((3, 3), (1, 1), (1, 1), (1, 1)) or conv.groups != 1:
        return False
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if conv.padding_mode != "zeros" or any(getattr(conv, kind) for kind in kinds):
        return False
    return "forward" not in conv.__dict__ and "_conv_forward" not in conv.__dict__


# On the CPU, wherever this module is first imported.
_ROWS = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], device="cpu")
"""[3, 4]: the rows of a transposed convolution's kernel that a row of a convolution's goes to. Each
input is seen at two rows, and a transposed convolution runs backwards."""
_TAPS = torch.kron(_ROWS, _ROWS)
"""[9, 16]: the same of rows and columns."""


def _upsampling_kernel(weight: Tensor) -> Tensor:
    """[I, O, 4, 4] by which a transposed convolution of stride 2 is nearest upsampling by 2 and a
    convolution by weight [O, I, 3, 3]."""
    summed = weight.reshape(-1, 9) @ _TAPS.to(weight)
    return summed.view(*weight.shape[:2], 4, 4).transpose(0, 1)


class _RowsGroupNorm(_Faster, nn.GroupNorm):
    """Normalizes rows of all channels, which is what lies together channels-last: compiled, or
    where torch's kernel goes through groups of few channels by themselves."""

    _plain = nn.GroupNorm

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        is_exact = input.device.type == "cpu" and input.dtype in EXACT
        fits = self._acts() and is_exact and self.affine and input.ndim > 2
        if not fits or not (torch.compiler.is_compiling() or self._is_slow(input)):
            return super().forward(input)
        rows = input.flatten(2).transpose(1, 2)
        count, _, channels = rows.shape

        def mean(x: Tensor) -> Tensor:  # [B, groups, 1]
            return x.mean(1).view(count, self.num_groups, -1).mean(2, keepdim=True)

        def stored(x: Tensor) -> Tensor:  # else a compiler computes it again for every element
            shape = (count, 1, channels)
            return x.reshape(shape).as_strided(shape, (channels, channels, 1))

        def each(x: Tensor) -> Tensor:  # of each group for its channels
            return stored(x.expand(-1, -1, channels // self.num_groups))

        def moments(x: Tensor) -> tuple[Tensor, Tensor]:
            centre = mean(x)
            return centre, (mean(x * x) - centre * centre).clamp_(min=0)

        compiling = torch.compiler.is_compiling()
        centre, spread = (mean(rows), None) if compiling else moments(rows)
        # Far from 0 that difference cancels: such groups, which are rare, are centred first.
        if spread is None or bool((spread * FAR < centre * centre).any()):
            rows = rows - each(centre)
            centre, spread = moments(rows)
        weight, bias = (p.view(self.num_groups, -1) for p in (self.weight, self.bias))
        scale = (spread + self.eps).rsqrt() * weight  # [B, groups, channels of one]
        shift = bias - centre * scale
        normalized = torch.addcmul(stored(shift), rows, stored(scale))
        return normalized.transpose(1, 2).reshape(input.shape)

    def _is_slow(self, x: Tensor) -> bool:
        """Whether torch's kernel is slow: for many small feature maps that lie channels-last, if
        the channels of a group do not fill a vector register."""
        width = self.num_channels // self.num_groups
        if width >= 16 or width == 8 or x.ndim != 4 or x.numel() < LARGE:
            return False
        if x.shape[2] * x.shape[3] >= SMALL_MAP:
            return False
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


_FASTER = {kind._plain: kind for kind in (_LaidConv2d, _OnceUpsample2D, _RowsGroupNorm)}


class _ShortAttnProcessor(AttnProcessor2_0):  # type: ignore[misc]
    """Plain attention of few tokens by products of small matrices; torch's kernel for the rest."""

    def __call__(  # diffusers passes only what is named here
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Any:
        is_map = hidden_states.ndim == 4
        tokens = hidden_states.flatten(2).transpose(1, 2) if is_map else hidden_states
        given = tokens if encoder_hidden_states is None else encoder_hidden_states
        is_short = tokens.shape[1] * given.shape[1] <= SHORT
        is_plain = attention_mask is None and not any(getattr(attn, name) for name in _UNSUPPORTED)
        if not (is_short and is_plain and hidden_states.dtype in EXACT):
            others = (encoder_hidden_states, attention_mask, temb)
            return super().__call__(attn, hidden_states, *others)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        given = tokens if encoder_hidden_states is None else encoder_hidden_states
        mixed = _attend(attn.to_q(tokens), attn.to_k(given), attn.to_v(given), heads=attn.heads)
        for layer in attn.to_out:
            mixed = layer(mixed)
        if is_map:
            mixed = mixed.transpose(1, 2).reshape(hidden_states.shape)
        mixed = mixed + hidden_states if attn.residual_connection else mixed
        return mixed / attn.rescale_output_factor


_UNSUPPORTED = ("spatial_norm", "norm_q", "norm_k", "norm_cross")
"""With these parts an attention layer keeps torch's kernel. Upcasting of scores or softmax is not
among them: it is for half precision, and diffusers' processor of torch's kernel ignores it too."""


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
    mixed = torch.bmm(value.transpose(1, 2).contiguous(), weights)  # [B * heads, D, queries]
    mixed = mixed / weights.sum(1, keepdim=True)
    return mixed.reshape(count, heads * width, -1).transpose(1, 2)
