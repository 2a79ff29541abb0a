"""A mixture of full-covariance Gaussians over single convolution kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dwp_pyro.distributions.kernel_density import KernelDensity

__all__ = ["KernelMixture"]


class KernelMixture(KernelDensity):
    """p(u) = Σ_c π_c N(u; μ_c, Λ_c⁻¹Λ_c⁻ᵀ) over standardised kernels: an exact density.

    Args:
        kernel_shape: spatial shape of a kernel; D is its product.
        components: C.
    """

    log_weights: Tensor
    means: Tensor
    whitenings: Tensor

    def __init__(self, kernel_shape: Sequence[int], components: int = 1) -> None:
        super().__init__(kernel_shape)
        size = self.kernel_shape.numel()
        self.register_buffer("log_weights", torch.full((components,), -math.log(components)))
        self.register_buffer("means", torch.zeros(components, size))
        self.register_buffer("whitenings", torch.eye(size).repeat(components, 1, 1))

    def form(self) -> dict[str, Any]:
        return {"components": len(self.log_weights)}

    def component_log_prob(self, u: Tensor) -> Tensor:
        """log π_c + log N(u; component c): [..., D] → [..., C]."""
        # Λ_c (u − μ_c) for all components at once: one product of matrices, [D] by [C·D].
        components, size = self.means.shape
        flat = self.whitenings.reshape(components * size, size)
        offsets = torch.einsum("cij,cj->ci", self.whitenings, self.means)
        v = (u @ flat.T).unflatten(-1, (components, size)) - offsets
        log_volume = self.whitenings.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = self.log_weights + log_volume - 0.5 * size * math.log(2 * math.pi)
        return constant - 0.5 * v.square().sum(-1)

    def log_prob_standard(self, u: Tensor, samples: int = 1) -> Tensor:
        return self.component_log_prob(u).logsumexp(-1)

    def rsample_standard(self, shape: Sequence[int]) -> Tensor:
        chosen = torch.multinomial(self.log_weights.exp(), math.prod(shape), replacement=True)
        size = len(self.loc)
        noise = torch.randn(len(chosen), size, dtype=self.loc.dtype, device=self.loc.device)
        # For every component, then the chosen one: to loop over those that occur, a GPU would have to be waited for.
        solved = torch.linalg.solve_triangular(self.whitenings, noise.T.expand(len(self.means), -1, -1), upper=False)
        u = self.means[chosen] + solved[chosen, :, torch.arange(len(chosen), device=chosen.device)]
        return u.reshape(*shape, size)
