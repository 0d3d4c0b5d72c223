"""The compiled network of a run, which is used only if its gradients are the eager network's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddim.training.division import Piece
from ddim.training.loop import Run, step_loss

__all__ = ["compiled", "count_differences", "reason_against", "usable_network"]

_TOLERANCE = {"no": 0.01, "bf16": 0.25, "fp16": 0.25}
"""Largest relative difference of a gradient, by the precision of the forward pass. Rounding is
below it, and a gradient that is lost differs by 1."""

_ROUNDING = 1e-3
"""Differences below this part of the whole gradient's norm are rounding: for example, the gradient
of a bias in front of a normalisation is 0 but for rounding."""


def compiled(model: nn.Module, device: torch.device) -> Callable[..., Any]:
    """Returns the network as ``torch.compile`` makes it.

    PyTorch 2.13's layout optimisation loses most gradients of diffusers' UNets on a CPU, so it is
    off there. Dropout draws the numbers that it draws in the eager network."""
    options: dict[str, Any] = {"fallback_random": True}
    if device.type == "cpu":
        options["layout_optimization"] = False
    made: Callable[..., Any] = torch.compile(model, options=options)
    return made


def reason_against(device: torch.device) -> str | None:
    """A sentence, where a compiled network trains no faster than the eager one, which is prepared
    (:func:`ddim.pipelines.networks.prepare_for_training`)."""
    if device.type != "cpu":
        return None
    return (
        "--compile is not worth it on a CPU, where the network trains as fast without and is ready "
        "at once; the run goes on without --compile."
    )


def usable_network(
    run: Run, batch: Any, step: int, piece: Piece
) -> tuple[Callable[..., Any], str | None]:
    """Compiles the network of a run that ``accelerate`` has prepared, and compares its gradients of
    one batch with those of the eager network.

    Returns:
        The compiled network; or the eager one and a sentence that says why, if a gradient differs
        by more than rounding, or the network cannot be compiled.
    """
    expected = _gradients(run, run.model, batch, step, piece)
    try:
        network = compiled(run.model, run.accelerator.device)
        found = _gradients(run, network, batch, step, piece)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = f"the network cannot be compiled here ({str(error).strip().splitlines()[0]})"
        return run.model, f"{reason}; the run goes on without --compile."
    tolerance = _TOLERANCE[run.accelerator.mixed_precision]
    wrong = torch.tensor(float(count_differences(found, expected, tolerance)))
    # Every process must come to the same decision.
    if run.accelerator.reduce(wrong.to(run.accelerator.device), "sum") == 0:
        return network, None
    return run.model, (
        f"the compiled network has wrong gradients for {int(wrong)} of {len(expected)} parameters; "
        "the run goes on without --compile."
    )


def _gradients(
    run: Run, network: Callable[..., Any], batch: Any, step: int, piece: Piece
) -> list[Tensor | None]:
    """The gradients of one batch, by parameter; none are left behind."""
    # A power of two: it keeps the gradients of a forward pass in fp16 above its smallest number.
    torch.autograd.backward(step_loss(run, network, batch, step, piece) * 1024)
    gradients = [None if p.grad is None else p.grad.clone() for p in run.model.parameters()]
    run.model.zero_grad(set_to_none=True)
    return gradients


def count_differences(
    found: list[Tensor | None], expected: list[Tensor | None], tolerance: float
) -> int:
    """Counts the parameters whose gradient differs by more than ``tolerance``, relative to its own
    norm, and by more than rounding of the whole gradient. A gradient that is None is 0."""
    rows = []
    for mine, other in zip(found, expected, strict=True):
        known = mine if other is None else other
        if known is not None:
            a, b = (torch.zeros_like(known) if g is None else g for g in (mine, other))
            rows.append(torch.stack([(a - b).norm(), b.norm()]))
    if not rows:
        return 0
    difference, size = torch.stack(rows).unbind(1)
    # Written so that NaN counts as a difference, unless the eager gradient is not finite either.
    close = difference <= tolerance * size + _ROUNDING * size.nan_to_num(0.0).norm()
    return int((~close & size.isfinite()).sum())
