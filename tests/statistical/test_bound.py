"""The bound of `KernelVAE` against exact densities and quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from dwp_pyro.densities.vae import KernelVAE
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior


def standard_error(draws: Tensor) -> Tensor:
    return draws.std(0) / math.sqrt(len(draws))


@pytest.mark.parametrize("kernel_shape", [(3, 3), (2, 2, 3)])
@pytest.mark.parametrize("latent_size", [1, 3])
@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("standardized", [False, True])
def test_exact_encoder_gives_the_gaussian_density_on_every_draw(
    linear_gaussian, kernel_shape, latent_size, particles, standardized
):
    """With r(z|w) = p(z|w) every importance weight is p(w), a multivariate normal density."""
    vae, exact = linear_gaussian(kernel_shape, latent_size, standardized)
    kernels = 3 * torch.randn(20, *kernel_shape, dtype=torch.double)
    prior = DeepWeightPrior(vae, particles)
    for _ in range(3):
        assert_close(prior.log_prob(kernels), exact.log_prob(kernels.flatten(1)), rtol=1e-10, atol=0)


def test_a_wrong_encoder_lowers_the_bound_by_its_divergence_and_particles_close_the_gap(linear_gaussian):
    """L₁ = log p(w) − KL(r‖p(z|w)), and L_K increases with K to log p(w) (Burda et al. 2016, theorem 1)."""
    vae, exact = linear_gaussian((3, 3), latent_size=3, standardized=True)
    kernel = exact.sample().reshape(3, 3)
    posterior = Normal(*vae.encode(kernel))
    with torch.no_grad():
        vae.encoder[-1].bias += torch.tensor([0.6, -0.4, 0.3, 0.3, -0.2, 0.1], dtype=torch.double)
    gap = kl_divergence(Normal(*vae.encode(kernel)), posterior).sum()

    batch = kernel.expand(20_000, 3, 3)
    draws = {particles: vae.log_prob_estimate(batch, particles).detach() for particles in (1, 4, 16)}
    means = {particles: ell.mean() for particles, ell in draws.items()}
    errors = {particles: standard_error(ell) for particles, ell in draws.items()}
    truth = exact.log_prob(kernel.flatten())

    assert abs(means[1] - (truth - gap)) < 4 * errors[1]
    assert all(truth - means[particles] > 4 * errors[particles] for particles in draws)
    assert means[4] - means[1] > 4 * (errors[4] + errors[1])
    assert means[16] - means[4] > 4 * (errors[16] + errors[4])


@pytest.fixture
def random_vae_1d() -> KernelVAE:
    """Return a VAE of one weight w with nonlinear networks, whose encoder is far from its posterior."""
    torch.manual_seed(1)
    vae = KernelVAE([1], latent_size=1, hidden=(6,)).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(0.6 * torch.randn_like(parameter))
        # An encoder wider than p(z) keeps the importance weights bounded, so that their mean can be estimated.
        for network, log_scale in ((vae.decoder, -0.3), (vae.encoder, 0.4)):
            network[-1].weight[1] *= 0.2
            network[-1].bias[1] = log_scale
    vae.standardize_by(torch.tensor([0.5]), torch.tensor([[1.5]]))
    return vae


def density_by_quadrature(vae: KernelVAE, w: Tensor) -> Tensor:
    """Compute p(w) = ∫ N(w; b + A μ(z), A² σ²(z)) N(z; 0, 1) dz on a grid of z; w of shape [n]."""
    z = torch.linspace(-9, 9, 4001, dtype=torch.double)
    loc, scale = vae.decode(z[:, None])
    a = vae.scale_tril.squeeze()
    component = Normal(vae.loc + a * loc, a * scale).log_prob(w).exp()
    return torch.trapezoid(component * Normal(0.0, 1.0).log_prob(z).exp()[:, None], z, dim=0)


@pytest.mark.parametrize("particles", [1, 3])
@torch.no_grad()
def test_exponential_of_the_bound_is_unbiased_and_integrates_to_one(random_vae_1d, particles):
    """E exp(ℓ) = p(w) for any encoder and every K, and ∫ p(w) dw = 1."""
    w = torch.linspace(-14, 15, 300, dtype=torch.double)
    truth = density_by_quadrature(random_vae_1d, w)
    assert_close(torch.trapezoid(truth, w), torch.ones((), dtype=torch.double), rtol=0, atol=1e-6)

    draws = DeepWeightPrior(random_vae_1d, particles).log_prob(w[:, None].expand(2_000, -1, -1)).exp()
    integrals = torch.trapezoid(draws, w, dim=1)
    assert standard_error(integrals) < 0.01
    assert abs(integrals.mean() - 1) < 4 * standard_error(integrals)
    inside = truth > 0.01
    assert ((draws.mean(0) - truth).abs() < 4.5 * standard_error(draws))[inside].all()
