"""``ddim convert``: a checkpoint of another codebase into a model in diffusers format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = ["Command", "defaults", "run"]


@dataclass(frozen=True)
class Command:
    """Converts a checkpoint of ermongroup/ddim or openai/improved-diffusion; no code out of the
    file is run."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A file of weights: safetensors, a state dict, or a training checkpoint (the averaged weights
    are taken)."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the model; it must not exist."""
    layout: Literal["ddim", "improved-diffusion"] | None = None
    """Where the checkpoint is from; by default told by the names of its weights."""
    sample_size: int | None = None
    """Side of the images; by default told by the attention at 16x16, for ddim only."""
    num_heads: int | None = None
    """Heads of attention of improved-diffusion, by default 4."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    """What the network predicts."""
    num_train_timesteps: int = 1000
    """Levels of the noise schedule it was trained with."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = (
        "linear"
    )
    """Noise schedule it was trained with; improved-diffusion's cosine is squaredcos_cap_v2."""
    beta_start: float = 1e-4
    """First beta of linear, scaled_linear and sigmoid."""
    beta_end: float = 0.02
    """Last beta of the same."""


def defaults(arguments: list[str]) -> tuple[None, list[str]]:
    """This command has no presets."""
    return None, arguments


def run(command: Command) -> None:
    """Reads, renames, writes, and says how to sample the result."""
    from ddim.models.conversion import convert, read_state_dict, write_model

    converted = convert(
        read_state_dict(Path(command.checkpoint)),
        layout=command.layout,
        sample_size=command.sample_size,
        num_heads=command.num_heads,
        prediction_type=command.prediction_type,
        num_train_timesteps=command.num_train_timesteps,
        beta_schedule=command.beta_schedule,
        beta_start=command.beta_start,
        beta_end=command.beta_end,
    )
    write_model(converted, Path(command.out))
    count = sum(weight.numel() for weight in converted.state.values())
    unet, levels = converted.unet, converted.scheduler["num_train_timesteps"]
    print(
        f"{len(converted.state)} tensors, {count} parameters, from the layout of "
        f"{converted.layout}."
    )
    heads = (
        f", {command.num_heads or 4} heads of attention"
        if converted.layout == "improved-diffusion"
        else ""
    )
    print(
        "Weights do not tell what follows, so it is as you said, or assumed: "
        f"{command.prediction_type} prediction, "
        f"{command.beta_schedule} betas, {command.num_train_timesteps} levels{heads}."
    )
    if levels != command.num_train_timesteps:
        print(
            f"Every {command.num_train_timesteps // levels}th level is kept: those at which the "
            "network is told a whole number."
        )
    if unet["out_channels"] == 2 * unet["in_channels"]:
        print("The network predicts a variance too; DDIM does not use it.")
    print(f"Sample the model with: ddim sample {command.out}")
