"""`DeepWeightPrior` keeps the contract of a Pyro distribution, and SVI can use it."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.distributions import Normal
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from torch.distributions import constraints, kl_divergence
from torch.testing import assert_close

from dwp_pyro.distributions.deep_weight_prior import DeepWeightPrior
from dwp_pyro.distributions.kernel_vae import KernelVAE
from dwp_pyro.distributions.priors import prior_at
from dwp_pyro.errors import PriorError
from dwp_pyro.inference.batched_elbo import BatchedMeanFieldELBO


@pytest.fixture
def prior() -> DeepWeightPrior:
    return DeepWeightPrior(KernelVAE((3, 2), latent_size=2, hidden=(4,)), particles=3)


@pytest.mark.parametrize("sample_shape", [(), (5,), (2, 1)])
@pytest.mark.parametrize("batch_shape", [(), (4,), (2, 3)])
def test_shapes(prior, sample_shape, batch_shape):
    """sample_shape + batch_shape + event_shape, and log_prob without the event."""
    expanded = prior.expand(batch_shape)
    assert expanded.batch_shape == batch_shape
    assert expanded.event_shape == (3, 2)
    value = expanded.sample(sample_shape)
    assert value.shape == (*sample_shape, *batch_shape, 3, 2)
    assert expanded.log_prob(value).shape == (*sample_shape, *batch_shape)

    event = expanded.to_event(len(batch_shape))
    assert event.batch_shape == ()
    assert event.event_shape == (*batch_shape, 3, 2)
    assert event.log_prob(value).shape == sample_shape


def test_log_prob_broadcasts_a_value_against_the_batch(prior):
    """Each member of the batch has its own draw of the estimate."""
    kernel = torch.randn(3, 2)
    assert prior.expand([2, 3]).log_prob(kernel).shape == (2, 3)
    assert prior.expand([3]).log_prob(kernel.expand(4, 1, 3, 2)).shape == (4, 3)
    with pytest.raises(ValueError):
        prior.expand([3]).log_prob(kernel.expand(4, 3, 2))


def test_expand_shares_the_density_and_keeps_the_particles(prior):
    """Nothing but the batch changes, also under a second expansion."""
    expanded = prior.expand([3]).expand([2, 3])
    assert expanded.kernel_vae is prior.kernel_vae
    assert expanded.particles == 3
    assert type(expanded) is DeepWeightPrior


def test_validation_rejects_what_is_no_kernel(prior):
    """NaN, and axes that are not a kernel's; an expanded prior keeps its setting."""
    wrong = torch.full((3, 2), float("nan"))
    for strict in (DeepWeightPrior(prior.kernel_vae, validate_args=True), prior.expand([2]), prior):
        with pytest.raises(ValueError):
            strict.log_prob(wrong)
        with pytest.raises(ValueError):
            strict.log_prob(torch.zeros(2, 3))
    lax = DeepWeightPrior(prior.kernel_vae, validate_args=False)
    assert lax.expand([2]).log_prob(wrong).isnan().all()


@pytest.mark.parametrize("particles", [0, -1])
def test_fewer_than_one_particle_raises(prior, particles):
    with pytest.raises(ValueError, match="particles must be at least 1"):
        DeepWeightPrior(prior.kernel_vae, particles)


def test_support_is_the_reals_over_one_kernel(prior):
    assert prior.support.event_dim == 2
    assert prior.has_rsample
    assert isinstance(prior.support.base_constraint, type(constraints.real))


def test_rsample_is_differentiable_and_sample_is_not(prior):
    """Through z and the decoder, to its every parameter."""
    torch.nn.init.normal_(prior.kernel_vae.decoder[-1].weight)
    prior.rsample((4,)).square().sum().backward()
    assert all((p.grad != 0).any() for p in prior.kernel_vae.decoder.parameters())
    assert not prior.sample((4,)).requires_grad


def test_divergence_is_reached_through_independent_wrappers(linear_gaussian):
    """A guide's Normal over the whole weight, a prior over kernels: one number, of the registered formula."""
    vae, _ = linear_gaussian((3, 3, 3))
    q = Normal(torch.randn(4, 2, 3, 3, 3).double(), 0.3).to_event(5)
    prior = DeepWeightPrior(vae).expand([4, 2]).to_event(2)
    torch.manual_seed(1)
    divergence = kl_divergence(q, prior)
    torch.manual_seed(1)
    expected = -q.entropy() - prior.log_prob(q.rsample())
    assert divergence.shape == ()
    # The encoder is exact: the draws of z do not matter, those of w are the same.
    assert_close(divergence, expected)


def test_divergence_is_differentiable_through_its_own_draw(linear_gaussian):
    """In mean and scale, against finite differences at fixed draws: the stock estimator trains on it."""
    vae, _ = linear_gaussian((2, 2))

    def divergence(loc: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return kl_divergence(Normal(loc, log_scale.exp()).to_event(2), DeepWeightPrior(vae))

    assert torch.autograd.gradcheck(divergence, [torch.randn(2, 2).double().requires_grad_() for _ in range(2)])


def test_divergence_without_a_closed_entropy_is_not_implemented(prior):
    """Only Normal guides have one; Pyro then falls back on samples."""
    with pytest.raises(NotImplementedError):
        kl_divergence(pyro.distributions.Laplace(torch.zeros(3, 2), 1.0).to_event(2), prior)


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, BatchedMeanFieldELBO])
def test_a_step_of_svi_moves_the_guide_and_leaves_the_prior(scene, elbo):
    """Through pyro.infer.SVI: finite loss, every mean and scale moved, the frozen φ untouched."""
    tiny = scene("dwp")
    before = {name: p.detach().clone() for name, p in tiny.guide.named_parameters()}
    loss = SVI(tiny.model, tiny.guide, Adam({"lr": 0.01}), elbo()).step(*tiny.data)
    assert torch.tensor(loss).isfinite()
    assert all((p != before[name]).all() for name, p in tiny.guide.named_parameters())
    names = list(pyro.get_param_store())
    assert len(names) == len(before)
    assert all(name.startswith("guide.") for name in names)


def test_at_site_needs_a_prior():
    with pytest.raises(PriorError, match="fit-prior"):
        prior_at("dwp", "input.weight", torch.zeros(2, 1, 3, 3, 3))
