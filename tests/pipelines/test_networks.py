"""Faster networks compute what they computed, but for rounding."""

import copy
import os
import pickle
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import load_file, save_file
from torch import nn

from ddim import DiffusionPipeline, UnconditionalPipeline
from ddim.models.checkpoints import find_model, weight_hash
from ddim.pipelines import faster_layers, networks
from ddim.pipelines.networks import prepare_for_compiling


def specialized(module):
    """A copy in a network that was prepared."""
    network = nn.Sequential(copy.deepcopy(module))
    prepare_for_compiling(network)
    return network[0]


def upsampling(**options):
    """With weights that lie as those of a prepared one, since what lies elsewhere is rounded in
    another order."""
    torch.manual_seed(0)
    return (
        Upsample2D(3, use_conv=True, out_channels=5, **options)
        .double()
        .to(memory_format=torch.channels_last)
    )


def calls_of(owner, name, monkeypatch):
    """What a function that still does its work is called with from now on."""
    calls, true = [], getattr(owner, name)

    def counted(*given, **options):
        calls.append(given)
        return true(*given, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.fixture
def transposed(monkeypatch):
    """The calls of a transposed convolution, which any number of places is worth."""
    monkeypatch.setattr(faster_layers, "PIXELS", 1)
    return calls_of(torch.nn.functional, "conv_transpose2d", monkeypatch)


@pytest.fixture
def attended(monkeypatch):
    """The calls of short attention."""
    return calls_of(faster_layers, "_attend", monkeypatch)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (7, 7), (6, 5)])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"name": "Conv2d_0"}])
def test_upsampling_and_convolution_at_once_are_the_same(size, options, transposed):
    usual, x = upsampling(**options), torch.randn(2, 3, *size, dtype=torch.float64)
    at_once = specialized(usual)
    torch.testing.assert_close(at_once(x), usual(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(at_once(x, (2 * size[0], 2 * size[1])), usual(x), rtol=0, atol=1e-14)
    assert len(transposed) == 2


@pytest.mark.parametrize("places", [32, 33])
def test_few_places_are_upsampled_and_convolved_by_turns(places, transposed, monkeypatch):
    monkeypatch.setattr(faster_layers, "PIXELS", places)
    specialized(upsampling())(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert len(transposed) == (places == 32)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 5, "padding": 2},
        {"norm_type": "ln_norm", "eps": 1e-5, "elementwise_affine": True},
        {"interpolate": False},
    ],
)
def test_other_upsampling_is_left_to_diffusers(options, transposed):
    usual, x = upsampling(**options), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(specialized(usual)(x), usual(x))
    assert transposed == []


