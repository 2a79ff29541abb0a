"""The ELBO against its parts computed by hand: sums, scales and gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close

from dwp_pyro.config.names import PRIORS
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.inference.local_reparameterization import LocalReparameterization
from dwp_pyro.models.likelihoods import LIKELIHOODS
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior
from dwp_pyro.priors.prior_scales import PriorScales
from tests.conftest import random_density

MEAN_FIELD = [MeanFieldELBO, TraceMeanField_ELBO]

#: Every prior in its own place, and with a center and a scale where it supports them.
MOVED = [(prior, moved) for prior in PRIORS for moved in (False, True) if not (moved and prior == "log-uniform")]


def at_seed(elbo, tiny, data=None) -> float:
    """Return the loss at a fixed seed."""
    pyro.set_rng_seed(7)
    return elbo().loss(tiny.model, tiny.guide, *(data or tiny.data))


def tempered(beta) -> Callable[[], MeanFieldELBO]:
    return partial(MeanFieldELBO, beta=beta)


@dataclass(frozen=True)
class Parts:
    """The expected parts of `at_seed`: sums over the cases and over the weights."""

    log_likelihood: float
    kl: float


@torch.no_grad()
def parts_at_seed(tiny, data=None) -> Parts:
    """Compute the parts without an ELBO; the scene's encoder is exact, so every draw of z gives the same KL."""
    image, *truth = data or tiny.data
    pyro.set_rng_seed(7)
    weights = tiny.guide()
    trace = poutine.trace(poutine.condition(tiny.model.network, weights)).get_trace(image)
    kl = sum(float(kl_divergence(tiny.guide.distribution(site), trace.nodes[site]["fn"])) for site in weights)
    logits = trace.nodes["_RETURN"]["value"]
    return Parts(50 * float(LIKELIHOODS[tiny.model.likelihood](logits, *truth).sum()), kl)


