"""Foreign checkpoints: converted weights give the outputs of a network of the foreign layout,
written here from its description."""

import functools
import math
import re
import runpy
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from ddim.configuration import noise_schedule
from ddim.errors import CheckpointError
from ddim.models.conversion import _check, convert, read_state_dict, write_model
from ddim.pipelines.unconditional import UnconditionalPipeline


def embed(t, width, *, cosine_first):
    """Sinusoids of t: sin||cos over (half - 1) as in ddim, or cos||sin over half as in
    improved-diffusion."""
    half = width // 2
    angle = t.float()[:, None] * torch.exp(
        -math.log(10000) * torch.arange(half) / (half if cosine_first else half - 1)
    )
    return torch.cat(
        [angle.cos(), angle.sin()] if cosine_first else [angle.sin(), angle.cos()], dim=1
    )


class Part(nn.Module):
    """A place for modules by name."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def attend(q, k, v):
    """Attention over pixels, [B, C, N]."""
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(q.shape[1]), dim=2)
    return torch.einsum("bnm,bcm->bcn", weights, v)


class SongBlock(nn.Module):
    def __init__(self, ins, outs, told):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, ins, eps=1e-6), nn.GroupNorm(32, outs, eps=1e-6)
        self.conv1, self.conv2 = (
            nn.Conv2d(ins, outs, 3, padding=1),
            nn.Conv2d(outs, outs, 3, padding=1),
        )
        self.temb_proj = nn.Linear(told, outs)
        if ins != outs:
            self.nin_shortcut = nn.Conv2d(ins, outs, 1)

    def forward(self, x, told):
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(told))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SongAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        h = attend(*(layer(h).flatten(2) for layer in (self.q, self.k, self.v)))
        return x + self.proj_out(h.reshape(x.shape))


class Song(nn.Module):
    """The layout of ermongroup/ddim: up.0 is the full resolution, and attention is where the side
    is 16."""

    def __init__(self, multiples, side, *, width=32, blocks=2, channels=3):
        super().__init__()
        widths, told = [width * m for m in multiples], 4 * width
        self.width, self.blocks = width, blocks
        self.temb = Part(dense=nn.ModuleList([nn.Linear(width, told), nn.Linear(told, told)]))
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, ins = [width], width
        for level, outs in enumerate(widths):
            block = nn.ModuleList(
                [SongBlock(ins if i == 0 else outs, outs, told) for i in range(blocks)]
            )
            attn = nn.ModuleList(
                [SongAttention(outs) for _ in range(blocks if side // 2**level == 16 else 0)]
            )
            stage, ins = Part(block=block, attn=attn), outs
            skips += [outs] * blocks
            if level < len(widths) - 1:
                stage.downsample = Part(conv=nn.Conv2d(outs, outs, 3, stride=2))
                skips.append(outs)
            self.down.append(stage)
        self.mid = Part(
            block_1=SongBlock(ins, ins, told),
            attn_1=SongAttention(ins),
            block_2=SongBlock(ins, ins, told),
        )
        for level, outs in reversed(list(enumerate(widths))):
            block, attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks + 1):
                block.append(SongBlock(ins + skips.pop(), outs, told))
                ins = outs
            if side // 2**level == 16:
                attn.extend([SongAttention(outs) for _ in range(blocks + 1)])
            stage = Part(block=block, attn=attn)
            if level:
                stage.upsample = Part(conv=nn.Conv2d(outs, outs, 3, padding=1))
            self.up.insert(0, stage)
        self.norm_out, self.conv_out = (
            nn.GroupNorm(32, ins, eps=1e-6),
            nn.Conv2d(ins, channels, 3, padding=1),
        )

    def forward(self, x, t):
        told = self.temb.dense[1](
            F.silu(self.temb.dense[0](embed(t, self.width, cosine_first=False)))
        )
        skips = [h := self.conv_in(x)]
        for stage in self.down:
            for i, block in enumerate(stage.block):
                h = block(h, told)
                skips.append(h := stage.attn[i](h) if len(stage.attn) else h)
            if hasattr(stage, "downsample"):
                skips.append(h := stage.downsample.conv(F.pad(h, (0, 1, 0, 1))))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, told)), told)
        for stage in reversed(self.up):
            for i, block in enumerate(stage.block):
                h = block(torch.cat([h, skips.pop()], dim=1), told)
                h = stage.attn[i](h) if len(stage.attn) else h
            if hasattr(stage, "upsample"):
                h = stage.upsample.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))


class OpenBlock(nn.Module):
    def __init__(self, ins, outs, told, scale_shift):
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, ins), nn.SiLU(), nn.Conv2d(ins, outs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(told, 2 * outs if scale_shift else outs)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outs), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outs, outs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)

    def forward(self, x, told):
        h, told = self.in_layers(x), self.emb_layers(told)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + told)
        return self.skip_connection(x) + h


class OpenAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(32, width)
        self.qkv, self.proj_out = nn.Conv1d(width, 3 * width, 1), nn.Conv1d(width, width, 1)

    def forward(self, x, told):
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat)).reshape(len(x) * self.heads, -1, flat.shape[2])
        return (flat + self.proj_out(attend(*qkv.chunk(3, dim=1)).reshape(flat.shape))).reshape(
            x.shape
        )


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x, told):
        return self.op(x)


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x, told):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Open(nn.Module):
    """The layout of openai/improved-diffusion: blocks numbered through, q, k and v of a head in a
    row."""

    def __init__(
        self,
        multiples=(1, 2, 2),
        attended=(1, 2),
        *,
        width=32,
        blocks=2,
        heads=4,
        scale_shift=True,
        classes=None,
        outs=3,
    ):
        super().__init__()
        told, self.width = 4 * width, width

        def residual(ins, made):
            return OpenBlock(ins, made, told, scale_shift)

        self.time_embed = nn.Sequential(nn.Linear(width, told), nn.SiLU(), nn.Linear(told, told))
        self.label_emb = nn.Embedding(classes, told) if classes else None
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, width, 3, padding=1)])])
        skips, now = [width], width
        for level, multiple in enumerate(multiples):
            for _ in range(blocks):
                layers = [residual(now, width * multiple)]
                now = width * multiple
                self.input_blocks.append(
                    nn.ModuleList(
                        [*layers, *([OpenAttention(now, heads)] if level in attended else [])]
                    )
                )
                skips.append(now)
            if level < len(multiples) - 1:
                self.input_blocks.append(nn.ModuleList([Down(now)]))
                skips.append(now)
        self.middle_block = nn.ModuleList(
            [residual(now, now), OpenAttention(now, heads), residual(now, now)]
        )
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(multiples))):
            for i in range(blocks + 1):
                layers = [residual(now + skips.pop(), width * multiple)]
                now = width * multiple
                layers += [OpenAttention(now, heads)] if level in attended else []
                self.output_blocks.append(
                    nn.ModuleList([*layers, *([Up(now)] if level and i == blocks else [])])
                )
        self.out = nn.Sequential(
            nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, outs, 3, padding=1)
        )

    def forward(self, x, t, labels=None):
        told = self.time_embed(embed(t, self.width, cosine_first=True))
        told = told if labels is None else told + self.label_emb(labels)
        skips = [h := self.input_blocks[0][0](x)]
        for block in self.input_blocks[1:]:
            for layer in block:
                h = layer(h, told)
            skips.append(h)
        for layer in self.middle_block:
            h = layer(h, told)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            for layer in block:
                h = layer(h, told)
        return self.out(h)


def randomised(network):
    """Weights of which each matters: norms away from 1 and 0 too."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += (
            0.1
            * torch.randn(parameter.shape, generator=generator)
            * (1 if parameter.ndim == 1 else parameter.std())
        )
    return network.eval()


