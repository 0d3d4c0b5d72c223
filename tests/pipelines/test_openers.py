"""What ddim.DiffusionPipeline takes beside diffusers': its openers, their options, and what our
classes lack."""

import inspect
import re

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import ddim
from ddim.errors import CheckpointError, DDIMError
from ddim.pipelines.base import HUB_OPTIONS, LOADING_OPTIONS
from ddim.pipelines.diffusion_pipeline import DiffusionPipeline
from ddim.pipelines.text_to_image import ImageToImagePipeline, TextToImagePipeline
from ddim.pipelines.unconditional import UnconditionalPipeline
from ddim.scheduler import DDIMScheduler

HALF = torch.bfloat16


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"low_cpu_mem_usage": True},
        {"low_cpu_mem_usage": False},
        {"torch_dtype": {"default": HALF}},
        {"dtype": {"unet": HALF}},
        {"dtype": HALF, "device_map": "cpu"},
        {"disable_mmap": False, "offload_state_dict": False},
    ],
)
def test_options_of_loading_act_as_in_diffusers(options, tiny):
    theirs = diffusers.DDIMPipeline.from_pretrained(tiny, **options)
    ours = DiffusionPipeline.from_pretrained(tiny, **options)
    assert isinstance(ours, DiffusionPipeline)
    assert type(ours.scheduler) is DDIMScheduler
    assert ours.unet.dtype == theirs.unet.dtype
    assert getattr(ours, "hf_device_map", None) == getattr(theirs, "hf_device_map", None)
    for name, weight in theirs.unet.state_dict().items():
        assert torch.equal(ours.unet.state_dict()[name], weight)


def test_a_network_is_taken_with_options_of_loading_too(tiny):
    unet = UnconditionalPipeline.from_pretrained(tiny).unet
    made = DiffusionPipeline.from_pretrained(tiny, unet=unet, device_map="cpu")
    assert made.unet is unet


def test_eps_is_derived_again_where_diffusers_is_asked_for_it(foreign):
    theirs, ours = diffusers.DDIMPipeline.from_pretrained(foreign), DiffusionPipeline
    ours = ours.from_pretrained(foreign)
    options = {"num_inference_steps": 10, "use_clipped_model_output": True}
    generator = torch.Generator().manual_seed(0)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(generator=generator, output_type="np", **options).images
    found = ours(seeds=[0], progress=False, output_type="np", **options).images
    assert abs(found - expected).max() < 1e-4
    with pytest.raises(DDIMError, match="use_clipped_model_output is False; leave it out"):
        ours(use_clipped_model_output=False)
    options |= {"use_clipped_model_output": False, "clip": "none"}
    assert len(ours(progress=False, **options).images) == 1


def test_pipelines_are_made_of_pipelines(tiny_text, tiny):
    pipe = DiffusionPipeline.from_pretrained(tiny_text, dtype=torch.float64)
    control = diffusers.ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(4, 8)
    )
    for given, options, kind in (
        (pipe, {}, TextToImagePipeline),
        (pipe, {"controlnet": control}, diffusers.StableDiffusionControlNetPipeline),
        (ImageToImagePipeline.from_pipe(pipe, dtype=torch.float64), {}, ImageToImagePipeline),
        (
            ImageToImagePipeline.from_pipe(pipe, dtype=torch.float64),
            {"controlnet": control},
            diffusers.StableDiffusionControlNetImg2ImgPipeline,
        ),
        (diffusers.StableDiffusionPipeline(**pipe.components), {}, TextToImagePipeline),
        (DiffusionPipeline.from_pretrained(tiny), {}, UnconditionalPipeline),
    ):
        made = DiffusionPipeline.from_pipe(given, **options)
        assert isinstance(made, kind)
        assert isinstance(made, DiffusionPipeline)
        assert type(made.scheduler) is DDIMScheduler
        assert made.unet is given.unet
        assert made.unet.dtype == (
            torch.float32 if kind is UnconditionalPipeline else torch.float64
        )
    with pytest.raises(DDIMError, match="has no form with a controlnet"):
        DiffusionPipeline.from_pipe(made, controlnet=control)


