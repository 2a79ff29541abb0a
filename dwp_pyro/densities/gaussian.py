"""The full-covariance Gaussian over convolution kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from dwp_pyro.densities.kernel_distribution import KernelDistribution
from dwp_pyro.densities.kernel_normal import KernelNormal
from dwp_pyro.densities.moments import Moments

__all__ = ["FOLDS", "KernelGaussian", "fold_moments", "gaussian_of", "kernel_gaussian"]

_SHRINKAGES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0)

#: Number of folds of the cross-validation.
FOLDS = 5

_MIN_VARIANCE = 1e-12  # per weight; kernels are of the order of 0.01 to 1


class KernelGaussian(KernelDistribution):
    """The full-covariance Gaussian N(b, A Aᵀ): u ~ N(0, I)."""

    def log_prob_standardized(self, u: Tensor, samples: int = 1) -> Tensor:
        return -0.5 * (u.square().sum(-1) + u.shape[-1] * math.log(2 * math.pi))

    def rsample_standardized(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, len(self.loc), dtype=self.loc.dtype, device=self.loc.device)

    def kl_from_normal(self, q: KernelNormal, center: Tensor, scale: float | Tensor) -> Tensor:
        # E |A⁻¹ (w − a) / c|² for w = m + A_q (s ∘ ε) is |A⁻¹ (m − a) / c|² + Σ_j s_j² |(A⁻¹ A_q)_j|² / c².
        columns = (self.whitening() @ q.scale_tril).square().sum(0)
        spread = (q.scale.flatten(-len(self.kernel_shape)).square() @ columns) / scale**2
        square = self.standardize(q.loc, center, scale).square().sum(-1) + spread
        return 0.5 * (square + len(self.loc) * math.log(2 * math.pi)) + self.log_abs_det(scale) - q.entropy()


def kernel_gaussian(kernel_shape: Sequence[int], folds: Sequence[Moments]) -> KernelGaussian:
    """Return the fit of `gaussian_of` as a density of kernels of this shape."""
    density, fit = KernelGaussian(kernel_shape), gaussian_of(folds)
    density.standardize_by(fit.loc, fit.scale_tril)
    return density


def fold_moments(kernels: Tensor, identities: Tensor) -> list[Moments]:
    """Return the moments of at most five folds of kernels.

    Args:
        kernels: Kernels, [n, k₁, …, k_d], n ≥ 1.
        identities: Number of each kernel, shared by its snapshots, [n] integers. Snapshots of a kernel are held out
            together: near copies in both parts would favor no shrinkage.
    """
    numbers = identities.unique(return_inverse=True)[1] % FOLDS
    return [Moments.of(kernels[numbers == number]) for number in numbers.unique()]


def gaussian_of(folds: Sequence[Moments]) -> MultivariateNormal:
    """Fit a Gaussian of covariance (1−a)·S + a·(tr S / D)·I to the moments of all folds together.

    The shrinkage a maximizes the cross-validated log-likelihood, so that the density is proper for few kernels and for
    kernels that span a subspace. It is 1 for a single fold. Noisy scatters are projected after they are added up.

    Args:
        folds: Moments of kernels that are held out together, at least one.

    Returns:
        A distribution over [D], in float64.
    """

    def score(shrinkage: float) -> float:
        return sum(
            _log_likelihood(_gaussian([*folds[:number], *folds[number + 1 :]], shrinkage), fold)
            for number, fold in enumerate(folds)
        )

    return _gaussian(folds, max(reversed(_SHRINKAGES), key=score) if len(folds) > 1 else 1.0)


def _gaussian(folds: Sequence[Moments], shrinkage: float) -> MultivariateNormal:
    moments = reduce(Moments.__add__, folds).projected()
    loc, covariance = moments.mean, moments.scatter / moments.count
    identity = torch.eye(len(loc), dtype=loc.dtype)
    shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / len(loc) * identity
    # Identical kernels have covariance 0.
    return MultivariateNormal(loc, covariance_matrix=shrunk + _MIN_VARIANCE * identity)


def _log_likelihood(gaussian: MultivariateNormal, moments: Moments) -> float:
    squares = torch.cholesky_solve(moments.projected().scatter_about(gaussian.loc), gaussian.scale_tril).trace()
    return float(moments.count * gaussian.log_prob(gaussian.loc) - 0.5 * squares)
