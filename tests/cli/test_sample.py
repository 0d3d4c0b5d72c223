import errno
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import edit, on_a_terminal, pixels, record

from ddim import cli
from ddim.cli import main
from ddim.errors import OutputError
from ddim.fitting.timesteps import estimate_eps_mean_square
from ddim.models.checkpoints import weight_hash
from ddim.models.images import load_image
from ddim.pipelines.unconditional import UnconditionalPipeline
from ddim.runs.model import short_name
from ddim.runs.record import IDENTITY, read_run


def sample(model, out, *options):
    """Runs the command in this process with few steps; returns its exit code."""
    steps = () if any(o in ("--steps", "--timesteps") for o in options) else ("--steps", "4")
    return main(["sample", str(model), *steps, "--out", str(out), *map(str, options)])


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != ".shards")


def test_it_writes_pictures_a_grid_and_a_record(tiny, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert sample(tiny, out, "--count", 3, "--seed", 5) == 0
    assert names(out) == ["000005.png", "000006.png", "000007.png", "grid.png", "run.json"]
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    expected = pipe(seeds=[5, 6, 7], num_inference_steps=4, progress=False).images
    for seed, picture in zip((5, 6, 7), expected, strict=True):
        assert np.abs(pixels(out / f"{seed:06d}.png") - np.asarray(picture).astype(int)).max() <= 1
    run = record(out)
    assert set(run) == {
        "protocol",
        "results",
        "seconds",
        "seconds_total",
        "evaluations",
        "execution",
        "versions",
        "files",
    }
    ours = {
        "sampler",
        "timesteps",
        "eta",
        "order",
        "variance",
        "clip",
        "prior",
        "prompt",
        "guidance_scale",
        "dtype",
        "class",
    }
    assert ours | {"command", "weight_hash", "schedule"} <= set(run["protocol"]) & set(IDENTITY)
    assert run["protocol"]["weight_hash"] == weight_hash(tiny)
    assert run["protocol"]["timesteps"] == [999, 749, 499, 249]
    assert run["protocol"]["eta"] == 0
    assert run["protocol"]["clip"] == {"kind": "none"}
    assert run["results"] == [{"seed": s, "file": f"{s:06d}.png"} for s in (5, 6, 7)]
    assert run["evaluations"] == 4
    assert 0 < run["seconds"] < run["seconds_total"]
    assert run["execution"]["count"] == 3
    assert run["execution"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert set(run["versions"]) == {"python", "ddim", "torch", "diffusers", "numpy"}
    told = capsys.readouterr().out
    assert f"3 images drawn; they are in {out}" in told


@pytest.mark.parametrize(
    "options",
    [(), ("--eta", "1"), ("--sampler", "ddpm"), ("--eta", "sigma-hat", "--clip", "dynamic")],
)
def test_a_seed_is_one_picture_whatever_its_batch(options, tiny, tmp_path):
    assert sample(tiny, tmp_path / "a", "--count", 5, *options) == 0
    assert sample(tiny, tmp_path / "b", "--count", 4, "--seed", 1, "--batch-size", 3, *options) == 0
    for seed in range(1, 5):
        assert (
            np.abs(
                pixels(tmp_path / "a" / f"{seed:06d}.png")
                - pixels(tmp_path / "b" / f"{seed:06d}.png")
            ).max()
            <= 1
        )


def test_running_again_draws_what_is_missing(tiny, tmp_path, capsys, monkeypatch):
    assert sample(tiny, tmp_path, "--count", 3) == 0
    first = record(tmp_path)
    (tmp_path / "000001.png").unlink()
    times = {s: (tmp_path / f"{s:06d}.png").stat().st_mtime_ns for s in (0, 2)}
    assert sample(tiny, tmp_path, "--count", 2, "--seed", 1, "--batch-size", 1) == 0
    assert "1 image drawn, 1 was there" in capsys.readouterr().out
    assert {s: (tmp_path / f"{s:06d}.png").stat().st_mtime_ns for s in (0, 2)} == times
    assert [r["seed"] for r in record(tmp_path)["results"]] == [0, 1, 2]
    second = record(tmp_path)
    assert second["protocol"] == first["protocol"]
    assert second["execution"]["drawn"] == 1
    assert sample(tiny, tmp_path, "--count", 3) == 0
    assert "0 images drawn, 3 were there" in capsys.readouterr().out
    assert record(tmp_path) == second


def test_images_that_were_not_asked_for_are_told_and_not_in_the_grid(tiny, tmp_path, capsys):
    assert sample(tiny, tmp_path, "--count", 4) == 0
    assert "are there too" not in capsys.readouterr().out
    assert sample(tiny, tmp_path, "--count", 3, "--seed", 3) == 0
    told = capsys.readouterr().out
    assert "2 images drawn, 1 was there" in told
    assert "grid.png. 3 of other seeds are there too, and not in the grid." in told
    assert sample(tiny, tmp_path / "alone", "--count", 3, "--seed", 3) == 0
    assert (
        np.abs(pixels(tmp_path / "grid.png") - pixels(tmp_path / "alone" / "grid.png")).max() <= 1
    )


def test_times_say_how_many_batches_they_are_of(tiny, tmp_path, capsys):
    assert sample(tiny, tmp_path / "a", "--count", 5, "--batch-size", 2) == 0
    told = re.search(
        r"4 steps in each of 3 batches took ([\d.]+) s, ([\d.]+) ms a step", capsys.readouterr().out
    )
    assert float(told[1]) == pytest.approx(4 * 3 * float(told[2]) / 1000, abs=0.06)
    assert sample(tiny, tmp_path / "b", "--count", 2) == 0
    assert re.search(r"4 steps took [\d.]+ s", capsys.readouterr().out)


@pytest.mark.parametrize("columns", [0, 60])
def test_a_terminal_shows_progress_whether_or_not_it_says_its_width(
    columns, tiny, tmp_path, monkeypatch
):
    with on_a_terminal(monkeypatch, columns=columns) as shown:
        assert sample(tiny, tmp_path, "--count", 4, "--batch-size", 2) == 0
    told = shown()
    assert "0/8 [" in told
    assert "8/8 [" in told


def test_an_interrupted_run_is_gone_on_with(tiny, tmp_path, capsys, monkeypatch):
    from ddim.runs import sample as drawing

    real, written = drawing.save_picture, []

    def interrupt(image, path, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        real(image, path, **options)

    monkeypatch.setattr(drawing, "save_picture", interrupt)
    assert sample(tiny, tmp_path, "--count", 4, "--batch-size", 2) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert names(tmp_path) == ["000000.png", "000001.png", "run.json"]
    monkeypatch.undo()
    assert sample(tiny, tmp_path, "--count", 4) == 0
    assert "2 images drawn, 2 were there" in capsys.readouterr().out
    assert len(record(tmp_path)["results"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--steps", "5"),
            "timesteps is [999, 749, 499, 249] there and [999, 799, ... 199] (5 levels) here",
        ),
        (("--eta", "0.5"), "eta is 0.0 there and 0.5 here"),
        (("--order", "2"), "order is 1 there and 2 here"),
        (
            ("--clip", "static"),
            'clip is {"kind": "none"} there and {"kind": "static", "bound": 1.0} here',
        ),
        (("--dtype", "bfloat16"), 'dtype is "float32" there and "bfloat16" here'),
        (("--spacing", "linspace"), "timesteps is"),
    ],
)
def test_another_protocol_is_refused_with_what_differs(options, message, tiny, tmp_path, capsys):
    assert sample(tiny, tmp_path, "--count", 1) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert sample(tiny, tmp_path, "--count", 2, *options) == 2
    told = capsys.readouterr().err
    assert f"ddim: {tmp_path} holds results of another protocol: " in told
    assert message in told
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_other_weights_or_another_schedule_are_another_protocol(tiny, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    assert sample(model, tmp_path / "out", "--count", 1) == 0
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"linear"', '"squaredcos_cap_v2"'))
    assert sample(model, tmp_path / "out") == 2
    assert "another protocol: schedule is" in capsys.readouterr().err


def test_pictures_without_a_record_are_not_mixed_with(tiny, tmp_path, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "000000.png")
    assert sample(tiny, tmp_path) == 2
    assert (
        "holds files such as 000000.png, and no run.json that says how they were made"
        in capsys.readouterr().err
    )
    assert names(tmp_path) == ["000000.png"]


def test_what_a_run_left_without_a_picture_binds_nobody_but_another_command_does(
    tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(UnconditionalPipeline, "warm_up", interrupted)
    assert sample(tiny, tmp_path, "--steps", 3) == 130
    assert names(tmp_path) == ["run.json"]
    monkeypatch.undo()
    assert sample(tiny, tmp_path, "--steps", 2, "--count", 1) == 0
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace('"command": "sample"', '"command": "reconstruct"'))
    (tmp_path / "000000.png").unlink()
    assert sample(tiny, tmp_path, "--steps", 2, "--count", 1) == 2
    assert (
        'another protocol: command is "reconstruct" there and "sample" here'
        in capsys.readouterr().err
    )


def interrupted(*args):
    raise KeyboardInterrupt


def test_a_damaged_record_is_named(tiny, tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"run\.json is not a record of this program"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"protocol": {}}')
    assert sample(tiny, tmp_path) == 2


def test_timesteps_are_a_list_or_a_file_that_holds_one(tiny, tmp_path):
    assert sample(tiny, tmp_path / "a", "--timesteps", "900,500,3", "--count", 1) == 0
    assert record(tmp_path / "a")["protocol"]["timesteps"] == [900, 500, 3]
    (tmp_path / "levels.json").write_text('{"timesteps": [900, 500, 3]}')
    for file in (tmp_path / "levels.json", tmp_path / "a" / "run.json"):
        assert sample(tiny, tmp_path / "a", "--timesteps", file, "--count", 2) == 0


@pytest.mark.parametrize(
    "content",
    [
        '{"protocol": []}',
        '{"protocol": {}}',
        "{}",
        "[5, 3]",
        '{"timesteps": [5, true]}',
        '{"timesteps": "5"}',
    ],
)
def test_a_file_without_timesteps_is_one_sentence(content, tiny, tmp_path, capsys):
    (tmp_path / "levels.json").write_text(content)
    assert sample(tiny, tmp_path / "a", "--timesteps", tmp_path / "levels.json") == 2
    assert (
        "levels.json must hold a list of whole numbers under the key 'timesteps'."
        in capsys.readouterr().err
    )


def test_the_ddpm_sampler_is_sigma_hat_with_static_clipping(tiny, tmp_path, capsys):
    assert sample(tiny, tmp_path / "a", "--sampler", "ddpm", "--count", 1) == 0
    protocol = record(tmp_path / "a")["protocol"]
    assert (protocol["sampler"], protocol["eta"], protocol["clip"]) == (
        "ddpm",
        "sigma-hat",
        {"kind": "static", "bound": 1.0},
    )
    assert sample(tiny, tmp_path / "b", "--eta", "sigma-hat", "--clip", "static", "--count", 1) == 0
    assert np.array_equal(
        pixels(tmp_path / "a" / "000000.png"), pixels(tmp_path / "b" / "000000.png")
    )
    assert sample(tiny, tmp_path / "c", "--sampler", "ddpm", "--eta", 1) == 2
    assert "--eta acts only with --sampler ddim; give both, or" in capsys.readouterr().err


def test_classes_go_round_the_seeds_unless_one_is_asked_for(tiny, tiny_classes, tmp_path, capsys):
    assert sample(tiny_classes, tmp_path / "all", "--count", 6) == 0
    assert [r["class"] for r in record(tmp_path / "all")["results"]] == [0, 1, 2, 3, 0, 1]
    assert sample(tiny_classes, tmp_path / "one", "--count", 6, "--class", 1) == 0
    assert (
        np.abs(
            pixels(tmp_path / "all" / "000005.png") - pixels(tmp_path / "one" / "000005.png")
        ).max()
        <= 1
    )
    assert not np.array_equal(
        pixels(tmp_path / "all" / "000002.png"), pixels(tmp_path / "one" / "000002.png")
    )
    assert sample(tiny_classes, tmp_path / "x", "--class", 4) == 2
    assert "--class must be from 0 to 3; got 4" in capsys.readouterr().err
    assert sample(tiny, tmp_path / "x", "--class", 1) == 2
    assert "--class has no effect" in capsys.readouterr().err


def test_a_foreign_configuration_is_followed_with_a_note(foreign, tiny, tmp_path, capsys):
    assert sample(foreign, tmp_path / "a", "--count", 1) == 0
    told = capsys.readouterr().out
    assert (
        "note: the model's configuration clips predicted images (static) and starts at level 750, "
        "not at 999; " in told
    )
    assert "--clip none --spacing trailing would not." in told
    assert pixels(tmp_path / "a" / "000000.png").shape == (8, 8, 3)
    assert (
        sample(foreign, tmp_path / "b", "--count", 1, "--clip", "none", "--spacing", "trailing")
        == 0
    )
    assert "note:" not in capsys.readouterr().out
    assert sample(tiny / "unet", tmp_path / "c", "--count", 1) == 0
    assert (
        "comes without a scheduler; it is taken for a model of 1000 linear levels that predicts "
        "epsilon" in capsys.readouterr().out
    )


def test_half_precision_runs_is_recorded_and_told(tiny, tmp_path, capsys):
    assert sample(tiny, tmp_path, "--count", 1, "--dtype", "bfloat16") == 0
    assert record(tmp_path)["protocol"]["dtype"] == "bfloat16"
    said = "grey levels from those in float32; --dtype float32 is the way out."
    assert capsys.readouterr().out.count(said) == 1


def test_the_grid_does_not_grow_without_end(tiny, tmp_path):
    assert sample(tiny, tmp_path, "--count", 70, "--batch-size", 35, "--steps", 1) == 0
    assert len(record(tmp_path)["results"]) == 70
    assert pixels(tmp_path / "grid.png").shape == (12 * (8 * 10 + 2), 12 * (8 * 10 + 2))


def test_the_analytic_variance_is_measured_once_and_draws_noise_at_eta_zero(
    tiny_classes, tmp_path, capsys
):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(10) % 4)
    options = ("--variance", "analytic", "--data", tmp_path / "data.npz", "--clip", "none")
    assert sample(tiny_classes, tmp_path / "a", "--count", 3, *options) == 0
    variance = record(tmp_path / "a")["protocol"]["variance"]
    assert len(variance.pop("hash")) == 16
    assert variance == {"kind": "analytic", "data": str(tmp_path / "data.npz"), "images": 10}
    gamma = json.loads((tmp_path / "a" / "gamma.json").read_text())["gamma"]
    assert list(gamma) == ["999", "749", "499", "249"]
    assert all(0 <= value <= 1 for value in gamma.values())
    assert (
        sample(tiny_classes, tmp_path / "b", "--count", 2, "--seed", 1, "--batch-size", 1, *options)
        == 0
    )
    assert sample(tiny_classes, tmp_path / "c", "--count", 2, "--seed", 1) == 0
    for seed in (1, 2):
        first, same, without = (pixels(tmp_path / name / f"{seed:06d}.png") for name in "abc")
        assert np.abs(first - same).max() <= 1
        assert np.abs(first - without).max() > 1
    (tmp_path / "data.npz").unlink()  # opened before, so the file is asked for again
    assert sample(tiny_classes, tmp_path / "a", "--count", 4, *options) == 2
    assert "there is no data at" in capsys.readouterr().err
    assert sample(tiny_classes, tmp_path / "c", *options[:2]) == 2
    assert (
        "does not say what it was trained on; name images for --variance analytic with --data"
        in capsys.readouterr().err
    )


def test_a_measured_gamma_is_used_again(tiny, tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros((3, 8, 8), np.uint8))
    options = ("--variance", "analytic", "--data", tmp_path / "data.npz")
    assert sample(tiny, tmp_path / "a", "--count", 1, *options) == 0
    path = tmp_path / "a" / "gamma.json"
    before = pixels(tmp_path / "a" / "000000.png")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"gamma": dict.fromkeys(content["gamma"], 0.0)}))
    assert sample(tiny, tmp_path / "a", "--count", 2, *options) == 0
    (tmp_path / "a" / "000000.png").unlink()
    assert sample(tiny, tmp_path / "a", "--count", 1, *options) == 0
    assert (
        np.abs(pixels(tmp_path / "a" / "000000.png") - before).max() > 1
    )  # by the file, which says something else now


