r"""Count, mean and unbiased covariance of features, by float64 sums that add up across batches."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Statistics", "frechet_distance"]


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
    first, second = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(first)
    # The eigenvalues of a covariance are below 0 by rounding only.
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * cross)