def test_another_size_half_precision_and_adapters_are_left_to_diffusers(transposed):
    usual, x = upsampling(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    at_once = specialized(usual)
    assert torch.equal(at_once(x, (7, 9)), usual(x, (7, 9)))
    at_once.conv = nn.Sequential(usual.conv, nn.Tanh())  # as an adapter would stand there
    assert torch.equal(at_once(x), usual(x).tanh())
    half = usual.bfloat16()
    assert torch.equal(specialized(half)(x.bfloat16()), half(x.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            specialized(upsampling().float())(x.float()), upsampling().float()(x.float())
        )
    without = Upsample2D(3)
    assert torch.equal(specialized(without)(x), without(x))
    assert transposed == []


def round_about(conv):
    conv.padding_mode = "circular"


def patched(conv):
    conv._conv_forward = lambda x, weight, bias: torch.nn.functional.conv2d(
        x.abs(), weight, bias, padding=1
    )


def replaced(conv):
    conv.forward = lambda x: x.abs()


def hooked(conv):
    conv.register_forward_hook(lambda conv, given, output: output.abs())


def hooked_before(conv):
    conv.register_forward_pre_hook(lambda conv, given: given[0].abs())


def hooked_backward(conv):
    conv.register_full_backward_hook(lambda conv, given, output: None)


def parametrized(conv):
    nn.utils.parametrizations.weight_norm(conv)
    conv.parametrizations.weight.original0.data.mul_(2)


def strided(conv):
    conv.stride = (2, 2)


@pytest.mark.parametrize(
    "change",
    [round_about, patched, replaced, hooked, hooked_before, hooked_backward, parametrized, strided],
)
def test_a_convolution_that_someone_changed_does_what_they_asked_for(change, transposed):
    usual, x = upsampling(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    at_once, before = specialized(usual), usual(x)
    for module in (usual, at_once):
        change(module.conv)
    assert not torch.equal(usual(x), before) or change is hooked_backward
    assert torch.equal(at_once(x), usual(x))
    assert transposed == []


@pytest.fixture
def normalized(monkeypatch):
    """The calls by which rows are normalized."""
    return calls_of(torch, "addcmul", monkeypatch)


def normalization(groups=4, channels=12, **options):
    """Weights that were trained, and images of 400 places that lie channels-last."""
    torch.manual_seed(0)
    usual = nn.GroupNorm(groups, channels, **options).double()
    for parameter in usual.parameters():
        nn.init.normal_(parameter)
    x = 3 * torch.randn(2**17 // (400 * channels) + 1, channels, 20, 20, dtype=torch.float64) + 5
    return usual, x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("groups", "channels"), [(1, 1), (4, 4), (4, 12), (4, 48), (2, 30)])
def test_rows_of_channels_are_normalized_as_torch_does(groups, channels, normalized):
    usual, x = normalization(groups, channels)
    x = x.requires_grad_()
    by_rows = specialized(usual)
    expected, got = usual(x), by_rows(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert got.stride() == expected.stride()
    expected, got = (
        torch.autograd.grad(y.square().sum(), [x, *m.parameters()])
        for y, m in ((expected, usual), (got, by_rows))
    )
    torch.testing.assert_close(got, expected)
    assert len(normalized) == (channels > 1)  # one channel lies either way, and is torch's


def test_rows_of_large_and_of_equal_numbers_are_normalized_as_exactly_as_torch_does(normalized):
    usual, x = normalization()
    by_rows = specialized(usual.float())
    for given in (x + 1000, torch.full_like(x, 0.1)):
        exact = nn.functional.group_norm(
            given.float().double(), 4, usual.weight.double(), usual.bias.double()
        )
        torchs, ours = ((norm(given.float()) - exact).abs().max() for norm in (usual, by_rows))
        assert ours <= torchs + 1e-6
    assert len(normalized) == 2


@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0, -1e4])
def test_rows_far_from_zero_lose_no_digits(mean, normalized):
    usual, x = normalization()
    given, by_rows = ((x - 5) / 3 + mean).float(), specialized(usual.float())
    weights = usual.weight.double(), usual.bias.double()
    exact = nn.functional.group_norm(given.double(), 4, *weights)
    assert (by_rows(given) - exact).abs().max() < 2e-5
    assert len(normalized) == 1


def test_rows_of_large_equal_numbers_have_no_negative_variance(normalized):
    usual, x = normalization()
    constants = (
        torch.linspace(100, 10_000, len(x))
        .view(-1, 1, 1, 1)
        .expand_as(x)
        .contiguous(memory_format=torch.channels_last)
    )
    assert specialized(usual.float())(constants).isfinite().all()
    assert len(normalized) == 1


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, lambda x: x.contiguous()),
        ({}, lambda x: x[:1]),
        ({}, lambda x: x.flatten(2)),
        (
            {},
            lambda x: x[:, :, :10].repeat(1, 1, 8, 2).contiguous(memory_format=torch.channels_last),
        ),
        ({"affine": False}, lambda x: x),
        ({"channels": 32}, lambda x: x),
        ({"channels": 64}, lambda x: x),
    ],
    ids=[
        "contiguous",
        "few",
        "no image",
        "large images",
        "no weights",
        "8 channels",
        "16 channels",
    ],
)
def test_other_normalization_is_left_to_torch(options, change, normalized):
    usual, x = normalization(**options)
    assert torch.equal(specialized(usual)(change(x)), usual(change(x)))
    assert normalized == []


def test_normalization_in_half_precision_is_left_to_torch(normalized):
    usual, x = normalization()
    half = usual.bfloat16()
    assert torch.equal(specialized(half)(x.bfloat16()), half(x.bfloat16()))
    assert normalized == []


