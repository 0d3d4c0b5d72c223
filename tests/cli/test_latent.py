"""The commands of the latent space: encode and decode, reconstruct, interpolate, consistency."""

import contextlib
import dataclasses
import json
import warnings

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import ours, record, tiny_unet

from ddim.cli import main
from ddim.inversion.code_files import load_code, save_code
from ddim.pipelines.unconditional import UnconditionalPipeline


def pictures(folder, count=4, size=8, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    return pixels, ",".join(str(folder / f"{i}.png") for i in range(count))


def read(path):
    return np.asarray(Image.open(path))


def saved(folder, scheduler=None, **options):
    """A tiny model of its own."""
    diffusers.DDIMPipeline(tiny_unet(**options), scheduler or ours()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def zero_snr(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "zero", ours(rescale_betas_zero_snr=True))


@contextlib.contextmanager
def interrupted(method):
    """Has the user interrupt what a pipeline is asked to do."""

    def stop(*args, **options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnconditionalPipeline, method, stop)
        yield


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("method", ["o-belm", "bdia", "fixed-point", "ddim"])
def test_images_come_back_from_a_file(tiny, tmp_path, method, capsys):
    pixels, files = pictures(tmp_path / "in")
    code, out = tmp_path / "code.safetensors", tmp_path / "out"
    assert (
        run("encode", tiny, "--images", files, "--steps", 20, "--method", method, "--out", code)
        == 0
    )
    assert "4 images encoded by" in capsys.readouterr().out
    assert run("decode", tiny, "--code", code, "--out", out) == 0
    back = np.stack([read(out / f"{i:06d}.png") for i in range(4)]).astype(int)
    assert (
        np.abs(back - pixels).max()
        <= {"o-belm": 0, "bdia": 0, "fixed-point": 2, "ddim": 255}[method]
    )
    assert sorted(p.name for p in out.iterdir()) == [
        *(f"{i:06d}.png" for i in range(4)),
        "grid.png",
        "run.json",
    ]
    assert record(out)["protocol"]["data"]["method"] == method
    assert run("decode", tiny, "--code", code, "--out", tmp_path / "other", "--steps", 7) == (
        2 if method in ("o-belm", "bdia") else 0
    )


def test_a_data_set_is_encoded_with_its_classes(tiny_classes, tmp_path):
    folder = tmp_path / "in"
    pixels = np.stack(
        [pictures(folder / name, 2, seed=i)[0] for i, name in enumerate("abcd")]
    ).reshape(8, 8, 8)
    code, out = tmp_path / "code.safetensors", tmp_path / "out"
    assert (
        run(
            "encode",
            tiny_classes,
            "--data",
            folder,
            "--split",
            "train",
            "--steps",
            3,
            "--out",
            code,
        )
        == 0
    )
    assert run("decode", tiny_classes, "--code", code, "--out", out) == 0
    assert (np.stack([read(out / f"{i:06d}.png") for i in range(8)]) == pixels).all()
    assert load_code(code).labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_seed_and_count_name_the_images_that_are_taken(tiny, tmp_path, capsys):
    pixels, _ = pictures(tmp_path / "in", 6)
    code, out = tmp_path / "code.safetensors", tmp_path / "out"
    data = ("--data", tmp_path / "in", "--split", "train", "--steps", 3)
    assert run("encode", tiny, *data, "--seed", 2, "--count", 3, "--out", code) == 0
    written = json.loads((tmp_path / "code.safetensors.run.json").read_text())
    assert [r["image"] for r in written["results"]] == [2, 3, 4]
    assert run("decode", tiny, "--code", code, "--seed", 1, "--count", 1, "--out", out) == 0
    assert (read(out / "000001.png") == pixels[3]).all()
    assert not (out / "000000.png").exists()
    assert run("decode", tiny, "--code", code, "--seed", 2, "--out", out) == 0
    assert (read(out / "000002.png") == pixels[4]).all()
    assert record(out)["results"] == [{"image": n, "file": f"00000{n}.png"} for n in (1, 2)]
    assert (
        run(
            "reconstruct",
            tiny,
            *data,
            "--seed",
            4,
            "--count",
            2,
            "--method",
            "o-belm",
            "--out",
            tmp_path / "table",
        )
        == 0
    )
    assert "of 2 images of" in (text := (tmp_path / "table" / "table.md").read_text())
    assert "(train, from number 4 on)" in text
    capsys.readouterr()
    for asked, told in (((2, 2), "images 2 to 3"), ((3, None), "image 3")):
        count = () if asked[1] is None else ("--count", asked[1])
        assert (
            run(
                "decode", tiny, "--code", code, "--seed", asked[0], *count, "--out", tmp_path / "no"
            )
            == 2
        )
        assert (
            f"holds 3 images, 0 to 2; --seed and --count ask for {told}." in capsys.readouterr().err
        )


def test_reconstruct_measures_each_method_and_goes_on(tiny, tmp_path, capsys):
    _, _ = pictures(tmp_path / "in", 6)
    options = ["reconstruct", tiny, "--data", tmp_path / "in", "--out", tmp_path / "out", "--count"]
    assert run(*options, 6, "--steps", "4,8", "--method", "o-belm,ddim", "--batch-size", 4) == 0
    told = capsys.readouterr().out
    assert "4 cells measured; the table is" in told
    results = record(tmp_path / "out")["results"]
    assert [(r["method"], r["steps"]) for r in results] == [
        ("o-belm", 4),
        ("o-belm", 8),
        ("ddim", 4),
        ("ddim", 8),
    ]
    assert all(r["mse"] < 1e-12 for r in results[:2])
    assert all(r["mse"] > 1e-6 for r in results[2:])
    assert [r["evaluations"] for r in results] == [4, 8, 4, 8]
    assert run(*options, 6, "--steps", "4,8", "--method", "fixed-point,ddim") == 0
    assert "2 cells measured, 4 were there" in capsys.readouterr().out
    results = record(tmp_path / "out")["results"]
    assert [r["method"] for r in results] == [
        "o-belm",
        "o-belm",
        "fixed-point",
        "fixed-point",
        "ddim",
        "ddim",
    ]
    assert {"residual_max", "unsolved_steps"} <= set(results[2])
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.count("| fixed-point") == 2
    assert "The rows of sheet.png are the originals, then fixed-point, ddim at 4 steps." in text
    assert read(tmp_path / "out" / "sheet.png").shape[1] > 6 * 96
    assert read(tmp_path / "out" / "reconstruction.png").ndim == 3
    assert run(*options, 5, "--steps", "4") == 2
    assert "holds results of another protocol: data is" in capsys.readouterr().err


def test_a_path_between_seeds_begins_and_ends_at_their_samples(tiny, tmp_path):
    assert (
        run(
            "interpolate",
            tiny,
            "--seeds",
            "3,17",
            "--count",
            5,
            "--steps",
            4,
            "--out",
            tmp_path / "path",
            "--gif",
        )
        == 0
    )
    assert (
        run("sample", tiny, "--seed", 3, "--count", 1, "--steps", 4, "--out", tmp_path / "a") == 0
    )
    strip = read(tmp_path / "path" / "strip.png")
    scale = 96 // 8
    labels, side = 36, 8 * scale  # a line for the weights, and one for the path
    first = strip[labels + 2 : labels + 2 + side : scale, 2 : 2 + side : scale, 0].astype(int)
    assert np.abs(first - read(tmp_path / "a" / "000003.png").astype(int)).max() <= 1
    assert strip.shape == (labels + side + 4, 5 * (side + 2) + 4, 3)
    for place in range(5):  # each column under its weight
        assert strip[:18, 2 + place * (side + 2) :][:, :24].min() < 128
    assert strip[18:36, :200].min() < 128
    run_ = record(tmp_path / "path")
    assert [r["place"] for r in run_["results"]] == list(range(5))
    with Image.open(tmp_path / "path" / "path.gif") as gif:
        assert gif.n_frames > 1


@pytest.mark.parametrize("kind", ["spherical", "linear"])
def test_the_root_mean_square_along_a_path(tiny, tmp_path, kind):
    assert (
        run(
            "interpolate",
            tiny,
            "--seeds",
            "1,2",
            "--count",
            3,
            "--steps",
            2,
            "--interpolation",
            kind,
            "--out",
            tmp_path / "out",
        )
        == 0
    )
    first, middle, last = (r["rms"] for r in record(tmp_path / "out")["results"])
    assert (
        middle > 0.9 * min(first, last) if kind == "spherical" else middle < 0.85 * min(first, last)
    )


@pytest.mark.parametrize("method", ["o-belm", "fixed-point"])
def test_a_grid_between_images_has_them_at_its_corners(tiny, tmp_path, method):
    pixels, files = pictures(tmp_path / "in")
    options = ["--grid", "--count", 3, "--steps", 10, "--method", method, "--out", tmp_path / "out"]
    assert run("interpolate", tiny, "--images", files, *options) == 0
    grid, scale = read(tmp_path / "out" / "grid.png"), 96 // 8
    for corner, (row, column) in zip(pixels, [(0, 0), (0, 2), (2, 0), (2, 2)], strict=True):
        side = 8 * scale
        top, left = 36 + row * (side + 4 + 18) + 2, 2 + column * (side + 2)
        found = grid[top : top + side : scale, left : left + side : scale, 0].astype(int)
        assert np.abs(found - corner).max() <= (0 if method == "o-belm" else 2)


def test_consistency_compares_with_the_longest_trajectory(tiny, tmp_path):
    out = tmp_path / "out"
    assert (
        run(
            "consistency",
            tiny,
            "--steps",
            "50,5,20",
            "--sampler",
            "ddim,o-belm,ddim-2",
            "--count",
            3,
            "--batch-size",
            2,
            "--out",
            out,
        )
        == 0
    )
    results = record(out)["results"]
    assert [(r["sampler"], r["steps"]) for r in results] == [
        (s, n) for s in ("ddim", "o-belm", "ddim-2") for n in (5, 20, 50)
    ]
    errors = {(r["sampler"], r["steps"]): r["mse"] for r in results}
    assert errors["ddim", 50] == 0
    assert errors["ddim", 5] > errors["ddim", 20] > 0
    assert (out / "table.md").read_text().count("| o-belm") == 3
    assert read(out / "sheet.png").shape[0] > 3 * 96
    assert read(out / "distance.png").ndim == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["encode"],
        ["encode", "--images", "nowhere.png"],
        ["encode", "--data", "./nowhere"],
        ["reconstruct", "--data", "nowhere.npz"],
        ["interpolate", "--images", "a.png,b.png"],
    ],
)
def test_images_are_looked_for_before_a_model_is_loaded(arguments, monkeypatch, capsys):
    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(UnconditionalPipeline, "from_pretrained", load)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert any(
        told in error
        for told in ("give images as files", "there is no picture at", "there is no data at")
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["encode", "MODEL", "--images", "0.png"],
        ["interpolate", "MODEL", "--seeds", "1,2"],
        ["reconstruct", "MODEL", "--data", "."],
        ["consistency", "MODEL"],
        ["evaluate", "MODEL", "--reference", "."],
        ["table", "MODEL", "--reference", "."],
    ],
)
def test_models_of_text_are_sent_to_the_command_that_takes_them(
    arguments, tiny_text, tmp_path, monkeypatch, capsys
):
    pictures(tmp_path, 1, 16)
    monkeypatch.chdir(tmp_path)
    assert (
        run(*(tiny_text if a == "MODEL" else a for a in arguments), "--out", tmp_path / "out") == 2
    )
    error = capsys.readouterr().err
    assert "this command takes models without text; draw with `ddim sample" in error
    assert "--prompt TEXT`" in error


