"""The full-covariance Gaussian of a set of kernels: the control of every prior, and its coordinates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

__all__ = ["fit_gaussian"]

_SHRINKAGES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
_FOLDS = 5
_SMALLEST_VARIANCE = 1e-12  # of a weight; kernels are of the order of 0.01 to 1


def fit_gaussian(kernels: Tensor, identities: Tensor) -> MultivariateNormal:
    """A Gaussian over flattened kernels, its covariance (1−a)·S + a·(tr S / D)·I.

    The shrinkage a is chosen by cross-validated log-likelihood, so that few kernels, or kernels that
    span a subspace, give a proper density too.

    Args:
        kernels: [n, k₁, …, k_d], n ≥ 1.
        identities: [n] integers: the kernel that each is, or is a snapshot of. Snapshots of one kernel are
            held out together, or its near copies would call for no shrinkage at all.

    Returns:
        A distribution over [D], in the kernels' dtype.
    """
    flat = kernels.flatten(1).double()
    folds = identities.unique(return_inverse=True)[1] % _FOLDS

    def score(shrinkage: float) -> float:
        total = 0.0
        for fold in folds.unique():
            total += float(_gaussian(flat[folds != fold], shrinkage).log_prob(flat[folds == fold]).sum())
        return total

    enough = len(folds.unique()) > 1
    best = _gaussian(flat, max(_SHRINKAGES, key=score) if enough else 1.0)
    return MultivariateNormal(best.loc.to(kernels.dtype), scale_tril=best.scale_tril.to(kernels.dtype))


def _gaussian(flat: Tensor, shrinkage: float) -> MultivariateNormal:
    loc = flat.mean(0)
    size = flat.shape[1]
    covariance = (flat - loc).T @ (flat - loc) / len(flat)
    identity = torch.eye(size, dtype=flat.dtype)
    shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / size * identity
    # The floor serves kernels that are all alike: their covariance is 0.
    return MultivariateNormal(loc, covariance_matrix=shrunk + _SMALLEST_VARIANCE * identity)
