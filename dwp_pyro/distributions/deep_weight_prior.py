"""The deep weight prior as a Pyro distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Independent, constraints, register_kl
from torch.nn import functional as F

from dwp_pyro.distributions.kernel_density import KernelDensity, KernelGaussian
from dwp_pyro.distributions.kernel_normal import KernelNormal

__all__ = ["DeepWeightPrior"]

_CHUNK = 16384  # kernels × particles whose graph is in memory at once


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
        scale: c > 0; a tensor, [], where it is learned.

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
        scale: float | Tensor = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")
        # The value of a tensor is not read: a GPU would be waited for.
        if not isinstance(scale, Tensor) and not scale > 0:
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
        return self.mean + self.scale * (kernels - self._density_mean())

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        u = self.standardise(value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)))
        return _log_prob(self.density, self.particles, u) - self.log_volume()

    def standardise(self, value: Tensor) -> Tensor:
        """Kernels w → u = A⁻¹ (w − a) / c, [..., *kernel_shape] → [..., D]; A is the density's `scale_tril`."""
        return F.linear((value - self.mean).flatten(-len(self.event_shape)), self.density.whitening()) / self.scale

    def log_volume(self) -> Tensor:
        """log |det c A|: log p(w) = log p(u) − log |det c A|."""
        log_scale = self.scale.log() if isinstance(self.scale, Tensor) else math.log(self.scale)
        return self.density.log_volume() + self.event_shape.numel() * log_scale

    @property
    def mean(self) -> Tensor:
        """a: the mean of the fitted kernels' Gaussian, moved to the centre; broadcasts to a value's shape."""
        return self._density_mean() if self.centre is None else self.centre

    def _density_mean(self) -> Tensor:
        return self.density.loc.reshape(self.event_shape)


def _log_prob(density: KernelDensity, particles: int, u: Tensor) -> Tensor:
    """log p(u) of standardised kernels, [..., D] → [...]; of a fixed density, where there are many, by chunks."""
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in density.parameters())
    if trained or u[..., 0].numel() * particles <= _CHUNK:
        return density.log_prob_standard(u, particles)
    log_prob: Tensor = _ChunkedLogProb.apply(density, particles, u)
    return log_prob


class _ChunkedLogProb(torch.autograd.Function):
    """Takes the gradient with the value, so that memory does not hold the graph of more than one chunk."""

    @staticmethod
    def forward(ctx: Any, density: KernelDensity, particles: int, u: Tensor) -> Tensor:
        values, gradients = [], []
        for chunk in u.flatten(0, -2).split(max(1, _CHUNK // particles)):
            with torch.enable_grad():
                chunk = chunk.detach().requires_grad_()
                value = density.log_prob_standard(chunk, particles)
                gradients += torch.autograd.grad(value.sum(), chunk)
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(gradients).view_as(u))
        return torch.cat(values).view(u.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, None, grad.unsqueeze(-1) * gradient


@register_kl(KernelNormal, DeepWeightPrior)
def _kl_kernel_normal(q: KernelNormal, p: DeepWeightPrior) -> Tensor:
    """KL(q‖p) of each kernel: in closed form under a Gaussian density, else −H[q] − log p(w) at a draw w of q.

    For a bound on the density the draw's mean is at least KL(q‖p).
    """
    if q.event_shape != p.event_shape:
        raise NotImplementedError
    if not isinstance(p.density, KernelGaussian):
        return -q.entropy() - p.log_prob(q.rsample())
    # E |A⁻¹(w − a)/c|², w = m + A_q (s ∘ ε): the columns of A⁻¹ A_q have the lengths 1 where both have one root.
    lengths = (p.density.whitening() @ q.scale_tril).square().sum(0)
    spread = (q.scale.flatten(-len(q.event_shape)).square() @ lengths) / p.scale**2
    square = p.standardise(q.loc).square().sum(-1) + spread
    return 0.5 * (square + q.event_shape.numel() * math.log(2 * math.pi)) + p.log_volume() - q.entropy()


@register_kl(Independent, DeepWeightPrior)
def _kl_independent(q: Independent, p: DeepWeightPrior) -> Tensor:
    """The same for independent weights."""
    if not isinstance(q.base_dist, Normal) or q.event_shape != p.event_shape:
        raise NotImplementedError
    identity = torch.eye(q.event_shape.numel(), dtype=q.base_dist.loc.dtype, device=q.base_dist.loc.device)
    return _kl_kernel_normal(KernelNormal(q.base_dist.loc, q.base_dist.scale, identity, len(q.event_shape)), p)
