"""`KernelVAE` as a function: shapes, gradients against finite differences, standardization."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.distributions import MultivariateNormal, Normal
from torch.func import functional_call
from torch.testing import assert_close

from dwp_pyro.densities.vae import KernelVAE


def random_vae(kernel_shape: tuple[int, ...] = (2, 2), latent_size: int = 2) -> KernelVAE:
    vae = KernelVAE(kernel_shape, latent_size, hidden=(4,)).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    size = vae.kernel_shape.numel()
    vae.standardize_by(torch.randn(size), torch.eye(size) + 0.3 * torch.randn(size, size).tril(-1))
    return vae


class Bound(nn.Module):
    """`KernelVAE.bound` as a module, so that `functional_call` can replace its parameters."""

    def __init__(self, vae: KernelVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, w: Tensor, noise: Tensor) -> Tensor:
        return self.vae.bound(w, noise)


@pytest.mark.parametrize("particles", [1, 3])
def test_gradients_of_the_bound_match_finite_differences(particles):
    """In the kernel, the encoder's ψ and the decoder's φ for fixed noise: nothing is detached."""
    module = Bound(random_vae())
    w = torch.randn(3, 2, 2, dtype=torch.double, requires_grad=True)
    noise = torch.randn(particles, 3, 2, dtype=torch.double)
    names, parameters = zip(*module.named_parameters(), strict=True)
    assert len(names) == 8

    def bound(w: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (w, noise))

    assert gradcheck(bound, (w, *parameters))


def test_bound_is_the_written_formula():
    """log (1/K) Σ p(w|z) p(z) / r(z|w), composed of torch's densities of the raw kernel."""
    vae = random_vae()
    w = torch.randn(3, 2, 2, dtype=torch.double)
    noise = torch.randn(5, 3, 2, dtype=torch.double)
    reverse = Normal(*vae.encode(w))
    z = reverse.loc + reverse.scale * noise
    loc, scale = vae.decode(z)
    raw = MultivariateNormal(vae.loc + loc @ vae.scale_tril.T, scale_tril=vae.scale_tril @ scale.diag_embed())
    log_likelihood = raw.log_prob(w.flatten(1))
    log_ratio = (Normal(0, 1).log_prob(z) - reverse.log_prob(z)).sum(-1)
    assert_close(vae._log_weights(vae.standardize(w), noise), (log_likelihood + vae.log_abs_det(), log_ratio))
    assert_close(vae.bound(w, noise), (log_likelihood + log_ratio).logsumexp(0) - math.log(5))


def test_scaling_the_kernels_shifts_the_density_by_its_volume():
    """log p(w) = log p̃(w/c) − D log c."""
    vae = random_vae()
    w = torch.randn(3, 2, 2, dtype=torch.double)
    noise = torch.randn(2, 3, 2, dtype=torch.double)
    before = vae.bound(w, noise)
    vae.standardize_by(10 * vae.loc, 10 * vae.scale_tril)
    assert_close(vae.bound(10 * w, noise), before - 4 * math.log(10))


def test_untrained_it_is_the_gaussian_of_its_standardization():
    """A fit starts from the full-covariance Gaussian N(b, AAᵀ) for every latent size."""
    vae = KernelVAE((2, 2), latent_size=3).double()
    vae.standardize_by(torch.randn(4), torch.eye(4) + 0.3 * torch.randn(4, 4).tril(-1))
    w = torch.randn(6, 2, 2, dtype=torch.double)
    exact = MultivariateNormal(vae.loc, scale_tril=vae.scale_tril).log_prob(w.flatten(1))
    assert_close(vae.log_prob_estimate(w), exact)


@pytest.mark.parametrize("kernel_shape", [(3,), (3, 3), (1, 2, 3)])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_shapes(kernel_shape, batch):
    """Any number of spatial and batch axes."""
    vae = random_vae(kernel_shape, latent_size=3)
    w = vae.rsample(batch)
    assert w.shape == (*batch, *kernel_shape)
    assert w.dtype == torch.double
    assert vae.log_prob_estimate(w, 2).shape == batch
    assert [x.shape for x in vae.encode(w)] == [(*batch, 3)] * 2
    assert [x.shape for x in vae.decode(torch.zeros(*batch, 3).double())] == [
        (*batch, w[(0,) * len(batch)].numel())
    ] * 2


def test_kernels_of_a_batch_do_not_mix():
    """A kernel's bound depends on that kernel and its noise only."""
    vae = random_vae()
    w = torch.randn(4, 2, 2, dtype=torch.double)
    noise = torch.randn(3, 4, 2, dtype=torch.double)
    one_by_one = torch.stack([vae.bound(w[i], noise[:, i]) for i in range(4)])
    assert_close(vae.bound(w, noise), one_by_one)


def test_far_kernels_have_a_finite_density_and_gradient():
    """Scales are limited to exp(±6): float32 does not overflow far from the data."""
    vae = random_vae().float()
    w = torch.full((1, 2, 2), 1e4, requires_grad=True)
    ell = vae.log_prob_estimate(w)
    ell.sum().backward()
    assert ell.isfinite().all()
    assert w.grad.isfinite().all()
