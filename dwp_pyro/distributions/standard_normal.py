"""The prior N(0, 1) on every weight."""

from __future__ import annotations

from pyro.distributions import Normal, TorchDistribution
from torch import Tensor

from dwp_pyro.distributions.kernel_prior import KernelPrior

__all__ = ["LEARNED", "at_site"]

LEARNED = False


def at_site(site: str, weight: Tensor, kernel_prior: KernelPrior | None) -> TorchDistribution:
    """Independent N(0, 1) weights for one convolution, of shape [out, in, k₁, …, k_d]."""
    zero, one = weight.new_zeros(()), weight.new_ones(())
    return Normal(zero, one).expand(weight.shape).to_event(weight.dim())
