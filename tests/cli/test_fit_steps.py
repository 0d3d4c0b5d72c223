import json
from pathlib import Path

import pytest
from tests.conftest import on_a_terminal, with_fewer_levels

from ddim.cli import main
from ddim.core.timesteps import SPACINGS, check_timesteps
from ddim.models.checkpoints import weight_hash
from ddim.pipelines.text_to_image import TextToImagePipeline
from ddim.runs import fit_steps

QUICK = ("--steps", 4, "--count", 4, "--held-out", 6, "--evaluations", 20)


def fit(model, out, *options):
    return main(["fit-steps", str(model), "--out", str(out), *map(str, (*QUICK, *options))])


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_writes_steps_that_sample_takes(order, tiny, tmp_path, capsys):
    path = tmp_path / "deep" / "steps.json"
    assert fit(tiny, path, "--order", order) == 0
    told = capsys.readouterr().out
    content = json.loads(path.read_text())
    assert len(check_timesteps(content["timesteps"], 1000)) == 4
    assert content["protocol"]["order"] == order
    assert content["protocol"]["weight_hash"] == weight_hash(tiny)
    rows = {row["name"]: row for row in content["results"]}
    assert set(rows) == {"fitted", "ddim-50", *SPACINGS}
    assert content["timesteps"] in [row["timesteps"] for row in rows.values()]
    assert all(rows[name]["ratio"]["mean"] <= 1 for name in ("fitted", *SPACINGS))
    assert all(
        row["ode_error"]["low"] < row["ode_error"]["mean"] < row["ode_error"]["high"]
        for row in rows.values()
    )
    assert 0 < content["seconds"] < content["seconds_total"]
    assert f"ddim sample {tiny} --order {order} --timesteps {path}" in told
    assert ", ".join(map(str, content["timesteps"])) in told
    assert (
        main(
            [
                "sample",
                str(tiny),
                "--order",
                str(order),
                "--timesteps",
                str(path),
                "--count",
                "1",
                "--out",
                str(tmp_path / "o"),
            ]
        )
        == 0
    )
    assert (
        json.loads((tmp_path / "o" / "run.json").read_text())["protocol"]["timesteps"]
        == content["timesteps"]
    )


