"""The width of each block's prior, learned."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["PriorScales"]


class PriorScales(nn.Module):
    """Scale c of the prior of each block, w = a + c (v − b), under a hyperprior that keeps it near its start c₀.

    c² is inverse gamma with ν = κ n degrees of freedom, n the block's weights: as a density of log c, relative to its
    mode, log p(c) − log p(c₀) = −ν [log (c/c₀) + ½ (c₀²/c² − 1)]. Under q(v) = N(μ, σ²) the best c is then
    c² = (Σ (σ² + μ²) + ν c₀²) / (n + ν). Without a hyperprior, two empty posteriors cost nothing: a point at the center
    (c, σ → 0) and noise (c → ∞).

    Args:
        weights: Block → number of weights n.
        start: c₀.
        strength: κ.

    Raises:
        ValueError: if `start` is not positive.
    """

    def __init__(self, weights: Mapping[str, int], start: float, strength: float = 1.0) -> None:
        super().__init__()
        if not start > 0:
            raise ValueError(f"the prior's scale must start above 0, got {start}")
        self.weights = dict(weights)
        self.start = start
        self.strength = strength
        # A prefix, for a block may have the name of a method of the dictionary.
        self.log_scales = nn.ParameterDict({f"c/{block}": torch.tensor(math.log(start)) for block in weights})

    def scale(self, block: str) -> Tensor:
        """c of a block, []."""
        return self.log_scales[f"c/{block}"].exp()

    def log_prob(self) -> Tensor:
        """Log-density of all scales, relative to its mode, []."""
        terms = []
        for block, weights in self.weights.items():
            change = self.log_scales[f"c/{block}"] - math.log(self.start)
            terms.append(-self.strength * weights * (change + 0.5 * torch.expm1(-2 * change)))
        return torch.stack(terms).sum()
