"""The ELBO put together by hand: what is summed, what is scaled, and what is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Normal
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close

from dwp_pyro.distributions.deep_weight_prior import DeepWeightPrior
from dwp_pyro.distributions.kernel_density import KernelGaussian
from dwp_pyro.distributions.priors import PRIORS, prior_at
from dwp_pyro.distributions.summed_divergence import _window
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.batched_elbo import BatchedMeanFieldELBO
from dwp_pyro.models.bayesian import bayesianize
from dwp_pyro.models.likelihoods import LIKELIHOODS
from dwp_pyro.models.segmentation import SegmentationModel
from tests.conftest import random_density

MEAN_FIELD = [BatchedMeanFieldELBO, TraceMeanField_ELBO]

#: Their divergence has no closed form: it is taken at the weights drawn, by the stock estimator at others.
DRAWN = ("dwp", "flow", "mixture")

#: Every prior where it is by itself, and moved and scaled if it can be.
MOVED = [(prior, moved) for prior in PRIORS for moved in (False, True) if not (moved and prior == "log-uniform")]


def at_seed(elbo, tiny, data=None) -> float:
    """The loss, always at the same draws."""
    pyro.set_rng_seed(7)
    return elbo().loss(tiny.model, tiny.guide, *(data or tiny.data))


def tempered(beta) -> Callable[[], BatchedMeanFieldELBO]:
    return partial(BatchedMeanFieldELBO, beta=beta)


@dataclass(frozen=True)
class Parts:
    """What `at_seed` should be made of, without an ELBO: sums over the cases, and over the weights."""

    log_likelihood: float
    divergence: float


@torch.no_grad()
def parts_at_seed(tiny, data=None) -> Parts:
    image, *truth = data or tiny.data
    pyro.set_rng_seed(7)
    weights = tiny.guide()
    trace = poutine.trace(poutine.condition(tiny.model.network, weights)).get_trace(image)
    logits = trace.nodes["_RETURN"]["value"]
    divergence = 0.0
    for site, w in weights.items():
        q, p = Normal(*tiny.guide.posterior(site)).to_event(5), trace.nodes[site]["fn"]
        # The encoder of the scene is exact: the density needs no mean over z, and w is the guide's.
        drawn = isinstance(p.base_dist, DeepWeightPrior) and not isinstance(p.base_dist.density, KernelGaussian)
        divergence += float(-q.entropy() - p.log_prob(w) if drawn else kl_divergence(q, p))
    return Parts(float(LIKELIHOODS[tiny.model.likelihood](logits, *truth).sum()), divergence)


@pytest.mark.parametrize(("prior", "moved"), MOVED)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_loss_is_its_parts(scene, prior, moved, likelihood, beta):
    """−N/B Σ log p(y|x, W) + β Σ KL(q‖p), the divergence once for all kernels and unscaled by the plate."""
    tiny = scene(prior, likelihood, moved=moved)
    batch = [x[1:2] for x in tiny.data]
    parts = parts_at_seed(tiny, batch)
    expected = -3 * parts.log_likelihood + beta * parts.divergence
    assert_close(at_seed(tempered(beta), tiny, batch), expected, rtol=1e-10, atol=0)
    if prior not in DRAWN and beta == 1:
        assert_close(at_seed(TraceMeanField_ELBO, tiny, batch), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("elbo", MEAN_FIELD)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_minibatches_average_to_the_full_batch(scene, elbo, prior, likelihood):
    """At one draw of the weights, the mean over all minibatches of one case is the loss of all cases."""
    tiny = scene(prior, likelihood)
    singles = [at_seed(elbo, tiny, [x[i : i + 1] for x in tiny.data]) for i in range(3)]
    assert_close(sum(singles) / 3, at_seed(elbo, tiny), rtol=1e-10, atol=0)
    assert max(singles) - min(singles) > 1


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("prior", ["normal", "gaussian", "mixture", "dwp"])
def test_beta_tempers_the_divergence_alone(scene, prior, beta):
    """As a number, or as a tensor that is written to between two evaluations."""
    tiny = scene(prior)
    parts = parts_at_seed(tiny)
    expected = -parts.log_likelihood + beta * parts.divergence
    assert_close(at_seed(tempered(beta), tiny), expected, rtol=1e-10, atol=0)
    written = torch.tensor(2.0, dtype=torch.double)
    elbo = BatchedMeanFieldELBO(beta=written)
    assert_close(at_seed(lambda: elbo, tiny), -parts.log_likelihood + 2 * parts.divergence, rtol=1e-10, atol=0)
    written.fill_(beta)
    assert_close(at_seed(lambda: elbo, tiny), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("prior", ["normal", "dwp"])
def test_a_scale_of_the_guide_counts_too(scene, prior):
    """Pyro's own way to temper; a prior's density beside a scaled draw of the guide is not scaled by it."""
    tiny = scene(prior)
    parts = parts_at_seed(tiny)
    pyro.set_rng_seed(7)
    loss = BatchedMeanFieldELBO(beta=2.0).loss(tiny.model, poutine.scale(tiny.guide, scale=0.25), *tiny.data)
    assert_close(loss, -parts.log_likelihood + 0.5 * parts.divergence, rtol=1e-10, atol=0)


def test_terms_are_the_two_parts(scene):
    """In nats, the divergence with its β; they make up the loss."""
    tiny = scene("dwp")
    parts = parts_at_seed(tiny)
    elbo = BatchedMeanFieldELBO(beta=0.5)
    loss = at_seed(lambda: elbo, tiny)
    terms = {name: term.item() for name, term in elbo.terms.items()}
    assert_close(terms, {"log_likelihood": parts.log_likelihood, "divergence": 0.5 * parts.divergence})
    assert_close(loss, terms["divergence"] - terms["log_likelihood"])


@pytest.mark.parametrize(("prior", "moved"), MOVED)
def test_its_gradient_is_the_derivative_of_the_loss(scene, prior, moved):
    """Against central differences at fixed draws, in a random direction of all means and log-scales."""
    tiny = scene(prior, moved=moved)
    elbo = BatchedMeanFieldELBO()
    pyro.set_rng_seed(7)
    elbo.loss_and_grads(tiny.model, tiny.guide, *tiny.data)
    gradient = torch.cat([p.grad.flatten() for p in tiny.guide.parameters()])
    start = parameters_to_vector(tiny.guide.parameters()).detach()
    direction = torch.randn_like(start)
    losses = []
    for step in (1e-5, -1e-5):
        vector_to_parameters(start + step * direction, tiny.guide.parameters())
        losses.append(at_seed(BatchedMeanFieldELBO, tiny))
    assert_close((losses[0] - losses[1]) / 2e-5, float(gradient @ direction), rtol=1e-5, atol=0)


def test_every_density_gets_its_own_kernels(linear_gaussian):
    """Sites under one density or another, moved or scaled by themselves, of more particles: each counted once."""
    first, second = (linear_gaussian((3, 3, 3), standardised=True)[0] for _ in range(2))
    gaussian, mixture, flow = (random_density(family) for family in ("gaussian", "mixture", "flow"))
    convolutions = [nn.Conv3d(1, 1, 3, padding=1, bias=False) for _ in range(12)]
    network = nn.Sequential(*convolutions, nn.Conv3d(1, 2, 1)).double()
    centre = torch.randn(1, 1, 3, 3, 3, dtype=torch.double)
    learned = [
        DeepWeightPrior(first),
        DeepWeightPrior(second),
        DeepWeightPrior(first, particles=2),
        DeepWeightPrior(first),
        DeepWeightPrior(first, centre=centre, scale=0.5),
        DeepWeightPrior(first, scale=3.0),
        DeepWeightPrior(gaussian),
        DeepWeightPrior(gaussian, centre=centre, scale=0.3),
        DeepWeightPrior(mixture, centre=-centre),
        DeepWeightPrior(mixture, scale=2.0),
        DeepWeightPrior(flow, centre=2 * centre, scale=0.7),
    ]
    priors = {f"{i}.weight": prior for i, prior in enumerate(learned)}
    sites = {site: prior.expand([1, 1]).to_event(2) for site, prior in priors.items()}
    sites["11.weight"] = prior_at("normal", "11.weight", network[11].weight)
    guide = MeanFieldNormal(bayesianize(network, sites), scale=0.2)
    model = SegmentationModel(network, "categorical", num_cases=1)
    brain = torch.zeros(1, 1, 2, 2, 2, dtype=torch.double)
    data = (torch.zeros_like(brain), torch.zeros_like(brain).long(), brain, torch.ones(1).double())

    pyro.set_rng_seed(7)
    weights = guide()
    q = {site: Normal(*guide.posterior(site)).to_event(5) for site in sites}
    closed = {site for site in sites if site not in priors or priors[site].density is gaussian}
    assert len(closed) == 3
    expected = sum(
        kl_divergence(q[s], sites[s]) if s in closed else -q[s].entropy() - sites[s].log_prob(weights[s]) for s in sites
    )
    pyro.set_rng_seed(7)
    # Without a voxel of brain the likelihood is nothing.
    assert_close(BatchedMeanFieldELBO().loss(model, guide, *data), expected.item(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("moved", [False, True])
def test_one_call_of_a_density_serves_all_its_sites(scene, monkeypatch, moved):
    """Its purpose: as many kernels as there are, in one batch."""
    tiny = scene("dwp", moved=moved)
    calls = []
    trace = poutine.trace(poutine.condition(tiny.model.network, tiny.guide.draw())).get_trace(tiny.data[0])
    density = trace.nodes["0.weight"]["fn"].base_dist.density
    method = density.value_and_gradients
    monkeypatch.setattr(density, "value_and_gradients", lambda x, *args: calls.append(x.shape) or method(x, *args))
    BatchedMeanFieldELBO().loss(tiny.model, tiny.guide, *tiny.data)
    assert calls == [(1 * 2 + 2 * 2, 27)]


def test_a_part_of_the_kernels_stands_for_all(scene, monkeypatch):
    """At one draw of the weights, the mean over every choice of one kernel in six is the loss of all six."""
    tiny = scene("dwp")
    losses = []
    for first in range(6):
        monkeypatch.setattr(torch, "randint", lambda total, shape, first=first: torch.tensor(first))
        losses.append(at_seed(lambda: BatchedMeanFieldELBO(0.1), tiny))
    assert_close(sum(losses) / 6, at_seed(BatchedMeanFieldELBO, tiny), rtol=1e-10, atol=0)
    assert max(losses) - min(losses) > 0.1


@pytest.mark.parametrize("sizes", [[6], [1, 5], [3, 1, 4, 2]])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.95])
def test_every_kernel_is_chosen_as_often_as_any_other(sizes, part):
    """Over every start, around the end of the circle too."""
    total = sum(sizes)
    count = round(part * total)
    times = torch.zeros(total)
    for start in range(total):
        chosen = torch.zeros(total)
        for slices, site in zip(_window(sizes, count, start), chosen.split(sizes), strict=True):
            for each in slices:
                site[each] += 1
        assert chosen.max() == 1 and chosen.sum() == count
        times += chosen
    assert torch.equal(times, torch.full((total,), float(count)))


def test_kernels_of_any_batch_shape_are_one_batch():
    """One axis of kernels, of another shape than 3×3×3."""
    density = random_density("mixture", (2, 3))
    prior = DeepWeightPrior(density).expand([4]).to_event(1)
    guide = MeanFieldNormal({"w": torch.randn(4, 2, 3, dtype=torch.double)}, 0.1)
    losses = []
    for elbo in (BatchedMeanFieldELBO(), BatchedMeanFieldELBO(0.5)):
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(lambda: pyro.sample("w", prior), guide))
    pyro.set_rng_seed(0)
    q = Normal(*guide.posterior("w")).to_event(3)
    expected = (-q.entropy() - prior.log_prob(guide()["w"])).detach()
    assert_close(losses[0], float(expected), rtol=1e-10, atol=0)
    assert losses[1] != losses[0]