def test_bad_input_is_one_sentence_and_writes_nothing(tiny, tiny_classes, tmp_path, capsys):
    _, files = pictures(tmp_path / "in")
    _, large = pictures(tmp_path / "large", 2, 16)
    first = files.split(",")[0]
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((tmp_path / "in" / "0.png").read_bytes()[:40])
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"")
    out, inside = tmp_path / "out", ("--data", tmp_path / "in", "--split", "train")
    cases = {
        "0.png is 16x16 and the model's images 8x8 (width x height); give --resize": [
            "encode",
            tiny,
            "--images",
            large,
            "--out",
            out,
        ],
        "are 16x16 and the model's images 8x8 (width x height); give --resize": [
            *("encode", tiny, "--data", tmp_path / "large", "--out", out)
        ],
        "there is no data at './nowhere'; check the path": [
            "reconstruct",
            tiny,
            "--data",
            "./nowhere",
            "--out",
            out,
        ],
        "there is no picture at": ["encode", tiny, "--images", "nowhere.png", "--out", out],
        "is not a picture, or is damaged": ["encode", tiny, "--images", damaged, "--out", out],
        "give images as files (--images a.png,b.png) or as a data set": [
            "encode",
            tiny,
            "--out",
            out,
        ],
        "is there already; use another --out": ["encode", tiny, "--images", first, "--out", there],
        "--count must be at least 1; got 0": [
            "encode",
            tiny,
            "--data",
            tmp_path / "in",
            "--count",
            0,
            "--out",
            out,
        ],
        "and --seed and --count ask for the images 5 to 6": [
            "reconstruct",
            tiny,
            *inside,
            "--seed",
            5,
            "--count",
            2,
            "--out",
            out,
        ],
        "and --seed and --count ask for the image 7": [
            "encode",
            tiny,
            *inside,
            "--seed",
            7,
            "--out",
            out,
        ],
        "--seed must be at least 0; got -1": [
            "reconstruct",
            tiny,
            *inside,
            "--seed",
            -1,
            "--out",
            out,
        ],
        "--seed acts only with --data; give both, or leave out --seed.": [
            "encode",
            tiny,
            "--images",
            first,
            "--seed",
            1,
            "--out",
            out,
        ],
        "asks for 9": ["encode", tiny, *inside, "--count", 9, "--out", out],
        "name the images' class with --class": [
            "encode",
            tiny_classes,
            "--images",
            first,
            "--out",
            out,
        ],
        "trained without classes": ["encode", tiny, "--images", first, "--class", 1, "--out", out],
        "--method must be one of o-belm": [
            "encode",
            tiny,
            "--images",
            first,
            "--method",
            "euler",
            "--out",
            out,
        ],
        "there is no code at": ["decode", tiny, "--code", "nowhere.safetensors", "--out", out],
        "is no code, or is damaged": ["decode", tiny, "--code", there, "--out", out],
        "a path has two ends, and 1 was given": [
            "interpolate",
            tiny,
            "--images",
            first,
            "--out",
            out,
        ],
        "a grid has four corners, and 2 were given": [
            "interpolate",
            tiny,
            "--seeds",
            "1,2",
            "--grid",
            "--out",
            out,
        ],
        "as --seeds 3,17 or as --images": ["interpolate", tiny, "--out", out],
        "--count must be from 2 to 1000; got 1.": [
            "interpolate",
            tiny,
            "--seeds",
            "1,2",
            "--count",
            1,
            "--out",
            out,
        ],
        "--seeds must be at least 0; got -2.": [
            "interpolate",
            tiny,
            "--seeds",
            "1,-2",
            "--out",
            out,
        ],
        "--method must name some of": [
            "reconstruct",
            tiny,
            "--data",
            tmp_path / "in",
            "--method",
            "euler",
            "--out",
            out,
        ],
        "--sampler must name some of": ["consistency", tiny, "--sampler", "euler", "--out", out],
        "from 1 to 1000": ["consistency", tiny, "--steps", "1001", "--out", out],
        "--eta acts only with --sampler ddim; give both": [
            "sample",
            tiny,
            "--sampler",
            "o-belm",
            "--eta",
            1,
            "--out",
            out,
        ],
        "--order acts only with --sampler ddim or ddpm; give both": [
            "sample",
            tiny,
            "--sampler",
            "o-belm",
            "--order",
            2,
            "--out",
            out,
        ],
        "cannot be run backwards through clipping": [
            "sample",
            tiny,
            "--sampler",
            "bdia",
            "--clip",
            "static",
            "--out",
            out,
        ],
    }
    for sentence, arguments in cases.items():
        assert run(*arguments) == 2, sentence
        error = capsys.readouterr().err
        assert sentence in error, (sentence, error)
        assert error.count("\n") == 1
        assert not out.exists(), sentence


