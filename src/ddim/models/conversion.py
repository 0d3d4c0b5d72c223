"""Converts checkpoints of other codebases into diffusers format: renames the weights, and reads the
architecture from their shapes.

Two layouts are the same networks as :class:`diffusers.UNet2DModel` under other names: those of
Song's ``ddim`` (and Ho's models in PyTorch) and of OpenAI's ``improved-diffusion``. What a state
dict cannot tell is an option of :func:`convert`. Files are read from safetensors, or by
``torch.load`` with ``weights_only=True``, which runs no code out of them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ddim.configuration import PIXEL_MODEL, configured_betas, spelled_betas
from ddim.core.checks import check_kind, wrong_argument
from ddim.core.schedule import BetaSchedule, NoiseSchedule
from ddim.errors import CheckpointError, DDIMError, needs_code, shown_cause
from ddim.files import replacing_folder
from ddim.models.checkpoints import check_finite
from ddim.models.layouts import Layout, State, read_architecture, rename, tell_layout

__all__ = ["Converted", "convert", "read_state_dict", "refuse_existing", "write_model"]

_MOST_LEVELS = 1000  # improved-diffusion scales timesteps to this many levels


@dataclass(frozen=True, eq=False)
class Converted:
    """A model in diffusers' terms.

    Attributes:
        layout: The layout that it had.
        unet: Configuration of a ``UNet2DModel``.
        scheduler: Configuration of a ``DDIMScheduler``.
        state: Weights under diffusers' names.
        names: The original name of each weight.
    """

    layout: Layout
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    state: State
    names: dict[str, str]


def read_state_dict(path: Path | str) -> State:
    """The weights in a file, under names without ``module.``; averaged weights if it holds both.

    Args:
        path: safetensors; or a pickled state dict, or the five-element list of a training run of
            Song's code (model, optimiser, epoch, step, averaged weights), or a dict with such a
            state under ``ema`` or ``model``.

    Raises:
        CheckpointError: If the file is missing or damaged, would have to run code, or holds no
            weights.
    """
    check_kind("path", path, (str, os.PathLike), "the path of a file")
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}; give a file of weights.")
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = f"it is damaged or no file of weights ({type(error).__name__})"
        if needs_code(error):
            risk = "reading that would run code out of the file"
            why = f"it holds more than tensors, and {risk}; save its state_dict alone"
        raise CheckpointError(f"{path} cannot be read: {why}.") from shown_cause(error)
    if isinstance(content, (list, tuple)):
        content = content[4] if len(content) == 5 else content[0] if content else None
    content = content if isinstance(content, dict) else {}
    for name in ("ema", "ema_model", "model", "state_dict"):
        if isinstance(content.get(name), dict):
            content = content[name]
            break
    found = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    weights = {name.removeprefix("module."): value for name, value in found.items()}
    if not weights:
        wanted = "a state dict, or a training checkpoint with one, is needed"
        raise CheckpointError(f"{path} holds no weights by name; {wanted}.")
    return weights


def convert(
    state: Mapping[str, Tensor],
    *,
    layout: Layout | None = None,
    sample_size: int | None = None,
    num_heads: int | None = None,
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
    num_train_timesteps: int = 1000,
    beta_schedule: BetaSchedule = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> Converted:
    """Renames a state dict, and makes the configurations of network and scheduler.

    Args:
        state: From :func:`read_state_dict`.
        layout: The layout of the names. Default: the one that the names tell.
        sample_size: Side of the images. Default, for the layout ``ddim`` only: told by where the
            attention is (at 16x16).
        num_heads: Heads of attention of improved-diffusion. Default: 4.
        prediction_type: What the network predicts.
        num_train_timesteps: T. improved-diffusion gives its networks t * 1000 / T; above 1000
            levels every (T / 1000)th is kept, at which that is a whole number.
        beta_schedule: The schedule of training, with beta_start and beta_end. improved-diffusion
            scales both ends of ``linear`` by 1000 / T, and so they are here for its layout.
        beta_start: First beta.
        beta_end: Last beta.

    Raises:
        CheckpointError: If the layout is unknown or has no equal in ``UNet2DModel``, or a weight is
            missing, left over or misshapen.
        DDIMError: If betas do not rise.
    """
    is_state = isinstance(state, Mapping) and all(isinstance(w, Tensor) for w in state.values())
    if not is_state or not state:
        raise wrong_argument(
            "state", "be weights by their names, which read_state_dict gives", state
        )
    layout = layout or tell_layout(state)
    if num_heads is not None and layout != "improved-diffusion":
        raise CheckpointError(
            f"the weights tell the heads of attention in the layout of {layout}; leave out "
            "num_heads (--num-heads)."
        )
    unet, rules = read_architecture(state, layout, num_heads=num_heads or 4)
    unet["sample_size"] = sample_size or unet["sample_size"]
    if unet["sample_size"] is None:
        raise CheckpointError("the weights do not tell the images' size; give it (--sample-size).")
    if beta_start > beta_end:
        raise DDIMError(f"betas must rise; got beta_start {beta_start}, beta_end {beta_end}.")
    renamed: State = {}
    names: dict[str, str] = {}
    for key, weight in state.items():
        for target, tensor in rename(key, weight, rules).items():
            renamed[target], names[target] = tensor, key
    if layout == "improved-diffusion" and beta_schedule == "linear":
        # Its get_named_beta_schedule keeps the sum of the betas for every T.
        scale = _MOST_LEVELS / num_train_timesteps
        beta_start, beta_end = scale * beta_start, scale * beta_end
    named: dict[str, Any] = {
        **{"beta_schedule": beta_schedule, "beta_start": beta_start, "beta_end": beta_end},
        "num_train_timesteps": num_train_timesteps,
    }
    betas = spelled_betas(named)
    if layout == "improved-diffusion" and num_train_timesteps != _MOST_LEVELS:
        betas = _thin(configured_betas(named)).tolist()
    if betas is not None:
        named = {"trained_betas": betas, "num_train_timesteps": len(betas)}
    others = {name: PIXEL_MODEL[name] for name in ("clip_sample", "timestep_spacing")}
    scheduler = {"prediction_type": prediction_type, **others, **named}
    return Converted(layout, unet, scheduler, renamed, names)


def refuse_existing(out: Path) -> None:
    """Refuses, with a CheckpointError, to write over a folder that is there."""
    if out.exists():
        raise CheckpointError(f"{out} is there already, and is not overwritten; give another name.")


def write_model(converted: Converted, out: Path) -> None:
    """Writes a folder that plain diffusers opens as a ``DDIMPipeline``, whole or not at all.

    Raises:
        CheckpointError: If the folder exists, or weights and architecture do not fit; the message
            names the weight.
    """
    import diffusers

    refuse_existing(out)
    check_finite("the checkpoint", {converted.names[k]: w for k, w in converted.state.items()})
    network = diffusers.UNet2DModel(**converted.unet)
    _check(converted, network.state_dict())
    network.load_state_dict(converted.state)
    scheduler = diffusers.DDIMScheduler(**converted.scheduler)
    with replacing_folder(out) as unfinished:
        diffusers.DDIMPipeline(network, scheduler).save_pretrained(unfinished)


def _check(converted: Converted, expected: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if a weight is left over, missing, or of another shape."""
    for name, weight in converted.state.items():
        key = converted.names[name]
        if name not in expected:
            other = "the checkpoint is of another architecture"
            raise CheckpointError(f"the weight {key} has no place in a UNet2DModel; {other}.")
        wanted, got = list(expected[name].shape), list(weight.shape)
        if wanted != got:
            raise CheckpointError(f"the weight {key} must have shape {wanted}; got {got}.")
    missing = sorted(set(expected) - set(converted.state))
    if missing:
        lost = f"nothing for {missing[0]} (and {len(missing) - 1} more)"
        raise CheckpointError(f"the checkpoint is not complete: it has {lost}.")


def _thin(betas: Tensor) -> Tensor:
    """Betas of the 1000 levels out of T at which the network's t * 1000 / T is a whole number."""
    if len(betas) % _MOST_LEVELS:
        raise CheckpointError(
            f"improved-diffusion gives its networks t * {_MOST_LEVELS} / T, which at "
            f"T={len(betas)} is too rarely a whole number; only multiples of {_MOST_LEVELS} levels "
            "can be converted."
        )
    table = NoiseSchedule.from_betas(betas).alphas_cumprod[:: len(betas) // _MOST_LEVELS]
    return 1 - table / torch.cat([table.new_ones(1), table[:-1]])
