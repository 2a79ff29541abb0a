"""The one switch from a prior's name to a distribution at a site."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro.distributions import TorchDistribution
    from torch import Tensor

    from dwp_pyro.distributions.kernel_prior import KernelPrior

__all__ = ["FAMILIES", "LEARNED", "PRIORS", "prior_at"]

# Names alone at the top, so that the command line can list them without loading torch.

#: Families of learned densities, simplest first: what `fit-prior` fits.
FAMILIES = ("gaussian", "mixture", "flow", "dwp")

#: Priors that need a trained `KernelPrior`; "isotropic" takes the block's scale alone.
LEARNED = (*FAMILIES, "isotropic")

PRIORS = ("dwp", "gaussian", "mixture", "flow", "isotropic", "normal", "log-uniform")


def prior_at(
    name: str,
    site: str,
    weight: Tensor,
    kernel_prior: KernelPrior | None = None,
    *,
    centre: Tensor | None = None,
    scale: float | Tensor = 1.0,
    particles: int = 1,
) -> TorchDistribution:
    """The prior `name` for the kernels of one convolution.

    Args:
        name: one of `PRIORS`.
        site: name of the convolution's weight in the network, e.g. "down1.conv1.weight".
        weight: that weight [out, in, k₁, …, k_d]; its shape, dtype and device count, not its values.
        kernel_prior: the trained blocks, of the family `name`, for the priors that are learned.
        centre: the kernels around which the prior is put, [out, in, k₁, …, k_d]; None for where it is by itself.
        scale: Factor of the prior's spread around its centre; a tensor, [], where it is learned.
        particles: K of the bound, where the density is one.

    Returns:
        A distribution whose event is the whole weight.

    Raises:
        PriorError: if a learned prior is missing or does not fit the site.
        ValueError: for a centre or scale of the log-uniform prior, which has neither.
    """
    from pyro.distributions import Normal

    from dwp_pyro.distributions.deep_weight_prior import DeepWeightPrior
    from dwp_pyro.distributions.log_uniform import LogUniform
    from dwp_pyro.errors import PriorError

    if name == "log-uniform":
        if centre is not None or scale != 1:
            raise ValueError("the log-uniform prior has no centre and no scale")
        return LogUniform().expand(weight.shape).to_event(weight.dim())
    if name == "normal":
        loc = weight.new_zeros(()) if centre is None else centre
        return Normal(loc, weight.new_full((), float(scale))).expand(weight.shape).to_event(weight.dim())
    if kernel_prior is None:
        raise PriorError(f"the prior '{name}' needs a trained kernel prior: make one with 'dwp-pyro fit-prior'")
    density = kernel_prior.block_at(site, weight.shape)
    prior = DeepWeightPrior(density, particles, centre=centre, scale=scale)
    return prior.expand(weight.shape[:2]).to_event(2)