def test_a_code_of_another_model_is_refused(tiny, tmp_path, capsys):
    _, files = pictures(tmp_path / "in")
    code = tmp_path / "code.safetensors"
    assert run("encode", tiny, "--images", files, "--steps", 3, "--out", code) == 0
    network = tiny_unet()
    with torch.no_grad():
        network.conv_in.bias += 0.1
    diffusers.DDIMPipeline(network, ours()).save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert run("decode", tmp_path / "other", "--code", code, "--out", tmp_path / "out") == 2
    assert "made with another network" in capsys.readouterr().err
    assert run("decode", tiny, "--code", code, "--dtype", "float64", "--out", tmp_path / "out") == 2
    assert (
        "made by a network in float32, and this one is in float64; decode it in float32"
        in capsys.readouterr().err
    )
    assert run("decode", tiny, "--code", code, "--steps", 4, "--out", tmp_path / "out") == 2
    assert "a pair of states of its own 3 steps" in capsys.readouterr().err
    save_code(load_code(code)[:0], tmp_path / "empty.safetensors")
    assert (
        run("decode", tiny, "--code", tmp_path / "empty.safetensors", "--out", tmp_path / "out")
        == 2
    )
    assert "the code holds no images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_code_decoded_with_other_steps_begins_where_it_lies(tiny, tmp_path, capsys):
    _, files = pictures(tmp_path / "in")
    code, out = tmp_path / "code.safetensors", tmp_path / "out"
    assert (
        run(
            "encode",
            tiny,
            "--images",
            files,
            "--steps",
            20,
            "--spacing",
            "leading",
            "--method",
            "ddim",
            "--out",
            code,
        )
        == 0
    )
    assert run("decode", tiny, "--code", code, "--steps", 50, "--out", out) == 0
    assert (
        "note: the code lies at level 950; 2 of the 50 levels are not below it."
        in capsys.readouterr().out
    )
    assert record(out)["protocol"]["timesteps"][:2] == [950, 939]
    assert record(out)["evaluations"] == len(record(out)["protocol"]["timesteps"]) == 48


