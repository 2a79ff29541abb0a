"""The full-covariance Gaussian: accurate for many kernels, proper for few."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from dwp_pyro.densities.gaussian import fold_moments, gaussian_of


def test_many_kernels_recover_their_mean_and_covariance():
    """Within 5 standard errors of the sample moments: hardly any shrinkage is chosen."""
    root = torch.eye(4, dtype=torch.double) + 0.6 * torch.randn(4, 4, dtype=torch.double).tril(-1)
    truth = MultivariateNormal(torch.randn(4, dtype=torch.double), scale_tril=root)
    count = 20_000
    fit = gaussian_of(fold_moments(truth.sample((count,)).reshape(count, 2, 2), torch.arange(count)))
    assert ((fit.mean - truth.mean).abs() < 5 * (truth.variance / count).sqrt()).all()
    covariance = truth.covariance_matrix
    error = ((truth.variance[:, None] * truth.variance + covariance.square()) / count).sqrt()
    # A shrinkage of 1e-3 moves an entry by less than its error.
    assert ((fit.covariance_matrix - covariance).abs() < 5 * error).all()


@pytest.mark.parametrize("count", [1, 2, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("identity", [torch.zeros_like, lambda index: index], ids=["one kernel", "all different"])
def test_fewer_kernels_than_weights_give_a_proper_density(count, dtype, identity):
    """The fitted covariance is not singular; the mean is kept."""
    kernels = torch.randn(count, 3, 3, 3, dtype=dtype)
    fit = gaussian_of(fold_moments(kernels, identity(torch.arange(count))))
    assert_close(fit.loc, kernels.double().flatten(1).mean(0))
    assert torch.linalg.matrix_rank(fit.scale_tril) == 27
    assert fit.log_prob(torch.randn(4, 27, dtype=dtype)).isfinite().all()


def test_two_kernels_show_no_covariance():
    """A fold of one kernel scores all shrinkages alike; the strongest is chosen."""
    fit = gaussian_of(fold_moments(torch.randn(2, 3, 3, 3), torch.arange(2)))
    variances = fit.covariance_matrix.diagonal()
    assert_close(fit.covariance_matrix, variances.mean() * torch.eye(27, dtype=torch.double))


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 10])
def test_identical_kernels_give_a_finite_density(value, count):
    """Identical kernels have covariance 0."""
    kernels = torch.full((count, 3, 3), value)
    fit = gaussian_of(fold_moments(kernels, torch.arange(count)))
    assert fit.log_prob(kernels.flatten(1)).isfinite().all()
    assert fit.log_prob(torch.full((9,), 0.31)).isfinite()


@pytest.mark.parametrize(("mean", "spread"), [(3.3, 0.0), (1e6, 1.0), (100.0, 1e-4), (1e3, 1e-2)])
def test_a_mean_far_above_the_spread_does_not_hide_it(mean, spread):
    """Kernels of a plane, so that their covariance is singular."""
    plane = torch.randn(2, 9, dtype=torch.double)
    kernels = (mean + spread * torch.randn(1000, 2, dtype=torch.double) @ plane).reshape(1000, 3, 3)
    fit = gaussian_of(fold_moments(kernels, torch.arange(1000)))
    assert fit.log_prob(kernels.flatten(1)).isfinite().all()
    expected = kernels.flatten(1).T.cov(correction=0).trace()
    assert_close(fit.covariance_matrix.trace(), expected, rtol=1e-3, atol=1e-10)


def test_snapshots_of_a_kernel_are_held_out_together():
    """Ten kernels repeated twenty times: copies in other folds would favor no shrinkage."""
    kernels = torch.randn(10, 9, dtype=torch.double) @ torch.randn(9, 9, dtype=torch.double)
    snapshots = kernels.repeat(20, 1).reshape(200, 3, 3)
    together = gaussian_of(fold_moments(snapshots, torch.arange(200) % 10))
    apart = gaussian_of(fold_moments(snapshots, torch.arange(200) // 10))
    smallest = [torch.linalg.eigvalsh(fit.covariance_matrix)[0] for fit in (together, apart)]
    assert smallest[0] > 10 * smallest[1]
    assert_close(together.covariance_matrix.trace(), apart.covariance_matrix.trace())
