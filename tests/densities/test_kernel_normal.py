"""`KernelNormal`: a multivariate Normal over kernels, and its divergence from learned priors."""

from __future__ import annotations

import pytest
import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from torch.testing import assert_close

from dwp_pyro.densities.kernel_normal import KernelNormal
from dwp_pyro.densities.mixture import KernelMixture
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior
from tests.conftest import random_density

SHAPE = (3, 2, 2, 2, 2)


def tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double)


@pytest.fixture
def normal() -> KernelNormal:
    return KernelNormal(tensor(*SHAPE), tensor(*SHAPE).exp(), random_density("gaussian", SHAPE[2:]).scale_tril)


def multivariate(q: KernelNormal) -> MultivariateNormal:
    """Return the same as PyTorch's distribution: [3, 2] kernels of 8 weights, covariance A S² Aᵀ."""
    return MultivariateNormal(q.loc.flatten(2), scale_tril=q.scale_tril * q.scale.flatten(2).unsqueeze(-2))


def test_it_is_the_multivariate_normal(normal):
    """Density, entropy, mean and variance equal PyTorch's; shapes are those of a distribution over kernels."""
    same = multivariate(normal)
    assert (normal.batch_shape, normal.event_shape) == (SHAPE[:2], SHAPE[2:])
    w = normal.sample((5,))
    assert w.shape == (5, *SHAPE)
    assert_close(normal.log_prob(w), same.log_prob(w.flatten(3)))
    assert_close(normal.entropy(), same.entropy())
    assert_close(normal.mean.flatten(2), same.mean)
    assert_close(normal.variance.flatten(2), same.variance)
    assert_close(normal.expand([4, 3, 2]).log_prob(w[:4]), normal.log_prob(w[:4]))
    with pytest.raises(ValueError):
        normal.log_prob(torch.full(SHAPE, torch.nan).double())


def test_samples_have_its_mean_and_covariance(normal):
    """40,000 draws of one kernel, to four standard errors of each entry."""
    draws = normal.expand(SHAPE[:2]).rsample((40_000,))[:, 1, 1].flatten(1)
    same = multivariate(normal)
    covariance = same.covariance_matrix[1, 1]
    variances = covariance.diagonal()
    assert ((draws.mean(0) - same.mean[1, 1]).abs() < 4 * (variances / 40_000).sqrt()).all()
    error = ((variances[:, None] * variances + covariance.square()) / 40_000).sqrt()
    assert ((draws.T.cov() - covariance).abs() < 4.5 * error).all()


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_divergence_from_a_gaussian_is_that_of_multivariate_normals(normal, scale):
    density = random_density("gaussian", SHAPE[2:])
    center = tensor(*SHAPE)
    prior = DeepWeightPrior(density, center=center, scale=scale)
    p = MultivariateNormal(center.flatten(2), scale_tril=scale * density.scale_tril)
    assert_close(kl_divergence(normal, prior), kl_divergence(multivariate(normal), p))
    assert_close(kl_divergence(normal.to_event(2), prior.to_event(2)), kl_divergence(multivariate(normal), p).sum())


def test_divergence_reaches_zero_in_the_coordinates_of_the_prior_alone():
    """The minimum over diagonal q in w is ½ (Σ log Λᵢᵢ − log |Λ|)."""
    density = random_density("gaussian", SHAPE[2:])
    prior = DeepWeightPrior(density, scale=0.4)
    mean = density.loc.view(SHAPE[2:])
    q = KernelNormal(mean, torch.full_like(mean, 0.4), density.scale_tril)
    assert_close(kl_divergence(q, prior), torch.zeros((), dtype=torch.double), atol=1e-12, rtol=0)
    precision = (0.16 * density.scale_tril @ density.scale_tril.T).inverse()
    best = Normal(mean, precision.diagonal().rsqrt().view_as(mean)).to_event(3)
    least = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    assert_close(kl_divergence(best, prior), least)
    assert least > 0.3


@pytest.mark.parametrize("family", ["gaussian", "mixture", "flow"])
def test_divergence_is_differentiable_also_in_the_scale_of_the_prior(family):
    """Against finite differences at fixed draws, in mean, log s and log c."""
    density = random_density(family, (2, 2)).requires_grad_(False)
    root = random_density("gaussian", (2, 2)).scale_tril

    def divergence(loc: Tensor, log_scale: Tensor, log_c: Tensor) -> Tensor:
        torch.manual_seed(1)
        return kl_divergence(KernelNormal(loc, log_scale.exp(), root, 2), DeepWeightPrior(density, scale=log_c.exp()))

    arguments = [tensor(3, 2, 2).requires_grad_(), tensor(3, 2, 2).requires_grad_(), tensor().requires_grad_()]
    assert torch.autograd.gradcheck(divergence, arguments)


@pytest.mark.parametrize("particles", [1, 3])
def test_chunks_change_neither_value_nor_gradient(monkeypatch, particles):
    """Seven kernels in chunks of two; particles do not affect an exact density."""
    prior = DeepWeightPrior(random_density("mixture", (2, 2)).requires_grad_(False), particles, scale=0.7)
    w = tensor(7, 2, 2).requires_grad_()
    factors = tensor(7)
    whole = prior.log_prob(w)
    monkeypatch.setattr("dwp_pyro.priors.deep_weight_prior._CHUNK", 2 * particles)
    parts = prior.log_prob(w)
    assert parts.requires_grad
    assert_close(parts, whole)
    calls = []
    evaluate = KernelMixture.log_prob_standardized
    monkeypatch.setattr(
        KernelMixture, "log_prob_standardized", lambda self, u, *args: calls.append(len(u)) or evaluate(self, u, *args)
    )
    with torch.no_grad():  # as the summary of a run evaluates it
        assert_close(prior.log_prob(w), whole)
    assert calls == [2, 2, 2, 1]
    assert_close(
        torch.autograd.grad(parts @ factors, w), torch.autograd.grad(whole @ factors, w), rtol=1e-10, atol=1e-12
    )
    monkeypatch.setattr("dwp_pyro.priors.deep_weight_prior._CHUNK", 0)
    assert_close(prior.log_prob(w[0]), whole[0])  # one kernel, without a batch
