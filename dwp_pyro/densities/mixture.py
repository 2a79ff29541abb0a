"""A mixture of full-covariance Gaussians over convolution kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dwp_pyro.densities.kernel_distribution import KernelDistribution

__all__ = ["KernelMixture"]

_MAX_KERNELS = 30_000  # sufficient for a fit
_COMPONENTS = (2, 4, 8, 16, 32)
_ITERATIONS = 60  # of expectation maximization
_MIN_VARIANCE = 1e-6  # of a standardized kernel's weight: limits the density of kernels that repeat


class KernelMixture(KernelDistribution):
    """Mixture of full-covariance Gaussians over standardized kernels u, with an exact density.

    p(u) = Σ_c π_c N(u; μ_c, Λ_c⁻¹Λ_c⁻ᵀ), with weights π_c, means μ_c of D numbers, and lower-triangular whitening
    matrices Λ_c.

    Args:
        kernel_shape: Spatial shape of a kernel; D is its product.
        components: Number of components. `fit` replaces it when validation kernels are given.
    """

    log_weights: Tensor
    means: Tensor
    whitenings: Tensor

    def __init__(self, kernel_shape: Sequence[int], components: int = 1) -> None:
        super().__init__(kernel_shape)
        log_weights, means, whitenings = _standard_normals(components, self.kernel_shape.numel())
        self.register_buffer("log_weights", log_weights)
        self.register_buffer("means", means)
        self.register_buffer("whitenings", whitenings)

    def init_args(self) -> dict[str, Any]:
        return {"components": len(self.log_weights)}

    @torch.no_grad()
    def fit(self, kernels: Tensor, steps: int, *, validation: Tensor | None = None, chosen: int | None = None) -> int:
        if validation is None:
            self._expectation_maximization(kernels, chosen or len(self.log_weights))
            return len(self.log_weights)
        best, best_score = None, -math.inf
        for components in (1, *_COMPONENTS):
            if components > 1 and components * 2 * len(self.loc) > len(kernels):
                break
            self._expectation_maximization(kernels, components)
            score = float(self.log_prob_estimate(validation).mean())
            if best is None or score > best_score:
                best, best_score = (self.log_weights, self.means, self.whitenings), score
        assert best is not None
        self.log_weights, self.means, self.whitenings = best
        return len(self.log_weights)

    def _expectation_maximization(self, kernels: Tensor, components: int) -> None:
        """Run expectation maximization; each covariance is shrunk towards an isotropic one of the same trace."""
        size = len(self.loc)
        self.log_weights, self.means, self.whitenings = _standard_normals(components, size)
        if components == 1:
            return
        u = self.standardize(kernels[torch.randperm(len(kernels))[:_MAX_KERNELS]])
        # Kernels differ most in their norm: start from components of several norms.
        rank = u.square().sum(1).argsort().argsort()
        responsibility = nn.functional.one_hot(rank * components // len(u), components).float()
        for _ in range(_ITERATIONS):
            count = responsibility.sum(0)
            means = responsibility.T @ u / (count[:, None] + 1)
            for component in range(components):
                weighted = (u - means[component]) * responsibility[:, component, None].sqrt()
                scatter = weighted.T @ weighted
                # Shrinkage by D pseudo-kernels of the component's own variance: the variance of the whole block would
                # widen a component of near-zero kernels a thousandfold.
                variance = scatter.trace() / size / count[component].clamp_min(1)
                shrunk = (scatter + size * variance * torch.eye(size)) / (count[component] + size)
                covariance = shrunk + _MIN_VARIANCE * torch.eye(size)
                root = torch.linalg.cholesky(covariance)
                self.whitenings[component] = torch.linalg.solve_triangular(root, torch.eye(size), upper=False)
            self.means.copy_(means)
            self.log_weights.copy_(((count + 1) / (count + 1).sum()).log())
            responsibility = self.component_log_prob(u).softmax(-1)

    def component_log_prob(self, u: Tensor) -> Tensor:
        """Return log π_c + log N(u; component c): [..., D] → [..., C]."""
        # Λ_c (u − μ_c) of all components by one matrix product, [D] by [C·D].
        components, size = self.means.shape
        flat = self.whitenings.reshape(components * size, size)
        offsets = torch.einsum("cij,cj->ci", self.whitenings, self.means)
        v: Tensor = (u @ flat.T).unflatten(-1, (components, size)) - offsets
        log_abs_det = self.whitenings.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = self.log_weights + log_abs_det - 0.5 * size * math.log(2 * math.pi)
        return constant - 0.5 * v.square().sum(-1)

    def log_prob_standardized(self, u: Tensor, samples: int = 1) -> Tensor:
        return self.component_log_prob(u).logsumexp(-1)

    def rsample_standardized(self, shape: Sequence[int]) -> Tensor:
        chosen = torch.multinomial(self.log_weights.exp(), math.prod(shape), replacement=True)
        size = len(self.loc)
        noise = torch.randn(len(chosen), size, dtype=self.loc.dtype, device=self.loc.device)
        # Solve for every component, then select: a loop over the drawn components would synchronize with the GPU.
        solved = torch.linalg.solve_triangular(self.whitenings, noise.T.expand(len(self.means), -1, -1), upper=False)
        u: Tensor = self.means[chosen] + solved[chosen, :, torch.arange(len(chosen), device=chosen.device)]
        return u.reshape(*shape, size)


def _standard_normals(components: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-weights, means and whitenings of equally weighted components N(0, I)."""
    log_weights = torch.full((components,), -math.log(components))
    return log_weights, torch.zeros(components, size), torch.eye(size).repeat(components, 1, 1)