def test_a_level_without_signal_is_told(zero_snr, tmp_path, capsys):
    _, files = pictures(tmp_path / "in")
    note, code = (
        "note: level 999 has zero SNR and holds nothing of an image; the codes lie at level 998.",
        tmp_path / "code.safetensors",
    )
    assert run("encode", zero_snr, "--images", files, "--steps", 5, "--out", code) == 0
    assert capsys.readouterr().out.count(note) == 1
    assert (
        json.loads((tmp_path / "code.safetensors.run.json").read_text())["protocol"]["timesteps"][0]
        == 998
    )
    assert run("decode", zero_snr, "--code", code, "--out", tmp_path / "back") == 0
    assert note not in capsys.readouterr().out
    options = [
        "--images",
        ",".join(files.split(",")[:2]),
        "--count",
        3,
        "--steps",
        5,
        "--method",
        "bdia",
        "--out",
        tmp_path / "path",
    ]
    assert run("interpolate", zero_snr, *options) == 0
    assert capsys.readouterr().out.count(note) == 1
    assert record(tmp_path / "path")["protocol"]["timesteps"][0] == 998
    options = [
        "--data",
        tmp_path / "in",
        "--count",
        2,
        "--steps",
        "5,10",
        "--method",
        "o-belm",
        "--out",
        tmp_path / "table",
    ]
    assert run("reconstruct", zero_snr, *options) == 0
    assert capsys.readouterr().out.count(note) == 1
    assert (
        run(
            "interpolate",
            zero_snr,
            "--seeds",
            "1,2",
            "--count",
            3,
            "--steps",
            5,
            "--out",
            tmp_path / "seeds",
        )
        == 0
    )
    assert record(tmp_path / "seeds")["protocol"]["timesteps"][0] == 999


