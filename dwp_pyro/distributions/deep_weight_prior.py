"""The deep weight prior as a Pyro distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor
from torch.distributions import Independent, constraints, register_kl

from dwp_pyro.distributions.kernel_prior import KernelPrior
from dwp_pyro.distributions.kernel_vae import KernelVAE
from dwp_pyro.errors import PriorError

__all__ = ["LEARNED", "DeepWeightPrior", "at_site"]

LEARNED = True


class DeepWeightPrior(TorchDistribution):
    """An implicit prior over convolution kernels, with the density of a `KernelVAE`.

    Batch: independent kernels. Event: one kernel, `kernel_vae.kernel_shape`. At the site of a
    convolution: `DeepWeightPrior(vae).expand([out, in]).to_event(2)` (Atanov et al. 2018, section 3).

    `log_prob` is a *stochastic lower bound* on the log-density: one draw of
    log (1/K) Σ_k p(w|z_k) p(z_k) / r(z_k|w) a kernel, differentiable through w, with K = `particles`
    (see `KernelVAE.bound`). With a Normal guide the Kullback–Leibler divergence is registered, as an
    upper bound with the entropy in closed form; its draw of w is its own.

    Args:
        kernel_vae: the trained density. A distribution is in no state dict: register the module
            where its parameters must be found.
        particles: K ≥ 1.

    Raises:
        ValueError: if `particles` is below 1, or a value's last axes are not a kernel's.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own contract
    has_rsample = True

    def __init__(
        self,
        kernel_vae: KernelVAE,
        particles: int = 1,
        batch_shape: Sequence[int] = (),
        validate_args: bool | None = None,
    ) -> None:
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")
        self.kernel_vae = kernel_vae
        self.particles = particles
        super().__init__(torch.Size(batch_shape), kernel_vae.kernel_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DeepWeightPrior:
        new = self._get_checked_instance(DeepWeightPrior, _instance)
        new.kernel_vae = self.kernel_vae
        new.particles = self.particles
        super(DeepWeightPrior, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.kernel_vae.rsample([*sample_shape, *self.batch_shape])

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        return self.kernel_vae.log_prob_estimate(value.expand(shape), self.particles)


@register_kl(Independent, DeepWeightPrior)
def _kl_independent_deep_weight_prior(q: Independent, p: DeepWeightPrior) -> Tensor:
    """One draw of −H[q] − E_q L_K(w) ≥ KL(q‖p), a kernel."""
    if not isinstance(q.base_dist, Normal) or q.event_shape != p.event_shape:
        raise NotImplementedError
    return -q.entropy() - p.log_prob(q.rsample())


def at_site(site: str, weight: Tensor, kernel_prior: KernelPrior | None) -> TorchDistribution:
    """The deep weight prior of the kernels of one convolution, of shape [out, in, k₁, …, k_d].

    Raises:
        PriorError: without a kernel prior, or with one that has no block for this site and kernel shape.
    """
    if kernel_prior is None:
        raise PriorError("the deep weight prior needs a trained kernel prior: make one with 'dwp-pyro fit-prior'")
    return DeepWeightPrior(kernel_prior.block_at(site, weight.shape)).expand(weight.shape[:2]).to_event(2)
