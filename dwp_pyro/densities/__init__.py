"""Distributions over one convolution kernel."""

from dwp_pyro.densities.flow import KernelFlow
from dwp_pyro.densities.gaussian import KernelGaussian, fit_gaussian
from dwp_pyro.densities.kernel_distribution import BlockKernels, FitSettings, KernelDistribution
from dwp_pyro.densities.kernel_normal import KernelNormal
from dwp_pyro.densities.mixture import KernelMixture
from dwp_pyro.densities.vae import KernelVAE

__all__ = [
    "DENSITIES",
    "BlockKernels",
    "FitSettings",
    "KernelDistribution",
    "KernelFlow",
    "KernelGaussian",
    "KernelMixture",
    "KernelNormal",
    "KernelVAE",
    "fit_gaussian",
]

#: Family → kernel distribution; the names alone are `config.names.FAMILIES`.
DENSITIES: dict[str, type[KernelDistribution]] = {
    "gaussian": KernelGaussian,
    "mixture": KernelMixture,
    "flow": KernelFlow,
    "dwp": KernelVAE,
}
