"""Metrics equal their definitions pair by pair, and move the right way."""

import numpy as np
import pytest
import torch

from ddim.evaluation import metrics


def draws(count, dimensions=6, *, seed=0):
    return torch.randn((count, dimensions), generator=torch.Generator().manual_seed(seed))


def modes(count, *, kinds=4, dimensions=6, seed=0):
    """Tight clusters around far corners."""
    corners = 10 * torch.eye(dimensions)[:kinds]
    return corners[torch.arange(count) % kinds] + 0.1 * draws(count, dimensions, seed=seed)


def naive_kernel_distance(x, y):
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    within = [
        sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j)
        / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    return sum(within) - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def naive_precision(x, y, k):
    between = torch.cdist(y.double(), y.double()).fill_diagonal_(float("inf"))
    reach = between.sort(1).values[:, k - 1]
    return float((torch.cdist(x.double(), y.double()) <= reach).any(1).double().mean())


@pytest.fixture(params=[2**22, 64])
def chunks(request, monkeypatch):
    """In one piece, and in many."""
    monkeypatch.setattr(metrics, "_CHUNK", request.param)


@pytest.mark.usefixtures("chunks")
def test_kernel_distance_is_its_definition():
    x, y = draws(23), draws(17, seed=1) + 0.5
    assert metrics.kernel_distance(x, y) == pytest.approx(naive_kernel_distance(x, y), rel=1e-10)


def test_kernel_distance_is_unbiased_and_rises_with_noise():
    alike = [
        metrics.kernel_distance(draws(40, seed=2 * s), draws(40, seed=2 * s + 1))
        for s in range(200)
    ]
    assert abs(np.mean(alike)) < 3 * np.std(alike) / np.sqrt(200)
    assert min(alike) < 0
    x, y, noise = draws(500), draws(500, seed=1), draws(500, seed=2)
    values = [metrics.kernel_distance(x + s * noise, y) for s in (0, 1, 2)]
    assert values == sorted(values)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_torchmetrics_kernel_distance_agrees_given_the_same_features():
    image = pytest.importorskip("torchmetrics.image.kid")

    class Features(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.float().flatten(1) / 255

    metric = image.KernelInceptionDistance(feature=Features(), subsets=1, subset_size=60)
    x, y = torch.randint(
        0, 256, (2, 60, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    metric.update(x, real=True)
    metric.update(y // 2, real=False)
    ours = metrics.kernel_distance((y // 2).flatten(1) / 255, x.flatten(1) / 255)
    assert ours == pytest.approx(float(metric.compute()[0]), rel=1e-4)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("k", [1, 5])
def test_precision_and_recall_are_their_definition(k):
    x, y = draws(60), 1.5 * draws(40, seed=1)
    assert 0 < naive_precision(x, y, k) < 1 or k == 5
    assert metrics.precision(x, y, k=k) == naive_precision(x, y, k)
    assert metrics.recall(x, y, k=k) == naive_precision(y, x, k)


def test_dropped_modes_lower_recall_and_not_precision():
    real = modes(200)
    whole, half = modes(200, seed=1), modes(200, kinds=2, seed=1)
    assert metrics.recall(half, real) <= metrics.recall(whole, real) / 1.5
    assert metrics.precision(half, real) > 0.8
    assert metrics.precision(half + 5, real) == 0


@pytest.mark.usefixtures("chunks")
def test_nearest_distances_find_copies():
    y = draws(50)
    expected = torch.cdist(draws(9, seed=1).double(), y.double()).amin(1)
    torch.testing.assert_close(metrics.nearest_distances(draws(9, seed=1), y), expected)
    assert metrics.nearest_distances(y[3:5], y).max() < 1e-6


def test_sliced_wasserstein_of_one_direction_is_one_dimensional_transport():
    x, y = torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([[2.0], [6.0], [4.0]])
    assert metrics.sliced_wasserstein(x, y) == pytest.approx(((1 + 4 + 9) / 3) ** 0.5)
    assert metrics.sliced_wasserstein(x, x.flip(0)) == 0


def test_a_shift_moves_the_sliced_distance_by_its_part_along_each_direction():
    x = draws(100, 20)
    shift = torch.full((20,), 0.7)
    distance = metrics.sliced_wasserstein(metrics.project(x + shift), metrics.project(x))
    expected = metrics.project(shift[None]).double().square().mean().sqrt()
    assert distance == pytest.approx(float(expected), rel=1e-5)
    assert distance == pytest.approx(
        0.7, rel=0.2
    )  # the mean square of a unit vector's part is 1 / D


def test_projections_are_of_unit_length_and_follow_their_seed():
    directions = metrics.project(torch.eye(20))
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(128))
    assert torch.equal(directions, metrics.project(torch.eye(20)))
    assert not torch.equal(directions, metrics.project(torch.eye(20), seed=1))


def test_histograms_of_classes():
    counts = metrics.class_histogram(torch.tensor([0, 2, 2, 1]), count=4)
    assert counts == [1, 1, 2, 0]
    assert metrics.total_variation(counts, [2, 2, 4, 0]) == 0
    assert metrics.total_variation([1, 0], [0, 5]) == 1
    assert metrics.total_variation([3, 1], [1, 1]) == pytest.approx(0.25)
