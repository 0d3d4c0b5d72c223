"""LoRA weights and IP-adapters: loaded by diffusers' own loaders, with the images of diffusers' own
pipelines."""

import diffusers
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from PIL import Image

from ddim.core.noise import make_generators
from ddim.errors import DDIMError
from ddim.pipelines.text_to_image import ImageToImagePipeline, TextToImagePipeline

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # on peft's import

PROMPT = "a red square on a black background"
RED = Image.new("RGB", (16, 16), (255, 0, 0))
KINDS = [
    pytest.param(TextToImagePipeline, diffusers.StableDiffusionPipeline, {}, id="text"),
    pytest.param(
        ImageToImagePipeline,
        diffusers.StableDiffusionImg2ImgPipeline,
        {"image": RED, "strength": 0.6},
        id="image",
    ),
]


def open_both(ours, stock, folder, **parts):
    pipes = ours.from_pretrained(folder, **parts), stock.from_pretrained(folder, **parts)
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def draw(pipe, **options):
    return pipe(
        PROMPT,
        **{
            "num_inference_steps": 4,
            "output_type": "pt",
            "generator": make_generators([0]),
            **options,
        },
    ).images


def assert_alike(ours, theirs, **options):
    """Both pipelines draw the same image, which is returned."""
    image = draw(ours, **options)
    torch.testing.assert_close(image, draw(theirs, **options), rtol=0, atol=1e-5)
    return image


@pytest.fixture(scope="module")
def lora(tiny_text, tmp_path_factory):
    """A file of LoRA weights, not trained, for linear layers and convolutions of the network and
    for the text encoder."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(1)
    pipe, weights = diffusers.StableDiffusionPipeline.from_pretrained(tiny_text), {}
    targets = {
        "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "upsamplers.0.conv"],
        "text_encoder": ["q_proj", "v_proj"],
    }
    for part, names in targets.items():
        module = getattr(pipe, part)
        module.add_adapter(
            LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=names)
        )
        weights[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(
            get_peft_model_state_dict(module)
        )
    folder = tmp_path_factory.mktemp("lora")
    pipe.save_lora_weights(folder, **weights)
    return folder


@pytest.mark.parametrize(("ours", "stock", "more"), KINDS)
def test_lora_weights_are_loaded_scaled_fused_and_taken_off(ours, stock, more, tiny_text, lora):
    pipe, theirs = open_both(ours, stock, tiny_text)
    plain = draw(pipe, **more)
    for each in (pipe, theirs):
        each.load_lora_weights(lora)
    whole = assert_alike(pipe, theirs, **more)
    part = assert_alike(pipe, theirs, cross_attention_kwargs={"scale": 0.3}, **more)
    assert (whole - plain).abs().mean() > (part - plain).abs().mean() > 1e-3
    torch.testing.assert_close(
        draw(pipe, **more), whole, rtol=0, atol=0
    )  # a call's scale is gone after it
    pipe.fuse_lora()
    torch.testing.assert_close(draw(pipe, **more), whole, rtol=0, atol=1e-5)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe, **more), plain, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["before", "after"])
def test_lora_weights_count_in_a_compiled_network(loaded, tiny_text, lora):
    pipe, theirs = open_both(TextToImagePipeline, diffusers.StableDiffusionPipeline, tiny_text)
    theirs.load_lora_weights(lora)
    if loaded == "before":
        pipe.load_lora_weights(lora)
    pipe.compile()
    if loaded == "after":
        draw(pipe)
        pipe.load_lora_weights(lora)
    assert_alike(pipe, theirs)
    assert_alike(pipe, theirs, cross_attention_kwargs={"scale": 0.3})


def ip_adapter(unet):
    """Weights of an IP-adapter for a network, not trained, from image embeddings of 8 numbers to 4
    tokens."""
    generator = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim

    def weight(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    projection = {"proj.weight": weight(4 * width, 8), "proj.bias": weight(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    crossing = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    widths = [unet.get_submodule(name).to_q.out_features for name in crossing]
    keys = {
        f"{2 * i + 1}.to_{kind}_ip.weight": weight(w, width)
        for i, w in enumerate(widths)
        for kind in "kv"
    }
    return {"image_proj": projection, "ip_adapter": keys}


@pytest.mark.parametrize(("ours", "stock", "more"), KINDS)
def test_ip_adapters_are_sampled_by_diffusers_and_told_apart_where_no_image_is_given(
    ours, stock, more, tiny_text
):
    import transformers

    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    encoder = transformers.CLIPVisionModelWithProjection(vision).eval()
    extractor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    pipe, theirs = open_both(
        ours, stock, tiny_text, image_encoder=encoder, feature_extractor=extractor
    )
    plain = draw(pipe, **more)
    for each in (pipe, theirs):
        each.load_ip_adapter(
            ip_adapter(each.unet), subfolder=None, weight_name=None, image_encoder_folder=None
        )
        each.set_ip_adapter_scale(0.7)
    shown = assert_alike(pipe, theirs, ip_adapter_image=RED, **more)
    assert (shown - plain).abs().max() > 1e-3
    embeds = [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))]
    assert_alike(pipe, theirs, ip_adapter_image_embeds=embeds, **more)
    with pytest.raises(
        DDIMError,
        match=(
            r"IP-adapter, which wants an image: give a call ip_adapter_image or .*unload_ip_adapter"
        ),
    ):
        draw(pipe, **more)
    pipe.unload_ip_adapter()
    torch.testing.assert_close(draw(pipe, **more), plain, rtol=0, atol=1e-5)