@pytest.mark.parametrize("out", ["file/steps.json", "file", "folder", "/proc/steps.json"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_fitted(
    out, tiny, tmp_path, monkeypatch, capsys
):
    if out.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("there is no /proc")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(fit_steps, "fit_timesteps", lambda *args, **options: pytest.fail("fitted"))
    assert fit(tiny, tmp_path / out) == 2
    told = capsys.readouterr().err
    assert "cannot read or write" in told or "is there already" in told
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.slow
def test_a_terminal_shows_progress(tiny, tmp_path, monkeypatch):
    with on_a_terminal(monkeypatch, columns=80) as shown:
        assert fit(tiny, tmp_path / "steps.json") == 0
    assert "it/s]" in shown()


def test_steps_that_were_fitted_to_another_model_or_order_are_told_and_drawn_with(
    tiny, tiny_classes, tmp_path, capsys
):
    path = tmp_path / "steps.json"
    content = {
        "timesteps": [999, 500],
        "protocol": {
            "command": "fit-steps",
            "model": "m",
            "weight_hash": weight_hash(tiny),
            "order": 2,
        },
    }
    path.write_text(json.dumps(content))
    here, there = weight_hash(tiny), weight_hash(tiny_classes)

    def note(name, *options):
        drawn = ["sample", *options, "--count", "1", "--out", str(tmp_path / name)]
        assert main(list(map(str, drawn))) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "were fitted" in line]

    end = "); `ddim fit-steps` fits others."
    assert note("a", tiny, "--timesteps", path, "--order", 2) == []
    assert note("b", tiny, "--timesteps", path) == [
        f"note: these timesteps were fitted to m (order 2, not 1{end}"
    ]
    assert note("c", tiny_classes, "--timesteps", path) == [
        f"note: these timesteps were fitted to m (weights {here}, not {there}; order 2, not 1{end}"
    ]
    assert note("d", tiny_classes, "--timesteps", "999,500") == []
    assert (
        note("e", tiny_classes, "--timesteps", tmp_path / "a" / "run.json") == []
    )  # drawn with, and not fitted
    path.write_text(json.dumps({"timesteps": [999, 500]}))
    assert note("f", tiny_classes, "--timesteps", path) == []


@pytest.mark.slow
def test_the_held_out_errors_do_not_depend_on_their_batches_and_exact_ones_are_near(
    tiny_classes, tmp_path
):
    found, model = {}, with_fewer_levels(tiny_classes, tmp_path / "model")
    for name, options in {"a": (), "b": ("--batch-size", 4), "c": ("--exact",)}.items():
        assert fit(model, tmp_path / f"{name}.json", *options) == 0
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["a"]["timesteps"] == found["b"]["timesteps"]
    assert found["c"]["protocol"]["reference"] == {"order": 1, "steps": 250}
    for other, relative in (("b", 1e-3), ("c", 0.2)):
        for one, same in zip(found["a"]["results"][:5], found[other]["results"][:5], strict=True):
            assert one["ode_error"]["mean"] == pytest.approx(
                same["ode_error"]["mean"], rel=relative
            )


@pytest.mark.slow
def test_guided_models_of_text_are_fitted_on_their_latents(tiny_text, tmp_path, capsys):
    found = {}
    for scale in (1, 7.5):
        path = tmp_path / f"{scale}.json"
        assert (
            fit(
                tiny_text,
                path,
                "--prompt",
                "a cat",
                "--prompt",
                "a dog",
                "--guidance-scale",
                scale,
                "--order",
                2,
            )
            == 0
        )
        found[scale] = json.loads(path.read_text())
        told = found[scale]["protocol"]
        assert (told["prompt"], told["guidance_scale"], told["guidance_rescale"]) == (
            ["a cat", "a dog"],
            scale,
            0.0,
        )
        assert found[scale]["evaluations"] == 4 * (2 if scale > 1 else 1)
        assert all(
            row["ratio"]["mean"] <= 1 for row in found[scale]["results"] if row["name"] != "ddim-50"
        )
    assert f"--timesteps {path} --prompt PROMPT" in capsys.readouterr().out
    assert found[1]["results"][1]["ode_error"] != found[7.5]["results"][1]["ode_error"]
    drawn = (
        "--order",
        "2",
        "--timesteps",
        str(path),
        "--prompt",
        "a cat",
        "--count",
        "1",
        "--out",
        str(tmp_path / "o"),
    )
    assert main(["sample", str(tiny_text), *drawn]) == 0
    assert fit(tiny_text, tmp_path / "none.json") == 2
    assert "makes images of prompts: give --prompt TEXT" in capsys.readouterr().err


@pytest.mark.slow
def test_a_text_models_errors_are_of_the_latents_that_its_own_call_ends_at(tiny_text, tmp_path):
    options = ("--prompt", "a cat", "--guidance-scale", 3, "--guidance-rescale", 0.5, "--exact")
    model = with_fewer_levels(tiny_text, tmp_path / "model")
    assert fit(model, tmp_path / "steps.json", *options) == 0
    content = json.loads((tmp_path / "steps.json").read_text())
    pipe, seeds = TextToImagePipeline.from_pretrained(model), range(1_000_004, 1_000_010)

    def ends(**steps):
        asked = {
            "guidance_scale": 3.0,
            "guidance_rescale": 0.5,
            "output_type": "latent",
            "progress": False,
        }
        return pipe(["a cat"] * 6, seeds=seeds, **asked, **steps).images

    exact = ends(num_inference_steps=250, timestep_spacing="trailing")
    for row in content["results"][:2]:
        error = (
            (ends(timesteps=row["timesteps"]) - exact)
            .double()
            .square()
            .flatten(1)
            .mean(1)
            .log()
            .mean()
            .exp()
        )
        assert row["ode_error"]["mean"] == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "0"), "--steps must be at least 1; got 0."),
        (("--steps", "1001"), "ddim: --steps must be a whole number from 1 to 1000"),
        (("--order", "3"), "--order must be one of 1, 2; got '3'."),
        (("--held-out", "1"), "--held-out must be at least 2; got 1."),
        (("--count", "0"), "--count must be at least 1; got 0."),
        (("--evaluations", "-1"), "--evaluations must be at least 0; got -1."),
        (("--seed", "-1"), "--seed must be at least 0; got -1."),
        (
            ("--out", "there.json"),
            "there.json is there already; use another --out, or delete that file.",
        ),
    ],
)
def test_bad_options_are_one_sentence_and_leave_nothing(
    options, message, tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("{}")
    assert main(["fit-steps", str(tiny), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"ddim: {message}\n" or message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["there.json"]
    assert Path("there.json").read_text() == "{}"
