"""Sums over kernels that determine their Gaussian, and that may be added up across sites."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """Number, mean and scatter of flattened kernels w.

    Args:
        count: Number of kernels n.
        mean: Mean m, [D], float64.
        scatter: Σ (w − m) (w − m)ᵀ, [D, D], float64. Sums about 0 would lose it where the mean is large. With noise
            that makes it private it may have negative eigenvalues.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, kernels: Tensor) -> Moments:
        """Return the moments of kernels [n, k₁, …, k_d]."""
        flat = kernels.flatten(1).double()
        mean = flat.mean(0)
        return cls(len(flat), mean, (flat - mean).T @ (flat - mean))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        mean = self.mean + (other.mean - self.mean) * (other.count / count)
        return Moments(count, mean, self.scatter_about(mean) + other.scatter_about(mean))

    def projected(self) -> Moments:
        """Return the moments with the nearest scatter without negative eigenvalues that has the same trace.

        Noise leaves the trace unbiased, but the positive eigenvalues are too large. A trace below the largest
        eigenvalue, which only noise causes, is replaced by it.
        """
        values, vectors = torch.linalg.eigh(self.scatter)
        if values[0] >= 0:
            return self
        # Projection on a simplex (Duchi et al. 2008, figure 1): subtract a constant and clip at 0.
        trace = max(float(values.sum()), float(values[-1]), 0.0)
        excess = values.flip(0).cumsum(0) - trace
        offsets = excess / torch.arange(1, len(values) + 1)
        values = (values - offsets[values.flip(0) >= offsets][-1]).clamp_min(0)
        return Moments(self.count, self.mean, (vectors * values) @ vectors.T)

    def scatter_about(self, center: Tensor) -> Tensor:
        """Return Σ (w − c) (w − c)ᵀ for a center c, [D, D]."""
        return self.scatter + self.count * torch.outer(self.mean - center, self.mean - center)