def test_a_configuration_and_parts_make_the_pipeline_of_its_kind(tiny_text, tiny):
    for folder, kind in ((tiny_text, TextToImagePipeline), (tiny, UnconditionalPipeline)):
        pipe = DiffusionPipeline.from_pretrained(folder)
        config = DiffusionPipeline.load_config(folder)
        made = DiffusionPipeline.from_config(config, **pipe.components)
        assert type(made) is kind
        assert made.unet is pipe.unet
        with pytest.raises(DDIMError, match="does not know the parts scheduler, .*unet"):
            DiffusionPipeline.from_config(config)
        with pytest.raises(DDIMError, match="does not know the class of the pipeline"):
            DiffusionPipeline.from_config(pipe.config, **pipe.components)


def test_a_single_file_is_opened_by_the_kind_of_its_configuration(tiny_text, tmp_path):
    """Parts are given: diffusers translates the names of networks of full size only."""
    pipe, path = DiffusionPipeline.from_pretrained(tiny_text), tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.x": torch.zeros(1)}, path)
    parts = {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder", "tokenizer")}
    made = DiffusionPipeline.from_single_file(path, config=str(tiny_text), **parts)
    assert type(made) is TextToImagePipeline
    assert type(made.scheduler) is DDIMScheduler
    assert made.scheduler.config.beta_end == pipe.scheduler.config.beta_end
    assert made.unet is pipe.unet
    with pytest.raises(CheckpointError, match="cannot be opened as a checkpoint in one file"):
        DiffusionPipeline.from_single_file(tmp_path / "none", config=str(tiny_text))


PAIRS = (
    (diffusers.DiffusionPipeline, DiffusionPipeline),
    (diffusers.DDIMPipeline, UnconditionalPipeline),
    (diffusers.StableDiffusionPipeline, TextToImagePipeline),
    (diffusers.StableDiffusionImg2ImgPipeline, ImageToImagePipeline),
    (diffusers.DDIMScheduler, ddim.DDIMScheduler),
    (diffusers.DDIMInverseScheduler, ddim.DDIMInverseScheduler),
)
ABSENT = {
    # They are passed on to diffusers under ``**options``.
    "save_pretrained": {
        *("safe_serialization", "variant", "max_shard_size", "push_to_hub", "use_flashpack")
    }
}
"""Arguments that are not named in a method of ours, with the reason."""


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=lambda kind: kind.__name__)
def test_what_diffusers_methods_take_ours_take(theirs, ours):
    lacking = {}
    for name in ("__call__", "__init__", *(n for n in dir(theirs) if not n.startswith("_"))):
        method = getattr(theirs, name, None)
        if not inspect.isroutine(method):
            continue
        wanted, given = (inspect.signature(m).parameters for m in (method, getattr(ours, name)))
        is_open = any(p.kind is p.VAR_KEYWORD for p in given.values())
        names = {n for n, p in wanted.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        missing = names - set(given) - ABSENT.get(name, set())
        if missing or not (is_open or all(p.kind is not p.VAR_KEYWORD for p in wanted.values())):
            lacking[name] = missing
    assert lacking == {}


LEFT_OUT = {
    *("custom_pipeline", "custom_revision", "trust_remote_code"),  # other people's pipelines
    *("provider", "sess_options", "provider_options", "use_onnx"),  # of ONNX
    "load_connected_pipeline",  # of combined pipelines
    *("dtype", "torch_dtype"),  # named
}
"""Options of diffusers' ``from_pretrained`` that an unconditional model has no use for."""


def test_every_option_of_loading_is_known_or_left_out_for_a_reason():
    source = inspect.getsource(diffusers.DiffusionPipeline.from_pretrained)
    popped = set(re.findall(r'kwargs\.pop\("(\w+)"', source))
    assert popped - {*HUB_OPTIONS, *LOADING_OPTIONS} == LEFT_OUT
