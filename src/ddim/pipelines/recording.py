"""Calls of a network that are recorded once and replayed: what is recorded, when a recording is
out of date, and how much memory all of them may take.

Launching the kernels of a small batch takes a GPU's host longer than computing them takes the GPU.
A recording launches all of them at once, and computes the same numbers. How a device records is a
:class:`Recorder` (:mod:`ddim.pipelines.cuda_graphs`); everything else is here, and needs none."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ddim.pipelines.cuda_graphs import CudaRecorder
from ddim.pipelines.network_calls import NetworkCalls
from ddim.pipelines.networks import acting, copy_if_replayed, is_compiled, prepare_walk
from ddim.scheduler_base import log_once

__all__ = ["RECORDERS", "Recorded", "Recorder", "Recordings", "forget_recordings", "network_call"]

MOST = 4
"""Recordings that are kept of a network: of two batch sizes, each with and without guidance."""

TRIED = 8
"""From that many recordings on, a network that was replayed no oftener is no longer recorded."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference between a call and its first replay, relative to the largest output; in half
precision 0.01. A device may sum in another order, as in two calls that are not recorded."""

LIBRARIES = {"torch", "diffusers", "peft", "ddim"}
"""Whose layers take the same way through their code at each call, and keep nothing between two."""

PLAIN = (bool, int, float, str, type(None))
_OF_MODULES = frozenset(vars(nn.Module()))


class Recorded(Protocol):
    """A recorded call."""

    nbytes: int
    """Memory that it holds."""

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """Computes the call for other inputs of the same kind; a new tensor."""


class Recorder(Protocol):
    """How a kind of device records."""

    def record(
        self, call: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor]
    ) -> Recorded:
        """Records a call; a RuntimeError says that it cannot be recorded."""

    def surroundings(self, device: torch.device) -> Hashable:
        """The settings of the process that decide which kernels a call launches, and in which
        order they run."""

    def capacity(self, device: torch.device) -> int:
        """Bytes that the recordings of a network may hold."""


RECORDERS: dict[str, Recorder] = {"cuda": CudaRecorder()}
"""By the type of device; one without is called as ever."""

_recordings: WeakKeyDictionary[nn.Module, "Recordings"] = WeakKeyDictionary()
_adding = threading.Lock()


def network_call(network: Any, *, records: bool = True, **options: Any) -> Callable[..., Any]:
    """Prepares a network for a walk, and returns it as (x_t, t, *more) -> its first output, under
    ``options``.

    On a device that has a recorder, calls are recorded and replayed, unless ``records`` is False,
    the network is compiled, or something follows each operator."""
    prepare_walk(network)
    was_compiled = is_compiled(network)

    def call(x_t: Tensor, *given: Any) -> Any:
        # Contiguous at every step: a compiled network is compiled again for another layout,
        # and states have that of outputs.
        x_t = x_t.contiguous()
        recorder = RECORDERS.get(x_t.device.type) if records else None
        if was_compiled or recorder is not None:
            x_t = x_t.flatten().view(x_t.shape)  # strides of sides of 1 count there too
        with acting(network):
            if recorder is None or is_compiled(network) or _is_watched():
                output = network(x_t, *given, return_dict=False, **options)[0]
                return copy_if_replayed(output, network)
            return _recordings_of(network, recorder)(network, (x_t, *given), options)

    return call


def _recordings_of(network: nn.Module, recorder: Recorder) -> "Recordings":
    with _adding:
        found = _recordings.get(network)
        if found is None:
            found = _recordings[network] = Recordings(recorder)
        return found


def forget_recordings(network: Any) -> None:
    """Frees the memory of a network's recordings."""
    with _adding:
        found = _recordings.pop(network, None) if isinstance(network, nn.Module) else None
    if found is not None:
        found.forget()


def _is_watched() -> bool:
    """Whether something follows each operator, which a replay would not show: autograd, a
    compiler, a mode of torch's dispatcher, hooks of all modules."""
    hooks = torch.nn.modules.module
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)
    )