def test_the_analytic_variance_is_measured_under_the_clip_of_the_run(foreign, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images)
    pipe = UnconditionalPipeline.from_pretrained(foreign)
    x0 = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    for clip in ("none", "static"):
        out = tmp_path / clip
        options = ("--variance", "analytic", "--data", tmp_path / "data.npz", "--clip", clip)
        options += ("--spacing", "trailing")
        assert sample(foreign, out, "--count", 1, *options) == 0
        content = json.loads((out / "gamma.json").read_text())
        assert content["protocol"]["clip"]["kind"] == clip
        levels, schedule = [999, 749, 499, 249], pipe.noise_schedule
        batch = [(pipe.denoiser(5, clip=clip), x0)]
        expected = estimate_eps_mean_square(batch, levels, schedule=schedule)
        assert [content["gamma"][str(t)] for t in levels] == pytest.approx(list(expected.values()))
    gammas = [json.loads((tmp_path / c / "gamma.json").read_text()) for c in ("none", "static")]
    assert abs(gammas[0]["gamma"]["749"] - gammas[1]["gamma"]["749"]) > 1e-3


def test_the_card_of_a_model_has_no_data_fetched(tiny, tmp_path, capsys, monkeypatch, no_socket):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    monkeypatch.setattr("ddim.data.named.FASHION_MNIST_FOLDER", str(tmp_path / "none"))
    monkeypatch.delenv("DDIM_FASHION_MNIST", raising=False)
    for data in ("owner/set", "fashion-mnist"):
        (model / "card.json").write_text(json.dumps({"config": {"data": data}}))
        assert sample(model, tmp_path / "out", "--variance", "analytic") == 2
        assert f"names {data} as its data, which is not on this machine; give --data {data}" in (
            capsys.readouterr().err
        )


