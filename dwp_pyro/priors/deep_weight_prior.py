"""The deep weight prior as a Pyro distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Independent, constraints, register_kl

from dwp_pyro.densities.kernel_distribution import KernelDistribution
from dwp_pyro.densities.kernel_normal import KernelNormal

__all__ = ["DeepWeightPrior"]

_CHUNK = 16384  # kernels × particles whose autograd graph is in memory at once


class DeepWeightPrior(TorchDistribution):
    """A learned prior over convolution kernels: a `KernelVAE` or another `KernelDistribution` as a Pyro distribution.

    Batch: independent kernels. Event: one kernel, `density.kernel_shape`. At the site of a convolution:
    `DeepWeightPrior(vae).expand([out, in]).to_event(2)` (Atanov et al. 2018, section 3).

    The prior can be shifted and scaled: w = a + c·(v − b) with v ~ `density`, where b is the mean of the kernels used
    to fit the density. If a holds the kernels of a source network, the prior is on deviations from them.

    `log_prob` is exact for an exact density. For a `KernelVAE` it is a *stochastic lower bound*: a single-sample
    estimate of E log (1/K) Σ_k p(w|z_k) p(z_k) / r(z_k|w) per kernel, with z_k ~ r(z|w) and K = `particles`,
    differentiable through w (see `KernelVAE.bound`). The KL from a Normal guide is registered: in closed form if the
    density has one, else as an upper bound, with the guide's entropy in closed form and a separate draw of w.

    Args:
        density: Fitted kernel distribution. A Pyro distribution has no state dict: register this module elsewhere to
            train or save its parameters.
        particles: Number of samples K of the bound, K ≥ 1; unused for an exact density.
        center: Kernels a, [*batch_shape, *kernel_shape]; None for b.
        scale: Factor c > 0; a scalar tensor if it is learned.
        validate_args: Whether to check values; None for Pyro's default.

    Raises:
        ValueError: If `particles` is below 1 or `scale` is not positive.

    Examples:
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
        density: KernelDistribution,
        particles: int = 1,
        *,
        center: Tensor | None = None,
        scale: float | Tensor = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")
        # Reading the value of a tensor would synchronize with the GPU.
        if not isinstance(scale, Tensor) and not scale > 0:
            raise ValueError(f"the scale must be positive, got {scale}")
        self.density = density
        self.particles = particles
        self.center = center
        self.scale = scale
        event_shape = density.kernel_shape
        batch_shape = torch.Size() if center is None else center.shape[: center.dim() - len(event_shape)]
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DeepWeightPrior:
        new: DeepWeightPrior = self._get_checked_instance(DeepWeightPrior, _instance)  # type: ignore[no-untyped-call]
        batch_shape = torch.Size(batch_shape)
        new.density = self.density
        new.particles = self.particles
        new.center = None if self.center is None else self.center.expand(batch_shape + self.event_shape)
        new.scale = self.scale
        super(DeepWeightPrior, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        kernels = self.density.rsample([*sample_shape, *self.batch_shape])
        return self.mean + self.scale * (kernels - self._density_mean())

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        u = self.standardize(value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)))
        return _log_prob(self.density, self.particles, u) - self.density.log_abs_det(self.scale)

    def standardize(self, value: Tensor) -> Tensor:
        """Return u = A⁻¹ (w − a) / c of kernels w, [..., *kernel_shape] → [..., D]; A is the density's `scale_tril`."""
        return self.density.standardize(value, self.mean, self.scale)

    @property
    def mean(self) -> Tensor:
        """The center a, broadcastable to a value."""
        return self._density_mean() if self.center is None else self.center

    def _density_mean(self) -> Tensor:
        return self.density.loc.reshape(self.event_shape)


def _log_prob(density: KernelDistribution, particles: int, u: Tensor) -> Tensor:
    """Return log p(u), [..., D] → [...]; many kernels under a fixed density are evaluated by chunks."""
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in density.parameters())
    if trained or u[..., 0].numel() * particles <= _CHUNK:
        return density.log_prob_standardized(u, particles)
    log_prob: Tensor = _ChunkedLogProb.apply(density, particles, u)  # type: ignore[no-untyped-call]
    return log_prob


class _ChunkedLogProb(torch.autograd.Function):
    """log p(u) with its gradient taken in the forward pass, so that memory holds the graph of one chunk."""

    @staticmethod
    def forward(ctx: Any, density: KernelDistribution, particles: int, u: Tensor) -> Tensor:
        values, gradients = [], []
        for chunk in u.reshape(-1, u.shape[-1]).split(max(1, _CHUNK // particles)):
            with torch.enable_grad():
                chunk = chunk.detach().requires_grad_()
                value = density.log_prob_standardized(chunk, particles)
                gradients += torch.autograd.grad(value.sum(), chunk)
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(gradients).view_as(u))
        return torch.cat(values).view(u.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, None, grad.unsqueeze(-1) * gradient


@register_kl(KernelNormal, DeepWeightPrior)  # type: ignore[untyped-decorator]
def _kl_kernel_normal(q: KernelNormal, p: DeepWeightPrior) -> Tensor:
    """Return KL(q‖p) of each kernel in closed form, or else −H[q] − log p(w) at one draw w of q.

    If the log-density is a lower bound, the mean of the latter is at least KL(q‖p).
    """
    if q.event_shape != p.event_shape:
        raise NotImplementedError
    kl = p.density.kl_from_normal(q, p.mean, p.scale)
    return -q.entropy() - p.log_prob(q.rsample()) if kl is None else kl


@register_kl(Independent, DeepWeightPrior)  # type: ignore[untyped-decorator]
def _kl_independent(q: Independent[torch.distributions.Distribution], p: DeepWeightPrior) -> Tensor:
    """Return the same for independent weights."""
    if not isinstance(q.base_dist, Normal) or q.event_shape != p.event_shape:
        raise NotImplementedError
    identity = torch.eye(q.event_shape.numel(), dtype=q.base_dist.loc.dtype, device=q.base_dist.loc.device)
    kl: Tensor = _kl_kernel_normal(KernelNormal(q.base_dist.loc, q.base_dist.scale, identity, len(q.event_shape)), p)
    return kl
