"""KL estimates and ELBO estimators against closed forms and each other."""

from __future__ import annotations

import math

import pytest
import torch
from pyro.distributions import Normal
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior
from tests.conftest import random_density


def test_divergence_from_a_diagonal_normal_has_the_analytic_mean(linear_gaussian):
    """With an exact encoder the bound on KL(q‖p) is tight: the KL of a diagonal from a full normal."""
    vae, exact = linear_gaussian((3, 3), latent_size=3, standardized=True)
    loc = torch.randn(3, 3, dtype=torch.double)
    scale = 0.2 + torch.rand(3, 3, dtype=torch.double)
    truth = kl_divergence(Normal(loc.flatten(), scale.flatten()).to_event(1), exact)

    draws = 20_000
    q = Normal(loc, scale).expand([draws, 3, 3]).to_event(2)
    estimates = kl_divergence(q, DeepWeightPrior(vae).expand([draws])).detach()
    assert estimates.shape == (draws,)
    error = estimates.std() / math.sqrt(draws)
    assert error < 0.05 * truth
    assert abs(estimates.mean() - truth) < 4 * error


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("family", ["mixture", "flow"])
@torch.no_grad()
def test_divergence_from_an_exact_density_has_the_mean_by_quadrature(family, moved):
    """∫ q (log q − log p) over two weights; the estimate is unbiased, not a bound."""
    density = random_density(family, (1, 2))
    prior = (
        DeepWeightPrior(density, center=torch.randn(1, 2).double(), scale=0.6) if moved else DeepWeightPrior(density)
    )
    q = Normal(torch.randn(1, 2).double(), torch.tensor([[0.3, 0.7]]).double()).to_event(2)
    side = torch.linspace(-8, 8, 801, dtype=torch.double)
    w = q.base_dist.loc + q.base_dist.scale * torch.cartesian_prod(side, side).unflatten(-1, (1, 2))
    integrand = q.log_prob(w).exp() * (q.log_prob(w) - prior.log_prob(w))
    truth = integrand.sum() * (side[1] - side[0]) ** 2 * q.base_dist.scale.prod()

    draws = 20_000
    estimates = kl_divergence(q.expand([draws]), prior.expand([draws]))
    error = estimates.std() / math.sqrt(draws)
    assert error < 0.05 * truth
    assert abs(estimates.mean() - truth) < 4 * error


@pytest.mark.parametrize("moved", [False, True])
def test_the_elbo_has_the_mean_of_the_stock_one(scene, moved):
    """The two estimators agree within their combined standard error; under other priors draw by draw (test_elbo.py)."""
    tiny = scene("dwp", moved=moved)
    losses = {}
    for elbo in (MeanFieldELBO(), TraceMeanField_ELBO()):
        with torch.no_grad():
            draws = [elbo.loss(tiny.model, tiny.guide, *tiny.data) for _ in range(300)]
        losses[type(elbo)] = torch.tensor(draws, dtype=torch.double)
    tested, stock = losses.values()
    error = (tested.var() / len(tested) + stock.var() / len(stock)).sqrt()
    assert error < 0.01 * stock.mean().abs()
    assert abs(tested.mean() - stock.mean()) < 4 * error
