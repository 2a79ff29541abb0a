"""The Normal distribution of a mean-field guide, given by the logarithm of its scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.autograd.function import once_differentiable

from dwp_pyro.distributions.standard_normal import standard_normals_like

__all__ = ["LogScaleNormal"]


class LogScaleNormal(Normal):
    """N(m, s²) as a function of m and log s: a `Normal` whose draw and entropy read each weight fewer times.

    A network has millions of weights: what counts is how often each passes through memory, forward and
    backward, and the stock Normal takes exponentials and logarithms of the same scale over and over.

    Args:
        loc: m.
        log_scale: log s, of the shape of m.
        noise: ε of the first `rsample()`, of that shape; None to draw it then.
    """

    def __init__(
        self, loc: Tensor, log_scale: Tensor, validate_args: bool | None = None, *, noise: Tensor | None = None
    ) -> None:
        self.log_scale = log_scale
        self._noise = noise
        super().__init__(loc, log_scale.exp(), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Normal:
        return Normal(self.loc, self.scale).expand(torch.Size(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if sample_shape:
            return super().rsample(torch.Size(sample_shape))
        noise, self._noise = self._noise, None
        if noise is None:
            (noise,) = standard_normals_like([self.loc])
        draw: Tensor = _Draw.apply(self.loc, self.log_scale, self.scale.detach(), noise)
        return draw

    def entropy(self) -> Tensor:
        return self.log_scale + 0.5 * (1 + math.log(2 * math.pi))


class _Draw(torch.autograd.Function):
    """m + s ε, whose derivatives are 1 by m and s ε by log s."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        deviation = noise * scale
        ctx.save_for_backward(deviation)
        return loc + deviation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (deviation,) = ctx.saved_tensors
        # In place, for new memory is slow; autograd refuses a second way back.
        return grad, deviation.mul_(grad), None, None
