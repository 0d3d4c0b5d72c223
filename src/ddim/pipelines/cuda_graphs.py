"""Records a call on a CUDA device as a graph of its kernels."""

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["CudaRecorder"]


class _Graph:
    """A graph of kernels, the memory that it reads its inputs from, and what it writes to."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, inputs: list[Tensor], output: Tensor, nbytes: int
    ) -> None:
        self.nbytes = nbytes
        self._graph, self._inputs, self._output = graph, inputs, output

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """Copies the inputs in, replays, and copies the output: the next replay overwrites it."""
        with torch.cuda.device(self._output.device), torch.no_grad():
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
            self._graph.replay()
            return self._output.clone()


class CudaRecorder:
    """Records calls as CUDA graphs. Nothing in a graph waits for the host.

    References:
        PyTorch documentation. CUDA semantics, CUDA graphs.
        https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def record(
        self, call: Callable[[Sequence[Tensor]], Tensor], inputs: Sequence[Tensor]
    ) -> _Graph:
        """Records a call. A RuntimeError says that it waits for the device, or that the memory is
        at an end."""
        device = inputs[0].device
        # Outside of inference mode, whose tensors could not be written to outside of it.
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            held = [torch.empty_like(tensor).copy_(tensor) for tensor in inputs]
            stream, current = _side_stream(device), torch.cuda.current_stream(device)
            stream.wait_stream(current)
            with torch.cuda.stream(
                stream
            ):  # libraries set up their memory at a stream's first call
                call(held)
            current.wait_stream(stream)
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # so that what is reserved next is the graph's own
            before = torch.cuda.memory_reserved(device)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the device.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                output = call(held)
            taken = torch.cuda.memory_reserved(device) - before
        return _Graph(graph, held, output, taken + sum(tensor.nbytes for tensor in held))

    def surroundings(self, device: torch.device) -> Hashable:
        """What decides on kernels, and the stream, on which replays run one after the other."""
        backends, matmul = torch.backends, torch.backends.cuda.matmul
        return (
            torch.cuda.current_stream(device).cuda_stream,
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            (backends.cudnn.enabled, backends.cudnn.allow_tf32, backends.cudnn.benchmark),
            (backends.cudnn.deterministic, matmul.allow_fp16_reduced_precision_reduction),
            *_attention_kernels(),
        )

    def capacity(self, device: torch.device) -> int:
        """A quarter of the device's memory."""
        return int(torch.cuda.get_device_properties(device).total_memory) // 4


def _attention_kernels() -> tuple[bool, ...]:
    """Which kernels of attention torch may take."""
    kinds: Any = torch.backends.cuda  # without types
    is_on = (kinds.flash_sdp_enabled, kinds.mem_efficient_sdp_enabled, kinds.cudnn_sdp_enabled)
    return tuple(bool(ask()) for ask in (*is_on, kinds.math_sdp_enabled))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings of a device, since libraries keep memory for every stream."""
    made: Any = torch.cuda.Stream
    return made(device)  # type: ignore[no-any-return]
