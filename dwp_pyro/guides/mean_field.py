"""The mean-field Normal guide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import Normal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from dwp_pyro.densities.kernel_normal import KernelNormal

__all__ = ["MeanFieldNormal"]

#: No weight needs a scale below 1e-12 or above 1e12, whose squares float32 can still represent.
_MAX_LOG_SCALE = 12 * math.log(10)


class MeanFieldNormal(PyroModule):
    """Mean-field Normal guide over all weights of all sites, in optionally whitened coordinates.

    The weights of a site are w = m₀ + A (μ + s ∘ ε), ε ~ N(0, I), where m₀ are the initial means, μ and s are trained,
    and the scaling matrix A is fixed. With A = 1 the weights are independent, q(w) = N(m₀ + μ, s²). With a root of the
    prior's kernel covariance as A (`KernelNormal`), one learning rate works for all kernel scales, and q can match a
    prior with correlated weights.

    Each site is sampled directly, not through an auxiliary site, so `TraceMeanField_ELBO` uses the KL registered for
    the pair of distributions. Every s is clamped to [1e-12, 1e12].

    Args:
        locs: Site → initial means m₀, of the site's shape: kernels of a source network, draws of the prior or a
            random initialization.
        scale: Initial s of every coordinate.
        units: Site → A, lower triangular [D, D] for kernels of D weights, or the diagonal of such a matrix, [D] or [];
            1 for sites that are not listed.

    Raises:
        ValueError: If `scale` is not positive.

    Examples:
        >>> import torch
        >>> from dwp_pyro import MeanFieldNormal
        >>> guide = MeanFieldNormal({"0.weight": torch.zeros(2, 1, 3, 3, 3)}, scale=0.1)
        >>> mean, deviation = guide.posterior("0.weight")
        >>> f"{deviation.mean().item():.2f}"
        '0.10'
    """

    def __init__(
        self, locs: Mapping[str, Tensor], scale: float = 0.01, units: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__("guide")
        if not scale > 0:
            raise ValueError(f"the initial scale must be positive, got {scale}")
        # Parameter names must not contain dots, names of sites do.
        self._keys = {site: site.replace(".", "/") for site in locs}
        for site, loc in locs.items():
            self.register_buffer(f"start/{self._keys[site]}", loc.detach().clone())
            unit = (units or {}).get(site, torch.ones((), dtype=loc.dtype, device=loc.device))
            self.register_buffer(f"unit/{self._keys[site]}", unit.detach().clone())
        self.shifts = nn.ParameterDict({self._keys[site]: torch.zeros_like(loc) for site, loc in locs.items()})
        self.log_scales = nn.ParameterDict(
            {self._keys[site]: torch.full_like(loc, scale).log() for site, loc in locs.items()}
        )

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites."""
        return tuple(self._keys)

    def scale(self, site: str) -> Tensor:
        """Return s of a site, of the site's shape."""
        return _limited(self.log_scales[self._keys[site]]).exp()

    def unit(self, site: str) -> Tensor:
        """Return A of a site: [D, D], [D] or []."""
        return self._buffer("unit", self._keys[site])

    def posterior(self, site: str) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each weight of a site, of the site's shape."""
        q = self.distribution(site).base_dist
        return q.mean, q.variance.sqrt()

    def distribution(self, site: str) -> Any:
        """Return q of the weights of a site; its event is the whole weight."""
        key = self._keys[site]
        return self._distribution(key, self.shifts[key], self.log_scales[key])

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Sample every site; return site → weights. The model's arguments are unused."""
        # Each attribute access registers every parameter with Pyro: access once, not per site.
        shifts, log_scales = dict(self.shifts), dict(self.log_scales)
        return {
            site: pyro.sample(site, self._distribution(key, shifts[key], log_scales[key]))
            for site, key in self._keys.items()
        }

    def _distribution(self, key: str, shift: Tensor, log_scale: Tensor) -> Any:
        start, unit, scale = self._buffer("start", key), self._buffer("unit", key), _limited(log_scale).exp()
        loc = start + _times(unit, shift)
        if unit.dim() < 2:
            return Normal(loc, _times(unit, scale)).to_event(loc.dim())
        return KernelNormal(loc, scale, unit, loc.dim() - 2).to_event(2)  # type: ignore[no-untyped-call]

    def _buffer(self, kind: str, key: str) -> Tensor:
        buffer = self._buffers[f"{kind}/{key}"]
        assert buffer is not None
        return buffer

    def whiten(self, site: str, weights: Tensor) -> Tensor:
        """Return the coordinates v = A⁻¹ (w − m₀) of weights w, both of the site's shape."""
        unit = self.unit(site)
        inverse = 1 / unit if unit.dim() < 2 else torch.linalg.inv(unit)
        return _times(inverse, weights - self._buffer("start", self._keys[site]))

    @torch.no_grad()
    def set_shift(self, site: str, shift: Tensor) -> None:
        """Set μ of a site, of the site's shape."""
        self.shifts[self._keys[site]].copy_(shift)

    @torch.no_grad()
    def set_scale(self, site: str, scale: Tensor) -> None:
        """Set s of a site, of the site's shape."""
        self.log_scales[self._keys[site]].copy_(scale.log())

    @torch.no_grad()
    def means(self) -> dict[str, Tensor]:
        """Return the posterior mean of each site."""
        return {site: self.distribution(site).mean.clone() for site in self._keys}

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return one posterior sample, site → weights, without Pyro effects.

        The noise is drawn on the CPU: a seed gives the same sample on every device.

        Args:
            generator: Random generator on the CPU; None for the global one.
        """
        weights = {}
        for site, key in self._keys.items():
            shift = self.shifts[key]
            noise = torch.randn(shift.shape, dtype=shift.dtype, generator=generator).to(shift.device)
            coordinates = shift + self.scale(site) * noise
            weights[site] = self._buffer("start", key) + _times(self._buffer("unit", key), coordinates)
        return weights


def _times(unit: Tensor, coordinates: Tensor) -> Tensor:
    """Return A v for every kernel v of [out, in, k₁, …, k_d]."""
    if unit.dim() == 0:
        return unit * coordinates
    kernels = coordinates.flatten(2)
    product = kernels * unit if unit.dim() == 1 else F.linear(kernels, unit)
    return product.view_as(coordinates)


def _limited(log_scale: Tensor) -> Tensor:
    """Clamp a log-scale; the gradient passes through, so that optimization can return within the limits."""
    return log_scale + (log_scale.clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE) - log_scale).detach()
