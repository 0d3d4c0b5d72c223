from pathlib import Path

import diffusers
import pytest
import torch

from ddim.cli import main


def song_checkpoint(path, *, attention=""):
    """Writes a small checkpoint of the authors' layout; returns its network in diffusers'. With
    attention ``Attn`` it says that its images are 16x16."""
    network = diffusers.UNet2DModel(
        block_out_channels=(32,),
        down_block_types=(f"{attention}DownBlock2D",),
        up_block_types=(f"{attention}UpBlock2D",),
        layers_per_block=1,
        attention_head_dim=None,
    )
    names = [
        ("time_embedding.linear_1", "temb.dense.0"),
        ("time_embedding.linear_2", "temb.dense.1"),
        ("conv_norm_out", "norm_out"),
    ]
    names += [
        ("down_blocks.0.resnets", "down.0.block"),
        ("up_blocks.0.resnets", "up.0.block"),
        ("down_blocks.0.attentions", "down.0.attn"),
        ("up_blocks.0.attentions", "up.0.attn"),
        ("time_emb_proj", "temb_proj"),
    ]
    names += [
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0", "mid.attn_1"),
    ]
    names += [
        ("group_norm", "norm"),
        ("to_out.0", "proj_out"),
        ("to_", ""),
        ("conv_shortcut", "nin_shortcut"),
    ]
    state = {}
    for key, weight in network.state_dict().items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        state[key] = weight[:, :, None, None] if "attn" in key and weight.ndim == 2 else weight
    torch.save(state, path)
    return network


def test_a_state_dict_becomes_a_model_that_is_sampled(tmp_path, capsys):
    network = song_checkpoint(tmp_path / "ema.pth")
    out = tmp_path / "model"
    assert (
        main(
            [
                "convert",
                str(tmp_path / "ema.pth"),
                str(out),
                "--sample-size",
                "8",
                "--prediction-type",
                "v_prediction",
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert f"Sample the model with: ddim sample {out}" in told
    assert "as you said, or assumed: v_prediction prediction, linear betas, 1000 levels." in told
    restored = diffusers.UNet2DModel.from_pretrained(out, subfolder="unet").state_dict()
    assert all(torch.equal(weight, restored[key]) for key, weight in network.state_dict().items())
    assert (
        main(
            [
                "sample",
                str(out),
                "--count",
                "1",
                "--steps",
                "2",
                "--out",
                str(tmp_path / "pictures"),
            ]
        )
        == 0
    )
    assert main(["doctor", str(out), "--steps", "50"]) == 0


class Evil:
    def __reduce__(self):
        return (Path("stolen").touch, ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.weight": torch.zeros(1)}, "of no layout that can be converted"),
        (None, "is damaged or no file of weights"),
        (
            {"model": {"conv_in.weight": torch.zeros(1)}, "more": Evil()},
            "reading that would run code out of the file",
        ),
        (
            {
                "temb.dense.0.weight": torch.zeros(1),
                "down.0.block.0.conv1.weight": torch.zeros(7, 3),
            },
            "the weight down.0.block.0.conv1.weight",
        ),
    ],
)
def test_what_cannot_be_converted_is_one_sentence_and_nothing_is_written(
    content, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("x.pth").write_bytes(b"nothing") if content is None else torch.save(content, "x.pth")
    assert main(["convert", "x.pth", "out"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