@pytest.mark.parametrize("command", ["consistency", "sample"])
def test_edict_is_refused_at_zero_snr_before_anything_is_written(
    zero_snr, tmp_path, capsys, command
):
    steps = "3,5" if command == "consistency" else 5
    assert (
        run(
            command,
            zero_snr,
            "--sampler",
            "edict",
            "--steps",
            steps,
            "--count",
            1,
            "--out",
            tmp_path / "out",
        )
        == 2
    )
    assert "edict cannot start at t=999, where the SNR is 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_that_is_not_divided_is_taken_whole_and_a_test_split_goes_first(
    tiny, tmp_path, capsys
):
    plain, divided = tmp_path / "plain", tmp_path / "divided"
    pictures(plain, 3)
    train, _ = pictures(divided / "train", 2, seed=1)
    test, _ = pictures(divided / "test", 2, seed=2)
    for data, split, count in ((plain, "train", 3), (divided, "test", 2)):
        code = tmp_path / f"{data.name}.safetensors"
        assert run("encode", tiny, "--data", data, "--steps", 3, "--out", code) == 0
        assert len(load_code(code)) == count
        told = json.loads((tmp_path / f"{data.name}.safetensors.run.json").read_text())["protocol"][
            "data"
        ]
        assert (told["name"], told["split"], told["method"]) == (str(data), split, "o-belm")
        out = tmp_path / f"table-{data.name}"
        assert (
            run(
                "reconstruct",
                tiny,
                "--data",
                data,
                "--count",
                2,
                "--steps",
                3,
                "--method",
                "o-belm",
                "--out",
                out,
            )
            == 0
        )
        assert f"2 images of {data} ({split})" in (out / "table.md").read_text()
    assert (
        run("decode", tiny, "--code", tmp_path / "divided.safetensors", "--out", tmp_path / "back")
        == 0
    )
    assert (read(tmp_path / "back" / "000001.png") == test[1]).all()
    capsys.readouterr()
    assert (
        run("encode", tiny, "--data", plain, "--split", "test", "--out", tmp_path / "c.safetensors")
        == 2
    )
    assert (
        "has no split 'test'; it is not divided into splits, so leave out --split"
        in capsys.readouterr().err
    )


