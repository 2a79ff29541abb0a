"""Every test starts from the same seed with an empty parameter store; shared fixtures."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from dwp_pyro.config.names import FAMILIES
from dwp_pyro.densities import DENSITIES, KernelDistribution, KernelFlow, KernelMixture, KernelVAE
from dwp_pyro.guides.mean_field import MeanFieldNormal
from dwp_pyro.models.bayesianize import bayesianize
from dwp_pyro.models.segmentation import SegmentationModel
from dwp_pyro.priors.blocks import kernel_sites
from dwp_pyro.priors.kernel_prior import ANY_SITE, BlockInfo, KernelPrior
from dwp_pyro.priors.make_prior import make_prior
from dwp_pyro.runtime.progress import show_bars
from tests.world import command, copy_of_world, in_world, world

__all__ = ["command", "copy_of_world", "in_world", "world"]

# Tensors are tiny, and a second thread that waits for a busy core makes the tests up to twenty times slower. With one
# thread per worker, too, results agree to the bit for any number of workers.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs without -m gpu: their sums have no fixed order, and many tests compare bits."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


LinearGaussian = Callable[..., tuple[KernelVAE, MultivariateNormal]]


@pytest.fixture(autouse=True)
def _fresh_pyro() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture(autouse=True)
def _fresh_console() -> None:
    """Take back what commands of earlier tests set in this process."""
    show_bars(False)
    logger = logging.getLogger("dwp_pyro")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def linear_gaussian() -> LinearGaussian:
    """Return a function that makes a linear-Gaussian `KernelVAE` with an exact encoder, and its marginal.

    With u = Wz + b + σε, the posterior of z has the precision I + WᵀΨ⁻¹W, Ψ = diag σ². It is diagonal, as
    the encoder is, because the columns of W are orthogonal under Ψ⁻¹.
    """

    def make(
        kernel_shape: tuple[int, ...], latent_size: int = 1, standardized: bool = False
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
        if standardized:
            correlation = 0.5 * torch.randn(size, size, dtype=torch.double).tril(-1) / size**0.5
            vae.standardize_by(torch.randn(size, dtype=torch.double), correlation + 0.7 * torch.eye(size))
        root = torch.linalg.cholesky(columns @ columns.T + sigma.square().diag())
        return vae, MultivariateNormal(vae.loc + vae.scale_tril @ bias, scale_tril=vae.scale_tril @ root)

    return make


@torch.no_grad()
def random_density(family: str, kernel_shape: tuple[int, ...] = (3, 3, 3)) -> KernelDistribution:
    """Return an exact density in double precision with random parameters."""
    forms = {"gaussian": {}, "mixture": {"components": 3}, "flow": {"hidden": (8,)}}
    density = DENSITIES[family](kernel_shape, **forms[family]).double()
    size = density.kernel_shape.numel()

    def root(*batch: int) -> Tensor:
        below = 0.5 * torch.randn(*batch, size, size, dtype=torch.double).tril(-1) / size**0.5
        return below + (0.6 + 0.5 * torch.rand(*batch, size, dtype=torch.double)).diag_embed()

    density.standardize_by(torch.randn(size, dtype=torch.double), root())
    if isinstance(density, KernelMixture):
        density.log_weights.copy_(torch.randn(3, dtype=torch.double).log_softmax(0))
        density.means.copy_(torch.randn(3, size))
        density.whitenings.copy_(root(3))
    if isinstance(density, KernelFlow):
        for parameter in density.parameters():
            parameter.normal_(std=0.5 / size**0.5)
    return density


@dataclass(frozen=True)
class Scene:
    """Two Bayesian convolutions with an instance norm between them, and three cases of 4×4×4 voxels."""

    model: SegmentationModel
    guide: MeanFieldNormal
    data: tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def scene(linear_gaussian: LinearGaussian) -> Callable[..., Scene]:
    """Return a function that makes a `Scene` in double precision; `moved` centers priors at the initial kernels."""

    def make(prior: str, likelihood: str = "categorical", scale: float = 0.1, moved: bool = False) -> Scene:
        layers = [nn.Conv3d(1, 2, 3, padding=1, bias=False), nn.InstanceNorm3d(2), nn.ReLU()]
        network = nn.Sequential(*layers, nn.Conv3d(2, 2, 3, padding=1, bias=False)).double()
        family = prior if prior in FAMILIES else "dwp"
        density = random_density(family) if family != "dwp" else linear_gaussian((3, 3, 3), 2, standardized=True)[0]
        kernel_prior = KernelPrior(family, {"all": density}, {"all": BlockInfo((ANY_SITE,), 1)}).requires_grad_(False)
        if prior == "isotropic":
            kernel_prior = kernel_prior.as_family(prior)
        sites = kernel_sites(network)
        around = {site: {"center": w.detach().clone(), "scale": 0.5} if moved else {} for site, w in sites.items()}
        priors = {site: make_prior(prior, site, w, kernel_prior, **around[site]) for site, w in sites.items()}
        locs = bayesianize(network, priors)
        image = torch.randn(3, 1, 4, 4, 4, dtype=torch.double)
        brain_mask = (torch.rand_like(image) < 0.8).double()
        data = (image, (image > 0.5).long(), brain_mask)
        return Scene(
            SegmentationModel(network, likelihood, num_cases=3, evidence=50.0), MeanFieldNormal(locs, scale), data
        )

    return make
