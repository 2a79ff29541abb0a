"""Priors by name."""

from __future__ import annotations

from pyro.distributions import Normal, TorchDistribution
from torch import Tensor

from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior
from dwp_pyro.priors.kernel_prior import KernelPrior
from dwp_pyro.priors.log_uniform import LogUniform
from dwp_pyro.runtime.errors import PriorError

__all__ = ["make_prior"]


def make_prior(
    name: str,
    site: str,
    weight: Tensor,
    kernel_prior: KernelPrior | None = None,
    *,
    center: Tensor | None = None,
    scale: float | Tensor = 1.0,
    particles: int = 1,
) -> TorchDistribution:
    """Return the prior over the kernels of one convolution.

    Args:
        name: One of `PRIORS`.
        site: Parameter name of the convolution's weight, e.g. "down1.conv1.weight".
        weight: Weight, [out, in, k₁, …, k_d], that gives shape, dtype and device; its values are unused.
        kernel_prior: Fitted prior of the family `name`; required for learned priors.
        center: Kernels that the prior is centered on, [out, in, k₁, …, k_d]; None for its own mean.
        scale: Factor of the prior's spread around its center; a tensor, [], if it is learned.
        particles: Number of samples K of the bound; unused for an exact density.

    Returns:
        A distribution whose event is the whole weight.

    Raises:
        PriorError: If a learned prior is missing or does not fit the site.
        ValueError: If a center or a scale is given for the log-uniform prior, which has neither.
    """
    if name == "log-uniform":
        if center is not None or scale != 1:
            raise ValueError("the log-uniform prior has no center and no scale")
        prior: TorchDistribution = LogUniform().expand(weight.shape).to_event(weight.dim())  # type: ignore[no-untyped-call]
        return prior
    if name == "normal":
        loc = weight.new_zeros(()) if center is None else center
        prior = Normal(loc, weight.new_full((), float(scale))).expand(weight.shape).to_event(weight.dim())
        return prior
    if kernel_prior is None:
        raise PriorError(f"the prior '{name}' needs a fitted kernel prior; make one with 'dwp-pyro fit-prior'")
    density = kernel_prior.block_at(site, weight.shape)
    if name == "isotropic":
        loc = weight.new_zeros(()) if center is None else center
        prior = Normal(loc, scale * density.root_mean_square()).expand(weight.shape).to_event(weight.dim())
        return prior
    kernels = DeepWeightPrior(density, particles, center=center, scale=scale).expand(weight.shape[:2])
    prior = kernels.to_event(2)  # type: ignore[no-untyped-call]
    return prior
