"""Mixture and flow integrate to one, and their samples follow their densities."""

from __future__ import annotations

import math

import pytest
import torch
from pyro.distributions import Normal
from scipy import stats
from torch import Tensor
from torch.distributions import kl_divergence

from dwp_pyro.densities.kernel_distribution import KernelDistribution
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior
from tests.conftest import random_density

pytestmark = pytest.mark.slow

DRAWS = 50_000


def grid(density: KernelDistribution, side: int = 1601) -> tuple[Tensor, Tensor]:
    """Return kernels of two weights on a grid over ±24 of the standardized kernel u, and the mass of each cell."""
    u = torch.linspace(-24, 24, side, dtype=torch.double)
    points = torch.cartesian_prod(u, u)
    w = (density.loc + points @ density.scale_tril.T).reshape(-1, *density.kernel_shape)
    cell = (u[1] - u[0]) ** 2 * density.log_abs_det().exp()
    return w, density.log_prob_estimate(w).exp() * cell


@pytest.mark.parametrize("family", ["mixture", "flow"])
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_two_weights_integrate_to_one_and_samples_follow_the_density(family, seed):
    """Moments and nonlinear functions of 50,000 draws, within 4.5 standard errors."""
    torch.manual_seed(seed)
    density = random_density(family, (1, 2))
    w, mass = grid(density)
    assert abs(mass.sum() - 1) < 1e-5

    def functions(w: Tensor) -> Tensor:
        x, y = w.flatten(1).unbind(1)
        return torch.stack([x, y, x.square(), y.square(), x * y, x.sin() * y.cos(), (x > y).double()])

    values = functions(density.rsample((DRAWS,)))
    error = values.std(1) / math.sqrt(DRAWS)
    truth = functions(w) @ mass
    assert ((values.mean(1) - truth).abs() < 4.5 * error + 1e-4).all()


@torch.no_grad()
def test_one_weight_of_a_mixture():
    """∫ p = 1, and a Kolmogorov–Smirnov test against the mixture of the components' distributions."""
    density = random_density("mixture", (1,))
    w = torch.linspace(-40, 40, 40_001, dtype=torch.double)
    p = density.log_prob_estimate(w[:, None]).exp()
    assert abs(torch.trapezoid(p, w) - 1) < 1e-9
    a, weights = density.scale_tril.squeeze(), density.log_weights.exp()
    locs, scales = density.loc + a * density.means.squeeze(), a / density.whitenings.squeeze()

    def cdf(w):
        return sum(
            float(c) * stats.norm.cdf(w, float(m), float(s)) for c, m, s in zip(weights, locs, scales, strict=True)
        )

    assert stats.kstest(density.rsample((20_000,)).flatten().numpy(), cdf).pvalue > 1e-3


@torch.no_grad()
def test_a_mixture_has_the_moments_of_its_components():
    """Σ π_c m_c and Σ π_c (S_c + m_c m_cᵀ) in 27 dimensions, within 5 standard errors of 50,000 draws."""
    density = random_density("mixture")
    draws = density.rsample((DRAWS,)).flatten(1)
    weights = density.log_weights.exp()
    locs = density.loc + density.means @ density.scale_tril.T
    roots = density.scale_tril @ torch.linalg.inv(density.whitenings)
    seconds = roots @ roots.mT + locs[:, :, None] * locs[:, None, :]
    products = draws[:, :, None] * draws[:, None, :]
    for sample, truth in ((draws, weights @ locs), (products, torch.einsum("c,cij->ij", weights, seconds))):
        assert ((sample.mean(0) - truth).abs() < 5 * sample.std(0) / math.sqrt(DRAWS)).all()


@torch.no_grad()
def test_a_prior_with_center_and_scale_has_their_moments():
    """Mean a and covariance c² AAᵀ of each kernel of a Gaussian prior, within 4.5 standard errors."""
    density = random_density("gaussian", (2, 2))
    center = 3 * torch.randn(2, 1, 2, 2, dtype=torch.double)
    draws = DeepWeightPrior(density, center=center, scale=0.25).expand([2, 3]).sample((DRAWS,)).flatten(3)
    truth = 0.25**2 * density.scale_tril @ density.scale_tril.T
    variance = truth.diagonal()
    error = ((variance[:, None] * variance + truth.square()) / DRAWS).sqrt()
    for i in range(2):
        for j in range(3):
            sample = draws[:, i, j]
            assert ((sample.mean(0) - center[i, 0].flatten()).abs() < 4.5 * (variance / DRAWS).sqrt()).all()
            assert ((sample.T.cov() - truth).abs() < 4.5 * error).all()


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_the_closed_form_kl_of_a_gaussian_with_center_and_scale_is_that_of_its_draws(scale):
    """KL(q‖p) = E_q [log q − log p], within 4 standard errors."""
    density = random_density("gaussian", (2, 2))
    prior = DeepWeightPrior(density, center=torch.randn(2, 2, dtype=torch.double), scale=scale)
    q = Normal(torch.randn(2, 2).double(), 0.2 + torch.rand(2, 2).double()).to_event(2)
    w = q.sample((DRAWS,))
    draws = q.log_prob(w) - prior.log_prob(w)
    error = draws.std() / math.sqrt(DRAWS)
    assert error < 0.02 * draws.mean()
    assert abs(draws.mean() - kl_divergence(q, prior)) < 4 * error
