"""What makes diffusers' networks faster and leaves what they compute, but for rounding; and their
weights, wherever they lie."""

from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ddim.errors import DDIMError
from ddim.pipelines.faster_layers import FASTER, ActingHere, Faster, LaidConv2d
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
    "prepare_for_training",
    "prepare_walk",
    "weights_of",
]

_HOOKS = {"_hf_hook", "_diffusers_hook"}
"""Where accelerate and diffusers keep what moves or casts the weights of a module at its calls."""

COARSE = (
    "the network computes in bfloat16 on a CPU: single pixels may be off by 180 of 255 grey levels "
    "from those in float32"
)
"""What happens there, as the beginning of a sentence."""

_loaded: WeakSet[nn.Module] = WeakSet()


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
        if isinstance(layer, LaidConv2d):
            if is_moving:
                layer._laid = None
            else:
                layer.renew()


def acting(network: nn.Module) -> ActingHere:
    """While held by a thread, the layers of a network that :func:`prepare_walk` prepared act in
    their faster forms there."""
    return ActingHere(network in _loaded)


def _swap_layers(network: nn.Module) -> None:
    for layer in network.modules():
        if (kind := FASTER.get(type(layer))) is not None:
            layer.__class__ = kind


def prepare_for_compiling(network: nn.Module) -> None:
    """Prepares a network for being compiled on a CPU, in place, for all its calls: the weights of
    convolutions become channels-last, and layers take their faster forms."""
    _keep_freed_memory()
    _swap_layers(network)
    for module in network.modules():
        if isinstance(module, LaidConv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(module, Faster):
            module.always = True


def prepare_for_training(network: nn.Module) -> None:
    """Prepares a network for being trained on a CPU, in place, for all its calls: the weights of
    convolutions become channels-last, and those layers take their faster forms whose gradients are
    faster too. Copies of it are of the plain classes."""
    _keep_freed_memory()
    for module in network.modules():
        if type(module) in (Upsample2D, ResnetBlock2D, Attention):
            module.__class__ = FASTER[type(module)]
            module.always = True  # type: ignore[assignment]
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


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