def test_pictures_are_resized_to_a_model_that_is_not_square_and_stand_upright(tmp_path, capsys):
    model = saved(tmp_path / "wide", sample_size=(8, 12))
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = np.arange(96, dtype=np.uint8).reshape(8, 12) * 2
    lying = Image.fromarray(np.rot90(pixels))  # 12x8, to be turned by a quarter clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(folder / "a.png", exif=exif)
    Image.fromarray(np.kron(pixels, np.ones((2, 3), np.uint8))).save(folder / "b.png")  # 16x36
    code = tmp_path / "code.safetensors"
    assert run("encode", model, "--images", folder / "a.png", "--steps", 2, "--out", code) == 0
    assert run("decode", model, "--code", code, "--out", tmp_path / "upright") == 0
    assert (read(tmp_path / "upright" / "000000.png") == pixels).all()
    assert (
        run("encode", model, "--data", folder, "--steps", 2, "--out", tmp_path / "all.safetensors")
        == 2
    )
    assert (
        run(
            "encode",
            model,
            "--data",
            folder,
            "--resize",
            "--steps",
            2,
            "--out",
            tmp_path / "all.safetensors",
        )
        == 0
    )
    assert load_code(tmp_path / "all.safetensors").states.shape == (2, 2, 1, 8, 12)


def test_a_class_is_asked_for_in_the_words_of_the_command_line(
    tiny, tiny_classes, tmp_path, capsys
):
    _, files = pictures(tmp_path / "in", 2)
    out = tmp_path / "out"
    images = ["--images", files]
    data = ["--data", tmp_path / "in", "--count", 2, "--steps", 3, "--method", "o-belm"]
    missing = "the model is class-conditional: name the images' class with --class, from 0 to 3."
    for arguments in (
        ["encode", tiny_classes, *images],
        ["interpolate", tiny_classes, *images],
        ["interpolate", tiny_classes, "--seeds", "1,2"],
        ["reconstruct", tiny_classes, *data],
    ):
        assert run(*arguments, "--out", out) == 2
        assert missing in capsys.readouterr().err
        assert run(*arguments, "--class", 4, "--out", out) == 2
        assert "--class must be from 0 to 3; got 4." in capsys.readouterr().err
        assert run(arguments[0], tiny, *arguments[2:], "--class", 1, "--out", out) == 2
        assert " was trained without classes; got 1." in capsys.readouterr().err
        assert not out.exists()
    assert run("reconstruct", tiny_classes, *data, "--class", 3, "--out", out) == 0
    assert record(out)["protocol"]["class"] == 3
    assert (
        run(
            "interpolate",
            tiny_classes,
            "--seeds",
            "1,2",
            "--class",
            3,
            "--count",
            2,
            "--steps",
            2,
            "--out",
            tmp_path / "path",
        )
        == 0
    )
    unlabelled = UnconditionalPipeline.from_pretrained(tiny_classes).encode(
        torch.zeros(1, 1, 8, 8), 2, class_labels=1
    )
    save_code(dataclasses.replace(unlabelled, labels=None), tmp_path / "code.safetensors")
    assert (
        run(
            "decode",
            tiny_classes,
            "--code",
            tmp_path / "code.safetensors",
            "--out",
            tmp_path / "back",
        )
        == 2
    )
    assert "encode with class_labels (--class)" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_what_an_interrupted_run_leaves_is_known_and_in_nobodys_way(tiny, tmp_path, capsys):
    _, files = pictures(tmp_path / "in", 2)
    code, other = tmp_path / "code.safetensors", tmp_path / "other.safetensors"
    assert run("encode", tiny, "--images", files, "--steps", 3, "--out", code) == 0
    assert run("encode", tiny, "--images", files, "--steps", 4, "--out", other) == 0
    data = ["--data", tmp_path / "in", "--count", 2]
    cases = {
        "decode": ("decode", ["--code", code], ["--code", other]),
        "interpolate": (
            "decode",
            ["--seeds", "1,2", "--steps", 2, "--count", 2],
            ["--seeds", "1,3", "--steps", 2, "--count", 2],
        ),
        "consistency": ("draw", ["--steps", "2,4", "--count", 1], ["--steps", "2,3", "--count", 1]),
        "reconstruct": (
            "encode",
            [*data, "--steps", 2],
            [*data, "--steps", 2, "--spacing", "linspace", "--method", "o-belm"],
        ),
    }
    for command, (method, options, corrected) in cases.items():
        out = tmp_path / command
        with interrupted(method):
            assert run(command, tiny, *options, "--out", out) == 130
        assert [p.name for p in out.iterdir()] == ["run.json"]
        assert record(out)["results"] == []
        assert run(command, tiny, *corrected, "--out", out) == 0, capsys.readouterr().err
        assert record(out)["results"]
        assert run(command, tiny, *options, "--out", out) == 2  # now the folder holds results
        assert "holds results of another protocol" in capsys.readouterr().err


