"""`DeepWeightPrior`: the contract of a Pyro distribution, and use in SVI."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.distributions import Normal
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from torch.distributions import AffineTransform, TransformedDistribution, constraints, kl_divergence
from torch.testing import assert_close

from dwp_pyro.config.names import LEARNED, PRIORS
from dwp_pyro.densities.vae import KernelVAE
from dwp_pyro.inference.elbo import MeanFieldELBO
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior
from dwp_pyro.priors.kernel_prior import ANY_SITE, BlockInfo, KernelPrior
from dwp_pyro.priors.make_prior import make_prior
from dwp_pyro.runtime.errors import PriorError
from tests.conftest import random_density


@pytest.fixture
def prior() -> DeepWeightPrior:
    return DeepWeightPrior(KernelVAE((3, 2), latent_size=2, hidden=(4,)), particles=3)


@pytest.mark.parametrize("sample_shape", [(), (5,), (2, 1)])
@pytest.mark.parametrize("batch_shape", [(), (4,), (2, 3)])
def test_shapes(prior, sample_shape, batch_shape):
    """Draws have sample_shape + batch_shape + event_shape; log_prob lacks the event."""
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
    """Each element of the batch has its own draw of the estimate."""
    kernel = torch.randn(3, 2)
    assert prior.expand([2, 3]).log_prob(kernel).shape == (2, 3)
    assert prior.expand([3]).log_prob(kernel.expand(4, 1, 3, 2)).shape == (4, 3)
    with pytest.raises(ValueError):
        prior.expand([3]).log_prob(kernel.expand(4, 3, 2))


def test_expand_shares_the_density_and_keeps_the_particles(prior):
    """Only the batch changes, also under a second expansion."""
    expanded = prior.expand([3]).expand([2, 3])
    assert expanded.density is prior.density
    assert expanded.particles == 3
    assert type(expanded) is DeepWeightPrior


def test_validation_rejects_invalid_kernels(prior):
    """NaN and other kernel shapes; expansion keeps the setting."""
    wrong = torch.full((3, 2), float("nan"))
    for strict in (DeepWeightPrior(prior.density, validate_args=True), prior.expand([2]), prior):
        with pytest.raises(ValueError):
            strict.log_prob(wrong)
        with pytest.raises(ValueError):
            strict.log_prob(torch.zeros(2, 3))
    lax = DeepWeightPrior(prior.density, validate_args=False)
    assert lax.expand([2]).log_prob(wrong).isnan().all()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_raises(prior, scale):
    with pytest.raises(ValueError, match="scale must be positive"):
        DeepWeightPrior(prior.density, scale=scale)


@pytest.mark.parametrize("family", ["gaussian", "mixture", "flow"])
@pytest.mark.parametrize(("centered", "scale"), [(True, 1.0), (False, 0.3), (True, 2.5)])
def test_a_moved_prior_is_a_change_of_variables(family, centered, scale):
    """w = a + c·(v − b), by torch's affine transform of the exact density; a defaults to b."""
    density = random_density(family, (2, 2))
    center = torch.randn(3, 2, 2, dtype=torch.double) if centered else None
    prior = DeepWeightPrior(density, center=center, scale=scale).expand([3])
    mean = density.loc.reshape(2, 2)
    around = mean if center is None else center
    by_hand = TransformedDistribution(DeepWeightPrior(density), AffineTransform(around - scale * mean, scale, 2))
    w = torch.randn(5, 3, 2, 2, dtype=torch.double)
    assert_close(prior.log_prob(w), by_hand.log_prob(w))
    torch.manual_seed(1)
    drawn = prior.sample((5,))
    torch.manual_seed(1)
    assert_close(drawn, around + scale * (density.rsample((5, 3)) - mean))


def test_the_own_mean_and_scale_one_change_nothing():
    density = random_density("mixture", (2, 2))
    w = torch.randn(3, 2, 2, dtype=torch.double)
    moved = DeepWeightPrior(density, center=density.loc.reshape(2, 2), scale=1.0)
    assert moved.batch_shape == ()
    assert_close(moved.log_prob(w), DeepWeightPrior(density).log_prob(w))


