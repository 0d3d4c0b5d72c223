"""Statistics add up, and the distance made of them is the textbook's."""

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings, strategies as st

from ddim.evaluation.metrics import Statistics, frechet_distance


def features(count, dimensions, *, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn((dimensions, dimensions), generator=generator)
    return torch.randn((count, dimensions), generator=generator) @ mixing * scale + shift


def by_sqrtm(a, b):
    """The distance by the definition, with scipy's root of a matrix that is not symmetric."""
    first, second = (torch.cov(x.double().T).numpy() for x in (a, b))
    root = scipy.linalg.sqrtm(first @ second).real
    difference = a.double().mean(0) - b.double().mean(0)
    return float(difference @ difference) + first.trace() + second.trace() - 2 * root.trace()


def test_mean_and_covariance_are_torchs():
    x = features(200, 7, shift=3)
    s = Statistics.of(x)
    assert s.count == 200
    torch.testing.assert_close(s.mean, x.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(s.covariance, torch.cov(x.double().T), rtol=1e-10, atol=1e-10)
    assert s.total.dtype == s.outer.dtype == torch.float64


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(9)), cuts=st.sets(st.integers(1, 99), max_size=8))
def test_batches_in_any_number_and_order_give_one_number(order, cuts):
    x, other = features(100, 16, shift=5), Statistics.of(features(80, 16, seed=1))
    whole = frechet_distance(Statistics.of(x), other)
    edges = [0, *sorted(cuts), 100]
    parts = [Statistics.of(x[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    merged = Statistics.of(x[:0])
    for i in (i for i in order if i < len(parts)):
        merged = merged + parts[i]
    assert merged.count == 100
    assert abs(frechet_distance(merged, other) - whole) < 1e-10 * max(1, whole)


def test_order_of_images_does_not_matter():
    x, y = features(300, 16), Statistics.of(features(300, 16, seed=1))
    turned = x[torch.randperm(300, generator=torch.Generator().manual_seed(3))]
    assert frechet_distance(Statistics.of(x), y) == pytest.approx(
        frechet_distance(Statistics.of(turned), y), rel=1e-10
    )


@pytest.mark.parametrize("count", [400, 20])
def test_it_is_the_definition_by_scipys_root(count):
    x, y = features(count, 12), features(count, 12, seed=1, shift=0.3)
    assert frechet_distance(Statistics.of(x), Statistics.of(y)) == pytest.approx(
        by_sqrtm(x, y), rel=1e-7
    )


def test_closed_form_of_gaussians_that_share_their_axes():
    x = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])
    distance = frechet_distance(Statistics.of(x), Statistics.of(3 * x + torch.tensor([4.0, 0.0])))
    deviations = (x.double().square().sum(0) / 3).sqrt()
    assert distance == pytest.approx(16 + float((2 * deviations).square().sum()), rel=1e-12)


def test_it_is_symmetric_zero_on_itself_and_finite_where_covariances_are_singular():
    x, y = Statistics.of(features(50, 8)), Statistics.of(features(50, 8, seed=2))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    few, flat = Statistics.of(features(3, 8)), Statistics.of(torch.zeros(10, 8))
    assert frechet_distance(few, flat) == pytest.approx(
        float(few.covariance.trace() + few.mean.square().sum()), rel=1e-9
    )


def test_it_grows_with_noise():
    x, y = features(500, 8), features(500, 8)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    distances = [
        frechet_distance(Statistics.of(x + s * noise), Statistics.of(y)) for s in (0, 0.5, 1, 2)
    ]
    assert distances == sorted(distances)
    assert distances[1] > distances[0] + 0.05


def test_torchmetrics_agrees_given_the_same_features():
    image = pytest.importorskip("torchmetrics.image.fid")

    class Features(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1)[:, :12]

    metric = image.FrechetInceptionDistance(
        feature=Features(), normalize=True, input_img_size=(3, 2, 2)
    )
    x, y = torch.rand((2, 200, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    metric.update(x, real=True)
    metric.update(0.8 * y, real=False)
    ours = frechet_distance(*(Statistics.of(images.flatten(1)) for images in (x, 0.8 * y)))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-4)
