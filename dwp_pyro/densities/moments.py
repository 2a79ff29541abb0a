"""Sums over kernels that determine their Gaussian, and that may be added up across sites."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """Number of kernels, Σ w and Σ w wᵀ of flattened kernels w.

    Args:
        count: Number of kernels n.
        total: Σ w, [D], float64.
        outer: Σ w wᵀ, [D, D], float64.
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, kernels: Tensor) -> Moments:
        """Return the moments of kernels [n, k₁, …, k_d]."""
        flat = kernels.flatten(1).double()
        return cls(len(flat), flat.sum(0), flat.T @ flat)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def scatter_about(self, center: Tensor) -> Tensor:
        """Return Σ (w − m) (w − m)ᵀ for a center m, [D, D]."""
        cross = torch.outer(self.total, center)
        return self.outer - cross - cross.T + self.count * torch.outer(center, center)