def test_expand_keeps_the_center_and_the_scale():
    """The batch of the center is the prior's; expansion keeps the center of each kernel."""
    center = torch.randn(2, 1, 2, 2, dtype=torch.double)
    prior = DeepWeightPrior(random_density("gaussian", (2, 2)), center=center, scale=0.5)
    assert prior.batch_shape == (2, 1)
    expanded = prior.expand([2, 3]).expand([4, 2, 3])
    assert expanded.batch_shape == (4, 2, 3)
    assert expanded.scale == 0.5
    assert_close(expanded.center, center.expand(4, 2, 3, 2, 2))
    w = torch.randn(2, 1, 2, 2, dtype=torch.double)
    assert_close(expanded.log_prob(w), prior.log_prob(w).expand(4, 2, 3))


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_by_name_takes_a_center_and_a_scale(name):
    """log p(w) = log p₀(b + (w − a)/c) − D log c for the whole weight, p₀ the unmoved prior; log-uniform raises."""
    weight = torch.zeros(4, 2, 2, 2, dtype=torch.double)
    family = name if name in ("mixture", "flow") else "gaussian"
    block_infos = {"all": BlockInfo((ANY_SITE,), 1)}
    trained = KernelPrior(family, {"all": random_density(family, (2, 2))}, block_infos)
    if name == "isotropic":
        trained = trained.as_family(name)
    if name == "dwp":
        trained = KernelPrior(name, {"all": KernelVAE((2, 2)).double()}, block_infos)
    center, w = torch.randn_like(weight), torch.randn_like(weight)
    if name == "log-uniform":
        for setting in ({"center": center}, {"scale": 0.5}):
            with pytest.raises(ValueError, match="no center and no scale"):
                make_prior(name, "any.weight", weight, **setting)
        return
    mean = torch.zeros(()) if name in ("normal", "he") else trained.block("all").loc.reshape(2, 2)
    alone, moved = (
        make_prior(name, "any.weight", weight, trained, **setting) for setting in ({}, {"center": center, "scale": 0.5})
    )
    assert moved.event_shape == weight.shape
    expected = alone.log_prob(mean + (w - center) / 0.5) - weight.numel() * math.log(0.5)
    assert_close(moved.log_prob(w), expected)


@pytest.mark.parametrize("particles", [0, -1])
def test_fewer_than_one_particle_raises(prior, particles):
    with pytest.raises(ValueError, match="particles must be at least 1"):
        DeepWeightPrior(prior.density, particles)


def test_support_is_the_reals_over_one_kernel(prior):
    assert prior.support.event_dim == 2
    assert prior.has_rsample
    assert isinstance(prior.support.base_constraint, type(constraints.real))


def test_rsample_is_differentiable_and_sample_is_not(prior):
    """Gradients reach every parameter of the decoder."""
    torch.nn.init.normal_(prior.density.decoder[-1].weight)
    prior.rsample((4,)).square().sum().backward()
    assert all((p.grad != 0).any() for p in prior.density.decoder.parameters())
    assert not prior.sample((4,)).requires_grad


def test_divergence_is_reached_through_independent_wrappers(linear_gaussian):
    """For a guide's Normal over the whole weight: one number, by the registered formula."""
    vae, _ = linear_gaussian((3, 3, 3))
    q = Normal(torch.randn(4, 2, 3, 3, 3).double(), 0.3).to_event(5)
    prior = DeepWeightPrior(vae).expand([4, 2]).to_event(2)
    torch.manual_seed(1)
    divergence = kl_divergence(q, prior)
    torch.manual_seed(1)
    expected = -q.entropy() - prior.log_prob(q.rsample())
    assert divergence.shape == ()
    # The encoder is exact: draws of z do not matter, and those of w are the same.
    assert_close(divergence, expected)


def test_divergence_is_differentiable_through_its_own_draw(linear_gaussian):
    """In mean and scale, against finite differences at fixed draws: the stock estimator trains on it."""
    vae, _ = linear_gaussian((2, 2))

    def divergence(loc: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return kl_divergence(Normal(loc, log_scale.exp()).to_event(2), DeepWeightPrior(vae))

    assert torch.autograd.gradcheck(divergence, [torch.randn(2, 2).double().requires_grad_() for _ in range(2)])


def test_divergence_without_a_closed_entropy_is_not_implemented(prior):
    """Only Normal guides have one; Pyro falls back to samples for others."""
    with pytest.raises(NotImplementedError):
        kl_divergence(pyro.distributions.Laplace(torch.zeros(3, 2), 1.0).to_event(2), prior)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, MeanFieldELBO])
def test_a_step_of_svi_moves_the_guide_and_leaves_the_prior(scene, elbo, name):
    """With pyro.infer.SVI: finite loss, every mean and scale moves, the frozen φ does not."""
    tiny = scene(name)
    before = {name: p.detach().clone() for name, p in tiny.guide.named_parameters()}
    loss = SVI(tiny.model, tiny.guide, Adam({"lr": 0.01}), elbo()).step(*tiny.data)
    assert torch.tensor(loss).isfinite()
    assert all((p != before[name]).all() for name, p in tiny.guide.named_parameters())
    names = list(pyro.get_param_store())
    assert len(names) == len(before)
    assert all(name.startswith("guide.") for name in names)


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_prior_needs_a_kernel_prior(name):
    with pytest.raises(PriorError, match=f"'{name}' .* fit-prior"):
        make_prior(name, "input.weight", torch.zeros(2, 1, 3, 3, 3))