def built(converted):
    network = diffusers.UNet2DModel(**converted.unet)
    network.load_state_dict(converted.state)
    return network.eval()


@torch.no_grad()
def difference(theirs, ours, size, *labels):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 871])
    expected = theirs(x, t, *labels)
    got = ours(x, t, *labels).sample
    assert expected.std() > 0.05
    return float((got - expected).abs().max() / expected.abs().max())


def outputs_of_layers(network, names, call):
    """What each of the named layers returns in one call."""
    kept = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: kept.update({name: output})
        )
        for name in names
    ]
    call(network)
    for hook in hooks:
        hook.remove()
    return kept


@torch.no_grad()
def worst_layer(theirs, converted, size):
    """The largest relative difference between the outputs of a layer in both networks, over all
    that hold weights but joint q, k, v."""
    pairs = {
        ours.rpartition(".")[0]: weight.rpartition(".")[0]
        for ours, weight in converted.names.items()
        if ".qkv." not in weight
    }
    x, t = (
        torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)),
        torch.tensor([3, 871]),
    )
    expected = outputs_of_layers(theirs, pairs.values(), lambda network: network(x, t))
    got = outputs_of_layers(built(converted), pairs, lambda network: network(x, t))
    assert len(got) == len(pairs) > 30
    errors = {}
    for ours, name in pairs.items():
        there, here = expected[name], got[ours]
        # Attention is over pixels: [B, C, N] or [B, N, C].
        forms = (
            [there]
            if there.ndim < 3
            else [there, there.flatten(2), there.flatten(2).transpose(1, 2)]
        )
        errors[name] = min(
            float((form - here).abs().max() / form.abs().max())
            for form in forms
            if form.shape == here.shape
        )
    return max(errors.items(), key=lambda item: item[1])


