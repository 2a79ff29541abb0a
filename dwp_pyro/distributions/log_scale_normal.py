"""The Normal distribution of a mean-field guide, given by the logarithm of its scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["LogScaleNormal"]


class LogScaleNormal(Normal):
    """N(m, s²) as a function of m and log s: a `Normal` whose draw and entropy read each weight fewer times.

    A network has millions of weights: what counts is how often each passes through memory, forward and
    backward, and the stock Normal takes exponentials and logarithms of the same scale over and over.

    Args:
        loc: m.
        log_scale: log s, of the shape of m.
        noise: ε of the first `rsample()`, of that shape; None to draw it then, as a `Normal` does.
    """

    def __init__(
        self, loc: Tensor, log_scale: Tensor, validate_args: bool | None = None, *, noise: Tensor | None = None
    ) -> None:
        scale = log_scale.exp()
        self._draw: Tensor | None = None
        if noise is not None:
            # From here on log s passes through the draw, where its gradients meet.
            self._draw, log_scale = _Draw.apply(loc, log_scale, scale.detach(), noise)
        self.log_scale = log_scale
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Normal:
        return Normal(self.loc, self.scale).expand(torch.Size(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        draw = self._draw
        if sample_shape or draw is None:
            return super().rsample(torch.Size(sample_shape))
        self._draw = None
        return draw

    def entropy(self) -> Tensor:
        return self.log_scale + 0.5 * (1 + math.log(2 * math.pi))


class _Draw(torch.autograd.Function):
    """m + s ε, whose derivatives are 1 by m and s ε by log s; and log s itself, for whoever needs it besides."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_scale: Tensor, scale: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        deviation = noise * scale
        ctx.save_for_backward(deviation)
        return loc + deviation, log_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_draw: Tensor | None, by_log_scale: Tensor | None) -> tuple[Tensor | None, ...]:
        if by_draw is not None:
            (deviation,) = ctx.saved_tensors
            # Both in one pass, and in place, for new memory is slow; autograd refuses a second way back.
            if by_log_scale is None:
                by_log_scale = deviation.mul_(by_draw)
            else:
                by_log_scale = torch.addcmul(by_log_scale, deviation, by_draw, out=deviation)
        return by_draw, by_log_scale, None, None
