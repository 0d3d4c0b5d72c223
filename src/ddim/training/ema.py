"""The exponential moving average of a network's parameters, which is the model that is sampled."""

import copy

import torch
from torch import nn

__all__ = ["EMA", "ema_decay_at"]


def ema_decay_at(step: int, decay: float) -> float:
    r"""The decay after ``step`` updates: :math:`\min(\mathrm{decay}, (1 + n) / (10 + n))`, so that
    early averages forget the start."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Holds a float32 copy of a network whose parameters follow: average <- decay average + (1 -
    decay) parameter.

    Only parameters are averaged. Buffers (tables, running statistics) are copied, since the average
    of two tables means nothing.

    Args:
        network: The network to follow; it is copied.
        decay: In [0, 1); 0 follows at once.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Moves the average towards the network after optimiser step ``step`` (from 0)."""
        ours: list[torch.Tensor] = list(self.network.parameters())
        theirs = [
            p.detach().to(a.device, a.dtype)
            for p, a in zip(network.parameters(), ours, strict=True)
        ]
        torch._foreach_lerp_(ours, theirs, 1 - ema_decay_at(step, self.decay))
        for mine, other in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(other)
