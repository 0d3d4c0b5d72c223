"""``ddim evaluate``: pictures, arrays and models come to the same numbers, and what cannot be
compared is refused."""

import sys

import filelock
import numpy as np
import pytest
from PIL import Image
from tests.conftest import record

from ddim.cli import main
from ddim.data.batches import as_batches
from ddim.pipelines.unconditional import UnconditionalPipeline

METRICS = ["--metrics", "kid-pixels,precision-pixels,swd-pixels"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Sixty grey images of 8x8."""
    path = tmp_path_factory.mktemp("data") / "reference.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    return path


def evaluate(samples, reference, out, *options):
    metrics = [] if "--metrics" in options else METRICS
    return main(
        [
            "evaluate",
            str(samples),
            "--reference",
            str(reference),
            "--out",
            str(out),
            *metrics,
            *map(str, options),
        ]
    )


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_model_and_the_pictures_it_draws_come_to_the_same_numbers(
    kind, tiny, reference, tmp_path, capsys
):
    assert (
        main(
            [
                "sample",
                str(tiny),
                "--steps",
                "3",
                "--count",
                "20",
                "--picture",
                kind,
                "--out",
                str(tmp_path / "pictures"),
            ]
        )
        == 0
    )
    assert evaluate(tmp_path / "pictures", reference, tmp_path / "a") == 0
    assert (
        evaluate(tiny, reference, tmp_path / "b", "--steps", 3, "--count", 20, "--batch-size", 7)
        == 0
    )
    told = capsys.readouterr().out
    assert "| kid-pixels " in told
    assert f"20 images against 60 of {reference} (train); the record is in" in told
    pictures, model = record(tmp_path / "a"), record(tmp_path / "b")
    for one, other in zip(pictures["results"], model["results"], strict=True):
        assert set(one) == {"metric", "extractor", "value", "floor", "std", "count", "floor_count"}
        assert (one["metric"], one["count"]) == (other["metric"], other["count"])
        for key in ("value", "floor", "std"):
            assert one[key] == pytest.approx(other[key], rel=2e-3, abs=1e-3)
    assert [r["metric"] for r in model["results"]] == METRICS[1].split(",")
    assert model["protocol"]["timesteps"] == [999, 666, 332]
    assert model["protocol"]["reference"] == {
        "name": str(reference),
        "split": "train",
        "images": 60,
    }
    assert model["protocol"]["extractors"] == {"pixels": None}
    assert (model["evaluations"], pictures["evaluations"], pictures["seconds"]) == (3, 3, 0)
    assert 0 < model["seconds"] < model["seconds_total"]
    assert pictures["protocol"]["sampled"]["timesteps"] == [999, 666, 332]


def test_what_was_drawn_is_data_wherever_images_are_read(tiny, tmp_path):
    drawn = tmp_path / "drawn"
    assert main(["sample", str(tiny), "--steps", "2", "--count", "12", "--out", str(drawn)]) == 0
    assert evaluate(tiny, drawn, tmp_path / "a", "--steps", 2, "--count", 12) == 0
    assert record(tmp_path / "a")["protocol"]["reference"]["images"] == 12
    assert (
        main(
            [
                "reconstruct",
                str(tiny),
                "--data",
                str(drawn),
                "--count",
                "12",
                "--steps",
                "2",
                "--out",
                str(tmp_path / "b"),
            ]
        )
        == 0
    )


def test_any_folder_of_pictures_and_any_array_file(reference, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{i:02d}.png")
    np.savez(tmp_path / "samples.npz", images=pixels)
    assert evaluate(tmp_path / "pictures", reference, tmp_path / "a") == 0
    assert evaluate(tmp_path / "samples.npz", reference, tmp_path / "b") == 0
    assert record(tmp_path / "a")["results"] == record(tmp_path / "b")["results"]
    assert evaluate(tmp_path / "samples.npz", reference, tmp_path / "c", "--count", 9) == 0
    assert [r["count"] for r in record(tmp_path / "c")["results"]] == [9, 9, 9]


def test_a_small_reference_is_told(reference, tmp_path, capsys):
    assert evaluate(reference, reference, tmp_path) == 0
    assert (
        "note: the reference has 30 images a half, so its floor is of 30 and too high for 60."
        in capsys.readouterr().out
    )


def test_the_reference_is_brought_to_the_size_of_the_samples_if_asked(reference, tmp_path):
    np.savez(
        tmp_path / "wide.npz",
        images=np.random.default_rng(2).integers(0, 256, (40, 9, 12), dtype=np.uint8),
    )
    assert (
        evaluate(reference, tmp_path / "wide.npz", tmp_path / "out", "--count", 12, "--resize") == 0
    )
    assert record(tmp_path / "out")["protocol"]["reference"]["resolution"] == [8, 8]


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_the_default_metrics_are_those_that_the_count_allows(count, reference, tmp_path, capsys):
    command = [
        "evaluate",
        str(reference),
        "--reference",
        str(reference),
        "--out",
        str(tmp_path),
        "--count",
        str(count),
    ]
    assert main(command) == 0
    measured = [result["metric"] for result in record(tmp_path)["results"]]
    names = {
        "kid-pixels": 2,
        "precision-pixels": 6,
        "recall-pixels": 6,
        "nearest-pixels": 1,
        "swd-pixels": 1,
    }
    assert measured == [name for name, least in names.items() if least <= count]
    told = capsys.readouterr().out
    absent = [name for name in names if name not in measured]
    assert (
        f"{count} samples against 60 real images are too few for {', '.join(absent)}." in told
    ) == bool(absent)
    assert f"numbers of only {count} images say little" in told


def test_classes_go_round_the_seeds(tiny_classes, reference, tmp_path):
    assert (
        evaluate(
            tiny_classes, reference, tmp_path, "--steps", 1, "--count", 8, "--metrics", "swd-pixels"
        )
        == 0
    )
    assert record(tmp_path)["protocol"]["class"] == "seed modulo the number of classes"


def test_results_of_another_protocol_are_not_overwritten(reference, tmp_path, capsys):
    assert evaluate(reference, reference, tmp_path, "--count", 30) == 0
    before = (tmp_path / "run.json").read_bytes()
    assert evaluate(reference, reference, tmp_path, "--count", 20) == 2
    assert (
        "holds results of another protocol: count is 30 there and 20 here"
        in capsys.readouterr().err
    )
    assert (tmp_path / "run.json").read_bytes() == before
    assert evaluate(reference, reference, tmp_path, "--count", 30) == 0


def test_two_runs_in_one_folder_are_refused(reference, tmp_path, capsys):
    with filelock.FileLock(tmp_path / ".lock"):
        assert evaluate(reference, reference, tmp_path) == 2
    assert (
        f"{tmp_path} is being written by another run; wait for it, or use another --out."
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run.json").exists()
    assert evaluate(reference, reference, tmp_path) == 0


def test_colour_images_need_a_network_that_comes_as_a_package(tmp_path, capsys, monkeypatch):
    np.savez(
        tmp_path / "colour.npz",
        images=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
    )
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    command = [
        "evaluate",
        str(tmp_path / "colour.npz"),
        "--reference",
        str(tmp_path / "colour.npz"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    told = "run: pip install 'ddim[evaluate]'.\n"
    assert capsys.readouterr().err.endswith(told)
    assert not (tmp_path / "out").exists()
    assert main([*command, "--metrics", "kid-pixels"]) == 0


def test_models_of_text_are_measured_by_what_they_drew(tiny_text, tmp_path, capsys, monkeypatch):
    np.savez(
        tmp_path / "real.npz",
        images=np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8),
    )
    for command in ("evaluate", "table"):
        assert (
            main(
                [
                    command,
                    str(tiny_text),
                    "--reference",
                    str(tmp_path / "real.npz"),
                    "--out",
                    str(tmp_path / "out"),
                ]
            )
            == 2
        )
        assert (
            f"draw with `ddim sample {tiny_text} --prompt TEXT`, whose folder `ddim evaluate` "
            "measures" in capsys.readouterr().err
        )
    drawn = [
        "--prompt",
        "a red",
        "--prompt",
        "a blue",
        "--steps",
        "1",
        "--count",
        "3",
        "--out",
        str(tmp_path / "pictures"),
    ]
    assert main(["sample", str(tiny_text), *drawn]) == 0
    with Image.open(next((tmp_path / "pictures").glob("0*.png"))) as picture:
        side = picture.size[0]
    np.savez(
        tmp_path / "real.npz",
        images=np.random.default_rng(0).integers(0, 256, (12, side, side, 3), dtype=np.uint8),
    )
    assert (
        evaluate(
            tmp_path / "pictures",
            tmp_path / "real.npz",
            tmp_path / "out",
            "--metrics",
            "kid-pixels",
        )
        == 0
    )
    assert record(tmp_path / "out")["results"][0]["count"] == 6
    assert record(tmp_path / "out")["protocol"]["sampled"]["prompt"] == ["a red", "a blue"]
    seen = []

    def spied(data, chosen, **options):
        seen.append(list(chosen))
        return as_batches(data, chosen, **options)

    monkeypatch.setattr("ddim.runs.evaluate.as_batches", spied)
    options = ("--metrics", "kid-pixels", "--count", 3)
    assert evaluate(tmp_path / "pictures", tmp_path / "real.npz", tmp_path / "few", *options) == 0
    assert {number // 3 for number in seen[0]} == {0, 1}  # the first three are of one prompt


def test_fitted_timesteps_and_the_order_of_a_configuration_count(tiny, reference, tmp_path):
    pipe = UnconditionalPipeline.from_pretrained(tiny)
    pipe.scheduler.register_to_config(multistep_order=2, fitted_timesteps=[[900, 700, 100]])
    pipe.save_pretrained(tmp_path / "model")
    found = {}
    for steps, spacing, timesteps in (
        (3, "fitted", [900, 700, 100]),
        (4, "trailing", [999, 749, 499, 249]),
    ):
        out = tmp_path / str(steps)
        assert (
            evaluate(
                tmp_path / "model",
                reference,
                out,
                "--steps",
                steps,
                "--count",
                8,
                "--metrics",
                "swd-pixels",
            )
            == 0
        )
        protocol = record(out)["protocol"]
        assert (protocol["spacing"], protocol["timesteps"], protocol["order"]) == (
            spacing,
            timesteps,
            2,
        )
        found[steps] = record(out)["results"][0]["value"]
    drawn = [
        "--order",
        "2",
        "--timesteps",
        "900,700,100",
        "--count",
        "8",
        "--out",
        str(tmp_path / "pictures"),
    ]
    assert main(["sample", str(tiny), *drawn]) == 0
    assert (
        evaluate(tmp_path / "pictures", reference, tmp_path / "p", "--metrics", "swd-pixels") == 0
    )
    assert record(tmp_path / "p")["results"][0]["value"] == pytest.approx(found[3], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--count", "0"), "--count must be at least 1; got 0."),
        (("--count", "61"), "holds 60 images; got --count 61."),
        (("--count", "5"), "precision-pixels needs at least 6 images; got 5."),
        (("--steps", "5"), "--steps has no effect on"),
        (("--metrics", "fid"), "'fid' is no metric"),
        (
            ("--metrics", "fd-fashion"),
            "the extractor fashion takes grey images of 28x28; got grey ones of 8x8.",
        ),
        (
            ("--metrics", "fd-inception"),
            (
                "this extractor needs torch_fidelity, which is not installed; run: pip install "
                "torch-fidelity torchvision."
            ),
        ),
        (
            ("--weights", "inception"),
            "--weights are NAME=PATH, such as inception=weights.pth; got 'inception'.",
        ),
        (("--split", "test"), "has no split 'test'"),
        (("--device", "abacus"), "--device must be auto"),
    ],
)
def test_bad_options_are_one_sentence(options, message, reference, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert evaluate(reference, reference, tmp_path / "out", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_compared_are_refused(tiny, reference, tmp_path, capsys):
    np.savez(tmp_path / "large.npz", images=np.zeros((60, 9, 9), np.uint8))
    assert evaluate(tmp_path / "large.npz", reference, tmp_path / "out") == 2
    assert (
        f"large.npz has images of 9x9 and the reference {reference} of 8x8 (width x height), and "
        "only equal sizes compare; give --resize" in capsys.readouterr().err
    )
    assert evaluate(tiny, reference, tmp_path / "out") == 2
    assert (
        "2048 samples need a reference of as many images, and it holds 60; use at most 60."
        in capsys.readouterr().err
    )
    assert main(["evaluate", str(tiny)]) == 2
    assert "--reference must be given" in capsys.readouterr().err
    assert (
        main(
            [
                "sample",
                str(tiny),
                "--steps",
                "1",
                "--count",
                "8",
                "--out",
                str(tmp_path / "pictures"),
            ]
        )
        == 0
    )
    (tmp_path / "pictures" / "000005.png").unlink()
    assert evaluate(tmp_path / "pictures", reference, tmp_path / "out") == 2
    assert (
        "lacks 1 of the pictures that its run.json lists, such as 000005.png; draw them again."
        in capsys.readouterr().err
    )
    assert evaluate("nowhere", reference, tmp_path / "out") == 2
    assert (
        "'nowhere' is neither an embedded model nor an existing folder" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_some_of_the_images_of_a_sorted_set_are_of_all_kinds(tmp_path):
    """The first 100 would be dark alone."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (200, 8, 8), dtype=np.uint8)
    images[100:] += 190
    np.savez(tmp_path / "a.npz", images=images)
    np.savez(tmp_path / "shuffled.npz", images=rng.permutation(images))
    found = {}
    for name in ("a", "shuffled"):
        options = ("--metrics", "swd-pixels", "--count", 100)
        reference = tmp_path / "shuffled.npz"
        assert evaluate(tmp_path / f"{name}.npz", reference, tmp_path / name, *options) == 0
        (found[name],) = record(tmp_path / name)["results"]
    assert found["a"]["value"] < 2 * found["shuffled"]["value"]
    assert found["a"]["std"] < 3 * found["shuffled"]["std"]