class Recordings:
    """The recordings of one network.

    A call is recorded when its kind is seen for the first time: shapes, dtypes and devices of its
    tensors, its other arguments, and the surroundings. That call is computed as ever, and its
    output compared with the first replay. When anything in the network has changed since (weights,
    layers, attributes such as an adapter's scale), all of them are dropped."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.recorded = self.replayed = 0
        self._kept: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._refused: set[Hashable] = set()
        self._seen: _Snapshot | None = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(
        self, network: nn.Module, inputs: Sequence[Any], options: Mapping[str, Any]
    ) -> Any:
        """The first output of the network for these arguments, the first of which is x_t."""
        call = _Call.of(network, inputs, options)
        kind = (call.kind, self.recorder.surroundings(inputs[0].device))
        if call.reason is None:
            with self._lock:  # two replays would write to the same memory
                if self._seen is None or not self._seen.is_true_of(network):
                    self.forget()
                    self._seen = _Snapshot.of(network)
                if (found := self._kept.get(kind)) is not None:
                    _count(network, inputs)
                    self._kept.move_to_end(kind)
                    self.replayed += 1
                    return found.replay(call.tensors)
                if self._seen.reason is None and kind not in self._refused:
                    return self._record(network, call, kind)
        _tell(call.reason or self._seen_reason())
        return call.made()

    def forget(self) -> None:
        """Drops all recordings, and what is known of the network."""
        with self._lock:
            self._kept.clear()
            self._refused.clear()
            self._seen = None

    def _seen_reason(self) -> str | None:
        seen = self._seen
        return None if seen is None else seen.reason

    def _record(self, network: nn.Module, call: "_Call", kind: Hashable) -> Any:
        """Makes the call, and records it; what cannot be recorded is refused from now on."""
        expected = call.made()
        reason = self._try(call, kind, expected)
        if reason is not None:
            self._refused.add(kind)
            _tell(reason)
        # A first call may leave something behind in a layer.
        self._seen = _Snapshot.of(network)
        return expected

    def _try(self, call: "_Call", kind: Hashable, expected: Any) -> str | None:
        """Records a call whose output is known; a reason if it cannot be replayed."""
        if self.recorded >= TRIED and self.replayed <= self.recorded:
            return "its calls differ from one another"
        if not isinstance(expected, Tensor):
            return "it returns no tensor"
        try:
            found = self.recorder.record(call.below_hooks, call.tensors)
            again = found.replay(call.tensors)
        except RuntimeError as error:  # the end of the memory is one too
            return str(error).strip().partition("\n")[0] or type(error).__name__
        self.recorded += 1
        if not _agree(expected, again):
            return "a replay differs from the call"
        capacity = self.recorder.capacity(expected.device)
        if found.nbytes > capacity:
            return (
                f"it takes {found.nbytes / 2**20:.0f} MiB, and {capacity / 2**20:.0f} are allowed"
            )
        self._kept[kind] = found
        while len(self._kept) > MOST or sum(r.nbytes for r in self._kept.values()) > capacity:
            self._kept.popitem(last=False)  # the one that was used longest ago
        return None


def _tell(reason: str | None) -> None:
    if reason is not None:
        log_once(f"The network's kernels are launched one by one, not recorded: {reason}.")


def _count(network: nn.Module, inputs: Sequence[Any]) -> None:
    """Has those who count the calls of a network count one that is replayed."""
    for hook in network._forward_pre_hooks.values():
        hook(network, tuple(inputs))


def _agree(expected: Tensor, found: Tensor) -> bool:
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        return False
    largest = float(expected.abs().max().nan_to_num(0.0)) if expected.numel() else 0.0
    tolerance = TOLERANCE.get(expected.dtype, 1e-2) * largest
    return torch.allclose(expected, found, rtol=0.0, atol=tolerance, equal_nan=True)


@dataclass(frozen=True)
class _Call:
    """A call of a network, taken apart into its tensors and the rest."""

    network: nn.Module
    inputs: Sequence[Any]
    options: Mapping[str, Any]
    tensors: list[Tensor] = field(default_factory=list)
    kind: Hashable = None
    reason: str | None = None
    """Why such a call is not recorded."""

    @classmethod
    def of(cls, network: nn.Module, inputs: Sequence[Any], options: Mapping[str, Any]) -> "_Call":
        tensors: list[Tensor] = []
        try:
            kind = _kind((tuple(inputs), dict(options)), tensors)
        except TypeError as error:
            return cls(network, inputs, options, reason=str(error))
        if any(tensor.device != tensors[0].device for tensor in tensors):
            return cls(network, inputs, options, reason="its arguments lie on two devices")
        return cls(network, inputs, options, tensors, (kind, torch.is_inference_mode_enabled()))

    def made(self) -> Any:
        return self.network(*self.inputs, return_dict=False, **self.options)[0]

    def below_hooks(self, tensors: Sequence[Tensor]) -> Any:
        """The same with other tensors, and not seen by those who count calls."""
        given = iter(tensors)
        inputs, options = _replaced((tuple(self.inputs), dict(self.options)), given)
        return self.network.forward(*inputs, return_dict=False, **options)[0]


def _kind(value: Any, tensors: list[Tensor]) -> Hashable:
    """What a recording depends on in arguments, beside the numbers in their tensors, which are
    collected; a TypeError says what is neither a tensor nor plain."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter):
            raise TypeError(f"an argument is a {type(value).__name__}")
        tensors.append(value)
        return (value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, PLAIN):
        return (type(value), value)
    if isinstance(value, dict):
        return ("dict", *((name, _kind(held, tensors)) for name, held in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_kind(held, tensors) for held in value))
    raise TypeError(f"an argument is a {type(value).__name__}")


