"""Sides that draw images: this package's pipelines and diffusers', as their users have them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

import ddim
from ddim.pipelines import faster_layers, networks, recording
from ddim.pipelines.networks import mark_loaded
from ddim.pipelines.unconditional import UnconditionalPipeline
from ddim.runs.model import find_device
from sides import Call, Taken

__all__ = ["FOLDER", "MODELS", "our_images", "our_texts", "text_parts", "their_images"]
__all__ += ["their_texts", "wait"]

FOLDER = Path(ddim.__file__).parent / "zoo" / "fashion-mnist"
MODELS = Path(__file__).parent / "configs"
"""Configurations of real models, whose networks are made here with random weights."""


def wait(device: torch.device | str) -> None:
    """Until what was asked of a device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def our_images(
    device: str = "cpu",
    *,
    batch: int = 16,
    compiled: bool = False,
    records: bool = True,
    without: str | None = None,
) -> Call:
    """Images of the embedded model by our pipeline. ``without`` leaves out what acts beyond a walk:
    the freed ``block``, or the faster ``layers``."""
    if without == "block":
        networks._keep_freed_memory = lambda: None
    if without == "layers":
        faster_layers.FASTER.clear()
    find_device(device)  # float32 is computed in float32, as our commands do
    pipe = UnconditionalPipeline.from_pretrained(FOLDER).to(device).record_kernels(records)
    if compiled:
        pipe.compile().warm_up(batch)

    def draw(steps: int, **options: Any) -> None:
        pipe(seeds=range(batch), num_inference_steps=steps, progress=False, **options)
        wait(device)

    return draw


def their_images(
    device: str = "cpu", *, batch: int = 16, compiled: bool = False, channels_last: bool = False
) -> Call:
    """The same by diffusers' pipeline."""
    find_device(device)
    pipe = diffusers.DDIMPipeline.from_pretrained(FOLDER).to(device)
    pipe.set_progress_bar_config(disable=True)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)

    def draw(steps: int) -> None:
        pipe(
            batch_size=batch,
            generator=[torch.Generator().manual_seed(seed) for seed in range(batch)],
            num_inference_steps=steps,
        )
        wait(device)

    if compiled:
        pipe.unet.compile(fullgraph=True)
        draw(1)
    return draw


def text_parts(model: str, device: str, sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The network and the VAE of a real configuration, or of one with other ``sizes``, with random
    weights; prompts come as embeddings."""
    torch.manual_seed(0)
    diffusers.utils.logging.set_verbosity_error()
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    parts: dict[str, Any] = {}
    for name, kind in kinds.items():
        options = {**kind.load_config(MODELS / model / name), **sizes.get(name, {})}
        del options["_diffusers_version"]  # for that of old ones, diffusers changes the size
        with torch.device(device):
            parts[name] = kind.from_config(options).eval().requires_grad_(False)
    config = diffusers.DDIMScheduler.load_config(MODELS / model / "scheduler")
    parts["scheduler"] = diffusers.DDIMScheduler.from_config(config, timestep_spacing="trailing")
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    return {**parts, **dict.fromkeys(names)}


def _texts(kind: Any, model: str, device: str, dtype: str, sizes: Mapping[str, Any]) -> Any:
    parts = text_parts(model, device, sizes)
    pipe = kind(**parts, requires_safety_checker=False).to(device, getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw_texts(pipe: Any, device: str, *, steps: int, images: int, output: str = "pt") -> None:
    shape = (images, 77, pipe.unet.config.cross_attention_dim)
    given = {
        name: torch.zeros(shape, device=device, dtype=pipe.unet.dtype)
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    generator = torch.Generator().manual_seed(0)
    pipe(**given, num_inference_steps=steps, generator=generator, output_type=output)
    wait(device)


def our_texts(
    model: str, device: str, dtype: str, sizes: Mapping[str, Any], *, records: bool = True
) -> Call:
    """Images of embeddings by our pipeline, as if its networks had been loaded from files."""
    pipe = _texts(ddim.TextToImagePipeline, model, device, dtype, sizes)
    mark_loaded(pipe.unet, pipe.vae)
    pipe.record_kernels(records)

    def draw(**options: Any) -> Taken | None:
        _draw_texts(pipe, device, **options)
        return None

    def facts(what: str = "", **options: Any) -> Taken | None:
        if what != "recordings":
            return draw(**options)
        found = recording._recordings.get(pipe.unet)
        held = [] if found is None else [each.nbytes for each in found._kept.values()]
        return Taken(0.0, {"count": len(held), "bytes": sum(held)})

    return facts


def their_texts(
    model: str, device: str, dtype: str, sizes: Mapping[str, Any], *, channels_last: bool = False
) -> Call:
    """The same by diffusers' pipeline."""
    pipe = _texts(diffusers.StableDiffusionPipeline, model, device, dtype, sizes)
    if channels_last:
        for part in (pipe.unet, pipe.vae):
            part.to(memory_format=torch.channels_last)
    return partial(_draw_texts, pipe, device)
