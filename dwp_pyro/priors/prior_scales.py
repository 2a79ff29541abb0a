"""Learned scales of the blocks' priors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["PriorScales"]


class PriorScales(nn.Module):
    """Scale c of the prior of each block, w = a + c (v − b), under a hyperprior around an initial value c₀.

    c² is inverse gamma with ν = κ n degrees of freedom for the n weights of a block: as a density of log c, relative to
    its mode, log p(c) − log p(c₀) = −ν [log (c/c₀) + ½ (c₀²/c² − 1)]. Under q(v) = N(μ, σ²) the optimal c is
    c² = (Σ (σ² + μ²) + ν c₀²) / (n + ν). Without a hyperprior two uninformative posteriors have KL 0: a point at the
    center (c, σ → 0) and noise (c → ∞).

    Args:
        weights: Block → number of weights n.
        start: Initial scale c₀.
        strength: Degrees of freedom per weight κ.

    Raises:
        ValueError: If `start` is not positive.
    """

    def __init__(self, weights: Mapping[str, int], start: float, strength: float = 1.0) -> None:
        super().__init__()
        if not start > 0:
            raise ValueError(f"the initial scale of the prior must be positive, got {start}")
        self.weights = dict(weights)
        self.start = start
        self.strength = strength
        # The prefix avoids names of the dictionary's methods.
        self.log_scales = nn.ParameterDict({f"c/{block}": torch.tensor(math.log(start)) for block in weights})

    def scale(self, block: str) -> Tensor:
        """Return the scale c of a block, []."""
        log_scale: Tensor = self.log_scales[f"c/{block}"]
        return log_scale.exp()

    def log_prob(self) -> Tensor:
        """Return the log-density of all scales relative to its mode, []."""
        terms = []
        for block, weights in self.weights.items():
            change = self.log_scales[f"c/{block}"] - math.log(self.start)
            terms.append(-self.strength * weights * (change + 0.5 * torch.expm1(-2 * change)))
        return torch.stack(terms).sum()