@pytest.mark.parametrize("limit", [16, 15])
@pytest.mark.parametrize("cross", [False, True])
def test_short_attention_is_the_same_by_plain_products(limit, cross, attended, monkeypatch):
    monkeypatch.setattr(faster_layers, "SHORT", limit)
    torch.manual_seed(0)
    usual = Attention(8, cross_attention_dim=6 if cross else None, heads=2, dim_head=4).double()
    x, given = (
        torch.randn(2, 4, 8, dtype=torch.float64),
        torch.randn(2, 4, 6, dtype=torch.float64) if cross else None,
    )
    torch.testing.assert_close(specialized(usual)(x, given), usual(x, given), rtol=0, atol=1e-14)
    assert len(attended) == (limit == 16)


@pytest.mark.parametrize("shape", [(2, 8, 3, 2), (2, 6, 8)], ids=str)
def test_short_attention_of_a_network_has_its_norm_residual_and_scale(shape):
    torch.manual_seed(0)
    options = {
        "norm_num_groups": 2,
        "residual_connection": True,
        "rescale_output_factor": 3.0,
        "bias": True,
        "eps": 1e-5,
    }
    usual, x = (
        Attention(8, heads=2, dim_head=4, **options).double(),
        torch.randn(*shape, dtype=torch.float64),
    )
    torch.testing.assert_close(specialized(usual)(x), usual(x), rtol=0, atol=1e-14)


def test_short_attention_of_large_scores_does_not_overflow():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 8) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x[:, None] for x in (1e3 * q, 1e3 * k, v))
    )[:, 0]
    torch.testing.assert_close(
        faster_layers._attend(1e3 * q, 1e3 * k, v, heads=1), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("cached", [1, 40, 2**20])
def test_scores_of_some_heads_at_a_time_are_the_same(cached, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 4, 8) for _ in range(3))
    expected = faster_layers._attend(q, k, v, heads=2)
    monkeypatch.setattr(faster_layers, "CACHED", cached)
    torch.testing.assert_close(faster_layers._attend(q, k, v, heads=2), expected, rtol=0, atol=1e-6)


def residual(**options):
    torch.manual_seed(0)
    sizes = {"in_channels": 8, "temb_channels": 16, "groups": 2, **options}
    return ResnetBlock2D(**sizes).eval()


