"""The faster forms of diffusers' layers, which compute the same but for rounding."""

import threading
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

__all__ = ["FASTER", "ActingHere", "Faster", "LaidConv2d"]

SHORT = 64 * 64
"""Attention of at most that many queries times keys is computed as products of small matrices,
which a compiler fuses with what is around them."""

CACHED = 2**20
"""So many scores are computed at a time, so that they stay in the cache."""

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

_thread = threading.local()


class ActingHere:
    """While held by a thread, layers act in their faster forms there, or do not. (A class, since a
    generator would take longer than an operator of a small tensor.)"""

    def __init__(self, active: bool) -> None:
        self._active = active

    def __enter__(self) -> None:
        self._before = getattr(_thread, "acts", False)
        _thread.acts = self._active

    def __exit__(self, *error: object) -> None:
        _thread.acts = self._before


class Faster:
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


class LaidConv2d(Faster, nn.Conv2d):
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


class _OnceUpsample2D(Faster, Upsample2D):  # type: ignore[misc]
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
    if type(conv) not in (nn.Conv2d, LaidConv2d) or conv.weight.device.type != "cpu":
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


class _RowsGroupNorm(Faster, nn.GroupNorm):
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


class _InPlaceResnet(Faster, ResnetBlock2D):  # type: ignore[misc]
    """The usual residual block, which adds and activates in the memory of its own results, and
    divides nothing by 1: the same numbers, with a third of the memory traffic between its layers.
    """

    _plain = ResnetBlock2D

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **options: Any) -> Any:
        if temb is None or args or options or torch.compiler.is_compiling() or not self._is_usual():
            return super().forward(input_tensor, temb, *args, **options)
        in_place = not torch.is_grad_enabled()  # autograd keeps what goes into an activation
        x = self.conv1(F.silu(self.norm1(input_tensor), inplace=in_place))
        x = _added(x, self.time_emb_proj(F.silu(temb))[:, :, None, None])
        x = self.conv2(self.dropout(F.silu(self.norm2(x), inplace=in_place)))
        shortcut = self.conv_shortcut
        return _added(x, input_tensor if shortcut is None else shortcut(input_tensor))

    def _is_usual(self) -> bool:
        """Whether the block is what diffusers makes by default, and no layer of it is an adapter,
        or has a hook that would see its output change."""
        if not self._acts() or self.output_scale_factor != 1.0:
            return False
        if self.upsample is not None or self.downsample is not None or self.skip_time_act:
            return False
        if self.time_embedding_norm != "default" or self.time_emb_proj is None:
            return False
        return type(self.nonlinearity) is nn.SiLU and all(
            type(layer) in _OWN_OUTPUT and not layer._forward_hooks and "forward" not in vars(layer)
            for layer in (self.norm1, self.conv1, self.norm2, self.conv2, self.nonlinearity)
        )


def _added(x: Tensor, other: Tensor) -> Tensor:
    """x + other, in the memory of x unless the sum is of another dtype, as under autocast."""
    return x.add_(other) if torch.result_type(x, other) == x.dtype else x + other


_OWN_OUTPUT = {nn.Conv2d, nn.GroupNorm, nn.SiLU, LaidConv2d, _RowsGroupNorm}
"""Layers whose output lies in memory of its own, which may be written to."""


class _ShortAttention(Faster, Attention):  # type: ignore[misc]
    """Attention of few tokens by products of small matrices, and torch's kernel for the rest. Its
    ``processor`` stays where it is, and acts if it is not diffusers' default."""

    _plain = Attention

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        given = (hidden_states, encoder_hidden_states, attention_mask)
        temb = options.get("temb")  # for a norm of its own, with which attention is not short
        is_usual = type(self.processor) is AttnProcessor2_0 and not options.keys() - {"temb"}
        if not (is_usual and self._acts()):
            return super().forward(*given, **options)
        if attention_mask is not None or not self._is_short(*given[:2]):
            return self.processor(self, *given, temb)
        is_map = hidden_states.ndim == 4
        tokens = hidden_states.flatten(2).transpose(1, 2) if is_map else hidden_states
        if self.group_norm is not None:
            tokens = self.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        tokens = tokens.contiguous()  # once for three products
        others = tokens if encoder_hidden_states is None else encoder_hidden_states
        parts = (self.to_q(tokens), self.to_k(others), self.to_v(others))
        mixed = _attend(*parts, heads=self.heads)
        for layer in self.to_out:
            mixed = layer(mixed)
        if is_map:
            mixed = mixed.transpose(1, 2).reshape(hidden_states.shape)
        mixed = mixed + hidden_states if self.residual_connection else mixed
        factor = self.rescale_output_factor
        return mixed if factor == 1.0 else mixed / factor

    def _is_short(self, tokens: Tensor, given: Tensor | None) -> bool:
        if tokens.device.type != "cpu" or tokens.dtype not in EXACT:
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        queries = tokens.shape[1] if tokens.ndim == 3 else tokens.shape[2] * tokens.shape[3]
        pairs = queries * (queries if given is None else given.shape[1])
        return pairs <= SHORT and not any(getattr(self, name) for name in _UNSUPPORTED)


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
    pairs = query.shape[1] * key.shape[1]
    if torch.compiler.is_compiling() or len(query) * pairs <= CACHED:
        mixed = _mix(query, key, value)
    else:
        size = max(1, CACHED // pairs)
        each = zip(*(torch.split(x, size) for x in (query, key, value)), strict=True)
        mixed = torch.cat([_mix(*part) for part in each])
    return mixed.reshape(count, heads * width, -1).transpose(1, 2)


def _mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T) v of [B * heads, tokens, D], as [B * heads, D, queries]."""
    scores = torch.bmm(key, query.transpose(1, 2))
    # In place, and without a gradient: what is subtracted cancels.
    weights = scores.sub_(scores.detach().amax(1, keepdim=True)).exp_()
    mixed = torch.bmm(value.transpose(1, 2).contiguous(), weights)  # [B * heads, D, queries]
    return mixed / weights.sum(1, keepdim=True)


FASTER = {
    kind._plain: kind
    for kind in (LaidConv2d, _OnceUpsample2D, _RowsGroupNorm, _InPlaceResnet, _ShortAttention)
}
"""The faster form of each class of layers."""
