"""The log-uniform prior, p(|w|) ∝ 1/|w|: a sparsity penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.nn import functional as F

__all__ = ["APPROXIMATION", "LogUniform"]

#: k₁, k₂, k₃ of Molchanov et al. 2017, eq. 14.
APPROXIMATION = (0.63576, 1.87320, 1.48695)


class LogUniform(TorchDistribution):
    """p(w) ∝ 1/|w| for each weight (Kingma et al. 2015; Molchanov et al. 2017).

    The prior is improper: `sample` raises `NotImplementedError`, and its log-density and its KL from a Normal are known
    up to a constant. It acts as a penalty that drives weights to 0.

    Args:
        batch_shape: Shape of the weights.
        validate_args: Whether to check values; None for Pyro's default.

    Examples:
        >>> import torch
        >>> from dwp_pyro import LogUniform
        >>> prior = LogUniform([2, 1, 3, 3, 3]).to_event(5)
        >>> prior.log_prob(torch.full((2, 1, 3, 3, 3), 1.0)).item() == 0
        True
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own contract
    support = constraints.real
    has_rsample = False

    def __init__(self, batch_shape: Sequence[int] = (), validate_args: bool | None = None) -> None:
        super().__init__(torch.Size(batch_shape), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> LogUniform:
        new: LogUniform = self._get_checked_instance(LogUniform, _instance)  # type: ignore[no-untyped-call]
        super(LogUniform, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        raise NotImplementedError("the log-uniform prior is improper: it has no samples")

    def log_prob(self, value: Tensor) -> Tensor:
        """Return −log |w|, the log-density up to a constant."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return -value.abs().log().expand(shape)


@register_kl(Normal, LogUniform)  # type: ignore[untyped-decorator]
def _kl_normal_log_uniform(q: Normal, p: LogUniform) -> Tensor:
    """Return the KL up to a constant (Molchanov et al. 2017, eq. 14); it decreases to 0 as α = σ²/μ² grows."""
    log_alpha = 2 * (q.scale.log() - q.loc.abs().clamp_min(torch.finfo(q.loc.dtype).tiny).log())
    k1, k2, k3 = APPROXIMATION
    return k1 * torch.sigmoid(-(k2 + k3 * log_alpha)) + 0.5 * F.softplus(-log_alpha)
