"""Priors over the convolution kernels of a network."""

from dwp_pyro.priors.bank import KernelBank, KernelSource, collect_kernels, read_kernels
from dwp_pyro.priors.blocks import BLOCKS, assign_blocks, kernel_sites, prior_blocks
from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior
from dwp_pyro.priors.kernel_prior import ANY_SITE, BlockInfo, KernelPrior
from dwp_pyro.priors.log_uniform import LogUniform
from dwp_pyro.priors.make_prior import make_prior
from dwp_pyro.priors.model_card import model_card
from dwp_pyro.priors.prior_scales import PriorScales

__all__ = [
    "ANY_SITE",
    "BLOCKS",
    "BlockInfo",
    "DeepWeightPrior",
    "KernelBank",
    "KernelPrior",
    "KernelSource",
    "LogUniform",
    "PriorScales",
    "assign_blocks",
    "collect_kernels",
    "kernel_sites",
    "make_prior",
    "model_card",
    "prior_blocks",
    "read_kernels",
]
