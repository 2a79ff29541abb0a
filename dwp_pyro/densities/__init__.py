"""Distributions over one convolution kernel."""

from dwp_pyro.densities.flow import KernelFlow
from dwp_pyro.densities.gaussian import KernelGaussian
from dwp_pyro.densities.kernel_distribution import BlockKernels, KernelDistribution
from dwp_pyro.densities.kernel_normal import KernelNormal
from dwp_pyro.densities.mixture import KernelMixture
from dwp_pyro.densities.vae import KernelVAE

__all__ = [
    "DENSITIES",
    "BlockKernels",
    "KernelDistribution",
    "KernelFlow",
    "KernelGaussian",
    "KernelMixture",
    "KernelNormal",
    "KernelVAE",
]

#: Family → kernel distribution; the names alone are `config.names.FAMILIES`.
DENSITIES: dict[str, type[KernelDistribution]] = {
    "gaussian": KernelGaussian,
    "mixture": KernelMixture,
    "flow": KernelFlow,
    "dwp": KernelVAE,
}