def test_a_gamma_of_other_pictures_of_the_same_folder_is_not_used(tiny, tmp_path, capsys):
    out, data = tmp_path / "out", tmp_path / "data.npz"
    options = ("--count", 1, "--variance", "analytic", "--data", data)
    gammas = []
    for level in (0, 255):
        np.savez(data, images=np.full((3, 8, 8), level, np.uint8))
        assert sample(tiny, out, *options) == 0
        gammas.append(json.loads((out / "gamma.json").read_text())["gamma"])
        (out / "000000.png").unlink()
    assert gammas[0] != gammas[1]
    assert sample(tiny, out, *options) == 0
    np.savez(data, images=np.full((3, 8, 8), 99, np.uint8))
    capsys.readouterr()
    assert sample(tiny, out, "--count", 2, *options[2:]) == 2  # it would mix both in one folder
    assert "variance" in capsys.readouterr().err


def test_fitted_timesteps_of_the_configuration_are_used_at_their_step_count_and_order(
    tiny, tmp_path, capsys
):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    pipe.scheduler.register_to_config(multistep_order=2, fitted_timesteps=[[900, 700, 100]])
    pipe.save_pretrained(tmp_path / "model")
    for options, timesteps, spacing in (
        (("--steps", 3), [900, 700, 100], "fitted"),
        (("--steps", 2), [999, 499], "trailing"),
        (("--steps", 3, "--spacing", "trailing"), [999, 666, 332], "trailing"),
        (("--steps", 3, "--order", 1), [999, 666, 332], "trailing"),
        (("--timesteps", "5,4,3"), [5, 4, 3], None),
    ):
        out = tmp_path / "-".join(map(str, options)).replace("--", "")
        assert sample(tmp_path / "model", out, "--count", 1, *options) == 0
        protocol = record(out)["protocol"]
        assert (protocol["timesteps"], protocol["spacing"]) == (timesteps, spacing)
        assert protocol["order"] == (1 if "--order" in options else 2)
    assert "note:" not in capsys.readouterr().out


