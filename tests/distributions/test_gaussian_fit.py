"""The Gaussian control: true where kernels are many, proper where they are few."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from dwp_pyro.distributions.gaussian_fit import fit_gaussian


def test_many_kernels_give_back_their_mean_and_covariance():
    """Within 5 standard errors of the sample moments: hardly any shrinkage is chosen."""
    root = torch.eye(4, dtype=torch.double) + 0.6 * torch.randn(4, 4, dtype=torch.double).tril(-1)
    truth = MultivariateNormal(torch.randn(4, dtype=torch.double), scale_tril=root)
    count = 20_000
    fit = fit_gaussian(truth.sample((count,)).reshape(count, 2, 2), torch.arange(count) % 4)
    assert ((fit.mean - truth.mean).abs() < 5 * (truth.variance / count).sqrt()).all()
    covariance = truth.covariance_matrix
    error = ((truth.variance[:, None] * truth.variance + covariance.square()) / count).sqrt()
    # A shrinkage of 1e-3 moves an entry by less than its error.
    assert ((fit.covariance_matrix - covariance).abs() < 5 * error).all()


@pytest.mark.parametrize("count", [1, 2, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_kernels_than_weights_give_a_proper_density(count, dtype):
    """Their covariance is singular; the fit's is not, and it keeps the dtype and the mean."""
    kernels = torch.randn(count, 3, 3, 3, dtype=dtype)
    fit = fit_gaussian(kernels, torch.zeros(count, dtype=torch.long))
    assert fit.loc.dtype == dtype
    assert_close(fit.loc, kernels.flatten(1).mean(0))
    assert torch.linalg.matrix_rank(fit.scale_tril) == 27
    assert fit.log_prob(torch.randn(4, 27, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 10])
def test_identical_kernels_give_a_finite_density(value, count):
    """Dead kernels have no covariance at all."""
    kernels = torch.full((count, 3, 3), value)
    fit = fit_gaussian(kernels, torch.zeros(count, dtype=torch.long))
    assert fit.log_prob(kernels.flatten(1)).isfinite().all()
    assert fit.log_prob(torch.full((9,), 0.31)).isfinite()


def test_groups_are_held_out_together():
    """Twenty copies of ten kernels: by copy, nothing is ever held out and no shrinkage seems needed."""
    originals = torch.randn(10, 9, dtype=torch.double) @ torch.randn(9, 9, dtype=torch.double)
    copies = originals.repeat(20, 1).reshape(200, 3, 3)
    by_copy = fit_gaussian(copies, torch.arange(200) // 10)
    by_original = fit_gaussian(copies, torch.arange(200) % 10)

    fresh = torch.linalg.eigvalsh(by_copy.covariance_matrix)[0]
    assert torch.linalg.eigvalsh(by_original.covariance_matrix)[0] > 10 * fresh
    assert_close(by_original.covariance_matrix.trace(), by_copy.covariance_matrix.trace())