def _replaced(value: Any, tensors: Iterable[Tensor]) -> Any:
    """The same arguments with other tensors, in the order of :func:`_kind`."""
    if isinstance(value, Tensor):
        return next(iter(tensors))
    if isinstance(value, dict):
        return {name: _replaced(held, tensors) for name, held in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(held, tensors) for held in value)
    return value


@dataclass(frozen=True)
class _Snapshot:
    """A network as it was when its calls were recorded. Looking whether it still is costs 0.1 ms
    for a network of 170 layers, at each call: a callback may change it between two steps."""

    layers: tuple[nn.Module, ...]
    """Without the network itself, which recordings must not keep."""
    held: tuple[tuple[Any, ...], ...]
    """The values of all attributes of each layer, the network's first."""
    inside: tuple[tuple[Any, tuple[Any, ...]], ...]
    """Lists, sets and dictionaries among them, and what they held: such as an adapter's scales."""
    weights: tuple[Tensor | None, ...]
    marks: tuple[int, ...]
    """Where each weight lies, and how often it was changed in place."""
    reason: str | None = None
    """Why the calls of such a network are not recorded."""

    @classmethod
    def of(cls, network: nn.Module) -> "_Snapshot":
        layers = _layers(network)
        if (reason := _reason_against(layers)) is not None:
            return cls((), (), (), (), (), reason)
        own = [value for x in layers for name, value in vars(x).items() if name not in _OF_MODULES]
        held = tuple(tuple(vars(layer).values()) for layer in layers)
        inside = tuple((v, _content(v)) for v in own if isinstance(v, (dict, list, set)))
        weights = tuple(_weights(layers))
        return cls(tuple(layers[1:]), held, inside, weights, _marks(weights))

    def is_true_of(self, network: nn.Module) -> bool:
        layers = _layers(network)
        if self.reason is not None:  # looked at again, since a hook may have gone
            return _reason_against(layers) == self.reason
        if len(layers) != len(self.held) or not all(map(is_, layers[1:], self.layers)):
            return False
        if any(x._forward_hooks for x in layers) or any(x._forward_pre_hooks for x in layers[1:]):
            return False
        weights = _weights(layers)
        if len(weights) != len(self.weights) or not all(map(is_, weights, self.weights)):
            return False
        if _marks(weights) != self.marks or _reason_against_hooks(network) is not None:
            return False
        try:  # tuples compare what they hold by identity first, so values are seldom looked at
            same = all(tuple(vars(x).values()) == was for x, was in zip(layers, self.held))  # noqa: B905 - of one length
            return same and all(_content(value) == was for value, was in self.inside)
        except (RuntimeError, ValueError):  # another tensor or array, which has no truth value
            return False


def _layers(network: nn.Module) -> list[nn.Module]:
    """A network and all its layers, a tenth of the time of ``modules()``; those that stand in two
    places come twice."""
    found = [network]
    for layer in found:
        found += [inner for inner in layer._modules.values() if inner is not None]
    return found


def _weights(layers: Sequence[nn.Module]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for layer in layers:
        found += layer._parameters.values()
        found += layer._buffers.values()
    return found


def _marks(weights: Sequence[Tensor | None]) -> tuple[int, ...]:
    there = [w for w in weights if w is not None]
    # Tensors of inference mode count no changes.
    versions = [w._version for w in there if not w.is_inference()]
    return (*[w.data_ptr() for w in there], *versions)


def _content(value: Any) -> tuple[Any, ...]:
    return (*value.keys(), *value.values()) if isinstance(value, dict) else tuple(value)


def _reason_against(layers: Sequence[nn.Module]) -> str | None:
    """Why the calls of a network, the first of its layers, are not recorded; None if they are."""
    for layer in layers:
        name, own = type(layer).__name__, vars(layer)
        if layer._forward_hooks or (layer is not layers[0] and layer._forward_pre_hooks):
            return f"a {name} in it has hooks"
        if not {"_hf_hook", "_diffusers_hook"}.isdisjoint(own):
            return f"the weights of a {name} in it are moved or cast at its calls"
        if "forward" in own or "_conv_forward" in own:
            return f"a {name} in it has a forward of its own"
        for part in (layer, own.get("processor", layer)):
            if type(part).__module__.partition(".")[0] not in LIBRARIES:
                return f"it has a {type(part).__name__}, whose code is not known here"
    for weight in _weights(layers):
        if weight is not None and type(weight) not in (Tensor, nn.Parameter):
            return f"a weight in it is a {type(weight).__name__}"
    return _reason_against_hooks(layers[0])


def _reason_against_hooks(network: nn.Module) -> str | None:
    hooks = network._forward_pre_hooks.values()
    if all(isinstance(getattr(hook, "__self__", None), NetworkCalls) for hook in hooks):
        return None
    return f"the {type(network).__name__} has hooks"
