"""Which convolutions the handler replaces, its activations, and its gradients."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn
from torch.testing import assert_close

from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.inference.local_reparameterization import LocalReparameterization
from dwp_pyro.models.bayesianize import bayesianize
from dwp_pyro.priors.make_prior import make_prior


@pytest.fixture
def pair() -> tuple[nn.Module, MeanFieldNormal]:
    """Return two convolutions in double precision, the first of them Bayesian, and a guide."""
    network = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(3, 1, 1)).double()
    locs = bayesianize(network, {"0.weight": make_prior("normal", "0.weight", network[0].weight)})
    return network, MeanFieldNormal(locs, scale=0.3)


def test_outside_the_handler_it_is_the_plain_convolution(pair):
    """The weight is the value of its site."""
    network, guide = pair
    plain = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    image = torch.randn(2, 2, 6, 5, dtype=torch.double)
    weights = guide.draw()
    plain.load_state_dict({"weight": weights["0.weight"], "bias": network[0].bias})
    assert_close(poutine.condition(network, weights)(image), network[1](plain(image)))
    with LocalReparameterization(guide.posterior):
        pass
    assert_close(poutine.condition(network, weights)(image), network[1](plain(image)))


def test_without_variance_it_is_the_convolution_of_the_mean(pair):
    """With stride, padding and bias; the sampled weight is unused, and the standard deviation's floor is 1e-6."""
    network, guide = pair
    guide.set_scale("0.weight", torch.full((3, 2, 3, 3), 1e-9).double())
    image = torch.randn(2, 2, 6, 5, dtype=torch.double)
    expected = poutine.condition(network, guide.means())(image)
    with LocalReparameterization(guide.posterior):
        activations = poutine.condition(network, {"0.weight": torch.randn(3, 2, 3, 3).double()})(image)
    assert_close(activations, expected, rtol=0, atol=2e-5)


def test_activations_are_independent_between_voxels_and_calls(pair):
    network, guide = pair
    image = torch.ones(2, 2, 6, 6, dtype=torch.double)
    with LocalReparameterization(guide.posterior):
        first, second = network(image), network(image)
    assert first.unique().numel() == first.numel()
    assert (first != second).all()


def test_only_bayesian_sites_are_queried(pair):
    network, guide = pair
    asked = []
    with LocalReparameterization(lambda site: asked.append(site) or guide.posterior(site)):
        network(torch.randn(1, 2, 6, 6, dtype=torch.double))
    assert asked == ["0.weight"]


def test_gradients_match_finite_differences(pair):
    """With respect to mean and log-scale of the weights, at fixed noise."""
    network, guide = pair
    image = torch.randn(1, 2, 5, 5, dtype=torch.double)

    def activations(loc: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        pyro.set_rng_seed(3)
        with LocalReparameterization(lambda site: (loc, log_scale.exp())):
            return network(image)

    loc, scale = (x.detach().clone() for x in guide.posterior("0.weight"))
    assert torch.autograd.gradcheck(activations, (loc.requires_grad_(), scale.log().requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_input_of_zeros_has_finite_gradients(pair, dtype):
    """As in the background of a scan; the square root has no derivative at a variance of 0."""
    network, guide = (module.to(dtype) for module in pair)
    image = torch.zeros(1, 2, 8, 8, dtype=dtype, requires_grad=True)
    with LocalReparameterization(guide.posterior):
        network(image).square().sum().backward()
    assert image.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in [*guide.parameters(), *network.parameters()])


@pytest.mark.parametrize("prior", ["normal", "dwp"])
def test_a_step_of_svi_under_the_handler(scene, prior):
    """Only the likelihood changes: the KL is that of the weight-sample estimator."""
    tiny = scene(prior)
    elbo = MeanFieldELBO()
    pyro.set_rng_seed(7)
    elbo.loss(tiny.model, tiny.guide, *tiny.data)
    weight_sample = elbo.terms
    before = [p.detach().clone() for p in tiny.guide.parameters()]
    svi = SVI(tiny.model, tiny.guide, Adam({"lr": 1e-3}), elbo)
    pyro.set_rng_seed(7)
    with LocalReparameterization(tiny.guide.posterior):
        svi.step(*tiny.data)
    if prior == "normal":  # in closed form; the KL of a VAE is estimated with its own draws
        assert_close(elbo.terms["kl"], weight_sample["kl"])
    assert abs(elbo.terms["log_likelihood"] - weight_sample["log_likelihood"]) > 1e-3
    assert all((p != old).all() for p, old in zip(tiny.guide.parameters(), before, strict=True))
