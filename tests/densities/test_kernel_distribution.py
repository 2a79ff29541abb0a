"""Exact kernel distributions against torch's, and properties of all families."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal, kl_divergence
from torch.testing import assert_close

from dwp_pyro.config.names import FAMILIES
from dwp_pyro.densities import DENSITIES, KernelDistribution, KernelGaussian
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior
from tests.conftest import random_density

EXACT = ["gaussian", "mixture", "flow"]


def by_torch(density: KernelDistribution) -> Distribution:
    """Return torch's distribution over flattened kernels: a Gaussian or a mixture."""
    if isinstance(density, KernelGaussian):
        return MultivariateNormal(density.loc, scale_tril=density.scale_tril)
    locs = density.loc + density.means @ density.scale_tril.T
    components = MultivariateNormal(locs, scale_tril=density.scale_tril @ torch.linalg.inv(density.whitenings))
    return MixtureSameFamily(Categorical(logits=density.log_weights), components)


def test_torch_still_checks_its_arguments():
    """Importing zuko turns these checks off for the process."""
    with pytest.raises(ValueError):
        Normal(0.0, -1.0)


def test_names_of_families_match_their_classes():
    assert tuple(DENSITIES) == FAMILIES


@pytest.mark.parametrize("family", ["gaussian", "mixture"])
@pytest.mark.parametrize("kernel_shape", [(3, 3, 3), (2, 3)])
def test_the_density_is_that_of_torch(family, kernel_shape):
    density = random_density(family, kernel_shape)
    w = 2 * torch.randn(50, *kernel_shape, dtype=torch.double)
    assert_close(density.log_prob_estimate(w), by_torch(density).log_prob(w.flatten(1)))


def test_a_flow_is_a_change_of_variables():
    """log N(z; 0, I) + log |det ∂z/∂w|, the Jacobian by automatic differentiation; it is not triangular."""
    density = random_density("flow", (3, 2))

    def to_noise(w: Tensor) -> Tensor:
        return density.flow().transform(density.standardize(w))

    for w in torch.randn(5, 3, 2, dtype=torch.double):
        derivative = jacobian(to_noise, w).flatten(1)
        assert (derivative != 0).all()
        by_hand = Normal(0.0, 1.0).log_prob(to_noise(w)).sum() + torch.linalg.slogdet(derivative).logabsdet
        assert_close(density.log_prob_estimate(w), by_hand)


@pytest.mark.parametrize("family", EXACT)
def test_untrained_it_is_the_gaussian_of_its_standardization(family):
    """Every fit starts from the full-covariance Gaussian N(b, AAᵀ)."""
    shaped = random_density("gaussian")
    density = DENSITIES[family]((3, 3, 3), **({"components": 4} if family == "mixture" else {})).double()
    density.standardize_by(shaped.loc, shaped.scale_tril)
    w = torch.randn(6, 3, 3, 3, dtype=torch.double)
    assert_close(density.log_prob_estimate(w), by_torch(shaped).log_prob(w.flatten(1)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", EXACT)
def test_gradients_in_the_kernel_match_finite_differences(family):
    density = random_density(family, (2, 2)).requires_grad_(False)
    assert gradcheck(density.log_prob_estimate, torch.randn(5, 2, 2, dtype=torch.double, requires_grad=True))


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("kernel_shape", [(3,), (3, 3), (1, 2, 3)])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_shapes(family, kernel_shape, batch):
    """Any number of spatial and batch axes; kernels of a batch are independent."""
    density = random_density(family, kernel_shape)
    w = density.rsample(batch)
    assert w.shape == (*batch, *kernel_shape)
    assert w.dtype == torch.double
    ell = density.log_prob_estimate(w, 7)
    assert ell.shape == batch
    alone = [density.log_prob_estimate(kernel) for kernel in w.reshape(-1, *kernel_shape)]
    assert_close(ell.flatten(), torch.stack(alone))


@pytest.mark.parametrize("family", EXACT)
def test_scaling_the_kernels_shifts_the_density_by_its_volume(family):
    """log p(w) = log p̃(w/c) − D log c."""
    density = random_density(family, (2, 2))
    w = torch.randn(3, 2, 2, dtype=torch.double)
    before = density.log_prob_estimate(w)
    density.standardize_by(10 * density.loc, 10 * density.scale_tril)
    assert_close(density.log_prob_estimate(10 * w), before - 4 * math.log(10))


@pytest.mark.parametrize("family", FAMILIES)
def test_init_args_rebuild_the_distribution(family):
    """Arguments other than the defaults and the state are the whole distribution."""
    arguments = {"gaussian": {}, "mixture": {"components": 5}, "dwp": {"latent_size": 3, "hidden": [4]}}
    init_args = arguments.get(family, {"hidden": [4, 6], "transforms": 2})
    density = DENSITIES[family]((2, 3), **init_args)
    assert density.init_args() == init_args
    another = DENSITIES[family]((2, 3), **density.init_args())
    another.load_state_dict(density.state_dict())


def test_the_divergence_from_a_gaussian_is_that_of_torch():
    """In closed form without draws: per kernel, and for a guide's Normal over the whole weight."""
    density = random_density("gaussian")
    m, s = torch.randn(4, 2, 3, 3, 3).double(), 0.2 + torch.rand(4, 2, 3, 3, 3).double()
    expected = kl_divergence(MultivariateNormal(m.flatten(2), scale_tril=s.flatten(2).diag_embed()), by_torch(density))
    prior = DeepWeightPrior(density).expand([4, 2])
    state = torch.get_rng_state()
    assert_close(kl_divergence(Normal(m, s).to_event(3), prior), expected)
    assert_close(kl_divergence(Normal(m, s).to_event(5), prior.to_event(2)), expected.sum())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_divergence_from_itself_is_zero():
    """For a Gaussian with independent weights, also moved and scaled; positive for any other q."""
    density = random_density("gaussian", (2, 2))
    s = 0.3 + torch.rand(4, dtype=torch.double)
    density.standardize_by(density.loc, s.diag())
    center = torch.randn(3, 2, 2, dtype=torch.double)
    m, s = density.loc.reshape(2, 2), s.reshape(2, 2)
    nothing = torch.zeros((), dtype=torch.double)
    assert_close(kl_divergence(Normal(m, s).to_event(2), DeepWeightPrior(density)), nothing)
    moved = DeepWeightPrior(density, center=center, scale=0.4)
    assert_close(kl_divergence(Normal(center, 0.4 * s).to_event(2), moved), nothing.expand(3))
    for loc, scale in ((center + 0.1, 0.4 * s), (center, 0.5 * s), (center, 0.3 * s)):
        assert (kl_divergence(Normal(loc, scale).to_event(2), moved) > 0.01).all()


def test_the_whitening_follows_its_root():
    """After A was modified, loaded or converted."""
    density, other = KernelGaussian((2, 2)), KernelGaussian((2, 2))
    root = torch.randn(4, 4).tril() + 3 * torch.eye(4)
    assert torch.equal(density.whitening(), torch.eye(4))
    density.standardize_by(torch.zeros(4), root)
    once = density.whitening()
    torch.testing.assert_close(once @ root, torch.eye(4))
    other.load_state_dict(density.state_dict())
    torch.testing.assert_close(other.whitening(), once)
    assert density.double().whitening().dtype == torch.double
    torch.testing.assert_close(copy.deepcopy(density).whitening().float(), once)
    density.scale_tril *= 2
    torch.testing.assert_close(density.whitening().float(), once / 2)
