"""Learned scales of the blocks' priors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["PriorScales"]


class PriorScales(nn.Module):
    """Scale c of the prior of each block, w = a + c (v − b), under a hyperprior around an initial value c₀.

    c² is inverse gamma with n degrees of freedom, as many as the block has weights: as a density of log c, relative to
    its mode, log p(c) − log p(c₀) = −n [log (c/c₀) + ½ (c₀²/c² − 1)]. Under q(v) = N(μ, σ²) the optimal c is
    c² = (Σ (σ² + μ²) + n c₀²) / 2n. Without a hyperprior two uninformative posteriors have KL 0: a point at the
    center (c, σ → 0) and noise (c → ∞).

    Args:
        weights: Block → number of weights n.
        start: Initial scale c₀, above 0.
    """

    weights: Tensor

    def __init__(self, weights: Mapping[str, int], start: float) -> None:
        super().__init__()
        self.blocks = list(weights)
        self.start = start
        self.register_buffer("weights", torch.tensor([*weights.values()], dtype=torch.float32))
        self.log_scales = nn.Parameter(torch.full((len(weights),), math.log(start)))

    def scale(self, block: str) -> Tensor:
        """Return the scale c of a block, []."""
        return self.log_scales[self.blocks.index(block)].exp()

    def log_prob(self) -> Tensor:
        """Return the log-density of all scales relative to its mode, []."""
        change = self.log_scales - math.log(self.start)
        return -(self.weights * (change + 0.5 * torch.expm1(-2 * change))).sum()
