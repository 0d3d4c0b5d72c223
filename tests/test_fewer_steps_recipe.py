"""The study of docs/fewer-steps.md: what it keeps, what it measures again, and what its report
says."""

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import with_fewer_levels

from ddim.fitting.timesteps import geometric_mean, ode_error

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[1] / "studies" / "fewer_steps.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe_of_fewer_steps", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    few = [
        module.Method(name, order, steps)
        for name, order, steps in (("leading", 1, 3), ("trailing", 1, 3), ("trailing", 2, 3))
    ]
    module.METHODS = [*few, module.Method("fitted", 2, 3), module.MANY]
    module.DRAWN = [
        *module.METHODS,
        module.Method("trailing", 2, 200),
        module.Method("analytic", 1, 3),
    ]
    return module


@pytest.fixture(scope="module")
def run(recipe, tiny, tmp_path_factory):
    """A run of the tiny model over few methods; further options by name."""
    folder = tmp_path_factory.mktemp("fewer")
    model = with_fewer_levels(tiny, folder / "model")
    np.savez(
        folder / "real.npz",
        images=np.random.default_rng(0).integers(0, 256, (300, 8, 8), dtype=np.uint8),
    )

    def make(**options):
        given = {
            "model": str(model),
            "reference": str(folder / "real.npz"),
            "held_out": 3,
            "count": 12,
            "batch_size": 64,
            "device": "cpu",
            "out": folder / "out",
            **options,
        }
        made = recipe.Run(argparse.Namespace(**given))
        made.compiled = True  # as if; a compilation takes longer than all of this
        return made

    # What `ddim fit-steps` would find, for a search of a tiny model takes longer than the rest.
    made = make()
    made.store("fits", recipe.Method("fitted", 2, 3), timesteps=[247, 125, 25], found="fitted")
    made.errors()
    made.quality()
    made.report()
    return make


def test_errors_are_their_definition(run, recipe):
    made = run()
    record = made.stored("errors", recipe.Method("fitted", 2, 3))
    assert record["timesteps"] == [247, 125, 25]
    x, exact = (
        made.pipe(seeds=range(3), clip="none", progress=False, output_type="pt", **o).images
        for o in ({"timesteps": [247, 125, 25], "order": 2}, {"num_inference_steps": 250})
    )
    torch.testing.assert_close(
        torch.tensor(record["errors"]).double(),
        ode_error(2 * x - 1, 2 * exact - 1),
        rtol=1e-3,
        atol=0,
    )


def test_the_report_says_who_needs_how_many_evaluations(run, recipe):
    text = (run().out / "report.md").read_text()
    assert "ODE error (3 images:" in text
    assert "kid-pixels (12 images;" in text
    assert "The flow is 200 steps of order 2, which stand for DDIM at all levels." in text
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if len(cells := [c.strip() for c in line.strip("|").split("|")]) == 4
    }
    assert set(rows) >= {
        "leading, order 1",
        "trailing, order 1",
        "trailing, order 2",
        "fitted, order 2",
        "analytic, order 1",
    }
    many, three = (
        torch.tensor(run().stored("errors", m)["errors"])
        for m in (recipe.MANY, recipe.Method("trailing", 1, 3))
    )
    assert geometric_mean(three / many).mean > 1  # so that it takes more than three of DDIM's
    assert rows["trailing, order 1"][0] == "50"
    assert rows["analytic, order 1"][0] == "not measured"
    for name in ("errors.png", "quality.png"):
        assert (run().out / name).stat().st_size > 1000


def test_what_is_kept_is_not_measured_again_and_not_taken_for_other_numbers(
    run, recipe, monkeypatch
):
    monkeypatch.setattr(recipe.Run, "images", None)
    run().quality()
    monkeypatch.setattr(recipe, "sample", None)
    run().errors()
    with pytest.raises(
        SystemExit, match=r"is of 12 images, and 24 are asked for; use another --out"
    ):
        run(count=24).quality()
    path = run().out / "errors" / recipe.MANY.file
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"weight_hash": "0"}))
    with pytest.raises(SystemExit, match="is of other weights, 0; use another --out"):
        run().errors()
    path.write_text(kept)


def test_a_goal_is_reached_within_its_spread(recipe):
    goal = {"value": 2.0, "std": 0.5}
    assert [recipe.within({"value": v}, goal) for v in (1.0, 2.4, 2.6)] == [True, True, False]
    assert not recipe.within({"value": 2.1}, {"value": 2.0, "std": None})
    methods = [recipe.Method("trailing", 1, steps) for steps in (20, 10, 5)]
    assert recipe.fewest(dict(zip(methods, (True, True, False), strict=True))) == "10"
    assert recipe.fewest(dict.fromkeys(methods, False)) == "none"
    assert recipe.fewest({}) == "not measured"
