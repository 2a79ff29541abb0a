"""The estimated divergence, and the estimators of the ELBO, against closed forms and each other."""

from __future__ import annotations

import math

import pytest
import torch
from pyro.distributions import Normal
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from dwp_pyro.distributions.deep_weight_prior import DeepWeightPrior
from dwp_pyro.inference.batched_elbo import BatchedMeanFieldELBO


def test_divergence_from_a_diagonal_normal_has_the_analytic_mean(linear_gaussian):
    """With an exact encoder the bound on KL(q‖p) is tight: that of a diagonal from a full normal."""
    vae, exact = linear_gaussian((3, 3), latent_size=3, standardised=True)
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


@pytest.mark.parametrize("prior", ["normal", "log-uniform", "dwp"])
def test_batched_elbo_has_the_mean_of_the_stock_one(scene, prior):
    """Two estimators of one number agree within their combined standard error."""
    tiny = scene(prior)
    losses = {}
    for elbo in (BatchedMeanFieldELBO(), TraceMeanField_ELBO()):
        with torch.no_grad():
            draws = [elbo.loss(tiny.model, tiny.guide, *tiny.data) for _ in range(300)]
        losses[type(elbo)] = torch.tensor(draws, dtype=torch.double)
    ours, stock = losses.values()
    error = (ours.var() / len(ours) + stock.var() / len(stock)).sqrt()
    assert error < 0.01 * stock.mean().abs()
    assert abs(ours.mean() - stock.mean()) < 4 * error
