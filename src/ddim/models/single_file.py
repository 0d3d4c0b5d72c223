"""What a checkpoint in a single file declares in its header; no weights are read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddim.errors import CheckpointError, first_line

__all__ = ["Declaration", "read_declaration"]

_PICKLED = (".ckpt", ".pt", ".pth", ".bin")
# What diffusers' from_single_file makes of such a file, whatever it declares.
_MADE: dict[str, Any] = {
    **{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085},
    **{"beta_end": 0.012, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    **{"prediction_type": "epsilon", "timestep_spacing": "leading"},
}
_FOREIGN = {
    "edm_vpred.sigma_max": "EDMDPMSolverMultistepScheduler",
    "edm_mean": "EDMDPMSolverMultistepScheduler",
    "double_blocks.": "FlowMatchEulerDiscreteScheduler",
    "joint_blocks.": "FlowMatchEulerDiscreteScheduler",
}
"""The schedulers of other families, by a part of a weight's name."""


@dataclass(frozen=True)
class Declaration:
    """What a file says.

    Attributes:
        config: The scheduler's configuration that diffusers makes for the file.
        training: That of the schedule that the file declares; None if it declares nothing.
        message: A sentence about both.
    """

    config: dict[str, Any]
    training: dict[str, Any] | None
    message: str


def read_declaration(path: Path) -> Declaration | None:
    """Reads the header of a single-file checkpoint; None for a file of another kind.

    Raises:
        CheckpointError: If the file is pickled, damaged, or holds no diffusion model.
    """
    if path.suffix in _PICKLED:
        raise CheckpointError(
            f"{path} is a pickled file, which says nothing without being run; give a safetensors "
            "file, the model's folder, or its scheduler_config.json."
        )
    if path.suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return _declaration(path, list(file.keys()), file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or cut off ({first_line(error)}); copy or download it again."
        ) from error


def _declaration(path: Path, names: Collection[str], metadata: Mapping[str, str]) -> Declaration:
    for part, kind in _FOREIGN.items():
        if any(part in name for name in names):
            return Declaration({"_class_name": kind}, None, f"Its weights are those of a {kind}.")
    said: dict[str, Any] = {}
    marks = []
    for key, option, value in (
        ("v_pred", "prediction_type", "v_prediction"),
        ("ztsnr", "rescale_betas_zero_snr", True),
    ):
        if key in names or metadata.get(key, "false").lower() not in ("false", "0"):
            said[option] = value
            marks.append(key)
    kinds = {"v": "v_prediction", "epsilon": "epsilon"}
    if (stated := kinds.get(metadata.get("modelspec.prediction_type", ""))) is not None:
        said.setdefault("prediction_type", stated)
        marks.append("modelspec.prediction_type")
    if metadata.get("ss_zero_terminal_snr") == "True":
        said["rescale_betas_zero_snr"] = True
        marks.append("ss_zero_terminal_snr")
    if not said and not any(name.startswith("model.diffusion_model.") for name in names):
        raise CheckpointError(
            f"{path} holds weights that say nothing of a noise schedule; give the model's folder, "
            "its scheduler_config.json, or a whole checkpoint in a single file."
        )
    if not said:
        none = "The file declares neither a prediction type nor zero terminal SNR"
        return Declaration(_MADE, None, f"{none}: it is taken for Stable Diffusion's epsilon.")
    what = ", ".join(f"{key}={value}" for key, value in said.items())
    told = f"The file declares {what} (in its header: {', '.join(marks)})"
    diffusers = "plain diffusers does not read that, and samples it with epsilon and no rescale"
    return Declaration(_MADE, {**_MADE, **said}, f"{told}; {diffusers}.")
