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
        scatter: Σ (w − m) (w − m)ᵀ, [D, D], float64. Sums about 0 would lose it where the mean is large.
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

    def scatter_about(self, center: Tensor) -> Tensor:
        """Return Σ (w − c) (w − c)ᵀ for a center c, [D, D]."""
        return self.scatter + self.count * torch.outer(self.mean - center, self.mean - center)