def test_pictures_that_an_interrupted_run_left_are_of_its_protocol(
    tiny, tmp_path, monkeypatch, capsys
):
    _, files = pictures(tmp_path / "in", 2)
    codes = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for steps, code in zip((3, 4), codes, strict=True):
        assert run("encode", tiny, "--images", files, "--steps", steps, "--out", code) == 0
    with monkeypatch.context() as patch:
        patch.setattr(
            "ddim.runs.decode.make_grid",
            lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        assert run("decode", tiny, "--code", codes[0], "--out", tmp_path / "out") == 130
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert run("decode", tiny, "--code", codes[1], "--out", tmp_path / "out") == 2
    assert "holds results of another protocol: timesteps" in capsys.readouterr().err
    assert run("decode", tiny, "--code", codes[0], "--out", tmp_path / "out") == 0


@pytest.mark.slow
def test_evaluations_are_those_of_the_network(tiny, tmp_path, monkeypatch):
    """A run's record tells the network's calls an image: counted here beneath everything, warm-up
    and sheet apart."""
    _, files = pictures(tmp_path / "in", 3)
    seen = []
    forward = diffusers.UNet2DModel.forward

    def counting(self, sample, *args, **options):
        seen.append(len(sample))
        return forward(self, sample, *args, **options)

    monkeypatch.setattr(diffusers.UNet2DModel, "forward", counting)
    monkeypatch.setattr(UnconditionalPipeline, "warm_up", lambda *args, **options: None)
    monkeypatch.setattr(
        "ddim.runs.reconstruct.ReconstructJob._write_sheet", lambda *args, **options: None
    )

    def measured(*arguments):
        seen.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert run(*arguments) == 0
        return sum(seen)

    for method, up, down in (
        ("o-belm", 5, 4),
        ("bdia", 5, 4),
        ("edict", 10, 10),
        ("ddim", 5, 5),
        ("fixed-point", None, 5),
    ):
        code, out = tmp_path / f"{method}.safetensors", tmp_path / method
        calls = measured(
            "encode",
            tiny,
            "--images",
            files,
            "--steps",
            5,
            "--method",
            method,
            "--batch-size",
            2,
            "--out",
            code,
        )
        told = json.loads((tmp_path / f"{method}.safetensors.run.json").read_text())
        assert told["evaluations"] == pytest.approx(calls / 3)
        assert up is None or told["evaluations"] == up
        calls = measured("decode", tiny, "--code", code, "--batch-size", 2, "--out", out)
        assert record(out)["evaluations"] == calls / 3 == down
        options = [
            "--data",
            tmp_path / "in",
            "--count",
            3,
            "--steps",
            5,
            "--batch-size",
            2,
            "--method",
            method,
        ]
        calls = measured("reconstruct", tiny, *options, "--out", tmp_path / f"table-{method}")
        assert record(tmp_path / f"table-{method}")["evaluations"] == pytest.approx(calls / 3)
        ends = ",".join(files.split(",")[:2])
        calls = measured(
            "interpolate",
            tiny,
            "--images",
            ends,
            "--steps",
            5,
            "--method",
            method,
            "--count",
            6,
            "--out",
            out / "path",
        )
        assert record(out / "path")["evaluations"] == pytest.approx((calls - 6 * down) / 2 + down)
    assert (
        measured(
            "interpolate",
            tiny,
            "--seeds",
            "1,2",
            "--steps",
            5,
            "--count",
            4,
            "--out",
            tmp_path / "seeds",
        )
        == 4 * 5
    )
    assert record(tmp_path / "seeds")["evaluations"] == 5
    for samplers in ("ddim,edict,o-belm", "edict,ddim-2"):
        out = tmp_path / samplers
        calls = measured(
            "consistency",
            tiny,
            "--steps",
            "3,50",
            "--sampler",
            samplers,
            "--count",
            2,
            "--out",
            out,
        )
        assert record(out)["evaluations"] == calls / 2


def test_a_cell_that_diverges_is_told_with_what_it_took(tiny, tmp_path, monkeypatch, capsys):
    from ddim.errors import DivergenceError

    pictures(tmp_path / "in", 2)

    def diverge(self, *args, **options):
        raise DivergenceError("the code grew.")

    monkeypatch.setattr(UnconditionalPipeline, "encode", diverge)
    options = [
        "--data",
        tmp_path / "in",
        "--count",
        2,
        "--steps",
        3,
        "--method",
        "edict",
        "--out",
        tmp_path / "out",
    ]
    assert run("reconstruct", tiny, *options) == 0
    assert "edict, 3 steps: diverged" in capsys.readouterr().out
    assert record(tmp_path / "out")["results"] == [
        {"method": "edict", "steps": 3, "mse": None, "evaluations": 0}
    ]
    assert "diverged" in (tmp_path / "out" / "table.md").read_text()


def test_the_end_of_memory_is_a_sentence(tiny, tmp_path, monkeypatch, capsys):
    _, files = pictures(tmp_path / "in", 2)
    assert (
        run("encode", tiny, "--images", files, "--steps", 2, "--out", tmp_path / "code.safetensors")
        == 0
    )

    def exhausted(self, *args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("draw", "encode", "decode"):
        monkeypatch.setattr(UnconditionalPipeline, name, exhausted)
    for command, options in {
        "encode": ["--images", files],
        "decode": ["--code", tmp_path / "code.safetensors"],
        "interpolate": ["--images", files],
        "reconstruct": ["--data", tmp_path / "in", "--count", 2],
        "consistency": ["--count", 2],
    }.items():
        assert (
            run(
                command,
                tiny,
                *options,
                "--batch-size",
                7,
                "--device",
                "cpu",
                "--out",
                tmp_path / command,
            )
            == 2
        )
        assert (
            "cpu has too little memory for 7 images at once; give a smaller --batch-size."
            in capsys.readouterr().err
        )


def test_steps_that_are_not_solved_are_told_in_one_line(tiny, tmp_path, capsys, monkeypatch):
    _, files = pictures(tmp_path / "in", 2)
    encode = UnconditionalPipeline.encode
    monkeypatch.setattr(
        UnconditionalPipeline, "encode", lambda *a, **k: encode(*a, **k, max_evaluations=1)
    )
    options = ["--images", files, "--steps", 5, "--method", "fixed-point"]
    assert run("encode", tiny, *options, "--out", tmp_path / "code.safetensors") == 0
    told = capsys.readouterr()
    assert "5 steps were not solved to the tolerance; use more steps, or method o-belm." in told.out
    assert told.err == ""
    assert run("interpolate", tiny, *options, "--count", 2, "--out", tmp_path / "path") == 0
    assert "5 steps were not solved" in capsys.readouterr().out


def test_what_edict_cannot_draw_is_told(tiny, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as on a command line, where they are no errors
        assert (
            run(
                "sample",
                tiny,
                "--sampler",
                "edict",
                "--steps",
                5,
                "--count",
                1,
                "--out",
                tmp_path / "out",
            )
            == 0
        )
    told = capsys.readouterr().err
    assert told.startswith("ddim: warning: EDICT's two copies of an image ended ")
    assert told.count("\n") == 1


def test_the_exact_samplers_draw_pictures(tiny, tmp_path):
    for sampler in ("o-belm", "bdia", "edict"):
        assert (
            run(
                "sample",
                tiny,
                "--sampler",
                sampler,
                "--steps",
                50,
                "--count",
                2,
                "--out",
                tmp_path / sampler,
            )
            == 0
        )
        assert record(tmp_path / sampler)["protocol"]["sampler"] == sampler
        assert record(tmp_path / sampler)["evaluations"] == (100 if sampler == "edict" else 50)