def seen_after(layer, found):
    """Has a hook keep what a layer returns."""
    layer.register_forward_hook(lambda *given: found.append(given[-1]))


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"out_channels": 6}, {"conv_shortcut": True}, {"output_scale_factor": 2.0}),
        *({"up": True}, {"down": True}, {"time_embedding_norm": "scale_shift"}),
        *({"skip_time_act": True}, {"temb_channels": None}, {"non_linearity": "gelu"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_block_in_place_computes_the_same_bits(options, dtype):
    usual = residual(**options).to(dtype)
    x, temb = torch.randn(2, 8, 4, 4).to(dtype), torch.randn(2, 16).to(dtype)
    temb = None if usual.time_emb_proj is None else temb
    kept = x.clone()
    with torch.no_grad():
        block = copy.deepcopy(usual)  # its layers are torch's, which round alike
        block.__class__, block.always = faster_layers._InPlaceResnet, True
        assert torch.equal(block(x, temb), usual(x, temb))
    assert torch.equal(x, kept)


def test_a_residual_block_leaves_what_others_hold(monkeypatch):
    """Hooks, adapters and autograd see what they would see of diffusers' block."""
    usual, x, temb = residual(), torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    for name in ("norm1", "conv1", "norm2", "nonlinearity"):
        outputs = []
        for make in (copy.deepcopy, specialized):
            block, found = make(usual), []
            seen_after(getattr(block, name), found)
            with torch.no_grad():
                block(x, temb)
            outputs.append(found)
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    block = specialized(usual)
    block.norm1 = nn.Identity()  # whose output is the block's own input
    with torch.no_grad():
        kept = x.clone()
        block(x, temb)
        assert torch.equal(x, kept)
    block = specialized(usual)
    block(x, temb).sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def other_attention(**options):
    torch.manual_seed(0)
    return Attention(8, heads=2, dim_head=4, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": "layer_norm"},
        {"cross_attention_norm": "layer_norm", "cross_attention_dim": 8},
        {"half": True},
    ],
    ids=str,
)
def test_attention_that_does_more_or_less_exactly_is_left_to_torchs_kernel(options, monkeypatch):
    dtype = torch.bfloat16 if options.get("half") else torch.float32
    options = {name: value for name, value in options.items() if name != "half"}
    usual, x = other_attention(**options).to(dtype), torch.randn(2, 4, 8).to(dtype)
    for norm in (usual.norm_q, usual.norm_k, usual.norm_cross):
        if norm is not None:
            torch.nn.init.normal_(norm.weight)  # one that is passed over would show
    monkeypatch.setattr(faster_layers, "_attend", None)
    given = x.flip(1) if "cross_attention_dim" in options else None
    assert torch.equal(specialized(usual)(x, given), usual(x, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_that_asks_for_float32_is_short_attention_too(dtype, attended):
    usual, x = (
        other_attention(upcast_attention=True, upcast_softmax=True).to(dtype),
        torch.randn(2, 4, 8).to(dtype),
    )
    torch.testing.assert_close(
        specialized(usual)(x), usual(x), rtol=0, atol=10 * torch.finfo(dtype).eps
    )
    assert len(attended) == 1


def test_the_embedded_model_goes_the_shorter_ways_and_computes_the_same(
    attended, normalized, monkeypatch
):
    usual = diffusers.UNet2DModel.from_pretrained(find_model("fashion-mnist") / "unet")
    transposed = calls_of(torch.nn.functional, "conv_transpose2d", monkeypatch)
    torch.manual_seed(0)
    x = torch.randn(16, 1, 28, 28)
    with torch.no_grad():
        laid_out = UnconditionalPipeline.from_pretrained("fashion-mnist").unet
        expected = usual(x, 500)[0]
        networks.prepare_walk(laid_out)
        with networks.acting(laid_out):
            torch.testing.assert_close(laid_out(x, 500)[0], expected, rtol=0, atol=2e-5)
        kinds = [type(module) for module in laid_out.modules()]
        assert len(transposed) == kinds.count(faster_layers._OnceUpsample2D) == 2
        assert (
            len(normalized) == 7
        )  # of 32 and 96 channels at 28 x 28, and of 96 at 14 x 14, in 8 groups
        assert len(attended) == kinds.count(faster_layers._ShortAttention) > 0
        prepare_for_compiling(laid_out)
        torch.testing.assert_close(laid_out(x, 500)[0], expected, rtol=0, atol=2e-5)
    assert len(attended) == 2 * kinds.count(faster_layers._ShortAttention)


def test_attention_keeps_its_mask(caplog):
    usual, x, mask = (
        other_attention().double(),
        torch.randn(2, 4, 8, dtype=torch.float64),
        torch.zeros(2, 1, 4, dtype=torch.float64),
    )
    mask[0, 0, 3] = -1e4
    expected = usual(x, attention_mask=mask)
    assert not torch.equal(expected, usual(x))
    torch.testing.assert_close(
        specialized(usual)(x, attention_mask=mask), expected, rtol=0, atol=1e-14
    )
    assert not caplog.records


def test_attention_keeps_its_spatial_normalization():
    torch.manual_seed(0)
    usual = Attention(32, heads=2, dim_head=16, spatial_norm_dim=6).double()
    x, temb = (
        torch.randn(2, 32, 2, 2, dtype=torch.float64),
        torch.randn(2, 6, 2, 2, dtype=torch.float64),
    )
    expected = usual(x, temb=temb)
    assert not torch.equal(expected, usual(x, temb=temb.flip(0)))
    torch.testing.assert_close(specialized(usual)(x, temb=temb), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, {"mode": "reduce-overhead"}),
        ({"dynamic": False}, {"dynamic": False, "mode": "reduce-overhead"}),
    ]
    + [
        (given, given)
        for given in ({"mode": "default"}, {"backend": "eager"}, {"options": {"freezing": True}})
    ],
)
def test_kernels_are_recorded_on_a_gpu_where_nothing_else_is_asked_for(
    options, asked, tiny, monkeypatch
):
    pipe, calls = UnconditionalPipeline.from_pretrained(tiny), []
    monkeypatch.setattr(UnconditionalPipeline, "_execution_device", torch.device("cuda"))
    monkeypatch.setattr(pipe.unet, "compile", lambda **given: calls.append(given))
    pipe.compile(**options)
    assert calls == [asked]
    copy_if_replayed = {type(m.processor) for m in pipe.unet.modules() if isinstance(m, Attention)}
    assert copy_if_replayed == {AttnProcessor2_0}


class OnAGPU:
    """A tensor that says so."""

    is_cuda, device = True, "cuda"

    def clone(self):
        return "a copy"


def test_outputs_of_compiled_networks_on_a_gpu_are_copied():
    plain, in_place, around, inside = (nn.Linear(1, 1) for _ in range(4))
    in_place.compile(backend="eager")
    around = torch.compile(around, backend="eager")
    inside.forward = torch.compile(inside.forward, backend="eager")
    output = OnAGPU()
    assert networks.copy_if_replayed(output, plain) is output
    assert [
        networks.copy_if_replayed(output, network) for network in (in_place, around, inside)
    ] == ["a copy"] * 3
    here = torch.ones(1)
    assert networks.copy_if_replayed(here, in_place) is here


@pytest.mark.parametrize(
    ("on_a_gpu", "compiled", "evaluations"), [(True, True, 3), (True, False, 1), (False, True, 1)]
)
def test_warming_up_goes_as_far_as_replaying_what_is_recorded(
    on_a_gpu, compiled, evaluations, tiny, monkeypatch
):
    pipe, calls, waited = UnconditionalPipeline.from_pretrained(tiny), [], []
    if compiled:
        pipe.unet.compile(backend="eager")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    pipe._warm_up(lambda x, t: calls.append(t), OnAGPU() if on_a_gpu else torch.zeros(1))
    assert len(calls) == evaluations
    assert waited == ["cuda"] * on_a_gpu


def test_attention_that_someone_replaced_stays(tiny):
    network = diffusers.UNet2DModel.from_pretrained(tiny / "unet")
    mine = AttnProcessor()
    attention = [module for module in network.modules() if isinstance(module, Attention)]
    for module in attention:
        module.set_processor(mine)
    prepare_for_compiling(network)
    assert {module.processor for module in attention} == {mine}


def test_a_prepared_network_keeps_its_images_parameters_and_copies(tiny, tmp_path):
    plain, prepared = (
        diffusers.DDIMPipeline.from_pretrained(tiny),
        UnconditionalPipeline.from_pretrained(tiny),
    )
    assert prepared.compile(backend=lambda graph, inputs: graph.forward) is prepared
    kinds = {type(m) for m in prepared.unet.modules()}
    assert faster_layers._OnceUpsample2D in kinds
    assert Upsample2D not in kinds
    assert faster_layers._ShortAttention in kinds
    assert Attention not in kinds
    assert {type(m.processor) for m in prepared.unet.modules() if isinstance(m, Attention)} == {
        AttnProcessor2_0
    }
    prepare_for_compiling(copy.deepcopy(prepared.unet))  # again, which changes nothing
    assert prepared.unet.state_dict().keys() == plain.unet.state_dict().keys()
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([5, 400, 999])
    for network in (prepared.unet, copy.deepcopy(prepared.unet)):
        with torch.no_grad():
            torch.testing.assert_close(network(x, t)[0], plain.unet(x, t)[0])
    prepared.save_pretrained(tmp_path)
    assert weight_hash(tmp_path) == weight_hash(tiny)


FREED = """
import resource, torch
from ddim import UnconditionalPipeline

pipe, x = UnconditionalPipeline.from_pretrained("fashion-mnist"), torch.zeros(16, 1, 28, 28)
denoise = pipe.denoiser(16)
with torch.no_grad():
    for round in range(12):
        if round == 6:  # the first ones grow the heap
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        denoise(x, 5)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() // 6)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_that_was_freed_is_not_cleared_again_for_each_layer():
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))
    }
    ran = subprocess.run(
        [sys.executable, "-c", FREED], env=environment, check=True, capture_output=True, text=True
    )
    assert (
        int(ran.stdout) < 2**20
    )  # bytes an evaluation; about 20 MiB where nothing is copy_if_replayed


def laid_of(network):
    return [m._laid[3] for m in network.modules() if getattr(m, "_laid", None) is not None]


def test_loaded_weights_stay_contiguous_and_storable_after_a_walk(tiny, tiny_text, tmp_path):
    pipe, text = (
        UnconditionalPipeline.from_pretrained(tiny),
        DiffusionPipeline.from_pretrained(tiny_text),
    )
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    pipe(seeds=[0], num_inference_steps=2, progress=False)
    text("a", seeds=[0], num_inference_steps=2, progress=False)
    for network in (pipe.unet, text.unet, text.vae):
        assert len(laid_of(network)) > 3
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in laid_of(network))
        assert all(weight.is_contiguous() for weight in network.parameters())
        save_file(network.state_dict(), tmp_path / "weights.safetensors")
    stored = load_file(tmp_path / "weights.safetensors")
    assert stored.keys() == text.vae.state_dict().keys()
    after = pipe.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_outside_of_our_walks_a_loaded_network_is_the_plain_one(tiny):
    plain = diffusers.UNet2DModel.from_pretrained(tiny / "unet").eval()
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    x = torch.randn(2, 1, 8, 8)
    pipe(seeds=[0], num_inference_steps=2, progress=False)
    for network in (pipe.unet, copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        with torch.no_grad():
            assert torch.equal(network(x, 5).sample, plain(x, 5).sample)
    for other in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        assert {type(m) for m in other.modules()} == {type(m) for m in plain.modules()}
    pipe.unet(x, 5).sample.sum().backward()
    plain(x, 5).sample.sum().backward()
    for (name, ours), theirs in zip(pipe.unet.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_gradient_goes_through_a_walk_to_the_weights(tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    pipe.denoiser(1)(torch.randn(1, 1, 8, 8), 500).x0.sum().backward()
    assert all(weight.grad is not None for weight in pipe.unet.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: [w.data.mul_(1.5) for w in unet.parameters()],  # which no version tells
        lambda unet: unet.load_state_dict({k: v * 1.5 for k, v in unet.state_dict().items()}),
        lambda unet: unet.to(torch.float64).to(torch.float32).conv_in.weight.data.mul_(2),
        lambda unet: setattr(unet, "conv_in", nn.Conv2d(1, 8, 3, padding=1)),
    ],
)
def test_a_walk_sees_weights_that_changed(change, tiny):
    torch.manual_seed(1)
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    options = {"seeds": [0], "num_inference_steps": 3, "progress": False, "output_type": "pt"}
    before = pipe(**options).images
    change(pipe.unet)
    fresh = UnconditionalPipeline(copy.deepcopy(pipe.unet), pipe.scheduler)
    expected = fresh(**options).images
    torch.testing.assert_close(pipe(**options).images, expected)
    assert (expected - before).abs().max() > 1e-3


def test_a_change_in_mid_walk_is_seen_too(tiny):
    options = {"seeds": [0], "num_inference_steps": 4, "progress": False, "output_type": "pt"}
    images = []
    for given in (None, diffusers.UNet2DModel.from_pretrained(tiny / "unet").eval()):
        pipe = UnconditionalPipeline.from_pretrained(tiny, unet=given)

        def double(state, unet=pipe.unet):
            if state.number == 1:
                with torch.no_grad():
                    unet.conv_in.weight.mul_(2)

        images.append(pipe(callback=double, **options).images)
    torch.testing.assert_close(*images)


def test_two_threads_may_walk_one_network(tiny):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    options = {"num_inference_steps": 5, "progress": False, "output_type": "pt"}
    expected = [pipe(seeds=[seed], **options).images for seed in range(4)]
    fresh = UnconditionalPipeline.from_pretrained(tiny)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: fresh(seeds=[seed], **options).images, range(4)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_given_network_stays_as_it_is(tiny):
    given = diffusers.UNet2DModel.from_pretrained(tiny / "unet")
    kinds = [type(module) for module in given.modules()]
    pipe = UnconditionalPipeline.from_pretrained(tiny, unet=given)
    assert pipe.unet is given
    pipe(seeds=[0], num_inference_steps=2, progress=False)
    assert [type(module) for module in given.modules()] == kinds
