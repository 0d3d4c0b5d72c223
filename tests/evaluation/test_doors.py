"""The functions that docs/evaluation.md names are called with every kind of wrong value, as the
names of the package itself are."""

import pytest
import torch
from tests.test_public_calls import WRONG, fault, run

from ddim.errors import DDIMError
from ddim.evaluation.metrics import (
    Statistics,
    class_histogram,
    frechet_distance,
    kernel_distance,
    nearest_distances,
    precision,
    project,
    recall,
    sliced_wasserstein,
    total_variation,
)
from ddim.evaluation.protocol import collect, collect_reference, load_panel, measure, sample_cuts

A, B = (torch.randn(9, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
IMAGES = torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
SETS = {"samples": A, "reference": B}
PANEL = load_panel(["kid-pixels", "swd-pixels"], image_shape=(1, 28, 28))
REFERENCE = collect_reference(IMAGES.split(8), PANEL, available=32, counts=[12])
SAMPLES = collect(IMAGES.split(8), PANEL, cuts=sample_cuts([12]))

CALLS = {
    "Statistics.of": (Statistics.of, {"features": A}),
    "frechet_distance": (frechet_distance, {"a": Statistics.of(A), "b": Statistics.of(B)}),
    "kernel_distance": (kernel_distance, SETS),
    "precision": (precision, {**SETS, "k": 3}),
    "recall": (recall, {**SETS, "k": 3}),
    "nearest_distances": (nearest_distances, SETS),
    "project": (project, {"features": A, "directions": 3, "seed": 1}),
    "sliced_wasserstein": (sliced_wasserstein, SETS),
    "class_histogram": (class_histogram, {"classes": torch.tensor([0, 2, 3]), "count": 4}),
    "total_variation": (total_variation, {"samples": [1, 2], "reference": [2, 1]}),
    "load_panel": (
        load_panel,
        {"names": ["kid-pixels"], "image_shape": (1, 28, 28), "weights": None},
    ),
    "collect": (collect, {"images": IMAGES.split(8), "panel": PANEL, "cuts": [12]}),
    "collect_reference": (
        collect_reference,
        {"images": IMAGES.split(8), "panel": PANEL, "available": 32, "counts": [12]},
    ),
    "sample_cuts": (sample_cuts, {"counts": [12]}),
    "measure": (measure, {"samples": SAMPLES, "reference": REFERENCE, "panel": PANEL, "count": 12}),
}
OTHER_WORDS = {"names": "metrics must be named", "available": "images hold 32 images"}
OTHER_WORDS |= {"counts": "needs at least 2 images"}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_value_works_or_is_refused_by_name(name):
    call, arguments = CALLS[name]
    run(call, arguments)
    for argument in arguments:
        for kind in WRONG:
            wrong = fault(call, arguments, argument, kind)
            if OTHER_WORDS.get(argument, "no such words") not in wrong:
                assert not wrong, f"{name}({argument}: {kind}): {wrong}"


@pytest.mark.parametrize("metric", [kernel_distance, precision, nearest_distances])
def test_features_that_are_not_finite_are_no_distance(metric):
    damaged = A.clone()
    damaged[3, 2] = torch.nan
    for sets in ((damaged, B), (B, damaged)):
        with pytest.raises(DDIMError, match="with finite features"):
            metric(*sets)
    with pytest.raises(DDIMError, match="with finite features"):
        frechet_distance(Statistics.of(A), Statistics.of(damaged))


def test_counts_that_were_not_collected_are_told():
    with pytest.raises(DDIMError, match="was not collected for kid-pixels of count=9 images"):
        measure(SAMPLES, REFERENCE, PANEL, count=9)
    uncut = collect(IMAGES.split(8), PANEL, cuts=[])
    with pytest.raises(DDIMError, match=r"not collected with cuts at 0 and 4; give collect the"):
        measure(uncut, REFERENCE, PANEL, count=12)
