"""The mean-field Normal guide."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.runtime import effectful
from torch import Tensor, nn

from dwp_pyro.distributions.log_scale_normal import log_scale_normals
from dwp_pyro.distributions.standard_normal import standard_normals_like

__all__ = ["MeanFieldNormal"]

#: No weight needs a scale below 1e-12 or above 1e12, and the squares of these are still numbers in float32.
_MOST_LOG_SCALE = 12 * math.log(10)


_noise = effectful(standard_normals_like, type="noise")


class MeanFieldNormal(PyroModule):
    """q(W) = Π N(w; m, s²), independent over every weight of every site.

    Each site is sampled directly from a Normal (not through an auxiliary site), so the
    divergences registered for a pair of distributions reach `TraceMeanField_ELBO`.

    Every s lies between 1e-12 and 1e12, whatever optimisation makes of its logarithm.

    Args:
        locs: site → initial means m, of the site's shape: the kernels of a source network, draws of
            the prior, a random start.
        scale: initial standard deviation s of every weight.

    Raises:
        ValueError: if `scale` is not positive.

    Example:
        >>> import torch
        >>> from dwp_pyro import MeanFieldNormal
        >>> guide = MeanFieldNormal({"0.weight": torch.zeros(2, 1, 3, 3, 3)}, scale=0.1)
        >>> mean, deviation = guide.posterior("0.weight")
        >>> f"{deviation.mean().item():.2f}"
        '0.10'
    """

    def __init__(self, locs: Mapping[str, Tensor], scale: float = 0.01) -> None:
        super().__init__("guide")
        if not scale > 0:
            raise ValueError(f"the initial scale must be positive, got {scale}")
        # A parameter's name may hold no dot; a site's does.
        self._keys = {site: site.replace(".", "/") for site in locs}
        self.locs = nn.ParameterDict({self._keys[site]: loc.detach().clone() for site, loc in locs.items()})
        self.log_scales = nn.ParameterDict(
            {self._keys[site]: torch.full_like(loc, scale).log() for site, loc in locs.items()}
        )

    def posterior(self, site: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the weights at a site, each of the site's shape."""
        key = self._keys[site]
        return self.locs[key], self.log_scales[key].clamp(-_MOST_LOG_SCALE, _MOST_LOG_SCALE).exp()

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites."""
        return tuple(self._keys)

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Sample every site; returns site → weights. Arguments are those of the model, unused.

        The noise is an effect of the type "noise", so that a handler (`MovingNoise`) can answer it in its own way.
        """
        # Each access is an effect that registers every parameter: one access, not one a site.
        locs, log_scales = dict(self.locs), dict(self.log_scales)
        keys = list(self._keys.values())
        for key in keys:
            # The parameter itself: a limit inside the graph would cut the gradient that brings a scale back.
            log_scales[key].detach().clamp_(-_MOST_LOG_SCALE, _MOST_LOG_SCALE)
        means = [locs[key] for key in keys]
        posteriors = log_scale_normals(means, [log_scales[key] for key in keys], _noise(means))
        sites = zip(self._keys, posteriors, strict=True)
        return {site: pyro.sample(site, posterior.to_event(posterior.loc.dim())) for site, posterior in sites}

    @torch.no_grad()
    def set_scale(self, site: str, scale: Tensor) -> None:
        """Set the standard deviation of a site's weights, of its shape."""
        self.log_scales[self._keys[site]].copy_(scale.log())

    @torch.no_grad()
    def means(self) -> dict[str, Tensor]:
        """Site → posterior mean."""
        return {site: self.posterior(site)[0].clone() for site in self._keys}

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Site → one sample of the posterior, outside any effect; noise from the CPU, so alike on every device."""
        posteriors = [self.posterior(site) for site in self._keys]
        sizes = [loc.numel() for loc, _ in posteriors]
        device, dtype = posteriors[0][0].device, posteriors[0][0].dtype
        (noise,) = standard_normals_like([torch.empty(sum(sizes), dtype=dtype)], generator)
        parts = noise.to(device).split(sizes)  # to a GPU in one piece
        return {
            site: torch.addcmul(loc, scale, part.view_as(loc))
            for site, (loc, scale), part in zip(self._keys, posteriors, parts, strict=True)
        }