@pytest.mark.parametrize(("prior", "moved"), MOVED)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_loss_is_its_parts(scene, prior, moved, likelihood, beta):
    """−N/B Σ log p(y|x, W) + β Σ KL(q‖p); the plate does not scale the KL."""
    tiny = scene(prior, likelihood, moved=moved)
    batch = [x[1:2] for x in tiny.data]
    parts = parts_at_seed(tiny, batch)
    expected = -3 * parts.log_likelihood + beta * parts.kl
    assert_close(at_seed(tempered(beta), tiny, batch), expected, rtol=1e-10, atol=0)
    if beta == 1 and prior != "dwp":  # the stock estimator draws z once more, so its weights differ
        assert_close(at_seed(TraceMeanField_ELBO, tiny, batch), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("elbo", MEAN_FIELD)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_minibatches_average_to_the_full_batch(scene, elbo, prior, likelihood):
    """At a fixed weight sample, the mean over all minibatches of one case is the loss of all cases."""
    tiny = scene(prior, likelihood)
    singles = [at_seed(elbo, tiny, [x[i : i + 1] for x in tiny.data]) for i in range(3)]
    assert_close(sum(singles) / 3, at_seed(elbo, tiny), rtol=1e-10, atol=0)
    assert max(singles) - min(singles) > 1


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("prior", ["normal", "gaussian", "mixture", "dwp"])
def test_beta_tempers_the_divergence_alone(scene, prior, beta):
    """β as a number, and as a tensor that changes between two evaluations."""
    tiny = scene(prior)
    parts = parts_at_seed(tiny)
    expected = -parts.log_likelihood + beta * parts.kl
    assert_close(at_seed(tempered(beta), tiny), expected, rtol=1e-10, atol=0)
    written = torch.tensor(2.0, dtype=torch.double)
    elbo = MeanFieldELBO(beta=written)
    assert_close(at_seed(lambda: elbo, tiny), -parts.log_likelihood + 2 * parts.kl, rtol=1e-10, atol=0)
    written.fill_(beta)
    assert_close(at_seed(lambda: elbo, tiny), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("prior", ["normal", "dwp"])
def test_a_scale_of_the_guide_scales_the_kl(scene, prior):
    """Pyro's own tempering: `poutine.scale` on the guide multiplies the KL and nothing else."""
    tiny = scene(prior)
    parts = parts_at_seed(tiny)
    pyro.set_rng_seed(7)
    loss = MeanFieldELBO(beta=2.0).loss(tiny.model, poutine.scale(tiny.guide, scale=0.25), *tiny.data)
    assert_close(loss, -parts.log_likelihood + 0.5 * parts.kl, rtol=1e-10, atol=0)


def test_terms_are_the_parts(scene):
    """`terms` are in nats, the KL without β, and add up to the loss."""
    tiny = scene("dwp")
    tiny.model.prior_modules["scales"] = PriorScales({"all": 10}, 0.5)
    with torch.no_grad():
        tiny.model.prior_modules["scales"].log_scales.add_(0.1)
    log_prior = tiny.model.prior_modules["scales"].log_prob().item()
    assert log_prior < 0
    parts = parts_at_seed(tiny)
    elbo = MeanFieldELBO(beta=0.5)
    loss = at_seed(lambda: elbo, tiny)
    terms = {name: term.item() for name, term in elbo.terms.items()}
    assert_close(terms, {"log_likelihood": parts.log_likelihood, "kl": parts.kl, "log_prior": log_prior})
    assert_close(loss, 0.5 * terms["kl"] - terms["log_likelihood"] - terms["log_prior"])


def test_particles_are_averaged(scene):
    """With and without local reparameterization."""
    tiny = scene("normal")
    for handler in (nullcontext(), LocalReparameterization(tiny.guide.posterior)):
        with handler:
            pyro.set_rng_seed(3)
            singles = [MeanFieldELBO().loss(tiny.model, tiny.guide, *tiny.data) for _ in range(2)]
            pyro.set_rng_seed(3)
            pair = MeanFieldELBO(num_particles=2).loss_and_grads(tiny.model, tiny.guide, *tiny.data)
        assert singles[0] != singles[1]
        assert_close(pair, sum(singles) / 2)


def test_unsupported_guides_are_rejected(scene):
    """An `AutoNormal` has auxiliary sites, whose entropy a sum of KL terms would ignore."""
    tiny = scene("normal")
    with pytest.raises(ValueError, match="which is not a site of the model"):
        MeanFieldELBO().loss(tiny.model, AutoNormal(tiny.model), *tiny.data)

    def laplace(*args):
        for site in tiny.guide.sites:
            loc, scale = tiny.guide.posterior(site)
            pyro.sample(site, pyro.distributions.Laplace(loc, scale).to_event(5))

    tiny = scene("dwp")
    with pytest.raises(ValueError, match="no divergence is registered"):
        MeanFieldELBO().loss(tiny.model, laplace, *tiny.data)


def test_a_trained_center_of_the_prior_gets_its_gradient():
    center = torch.zeros(4, 2, 3, dtype=torch.double, requires_grad=True)
    prior = DeepWeightPrior(random_density("gaussian", (2, 3)), center=center).to_event(1)
    guide = MeanFieldNormal({"w": torch.randn(4, 2, 3, dtype=torch.double)}, 0.1)
    MeanFieldELBO().loss_and_grads(lambda: pyro.sample("w", prior), guide)
    assert center.grad is not None and (center.grad != 0).all()


def test_a_site_without_a_guide_is_drawn_from_its_prior(scene):
    tiny = scene("gaussian")
    pyro.set_rng_seed(7)
    loss = MeanFieldELBO().loss(tiny.model, lambda *args: {}, *tiny.data)
    pyro.set_rng_seed(7)
    logits = tiny.model.network(tiny.data[0])
    assert_close(loss, -50 * float(LIKELIHOODS["categorical"](logits, *tiny.data[1:]).sum()))


@pytest.mark.parametrize(("prior", "moved"), MOVED)
def test_its_gradient_is_the_derivative_of_the_loss(scene, prior, moved):
    """Central differences at a fixed seed, in a random direction of all means and log-scales."""
    tiny = scene(prior, moved=moved)
    elbo = MeanFieldELBO()
    pyro.set_rng_seed(7)
    elbo.loss_and_grads(tiny.model, tiny.guide, *tiny.data)
    gradient = torch.cat([p.grad.flatten() for p in tiny.guide.parameters()])
    start = parameters_to_vector(tiny.guide.parameters()).detach()
    direction = torch.randn_like(start)
    losses = []
    for step in (1e-5, -1e-5):
        vector_to_parameters(start + step * direction, tiny.guide.parameters())
        losses.append(at_seed(MeanFieldELBO, tiny))
    assert_close((losses[0] - losses[1]) / 2e-5, float(gradient @ direction), rtol=1e-5, atol=0)
