"""The one switch from a prior's name to a distribution at a site.

A further prior is a file with a function `at_site(site, weight, kernel_prior)` and a constant `LEARNED`,
whether it needs trained blocks, and a line here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro.distributions import TorchDistribution
    from torch import Tensor

    from dwp_pyro.distributions.kernel_prior import KernelPrior

__all__ = ["PRIORS", "is_learned", "prior_at"]

#: Name → module. By name, so that the command line can list them without loading torch.
PRIORS = {
    "dwp": "dwp_pyro.distributions.deep_weight_prior",
    "normal": "dwp_pyro.distributions.standard_normal",
    "log-uniform": "dwp_pyro.distributions.log_uniform",
}


def is_learned(name: str) -> bool:
    """Whether the prior `name`, one of `PRIORS`, needs a trained `KernelPrior`."""
    return bool(import_module(PRIORS[name]).LEARNED)


def prior_at(name: str, site: str, weight: Tensor, kernel_prior: KernelPrior | None = None) -> TorchDistribution:
    """The prior `name` for the kernels of one convolution.

    Args:
        name: one of `PRIORS`.
        site: name of the convolution's weight in the network, e.g. "down1.conv1.weight".
        weight: that weight [out, in, k₁, …, k_d]; its shape, dtype and device count, not its values.
        kernel_prior: the trained blocks, for the priors that are learned.

    Returns:
        A distribution whose event is the whole weight.

    Raises:
        PriorError: if a learned prior is missing or does not fit the site.
    """
    distribution: TorchDistribution = import_module(PRIORS[name]).at_site(site, weight, kernel_prior)
    return distribution
