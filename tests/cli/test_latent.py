"""The commands of the latent space: encode and decode, reconstruct, interpolate, consistency."""

import json

import numpy as np
import pytest
from PIL import Image

from ddim.cli import main


def pictures(folder, count=4, size=8, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    return pixels, ",".join(str(folder / f"{i}.png") for i in range(count))


def read(path):
    return np.asarray(Image.open(path))


def record(folder):
    return json.loads((folder / "run.json").read_text())


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("method", ["o-belm", "bdia", "fixed-point", "ddim"])
def test_images_come_back_from_a_file(tiny, tmp_path, method, capsys):
    pixels, files = pictures(tmp_path / "in")
    code, out = tmp_path / "code.safetensors", tmp_path / "out"
    assert run("encode", tiny, "--images", files, "--steps", 20, "--method", method, "--out", code) == 0
    assert "4 images encoded by" in capsys.readouterr().out
    assert run("decode", tiny, "--code", code, "--out", out) == 0
    back = np.stack([read(out / f"{i:06d}.png") for i in range(4)]).astype(int)
    assert np.abs(back - pixels).max() <= {"o-belm": 0, "bdia": 0, "fixed-point": 2, "ddim": 255}[method]
    assert sorted(p.name for p in out.iterdir()) == [*(f"{i:06d}.png" for i in range(4)), "grid.png", "run.json"]
    assert record(out)["protocol"]["data"]["method"] == method
    assert run("decode", tiny, "--code", code, "--out", tmp_path / "other", "--steps", 7) == (2 if method in ("o-belm", "bdia") else 0)


def test_a_data_set_is_encoded_with_its_classes(tiny_classes, tmp_path):
    folder = tmp_path / "in"
    pixels = np.stack([pictures(folder / name, 2, seed=i)[0] for i, name in enumerate("abcd")]).reshape(8, 8, 8)
    code, out = tmp_path / "code.safetensors", tmp_path / "out"
    assert run("encode", tiny_classes, "--data", folder, "--split", "train", "--steps", 3, "--out", code) == 0
    assert run("decode", tiny_classes, "--code", code, "--out", out) == 0
    assert (np.stack([read(out / f"{i:06d}.png") for i in range(8)]) == pixels).all()
    from ddim.codes import load_code

    assert load_code(code).labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_reconstruct_measures_each_method_and_goes_on(tiny, tmp_path, capsys):
    _, _ = pictures(tmp_path / "in", 6)
    options = ["reconstruct", tiny, "--data", tmp_path / "in", "--split", "train", "--count", 6, "--out", tmp_path / "out"]
    assert run(*options, "--steps", "4,8", "--method", "o-belm,ddim", "--batch-size", 4) == 0
    told = capsys.readouterr().out
    assert "4 cells measured, 0 were there" in told
    results = record(tmp_path / "out")["results"]
    assert [(r["method"], r["steps"]) for r in results] == [("o-belm", 4), ("o-belm", 8), ("ddim", 4), ("ddim", 8)]
    assert all(r["mse"] < 1e-12 for r in results[:2])
    assert all(r["mse"] > 1e-6 for r in results[2:])
    assert [r["evaluations"] for r in results] == [4, 8, 4, 8]
    assert run(*options, "--steps", "4,8", "--method", "fixed-point,ddim") == 0
    assert "2 cells measured, 4 were there" in capsys.readouterr().out
    results = record(tmp_path / "out")["results"]
    assert [r["method"] for r in results] == ["o-belm", "o-belm", "fixed-point", "fixed-point", "ddim", "ddim"]
    assert {"residual_max", "unsolved_steps"} <= set(results[2])
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.count("fixed-point") == 2
    assert read(tmp_path / "out" / "sheet.png").shape[1] > 6 * 96
    assert read(tmp_path / "out" / "reconstruction.png").ndim == 3
    assert run(*options, "--steps", "4", "--count", 5) == 2
    assert "holds results of another protocol: data is" in capsys.readouterr().err


def test_a_path_between_seeds_begins_and_ends_at_their_samples(tiny, tmp_path):
    assert run("interpolate", tiny, "--seeds", "3,17", "--count", 5, "--steps", 4, "--out", tmp_path / "path", "--gif") == 0
    assert run("sample", tiny, "--seed", 3, "--count", 1, "--steps", 4, "--out", tmp_path / "a") == 0
    strip = read(tmp_path / "path" / "strip.png")
    scale = 96 // 8
    first = strip[2 * scale : 10 * scale : scale, 2 * scale : 10 * scale : scale].astype(int)
    assert np.abs(first - read(tmp_path / "a" / "000003.png").astype(int)).max() <= 1
    assert strip.shape[:2] == ((8 + 4) * scale, (5 * 10 + 2) * scale)
    run_ = record(tmp_path / "path")
    assert [r["place"] for r in run_["results"]] == list(range(5))
    with Image.open(tmp_path / "path" / "path.gif") as gif:
        assert gif.n_frames > 1


@pytest.mark.parametrize("kind", ["spherical", "linear"])
def test_the_root_mean_square_along_a_path(tiny, tmp_path, kind):
    assert run("interpolate", tiny, "--seeds", "1,2", "--count", 3, "--steps", 2, "--interpolation", kind, "--out", tmp_path / "out") == 0
    first, middle, last = (r["rms"] for r in record(tmp_path / "out")["results"])
    assert middle > 0.9 * min(first, last) if kind == "spherical" else middle < 0.85 * min(first, last)


@pytest.mark.parametrize("method", ["o-belm", "fixed-point"])
def test_a_grid_between_images_has_them_at_its_corners(tiny, tmp_path, method):
    pixels, files = pictures(tmp_path / "in")
    options = ["--grid", "--count", 3, "--steps", 10, "--method", method, "--out", tmp_path / "out"]
    assert run("interpolate", tiny, "--images", files, *options) == 0
    grid, scale = read(tmp_path / "out" / "grid.png"), 96 // 8
    for corner, (row, column) in zip(pixels, [(0, 0), (0, 2), (2, 0), (2, 2)], strict=True):
        top, left = (2 + 10 * row) * scale, (2 + 10 * column) * scale
        found = grid[top : top + 8 * scale : scale, left : left + 8 * scale : scale].astype(int)
        assert np.abs(found - corner).max() <= (0 if method == "o-belm" else 2)


def test_consistency_compares_with_the_longest_trajectory(tiny, tmp_path):
    out = tmp_path / "out"
    assert (
        run("consistency", tiny, "--steps", "50,5,20", "--sampler", "ddim,o-belm,ddim-2", "--count", 3, "--batch-size", 2, "--out", out)
        == 0
    )
    results = record(out)["results"]
    assert [(r["sampler"], r["steps"]) for r in results] == [(s, n) for s in ("ddim", "o-belm", "ddim-2") for n in (5, 20, 50)]
    errors = {(r["sampler"], r["steps"]): r["mse"] for r in results}
    assert errors["ddim", 50] == 0
    assert errors["ddim", 5] > errors["ddim", 20] > 0
    assert (out / "table.md").read_text().count("o-belm") == 3
    assert read(out / "sheet.png").shape[0] > 3 * 96
    assert read(out / "distance.png").ndim == 3


def test_bad_input_is_one_sentence_and_writes_nothing(tiny, tiny_classes, tmp_path, capsys):
    _, files = pictures(tmp_path / "in")
    _, large = pictures(tmp_path / "large", 2, 16)
    first = files.split(",")[0]
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((tmp_path / "in" / "0.png").read_bytes()[:40])
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"")
    out = tmp_path / "out"
    cases = {
        "image 0 is 16x16 and the model's are 8x8; ask for resizing": ["encode", tiny, "--images", large, "--out", out],
        "there is no picture at": ["encode", tiny, "--images", "nowhere.png", "--out", out],
        "is not a picture, or is damaged": ["encode", tiny, "--images", damaged, "--out", out],
        "give images as files (--images a.png,b.png) or as a data set": ["encode", tiny, "--out", out],
        "is there already; use another --out": ["encode", tiny, "--images", first, "--out", there],
        "--count must be at least 1; got 0": ["encode", tiny, "--data", tmp_path / "in", "--count", 0, "--out", out],
        "asks for 9": ["encode", tiny, "--data", tmp_path / "in", "--split", "train", "--count", 9, "--out", out],
        "name the images' class with --class": ["encode", tiny_classes, "--images", first, "--out", out],
        "trained without classes": ["encode", tiny, "--images", first, "--class", 1, "--out", out],
        "--method must be one of o-belm": ["encode", tiny, "--images", first, "--method", "euler", "--out", out],
        "there is no code at": ["decode", tiny, "--code", "nowhere.safetensors", "--out", out],
        "is no code, or is damaged": ["decode", tiny, "--code", there, "--out", out],
        "a path has two ends, and 1 was given": ["interpolate", tiny, "--images", first, "--out", out],
        "a grid has four corners, and 2 were given": ["interpolate", tiny, "--seeds", "1,2", "--grid", "--out", out],
        "as --seeds 3,17 or as --images": ["interpolate", tiny, "--out", out],
        "--count must be at least 2": ["interpolate", tiny, "--seeds", "1,2", "--count", 1, "--out", out],
        "a seed must be a whole number from 0": ["interpolate", tiny, "--seeds", "1,-2", "--out", out],
        "--method must name some of": ["reconstruct", tiny, "--data", tmp_path / "in", "--method", "euler", "--out", out],
        "--sampler must name some of": ["consistency", tiny, "--sampler", "euler", "--out", out],
        "from 1 to 1000": ["consistency", tiny, "--steps", "1001", "--out", out],
        "o-belm is deterministic, and needs eta 0; got eta=1.0": ["sample", tiny, "--sampler", "o-belm", "--eta", 1, "--out", out],
        "o-belm is a solver of its own": ["sample", tiny, "--sampler", "o-belm", "--order", 2, "--out", out],
        "cannot be run backwards through clipping": ["sample", tiny, "--sampler", "bdia", "--clip", "static", "--out", out],
    }
    for sentence, arguments in cases.items():
        assert run(*arguments) == 2, sentence
        error = capsys.readouterr().err
        assert sentence in error, (sentence, error)
        assert error.count("\n") == 1
        assert not out.exists(), sentence


def test_a_code_of_another_model_is_refused(tiny, tmp_path, capsys):
    from tests.conftest import ours, tiny_unet  # noqa: PLC0415

    _, files = pictures(tmp_path / "in")
    code = tmp_path / "code.safetensors"
    assert run("encode", tiny, "--images", files, "--steps", 3, "--out", code) == 0
    import diffusers
    import torch

    network = tiny_unet()
    with torch.no_grad():
        network.conv_in.bias += 0.1
    diffusers.DDIMPipeline(network, ours()).save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert run("decode", tmp_path / "other", "--code", code, "--out", tmp_path / "out") == 2
    assert "made with another network" in capsys.readouterr().err


def test_the_exact_samplers_draw_pictures(tiny, tmp_path):
    for sampler in ("o-belm", "bdia", "edict"):
        assert run("sample", tiny, "--sampler", sampler, "--steps", 20, "--count", 2, "--out", tmp_path / sampler) == 0
        assert record(tmp_path / sampler)["protocol"]["sampler"] == sampler
        assert record(tmp_path / sampler)["evaluations"] == (40 if sampler == "edict" else 20)