# Multiples of the published configurations; at the size that the attention implies, but for LSUN's
# 256, which would take long.
@pytest.mark.parametrize(
    ("multiples", "side"),
    [((1, 2, 2, 2), 32), ((1, 2, 2, 2, 4), 64), ((1, 1, 2, 2, 4, 4), 256)],
    ids=["cifar10", "celeba", "lsun"],
)
def test_a_network_of_songs_layout_gives_the_same_outputs(multiples, side):
    theirs = randomised(Song(multiples, side))
    converted = convert(theirs.state_dict())
    assert converted.layout == "ddim"
    assert converted.unet["sample_size"] == side
    assert difference(theirs, built(converted), min(side, 64)) < 1e-5
    name, error = worst_layer(theirs, converted, min(side, 64))
    assert error < 1e-5, name


@pytest.mark.slow
def test_the_cifar10_network_at_its_published_width_gives_the_same_outputs():
    theirs = randomised(Song((1, 2, 2, 2), 32, width=128))
    assert difference(theirs, built(convert(theirs.state_dict())), 32) < 1e-5


@pytest.mark.parametrize(
    ("multiples", "side", "tensors", "parameters"),
    [
        pytest.param((1, 2, 2, 2), 32, 328, 35_746_307, id="cifar10"),
        pytest.param((1, 2, 2, 2, 4), 64, 390, 78_700_803, id="celeba"),
        pytest.param((1, 1, 2, 2, 4, 4), 256, 450, 113_673_219, id="bedroom and church"),
    ],
)
def test_the_published_networks_have_their_known_sizes(multiples, side, tensors, parameters):
    with torch.device("meta"):
        state = Song(multiples, side, width=128).state_dict()
    assert len(state) == tensors
    assert sum(weight.numel() for weight in state.values()) == parameters
    converted = convert(state)
    with torch.device("meta"):
        expected = diffusers.UNet2DModel(**converted.unet).state_dict()
    assert {name: weight.shape for name, weight in converted.state.items()} == {
        name: weight.shape for name, weight in expected.items()
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_shift": False},
        {"heads": 1, "multiples": (1, 2, 3)},
        {"multiples": (1, 2), "attended": (), "blocks": 1},
        {"outs": 6},
    ],
    ids=str,
)
def test_a_network_of_improved_diffusion_gives_the_same_outputs(options):
    theirs = randomised(Open(**options))
    converted = convert(theirs.state_dict(), sample_size=16, num_heads=options.get("heads"))
    assert converted.layout == "improved-diffusion"
    assert difference(theirs, built(converted), 16) < 1e-5
    name, error = worst_layer(theirs, converted, 16)
    assert error < 1e-5, name


def test_classes_of_improved_diffusion_are_kept():
    theirs = randomised(Open(classes=5))
    converted = convert(theirs.state_dict(), sample_size=16)
    assert difference(theirs, built(converted), 16, torch.tensor([0, 4])) < 1e-5


def named_betas_of_improved_diffusion(name, count):
    """``get_named_beta_schedule`` of improved-diffusion's ``gaussian_diffusion.py``."""
    if name == "linear":
        scale = 1000 / count
        return np.linspace(scale * 0.0001, scale * 0.02, count, dtype=np.float64)

    def alpha_bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - alpha_bar((i + 1) / count) / alpha_bar(i / count) for i in range(count)]
    return np.minimum(betas, 0.999)


