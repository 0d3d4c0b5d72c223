"""``ddim convert``: turns a checkpoint of another codebase into a model in diffusers format."""

from pathlib import Path

from ddim.runs.requests import ConvertRequest as Request

__all__ = ["Request", "run"]


def run(request: Request) -> None:
    """Reads, renames, writes, and says how to sample the result."""
    from ddim.cli.terminal import say
    from ddim.files import locked_file
    from ddim.models.conversion import convert, read_state_dict, refuse_existing, write_model

    refuse_existing(Path(request.out))
    converted = convert(
        read_state_dict(Path(request.checkpoint)),
        layout=request.layout,
        sample_size=request.sample_size,
        num_heads=request.num_heads,
        prediction_type=request.prediction_type,
        num_train_timesteps=request.num_train_timesteps,
        beta_schedule=request.beta_schedule,
        beta_start=request.beta_start,
        beta_end=request.beta_end,
    )
    with locked_file(Path(request.out)):
        write_model(converted, Path(request.out))
    count = sum(weight.numel() for weight in converted.state.values())
    unet, levels = converted.unet, converted.scheduler["num_train_timesteps"]
    asked, layout = request.num_train_timesteps, converted.layout
    has_heads = layout == "improved-diffusion"
    heads = f", {request.num_heads or 4} heads of attention" if has_heads else ""
    say(f"{len(converted.state)} tensors, {count} parameters, from the layout of {layout}.")
    say(
        "The weights do not tell the rest, so it is as you said, or assumed: "
        f"{request.prediction_type} prediction, {request.beta_schedule} betas, {asked} "
        f"levels{heads}."
    )
    if levels != asked:
        say(
            f"Every {asked // levels}th level is kept: those at which the network is told a whole "
            "number."
        )
    if unet["out_channels"] == 2 * unet["in_channels"]:
        say("The network predicts a variance too; DDIM does not use it.")
    say(f"Sample the model with: ddim sample {request.out}")
