"""Priors by name."""

from __future__ import annotations

import math

from pyro.distributions import Normal, TorchDistribution
from torch import Tensor

from dwp_pyro.priors.deep_weight_prior import DeepWeightPrior
from dwp_pyro.priors.kernel_prior import KernelPrior
from dwp_pyro.priors.log_uniform import LogUniform
from dwp_pyro.runtime.errors import PriorError

__all__ = ["fixed_spread", "make_prior"]


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
    if name in ("normal", "he"):
        return _independent(weight, center, weight.new_full((), float(scale) * fixed_spread(name, weight)))
    if kernel_prior is None:
        raise PriorError(f"the prior '{name}' needs a fitted kernel prior; make one with 'dwp-pyro fit-prior'")
    density = kernel_prior.block_at(site, weight.shape)
    if name == "isotropic":
        return _independent(weight, center, scale * density.root_mean_square())
    kernels = DeepWeightPrior(density, particles, center=center, scale=scale).expand(weight.shape[:2])
    prior = kernels.to_event(2)  # type: ignore[no-untyped-call]
    return prior


def fixed_spread(name: str, weight: Tensor) -> float:
    """Return the standard deviation of a weight under "normal", N(0, 1), or "he", N(0, 2 / inputs) (He et al. 2015)."""
    return math.sqrt(2 / weight[0].numel()) if name == "he" else 1.0


def _independent(weight: Tensor, center: Tensor | None, spread: Tensor) -> TorchDistribution:
    loc = weight.new_zeros(()) if center is None else center
    prior: TorchDistribution = Normal(loc, spread).expand(weight.shape).to_event(weight.dim())
    return prior