@pytest.mark.parametrize("count", [1000, 2000, 4000])
@pytest.mark.parametrize(("ours", "theirs"), [("linear",) * 2, ("squaredcos_cap_v2", "cosine")])
def test_the_named_schedules_are_those_of_improved_diffusion(ours, theirs, count):
    """Of T levels those are kept that the network is told as whole numbers, t * 1000 / T."""
    converted = convert(
        Open().state_dict(), sample_size=16, num_train_timesteps=count, beta_schedule=ours
    )
    assert converted.scheduler["num_train_timesteps"] == 1000
    full = np.cumprod(1 - named_betas_of_improved_diffusion(theirs, count))
    found = noise_schedule(converted.scheduler).alphas_cumprod
    np.testing.assert_allclose(found, full[:: count // 1000], rtol=1e-9)


def test_song_and_ho_do_not_scale_linear_betas():
    converted = convert(Song((1, 2), 32).state_dict(), num_train_timesteps=500)
    assert (converted.scheduler["beta_start"], converted.scheduler["beta_end"]) == (1e-4, 0.02)


def test_levels_that_the_network_is_not_told_whole_are_refused():
    state = Open().state_dict()
    with pytest.raises(CheckpointError, match="only multiples of 1000 levels"):
        convert(state, sample_size=16, num_train_timesteps=1500)


@pytest.mark.parametrize("number", ["1000000000", "9" * 5000])
def test_numbers_of_blocks_are_bounded(number):
    for name in (f"down.{number}.block.0.conv1.weight", f"down.0.block.{number}.conv1.weight"):
        with pytest.raises(CheckpointError, match="the weights are numbered up to [19][09]{9}"):
            convert(Song((1, 2), 32).state_dict() | {name: torch.zeros(1)})
    state = Open().state_dict() | {f"input_blocks.{number}.0.op.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="the weights are numbered up to"):
        convert(state, sample_size=16)


def test_options_that_have_no_equal_are_refused():
    with pytest.raises(CheckpointError, match=r"4 heads of attention at \[64, 96\] channels"):
        convert(Open((1, 2, 3)).state_dict(), sample_size=16)
    with pytest.raises(CheckpointError, match="do not tell the images' size"):
        convert(Open().state_dict())
    averaging = {k: v for k, v in Song((1, 2), 32).state_dict().items() if "downsample" not in k}
    with pytest.raises(CheckpointError, match="resamp_with_conv=False"):
        convert(averaging)
    pooled = {k: v for k, v in Open().state_dict().items() if ".op." not in k} | {
        "input_blocks.3.0.other": torch.zeros(1)
    }
    with pytest.raises(
        CheckpointError,
        match=r"input_blocks.3 is neither a residual block nor a strided convolution",
    ):
        convert(pooled, sample_size=16)
    halving = Open().state_dict() | {
        "input_blocks.3.0.in_layers.2.weight": torch.zeros(64, 32, 3, 3)
    }
    with pytest.raises(
        CheckpointError, match=r"input_blocks.3 is 64 wide on a level of 32: .* \(resblock_updown\)"
    ):
        convert(halving, sample_size=16)
    with pytest.raises(
        CheckpointError,
        match="network of denoising-diffusion-pytorch, whose blocks normalise after",
    ):
        convert(
            {
                "model.init_conv.weight": torch.zeros(1),
                "model.mid_attn.to_qkv.weight": torch.zeros(1),
            }
        )
    with pytest.raises(CheckpointError, match="of no layout that can be converted"):
        convert({"layer.weight": torch.zeros(1)})


@pytest.fixture(scope="module")
def song():
    return randomised(Song((1, 2), 32, blocks=1))


def test_averaged_weights_are_preferred_and_every_container_is_read(song, tmp_path):
    averaged = song.state_dict()
    raw = {f"module.{k}": v + 1 for k, v in averaged.items()}
    optimizer = torch.optim.Adam(song.parameters()).state_dict()
    for name, content in {
        "list": [raw, optimizer, 3, 100, averaged],
        "plain": averaged,
        "dict": {"step": 1, "ema": averaged},
    }.items():
        torch.save(content, tmp_path / f"{name}.pth")
        got = read_state_dict(tmp_path / f"{name}.pth")
        assert set(got) == set(averaged)
        assert all(torch.equal(got[k], averaged[k]) for k in averaged)
    torch.save([raw, optimizer, 3, 100], tmp_path / "raw.pth")
    assert torch.equal(
        read_state_dict(tmp_path / "raw.pth")["conv_in.bias"], averaged["conv_in.bias"] + 1
    )
    safetensors.torch.save_file(averaged, tmp_path / "x.safetensors")
    assert set(read_state_dict(tmp_path / "x.safetensors")) == set(averaged)


class Evil:
    def __reduce__(self):
        return (Path("stolen").touch, ())


def test_code_in_a_checkpoint_is_not_run_and_damage_is_told(song, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": song.state_dict(), "more": Evil()}, "evil.pth")
    with pytest.raises(CheckpointError, match="reading that would run code out of the file"):
        read_state_dict(Path("evil.pth"))
    assert not Path("stolen").exists()
    Path("cut.safetensors").write_bytes(b"12345")
    torch.save(song.state_dict(), "whole.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:5000])
    torch.save({"step": 3}, "empty.pth")
    for name, message in [
        ("cut.safetensors", "is damaged or no file of weights"),
        ("cut.pth", "is damaged or no file of weights"),
        ("empty.pth", "holds no weights by name"),
        ("none.pth", "there is no checkpoint at"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_state_dict(Path(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mid.block_1.conv1.weight": torch.zeros(2, 2)},
            r"the weight mid.block_1.conv1.weight must have shape \[64, 64, 3, 3\]; got \[2, 2\]",
        ),
        (
            {"down.0.block.0.conv1.weight": torch.zeros(31, 2)},
            (
                r"the weight down.0.block.0.conv1.weight must have a multiple of 32 rows, .*; got "
                r"\[31, 2\]"
            ),
        ),
        (
            {"conv_in.weight": torch.zeros(3)},
            r"the weight conv_in.weight must have more than 1 dimensions",
        ),
        ({"extra.weight": torch.zeros(1)}, "the weight extra.weight has no place in a UNet2DModel"),
        (
            {"conv_in.bias": torch.full((64,), float("nan"))},
            r"the weight conv_in\.bias of the checkpoint is NaN or infinite in torch\.float32",
        ),
        ({"conv_out.bias": None}, "it has nothing for conv_out.bias"),
        ({"conv_out.weight": None}, "it has no conv_out.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_written(change, message, song, tmp_path):
    state = {k: v for k, v in (song.state_dict() | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        write_model(convert(state), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def check(state, options):
    converted = convert(state, **options)
    _check(converted, shapes_of(tuple(converted.unet.items())))


@functools.cache
def shapes_of(unet):
    with torch.device("meta"):
        return diffusers.UNet2DModel(**dict(unet)).state_dict()


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (Song((1, 2), 32, blocks=1), {}),
        (Open((1, 2), (1,), blocks=1, classes=5), {"sample_size": 16}),
    ],
)
def test_a_weight_of_the_wrong_shape_is_named_whichever_it_is(network, options):
    state = network.state_dict()
    for key, weight in state.items():
        for shape in [
            (),
            (7, 3),
            (*weight.shape, 2),
            (weight.shape[0], *(size + 1 for size in weight.shape[1:]), 1),
        ]:
            with pytest.raises(CheckpointError, match=rf"the weight {re.escape(key)} must have"):
                check(state | {key: torch.zeros(shape)}, options)


def test_what_is_written_is_sampled_and_never_overwritten(song, tmp_path):
    write_model(
        convert(song.state_dict(), prediction_type="v_prediction"), tmp_path / "deep" / "out"
    )
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    pipe = UnconditionalPipeline.from_pretrained(tmp_path / "deep" / "out")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert len(pipe(seeds=[0], num_inference_steps=2, progress=False).images) == 1
    with pytest.raises(CheckpointError, match="is there already, and is not overwritten"):
        write_model(convert(song.state_dict()), tmp_path / "deep" / "out")


def test_the_example_of_an_adapter_runs():
    path = Path(__file__).parents[2] / "examples" / "60_any_module.py"
    assert len(path.read_text().splitlines()) < 60
    images = runpy.run_path(str(path))["main"]()
    assert images.shape == (4, 3, 16, 16)
    assert torch.isfinite(images).all()
