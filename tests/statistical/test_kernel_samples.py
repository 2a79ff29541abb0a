"""Samples of `KernelVAE` against its density."""

from __future__ import annotations

import torch
from scipy import stats
from torch.distributions import Normal

from dwp_pyro.densities.vae import KernelVAE
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior


def test_one_weight_follows_the_linear_gaussian_marginal(linear_gaussian):
    """Kolmogorov–Smirnov test against the normal marginal."""
    vae, exact = linear_gaussian((1,), standardized=True)
    draws = DeepWeightPrior(vae).sample((20_000,))
    assert draws.shape == (20_000, 1)
    marginal = stats.norm(exact.mean.item(), exact.stddev.item())
    assert stats.kstest(draws.flatten().numpy(), marginal.cdf).pvalue > 1e-3


def test_one_weight_follows_a_nonlinear_decoder():
    """Kolmogorov–Smirnov test against ∫ Φ((w − μ(z)) / σ(z)) p(z) dz, by quadrature."""
    vae = KernelVAE([1], latent_size=1, hidden=(6,)).double()
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.copy_(torch.randn_like(parameter))
    z = torch.linspace(-9, 9, 2001, dtype=torch.double)
    loc, scale = vae.decode(z[:, None])

    def cdf(w):
        below = Normal(loc, scale).cdf(torch.as_tensor(w))
        return torch.trapezoid(below * Normal(0.0, 1.0).log_prob(z).exp()[:, None], z, dim=0).detach().numpy()

    draws = vae.rsample((5_000,)).detach().flatten().numpy()
    assert stats.kstest(draws, cdf).pvalue > 1e-3


def test_three_weights_have_the_exact_mean_and_covariance(linear_gaussian):
    """Moments of 50,000 kernels within 4.5 standard errors, Var S_ij = (Σ_ii Σ_jj + Σ_ij²) / n."""
    vae, exact = linear_gaussian((3,), latent_size=2, standardized=True)
    draws = DeepWeightPrior(vae).sample((50_000,))
    truth = exact.covariance_matrix
    assert ((draws.mean(0) - exact.mean).abs() < 4.5 * (exact.variance / len(draws)).sqrt()).all()
    error = ((exact.variance[:, None] * exact.variance + truth.square()) / len(draws)).sqrt()
    assert ((draws.T.cov() - truth).abs() < 4.5 * error).all()
