"""The deep weight prior as a Pyro distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor, nn
from torch.distributions import Independent, constraints, register_kl
from torch.nn import functional as F

from dwp_pyro.distributions.kernel_density import KernelDensity, KernelGaussian

__all__ = ["DeepWeightPrior"]


class DeepWeightPrior(TorchDistribution):
    """A learned prior over convolution kernels, with the density of a `KernelVAE` or another `KernelDensity`.

    Batch: independent kernels. Event: one kernel, `density.kernel_shape`. At the site of a
    convolution: `DeepWeightPrior(vae).expand([out, in]).to_event(2)` (Atanov et al. 2018, section 3).

    The prior may be moved and scaled: w = a + c·(v − b), where v has the density, b is the mean of the kernels it
    was fitted to, and a the `centre`. With a = the kernels of a source network it is a prior on the change from them.

    `log_prob` is exact for an exact density. For a `KernelVAE` it is a *stochastic lower bound*: one draw of
    log (1/K) Σ_k p(w|z_k) p(z_k) / r(z_k|w) a kernel, differentiable through w, with K = `particles`
    (see `KernelVAE.bound`). With a Normal guide the Kullback–Leibler divergence is registered: in closed
    form for a Gaussian, else as an upper bound with the entropy in closed form; its draw of w is its own.

    Args:
        density: the trained density. A distribution is in no state dict: register the module
            where its parameters must be found.
        particles: K ≥ 1.
        centre: a, [*batch_shape, *kernel_shape]; None for b.
        scale: c > 0.

    Raises:
        ValueError: if `particles` is below 1, `scale` is not positive, or a value's last axes are not a kernel's.

    Example:
        >>> from dwp_pyro import DeepWeightPrior, KernelVAE
        >>> prior = DeepWeightPrior(KernelVAE((3, 3, 3)).requires_grad_(False)).expand([16, 4]).to_event(2)
        >>> kernels = prior.sample()
        >>> tuple(kernels.shape), tuple(prior.log_prob(kernels).shape)
        ((16, 4, 3, 3, 3), ())
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own contract
    has_rsample = True

    def __init__(
        self,
        density: KernelDensity,
        particles: int = 1,
        *,
        centre: Tensor | None = None,
        scale: float = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")
        if not scale > 0:
            raise ValueError(f"the scale must be positive, got {scale}")
        self.density = density
        self.particles = particles
        self.centre = centre
        self.scale = scale
        event_shape = density.kernel_shape
        batch_shape = torch.Size() if centre is None else centre.shape[: centre.dim() - len(event_shape)]
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DeepWeightPrior:
        new = self._get_checked_instance(DeepWeightPrior, _instance)
        batch_shape = torch.Size(batch_shape)
        new.density = self.density
        new.particles = self.particles
        new.centre = None if self.centre is None else self.centre.expand(batch_shape + self.event_shape)
        new.scale = self.scale
        super(DeepWeightPrior, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        kernels = self.density.rsample([*sample_shape, *self.batch_shape])
        if self.centre is None and self.scale == 1:
            return kernels
        return self.mean + self.scale * (kernels - self._density_mean())

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        return self.log_prob_of_change(value.expand(shape) - self.mean)

    def log_prob_of_change(self, change: Tensor) -> Tensor:
        """The log-density, or one draw of its bound, of kernels a + `change`; [..., *kernel_shape] → [...]."""
        u = F.linear(change.flatten(-len(self.event_shape)), self._whitening())
        return self.density.log_prob_standard(u, self.particles) - self.density.log_volume() - self.log_scale()

    def value_and_gradients(self, change: Tensor, parameters: Sequence[nn.Parameter] = ()) -> tuple[Tensor, ...]:
        """Σ `log_prob_of_change` over kernels [n, *kernel_shape], [], and its gradients: by `change`, of its shape, and
        by parameters of the density."""
        total, by_change, *rest = self.density.value_and_gradients(
            change.flatten(1), self._whitening(), self.particles, parameters
        )
        total = total - len(change) * (self.density.log_volume() + self.log_scale())
        return total, by_change.view_as(change), *rest

    def _whitening(self) -> Tensor:
        return self.density.whitening() / self.scale

    def to_density(self, value: Tensor) -> Tensor:
        """The kernels v of the density that stand for kernels w: b + (w − a)/c."""
        if self.centre is None and self.scale == 1:
            return value
        return self._density_mean() + (value - self.mean) / self.scale

    def log_scale(self) -> float:
        """D log c: log p(w) = log p(v) − D log c."""
        return self.event_shape.numel() * math.log(self.scale)

    @property
    def mean(self) -> Tensor:
        """a: the mean of the fitted kernels' Gaussian, moved to the centre; broadcasts to a value's shape."""
        return self._density_mean() if self.centre is None else self.centre

    def _density_mean(self) -> Tensor:
        return self.density.loc.reshape(self.event_shape)


@register_kl(Independent, DeepWeightPrior)
def _kl_independent_deep_weight_prior(q: Independent, p: DeepWeightPrior) -> Tensor:
    """−H[q] − E_q log p(w), a kernel; for a bound, one draw of it, whose mean is at least KL(q‖p)."""
    if not isinstance(q.base_dist, Normal) or q.event_shape != p.event_shape:
        raise NotImplementedError
    if isinstance(p.density, KernelGaussian):
        loc, scale = p.to_density(q.base_dist.loc), q.base_dist.scale / p.scale
        return p.log_scale() - q.entropy() - p.density.expected_log_prob(loc, scale)
    return -q.entropy() - p.log_prob(q.rsample())
