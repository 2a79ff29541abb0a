"""The log-uniform and the normal prior against quadrature and formulas."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Normal
from scipy import integrate, stats
from torch.distributions import kl_divergence
from torch.testing import assert_close

from dwp_pyro.config.names import PRIORS
from dwp_pyro.priors.log_uniform import LogUniform
from dwp_pyro.priors.make_prior import make_prior


def exact_divergence(log_alpha: float) -> float:
    """Return KL(N(1, α) ‖ p ∝ 1/|w|) less its limit for α → ∞: E log|1 + √α ε| − ½ log α − E log|ε|, ε ~ N(0, 1)."""
    root = np.exp(0.5 * log_alpha)
    pole = -1 / root  # of the logarithm; the integral is split there

    def integrand(e: float) -> float:
        return float(stats.norm.pdf(e) * np.log(abs(1 + root * e)))

    edges = [-10.0, *([pole] if pole > -10 else []), 10.0]
    expectation = sum(integrate.quad(integrand, a, b, limit=200)[0] for a, b in pairwise(edges))
    return expectation - 0.5 * log_alpha + 0.5 * (np.euler_gamma + np.log(2))


def test_log_uniform_divergence_matches_quadrature():
    """Molchanov et al. 2017, eq. 14, is within .0094 of the exact KL; it depends on α = σ²/μ² only."""
    grid = torch.arange(-8, 8.5, 0.5, dtype=torch.double)
    exact = torch.tensor([exact_divergence(float(x)) for x in grid])
    assert_close(exact[-1], torch.zeros(()).double(), atol=1e-3, rtol=0)
    for loc in (1.0, -0.03):
        divergence = kl_divergence(Normal(loc, abs(loc) * (0.5 * grid).exp()), LogUniform())
        assert ((divergence - exact).abs() < 0.015).all()


def test_log_uniform_divergence_drives_weights_to_zero():
    """It increases with |μ| and decreases with σ; float32 gradients are finite at μ = 0 and at tiny scales."""
    loc = torch.tensor([-0.5, -1e-3, 0.0, 1e-3, 2.0], requires_grad=True)
    log_scale = torch.tensor([-1.0, -9.0, -3.0, -4.0, 1.0], requires_grad=True)
    kl_divergence(Normal(loc, log_scale.exp()), LogUniform()).sum().backward()
    assert loc.grad.isfinite().all()
    assert (loc.grad.sign() == loc.detach().sign()).all()
    assert (log_scale.grad[loc != 0] < 0).all()
    assert log_scale.grad.isfinite().all()


def test_log_uniform_has_no_samples():
    prior = LogUniform().expand([2, 3])
    with pytest.raises(NotImplementedError, match="improper"):
        prior.sample()
    with pytest.raises(NotImplementedError, match="improper"):
        pyro.sample("w", prior.to_event(2))


def test_log_uniform_density_and_shapes():
    """log p(w) = −log |w|: equal on equal intervals of log |w|."""
    prior = LogUniform().expand([2, 3])
    assert_close(prior.log_prob(torch.tensor([1.0, -2.0, 4.0])), -torch.tensor([1.0, 2.0, 4.0]).log().expand(2, 3))
    assert prior.to_event(2).log_prob(torch.ones(5, 2, 3)).shape == (5,)
    with pytest.raises(ValueError):
        prior.log_prob(torch.tensor(float("nan")))


@pytest.mark.parametrize("name", ["normal", "log-uniform"])
def test_at_a_site_the_event_is_the_whole_weight(name):
    """One divergence per site, the sum over its weights."""
    weight = torch.zeros(4, 2, 3, 3, 3)
    prior = make_prior(name, "any.weight", weight)
    assert prior.event_shape == weight.shape
    assert prior.batch_shape == ()
    loc, scale = torch.randn(4, 2, 3, 3, 3), 0.1 + torch.rand(4, 2, 3, 3, 3)
    single = Normal(0.0, 1.0) if name == "normal" else LogUniform()
    total = kl_divergence(Normal(loc, scale).to_event(5), prior)
    assert_close(total, kl_divergence(Normal(loc, scale), single).sum())


def test_standard_normal_divergence_in_closed_form():
    """½ Σ (σ² + μ² − 1 − log σ²), in the weight's dtype."""
    weight = torch.zeros(2, 1, 3, 3, dtype=torch.double)
    loc, scale = torch.randn_like(weight), 0.1 + torch.rand_like(weight)
    divergence = kl_divergence(Normal(loc, scale).to_event(4), make_prior("normal", "any.weight", weight))
    assert divergence.dtype == torch.double
    assert_close(divergence, 0.5 * (scale**2 + loc**2 - 1 - 2 * scale.log()).sum())


@pytest.mark.parametrize("name", PRIORS)
def test_every_listed_prior_has_a_density_at_the_sites_of_a_network(scene, name):
    tiny = scene(name)
    conditioned = poutine.condition(tiny.model.network, tiny.guide.means())
    trace = poutine.trace(conditioned).get_trace(tiny.data[0])
    assert trace.observation_nodes == ["0.weight", "3.weight"]
    assert trace.log_prob_sum().isfinite()
