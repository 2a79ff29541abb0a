"""A Normal distribution over convolution kernels, diagonal in given coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

__all__ = ["KernelNormal"]


class KernelNormal(TorchDistribution):
    """w = m + A (s ∘ ε), ε ~ N(0, I): independent weights in the coordinates v = A⁻¹ w.

    Batch: independent kernels. Event: one kernel of D weights. If A is a root of a Gaussian prior's covariance, the
    posterior can equal a prior that correlates weights.

    Args:
        loc: Means m, [*batch_shape, *kernel_shape].
        scale: Standard deviations s in the coordinates v, of the shape of `loc`.
        scale_tril: Lower-triangular A, [D, D].
        kernel_dim: Number of spatial axes of a kernel.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own contract
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale: Tensor, scale_tril: Tensor, kernel_dim: int = 3, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale, self.scale_tril = loc, scale, scale_tril
        batch = loc.dim() - kernel_dim
        super().__init__(loc.shape[:batch], loc.shape[batch:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> KernelNormal:
        new: KernelNormal = self._get_checked_instance(KernelNormal, _instance)  # type: ignore[no-untyped-call]
        batch_shape = torch.Size(batch_shape)
        new.loc, new.scale = (part.expand(batch_shape + self.event_shape) for part in (self.loc, self.scale))
        new.scale_tril = self.scale_tril
        super(KernelNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        v = self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + F.linear(self._flat(v), self.scale_tril).view(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        deviation = self._flat(value - self.loc)
        v: Tensor = torch.linalg.solve_triangular(self.scale_tril, deviation.unsqueeze(-1), upper=False).squeeze(-1)
        v = v / self._flat(self.scale)
        return -0.5 * (v.square().sum(-1) + v.shape[-1] * math.log(2 * math.pi)) - self._log_abs_det()

    def entropy(self) -> Tensor:
        size = self.event_shape.numel()
        return 0.5 * size * (1 + math.log(2 * math.pi)) + self._log_abs_det()

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return F.linear(self._flat(self.scale.square()), self.scale_tril.square()).view_as(self.loc)

    def _log_abs_det(self) -> Tensor:
        return self._flat(self.scale).log().sum(-1) + self.scale_tril.diagonal().log().sum()

    def _flat(self, kernels: Tensor) -> Tensor:
        return kernels.flatten(kernels.dim() - len(self.event_shape))
