"""Every test starts from the same seed with an empty parameter store; scenes that several tests share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from dwp_pyro.distributions.kernel_prior import ANY_SITE, BlockCard, KernelPrior
from dwp_pyro.distributions.kernel_vae import KernelVAE
from dwp_pyro.distributions.priors import prior_at
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.models.bayesian import bayesianize
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.models.unet import kernel_sites

# Tensors are tiny, and a second thread that waits for a busy core makes the tests up to twenty times slower.
torch.set_num_threads(1)

LinearGaussian = Callable[..., tuple[KernelVAE, MultivariateNormal]]


@pytest.fixture(autouse=True)
def _fresh_pyro() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture
def linear_gaussian() -> LinearGaussian:
    """Makes a linear-Gaussian `KernelVAE` with its exact posterior as encoder, and its exact marginal.

    With u = Wz + b + σε, the posterior of z has the precision I + WᵀΨ⁻¹W, Ψ = diag σ². It is diagonal, as
    the encoder is, because the columns of W are orthogonal under Ψ⁻¹.
    """

    def make(
        kernel_shape: tuple[int, ...], latent_size: int = 1, standardised: bool = False
    ) -> tuple[KernelVAE, MultivariateNormal]:
        vae = KernelVAE(kernel_shape, latent_size, hidden=()).double()
        size = vae.kernel_shape.numel()
        sigma = 0.5 + torch.rand(size, dtype=torch.double)
        length = 0.5 + torch.arange(1, latent_size + 1, dtype=torch.double)
        columns = sigma[:, None] * torch.linalg.qr(torch.randn(size, latent_size, dtype=torch.double))[0] * length
        bias = torch.randn(size, dtype=torch.double)
        variance = 1 / (1 + length.square())
        regression = variance[:, None] * columns.T / sigma.square()
        with torch.no_grad():
            vae.decoder[-1].weight[:size] = columns
            vae.decoder[-1].bias.copy_(torch.cat([bias, sigma.log()]))
            vae.encoder[-1].weight[:latent_size] = regression
            vae.encoder[-1].bias.copy_(torch.cat([-regression @ bias, 0.5 * variance.log()]))
        if standardised:
            correlation = 0.5 * torch.randn(size, size, dtype=torch.double).tril(-1) / size**0.5
            vae.standardise_by(torch.randn(size, dtype=torch.double), correlation + 0.7 * torch.eye(size))
        root = torch.linalg.cholesky(columns @ columns.T + sigma.square().diag())
        return vae, MultivariateNormal(vae.loc + vae.scale_tril @ bias, scale_tril=vae.scale_tril @ root)

    return make


@dataclass(frozen=True)
class Scene:
    """Two Bayesian convolutions with an instance norm between them, and three cases of 4×4×4 voxels."""

    model: SegmentationModel
    guide: MeanFieldNormal
    data: tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def scene(linear_gaussian: LinearGaussian) -> Callable[..., Scene]:
    """Makes a `Scene` in double precision, from the name of a prior."""

    def make(prior: str, likelihood: str = "categorical", scale: float = 0.1) -> Scene:
        layers = [nn.Conv3d(1, 2, 3, padding=1, bias=False), nn.InstanceNorm3d(2), nn.ReLU()]
        network = nn.Sequential(*layers, nn.Conv3d(2, 2, 3, padding=1, bias=False)).double()
        vae, _ = linear_gaussian((3, 3, 3), latent_size=2, standardised=True)
        kernel_prior = KernelPrior({"all": vae}, {"all": BlockCard((ANY_SITE,), 1)}).requires_grad_(False)
        sites = kernel_sites(network)
        locs = bayesianize(network, {site: prior_at(prior, site, w, kernel_prior) for site, w in sites.items()})
        image = torch.randn(3, 1, 4, 4, 4, dtype=torch.double)
        brain = (torch.rand_like(image) < 0.8).double()
        data = (image, (image > 0.5).long(), brain, brain.flatten(1).sum(1))
        return Scene(SegmentationModel(network, likelihood, num_cases=3), MeanFieldNormal(locs, scale), data)

    return make
