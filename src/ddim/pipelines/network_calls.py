"""Counts the calls of a network."""

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["NetworkCalls"]


class NetworkCalls:
    """Counts, while it is held by ``with``, for how many images a network is called, whose first
    argument is a batch. ``before`` goes before each call; it may raise, to stop a walk there."""

    def __init__(self, network: nn.Module, before: Callable[[], None]) -> None:
        self.images = 0
        self._network, self._before = network, before

    def __enter__(self) -> "NetworkCalls":
        self._hook = self._network.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, network: object, inputs: tuple[Tensor, ...]) -> None:
        self._before()
        self.images += len(inputs[0])

    def each(self, count: int) -> float:
        """Calls for each of ``count`` images: whole, unless images took different numbers."""
        return self.images // count if self.images % count == 0 else self.images / count
