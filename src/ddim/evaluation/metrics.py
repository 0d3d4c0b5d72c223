"""The metrics: numbers that compare two sets of features, [N, D] and [M, D].

Pure functions in float64 and in bounded memory; ``samples`` are judged by ``reference``. A Frechet
distance needs only :class:`Statistics`, sums that add up across batches. A DDIMError refuses what
is no set of features, too few of them, and features that are not finite.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.bounds import LARGEST_SEED
from ddim.core.checks import check_kind, check_samples, check_whole, wrong_argument
from ddim.errors import DDIMError

__all__ = [
    "NEIGHBOURS",
    "Statistics",
    "class_histogram",
    "frechet_distance",
    "kernel_distance",
    "nearest_distances",
    "precision",
    "project",
    "recall",
    "sliced_wasserstein",
    "total_variation",
]

NEIGHBOURS = 5
"""k of precision and recall."""

_CHUNK = 2**22
"""Entries of a distance or kernel matrix that are held at a time."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a Frechet distance needs of a set of features; two sets add up to their union.

    Attributes:
        count: N, the number of images.
        total: Sum of the features, [D], float64.
        outer: Sum of their outer products, [D, D], float64.
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Statistics":
        """The statistics of features [N, D]; N may be 0."""
        _check_features(features=features)
        exact = features.double()
        return cls(len(features), exact.sum(0), exact.T @ exact)

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.count + other.count, self.total + other.total, self.outer + other.outer
        )

    @property
    def mean(self) -> Tensor:
        """[D], float64."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """[D, D], float64; needs N > 1."""
        return (self.outer - torch.outer(self.total, self.mean)) / (self.count - 1)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    r"""The squared Frechet distance of two Gaussians with these means and covariances.

    .. math:: |\mu_a - \mu_b|^2 + \mathrm{tr}\left(A + B - 2 (A^{1/2} B A^{1/2})^{1/2}\right)

    Both roots are of symmetric matrices, so two eigen-decompositions give them, for singular
    covariances too. Each set needs N > 1; the distance of equal sets is 0 up to rounding.

    References:
        Dowson, Landau. The Frechet Distance between Multivariate Normal Distributions. 1982.
        Heusel et al. GANs Trained by a Two Time-Scale Update Rule. 2017. Eq. 6.
        https://arxiv.org/abs/1706.08500
    """
    for name, given in (("a", a), ("b", b)):
        check_kind(name, given, Statistics, "Statistics, such as Statistics.of(features)")
        if given.count < 2 or not bool(given.outer.isfinite().all()):
            raise wrong_argument(name, "be of at least 2 images with finite features", given)
    if len(a.total) != len(b.total):
        sizes = f"{len(a.total)} and {len(b.total)}"
        raise DDIMError(f"a and b must be of features of one length; got {sizes}.")
    first, second = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(first)
    # The eigenvalues of a covariance are below 0 by rounding only.
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * cross)


def kernel_distance(samples: Tensor, reference: Tensor) -> float:
    r"""KID: the unbiased estimate of the squared maximum mean discrepancy under a cubic kernel,
    over all pairs.

    .. math:: k(x, y) = (x \cdot y / D + 1)^3

    Its mean does not depend on N and M, both above 1; it can be negative if the sets are alike.

    References:
        Binkowski et al. Demystifying MMD GANs. 2018. Eq. 4 and Sec. 3.
        https://arxiv.org/abs/1801.01401
    """
    _check_sets(samples, reference, least=2)
    x, y = samples.double(), reference.double()

    def within(z: Tensor) -> Tensor:
        own = (z.square().mean(1) + 1).pow(3).sum()
        return (_kernel_sum(z, z) - own) / (len(z) * (len(z) - 1))

    return float(within(x) + within(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y)))


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    parts = [(rows @ y.T / x.shape[1] + 1).pow(3).sum() for rows in _chunks(x, len(y))]
    return torch.stack(parts).sum()


def precision(samples: Tensor, reference: Tensor, *, k: int = NEIGHBOURS) -> float:
    """The fraction of the samples that are no farther from some reference image than that image's
    k-th neighbour in the reference.

    Args:
        samples: [N, D].
        reference: [M, D], M > k. The distances shrink as M grows: compare results of equal M only.
        k: The neighbour that gives the distance.

    Returns:
        In [0, 1]; 1 is best.

    References:
        Kynkaanniemi et al. Improved Precision and Recall Metric for Assessing Generative Models.
        2019. Eq. 1 and 2. https://arxiv.org/abs/1904.06991
    """
    k = check_whole("k", k, least=1)
    _check_sets(samples, reference, least=1)
    if len(reference) <= k:
        raise wrong_argument("reference", f"hold more than k = {k} images", reference)
    x, y = samples.double(), reference.double()
    # The smallest of k + 1 is the distance of an image to itself.
    reach = torch.cat(
        [_squared(rows, y).topk(k + 1, largest=False).values[:, k] for rows in _chunks(y, len(y))]
    )
    inside = [(_squared(rows, y) <= reach).any(1) for rows in _chunks(x, len(y))]
    return float(torch.cat(inside).double().mean())


def recall(samples: Tensor, reference: Tensor, *, k: int = NEIGHBOURS) -> float:
    """:func:`precision` with the sets exchanged."""
    k = check_whole("k", k, least=1)
    _check_sets(samples, reference, least=1)
    if len(samples) <= k:
        raise wrong_argument("samples", f"hold more than k = {k} images", samples)
    return precision(reference, samples, k=k)


def nearest_distances(samples: Tensor, reference: Tensor) -> Tensor:
    """Distance of each sample to the nearest reference image, [N], float64; 0 is a copy."""
    _check_sets(samples, reference, least=1)
    y = reference.double()
    parts = [_squared(rows, y).amin(1).sqrt() for rows in _chunks(samples.double(), len(y))]
    return torch.cat(parts)


def project(features: Tensor, *, directions: int = 128, seed: int = 0) -> Tensor:
    """Projects features [N, D] on fixed random unit vectors: [N, directions], float32."""
    _check_features(features=features)
    directions = check_whole("directions", directions, least=1, most=10**6)
    seed = check_whole("seed", seed, least=0, most=LARGEST_SEED)
    size, generator = (features.shape[1], directions), torch.Generator().manual_seed(seed)
    drawn = torch.randn(size, generator=generator, dtype=torch.float64)
    projected: Tensor = features.double() @ (drawn / drawn.norm(dim=0))
    return projected.float()


def sliced_wasserstein(samples: Tensor, reference: Tensor) -> float:
    r"""The sliced 2-Wasserstein distance of two sets of projections (:func:`project`), [N, P] each.

    .. math:: \left(\frac{1}{P N} \sum_p \sum_i (x_{p,(i)} - y_{p,(i)})^2\right)^{1/2}

    with sorted columns: in one dimension the optimal transport pairs equal ranks.

    References:
        Bonneel et al. Sliced and Radon Wasserstein Barycenters of Measures. 2015. Sec. 2.
        https://doi.org/10.1007/s10851-014-0506-3
    """
    _check_sets(samples, reference, least=1)
    if len(samples) != len(reference):
        sizes = f"{len(samples)} and {len(reference)}"
        raise DDIMError(f"samples and reference must be as many; got {sizes}.")
    x, y = samples.double().sort(0).values, reference.double().sort(0).values
    return float((x - y).square().mean().sqrt())


def class_histogram(classes: Tensor, *, count: int) -> list[int]:
    """The number of images in each of ``count`` classes."""
    count = check_whole("count", count, least=1, most=10**6)
    is_whole = isinstance(classes, Tensor) and classes.ndim == 1 and not classes.is_floating_point()
    if not is_whole or (len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < count):
        raise wrong_argument("classes", f"be whole numbers from 0 to {count - 1}, [N]", classes)
    return torch.bincount(classes, minlength=count).tolist()


def total_variation(samples: list[int], reference: list[int]) -> float:
    """The total variation distance of two histograms: the fraction of images of a wrong class."""
    for name, given in (("samples", samples), ("reference", reference)):
        counts = given if isinstance(given, (list, tuple)) else []
        is_histogram = all(type(n) is int and 0 <= n < 2**62 for n in counts)
        if not counts or not is_histogram or sum(counts) == 0:
            raise wrong_argument(name, "be a histogram, the number of images of each class", given)
    if len(samples) != len(reference):
        sizes = f"{len(samples)} and {len(reference)}"
        raise DDIMError(f"samples and reference must be of the same classes; got {sizes} of them.")
    x, y = (torch.tensor(h, dtype=torch.float64) / sum(h) for h in (samples, reference))
    return float((x - y).abs().sum() / 2)


def _check_features(**given: Tensor) -> None:
    """Refuses what is no set of features [N, D]."""
    check_samples(**given)
    for name, features in given.items():
        if features.ndim != 2 or features.shape[1] == 0:
            raise wrong_argument(name, "be features [N, D], one row an image", features)


def _check_sets(samples: Tensor, reference: Tensor, *, least: int) -> None:
    """Refuses two sets that cannot be compared."""
    given = {"samples": samples, "reference": reference}
    _check_features(**given)
    for name, features in given.items():
        if len(features) < least or not bool(features.isfinite().all()):
            wanted = f"hold at least {least} image{'s' * (least > 1)} with finite features"
            raise wrong_argument(name, wanted, features)
    if samples.shape[1] != reference.shape[1]:
        sizes = f"{samples.shape[1]} and {reference.shape[1]}"
        raise DDIMError(f"samples and reference must have features of one length; got {sizes}.")


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [N, M]; float64 keeps what the subtraction cancels."""
    return (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * (x @ y.T)).clamp(min=0)


def _chunks(x: Tensor, columns: int) -> Iterator[Tensor]:
    rows = max(1, _CHUNK // columns)
    return (x[first : first + rows] for first in range(0, len(x), rows))