def test_the_default_folder_is_of_one_protocol_so_no_two_requests_meet(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for steps, told in (("1", "\n1 step took "), ("2", "\n2 steps took ")):
        assert main(["sample", str(tiny), "--steps", steps, "--count", "1"]) == 0
        said = capsys.readouterr().out
        assert said.startswith("1 image drawn; they are in ")
        assert told in said
    assert main(["sample", str(tiny), "--steps", "1", "--count", "2"]) == 0  # goes on
    assert "1 image drawn, 1 was there" in capsys.readouterr().out
    folders = names(tmp_path / "out")
    assert len(folders) == 2
    assert all(re.fullmatch(r"sample-tiny-[0-9a-f]{8}", name) for name in folders)


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_pictures_keep_the_format_that_their_folder_began_with(kind, tiny, tmp_path, capsys):
    options = ("--count", 2, "--picture", kind)
    assert sample(tiny, tmp_path / "a", *options) == 0
    assert sample(tiny, tmp_path / "a", *options[:1], 3, *options[2:]) == 0
    assert "1 image drawn, 2 were there" in capsys.readouterr().out
    drawn = [f"00000{seed}.{kind}" for seed in range(3)]
    assert names(tmp_path / "a") == [*drawn, f"grid.{kind}", "run.json"]
    assert [row["file"] for row in record(tmp_path / "a")["results"]] == drawn
    with Image.open(tmp_path / "a" / drawn[0]) as picture:
        assert picture.format == {"jpg": "JPEG", "webp": "WEBP"}[kind]
    assert sample(tiny, tmp_path / "a") == 2
    assert f'picture is "{kind}" there and null here' in capsys.readouterr().err
    assert sample(tiny, tmp_path / "b", "--count", 1) == 0
    exact, kept = pixels(tmp_path / "b" / "000000.png"), load_image(tmp_path / "a" / drawn[0])
    assert np.abs(kept.astype(int)[..., 0] - exact).max() <= (0 if kind == "webp" else 20)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("card.json", {"data": {"classes": ["T-shirt", "Shirt", "Bag, purse", "bag"]}}),
        (
            "model_index.json",
            {"id2label": {"1": "Shirt", "0": "T-shirt", "3": "bag", "2": "Bag, purse"}},
        ),
    ],
)
def test_a_class_is_known_by_its_name(file, content, tiny_classes, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_classes, model)
    before = json.loads((model / file).read_text()) if (model / file).exists() else {}
    (model / file).write_text(json.dumps(before | content))
    assert sample(model, out, "--count", 1, "--class", "shirt") == 0
    assert record(out)["protocol"]["class"] == 1
    assert record(out)["results"][0]["class"] == 1
    assert sample(model, out, "--count", 2, "--class", 1) == 0  # goes on
    assert sample(model, tmp_path / "bags", "--count", 1, "--class", "PURSE") == 0
    assert record(tmp_path / "bags")["results"][0]["class"] == 2
    capsys.readouterr()
    for name, told in (
        ("bag", "--class 'bag' means the classes 2 and 3; give the number."),
        ("shrit", "--class must be a number or a name such as 'Shirt', "),
        ("4", "--class must be from 0 to 3; got 4."),
    ):
        assert sample(model, tmp_path / "x", "--class", name) == 2
        assert told in capsys.readouterr().err
    assert sample(tiny_classes, tmp_path / "x", "--class", "shirt") == 2
    assert "does not name its classes; give a number; got 'shirt'." in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_overwriting_starts_anew_and_keeps_what_is_not_listed(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert sample(tiny, out, "--count", 3) == 0
    (out / "mine.txt").write_text("mine")
    assert sample(tiny, out, "--count", 1, "--eta", 1) == 2
    assert "give --overwrite, which deletes those results." in capsys.readouterr().err
    assert sample(tiny, out, "--count", 1, "--eta", 1, "--overwrite") == 0
    assert names(out) == ["000000.png", "grid.png", "mine.txt", "run.json"]
    assert record(out)["protocol"]["eta"] == 1


def test_pictures_of_the_user_are_neither_counted_nor_overwritten(tiny, tmp_path, capsys):
    assert sample(tiny, tmp_path, "--count", 1) == 0
    before = (tmp_path / "000000.png").read_bytes()
    (tmp_path / "000001.png").write_bytes(before)
    (tmp_path / "000009.png").write_bytes(before)
    for options in (("--count", 2), ("--count", 2, "--overwrite")):
        assert sample(tiny, tmp_path, *options) == 2
        assert "does not list it; use another --out" in capsys.readouterr().err
    assert (tmp_path / "000000.png").read_bytes() == before
    (tmp_path / "000001.png").unlink()
    assert sample(tiny, tmp_path, "--count", 2) == 0
    assert [row["seed"] for row in record(tmp_path)["results"]] == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stepz", "3"), "there is no option --stepz; did you mean --steps?"),
        (("--zzz",), "there is no option --zzz; `ddim sample --help` lists the options."),
        (("again",), "there is an argument too many: 'again'"),
        (("--steps",), "--steps needs a value"),
        (("--steps", "many"), "--steps: it must be a whole number; got 'many'."),
        (("--steps", "1001"), "ddim: --steps must be a whole number from 1 to 1000"),
        (("--steps", "0"), "ddim: --steps must be at least 1; got 0."),
        (("--steps", "2", "--timesteps", "5,4"), "--steps has no effect with --timesteps;"),
        (("--count", "0"), "--count must be at least 1; got 0."),
        (("--count", "1000000000000"), "--count must be at most 4294967296; got 1000000000000."),
        (("--batch-size", "-1"), "--batch-size must be at least 1; got -1."),
        (("--seed", "-1"), "--seed must be at least 0; got -1."),
        (("--eta", "-0.5"), "--eta must be from 0 to 100; got -0.5."),
        (("--eta", "3"), "eta=3.0 would draw more noise than the level can hold"),
        (("--eta", "nan"), "--eta must be a finite number; got nan."),
        (("--variance", "learned"), "--variance must be one of eta, analytic; got 'learned'."),
        (
            ("--variance", "analytic", "--order", "2"),
            "the analytic variance draws noise; use order 1",
        ),
        (
            ("--variance", "analytic", "--sampler", "ddpm"),
            "the analytic variance is that of a number eta; got sigma-hat.",
        ),
        (("--variance", "analytic", "--data", "none.npz"), "there is no data at 'none.npz'"),
        (
            ("--data", "digits"),
            "--data acts only with --variance analytic; give both, or leave out --data.",
        ),
        (("--order", "3"), "--order must be one of 1, 2; got '3'."),
        (
            ("--order", "2", "--eta", "1"),
            "order 2 solves the deterministic flow and draws no noise; got eta=1.0",
        ),
        (("--eta", "big"), "--eta: it must be a number or sigma-hat; got 'big'."),
        (("--timesteps", "5,5"), "timesteps must not repeat a level; got 5 twice."),
        (("--timesteps", "4,5"), "timesteps must fall from noise to data; got 5 after 4."),
        (("--timesteps", "1000"), "timesteps must lie in [0, 1000)"),
        (("--timesteps", "5,x"), "--timesteps: it must be a whole number; got 'x'."),
        (("--timesteps", ","), "--timesteps must name at least one value."),
        (("--timesteps", "none.json"), "--timesteps: none.json cannot be read as JSON"),
        (
            ("--spacing", "cubic"),
            "--spacing must be one of leading, linspace, trailing, quadratic; got 'cubic'.",
        ),
        (("--clip", "soft"), "--clip must be one of none, static, dynamic; got 'soft'."),
        (
            ("--device", "abacus"),
            "--device must be auto, or one that torch knows such as cpu or cuda; got 'abacus'.",
        ),
        (("--device", "meta:x"), "--device must be auto"),
        (("--device", "meta"), "--device meta cannot be used here (Cannot copy out of meta tensor"),
        (("--dtype", "float8"), "--dtype must be one of float32, bfloat16, float16; got 'float8'."),
    ],
)
def test_bad_options_are_one_sentence(options, message, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = () if any(o in ("--steps", "--timesteps") for o in options) else ("--steps", "2")
    assert main(["sample", str(tiny), "--out", "out", *steps, *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ddim: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit_are_refused(tiny, tmp_path, capsys):
    def changed(name, path, **keys):
        folder = tmp_path / name
        shutil.copytree(tiny, folder)
        file = folder / path
        edit(file, **keys)
        assert sample(folder, tmp_path / "out") == 2
        return capsys.readouterr().err

    flow = changed(
        "flow", "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"
    )
    assert "is a FlowMatchEulerDiscreteScheduler of a flow-matching model" in flow
    for number, (option, value) in enumerate(
        [
            *[
                ("num_train_timesteps", "1000"),
                ("trained_betas", "abc"),
                ("beta_start", None),
                ("clip_sample", None),
            ],
            *[
                ("prediction_type", None),
                ("timestep_spacing", 3),
                ("steps_offset", "one"),
                ("beta_schedule", 1),
            ],
        ]
    ):
        told = changed(f"malformed{number}", "scheduler/scheduler_config.json", **{option: value})
        assert f"scheduler_config.json cannot be used: {option} must be " in told
        assert told.startswith("ddim: ")
        assert told.count("\n") == 1
    assert (
        "sides are multiples of 2; its configuration's sample_size is 7x7 (width x height)."
        in changed("odd", "unet/config.json", sample_size=7)
    )
    kind = changed("embeddings", "unet/config.json", class_embed_type="identity")
    assert "is conditioned on identity embeddings, not on numbered classes" in kind
    assert "weights and config.json do not fit" in changed(
        "channels", "unet/config.json", in_channels=3
    )
    assert "is a LDMPipeline, which needs more" in changed(
        "ldm", "model_index.json", _class_name="LDMPipeline", vqvae=["diffusers", "VQModel"]
    )
    (tmp_path / "ldm" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 40)
    shutil.copy(tiny / "model_index.json", tmp_path / "ldm")
    assert sample(tmp_path / "ldm", tmp_path / "out") == 2
    assert "is damaged or cut off" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert sample(tiny, tmp_path / "file" / "out") == 2
    assert f"cannot read or write {tmp_path / 'file' / 'out'}" in capsys.readouterr().err
    assert sample(tiny, tmp_path / "file") == 2
    assert "cannot read or write" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_half_written(tiny, tmp_path, capsys, monkeypatch):
    real = Image.Image.save

    def full(self, path, **options):
        real(self, path, **options)
        if "000001" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    assert sample(tiny, tmp_path, "--count", 3) == 2
    assert "No space left on device; nothing is left half-written." in capsys.readouterr().err
    assert names(tmp_path) == ["000000.png", "run.json"]


def test_too_little_memory_says_what_to_do(tiny, tmp_path, capsys, monkeypatch):
    def starve(self, *args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UnconditionalPipeline, "draw", starve)
    assert sample(tiny, tmp_path, "--count", 3) == 2
    assert (
        "cpu has too little memory for 16 images at once; give a smaller --batch-size."
        in capsys.readouterr().err
    )


def test_a_bug_shows_its_traceback(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(UnconditionalPipeline, "warm_up", lambda self, size: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(tiny, tmp_path)


def test_results_are_named_by_their_model():
    for path, name in {
        "fashion-mnist": "fashion-mnist",
        "OWNER/NAME": "NAME",
        "a/my model/": "my-model",
        "runs/shoes/checkpoints/0001200": "shoes-0001200",
        "checkpoints/0001200": "0001200",
        "checkpoints/best": "best",
        "/": "model",
    }.items():
        assert short_name(path) == name


def test_version_and_unknown_commands(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "ddim 0.1.0\n"
    assert main(["fly"]) == 2
    assert (
        capsys.readouterr().err
        == f"ddim: there is no command 'fly'; the commands are {', '.join(cli.COMMANDS)}.\n"
    )


@pytest.mark.slow
def test_as_a_program_it_draws_with_the_embedded_model(tmp_path):
    run = [sys.executable, "-m", "ddim", "sample", "--steps", "2", "--count", "1"]
    result = subprocess.run(
        [*run, "--out", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert result.stderr == ""
    assert pixels(tmp_path / "000000.png").shape == (28, 28)


def test_as_a_program_it_has_exit_codes():
    command = [sys.executable, "-m", "ddim", "fly"]
    bad = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr


def test_a_run_that_was_killed_before_it_told_is_told_of(tiny, tmp_path):
    assert main(["sample", str(tiny), "--steps", "2", "--count", "4", "--out", str(tmp_path)]) == 0
    content = record(tmp_path)
    for kept in (
        [],
        content["results"][2:],
    ):  # killed after its pictures; or two runs at once, of which the last wrote its own only
        (tmp_path / "run.json").write_text(json.dumps({**content, "results": kept}))
        assert (
            main(["sample", str(tiny), "--steps", "2", "--count", "2", "--out", str(tmp_path)]) == 0
        )
        assert record(tmp_path) == content


def test_a_picture_of_another_size_and_a_record_of_nothing_are_named(tiny, tmp_path, capsys):
    call = ["sample", str(tiny), "--steps", "2", "--count", "3", "--out", str(tmp_path)]
    assert main(call) == 0
    Image.new("RGB", (20, 20)).save(tmp_path / "000000.png")
    assert main(call) == 2
    assert (
        "000000.png has another size than the pictures beside it; delete it"
        in capsys.readouterr().err
    )
    (tmp_path / "run.json").write_text(json.dumps({**record(tmp_path), "protocol": []}))
    assert main(call) == 2
    assert "is not a record of this program (its protocol is no object" in capsys.readouterr().err


def test_a_fitted_list_that_is_none_and_a_card_that_says_nothing_are_refused(
    tiny, tmp_path, capsys
):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    path = model / "scheduler" / "scheduler_config.json"
    edit(path, fitted_timesteps=5)
    assert main(["sample", str(model), "--out", str(tmp_path / "a")]) == 2
    assert "fitted_timesteps must be a list of lists of levels" in capsys.readouterr().err
    (model / "card.json").write_text('{"config": 5}')
    assert main(["sample", str(tiny), "--variance", "analytic", "--out", str(tmp_path / "a")]) == 2
    assert "does not say what it was trained on; name images" in capsys.readouterr().err
