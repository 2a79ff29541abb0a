"""The Normal distribution of a mean-field guide, given by the logarithm of its scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["LogScaleNormal", "log_scale_normals"]


class LogScaleNormal(Normal):
    """N(m, s²) as a function of m and log s: a `Normal` whose draw and entropy read each weight fewer times.

    A network has millions of weights: what counts is how often each passes through memory, forward and
    backward, and the stock Normal takes exponentials and logarithms of the same scale over and over.

    Args:
        loc: m.
        log_scale: log s, of the shape of m.
        scale: s, where it is known.
        draw: that the first `rsample()` gives; None to draw it then, as a `Normal` does.
    """

    def __init__(
        self,
        loc: Tensor,
        log_scale: Tensor,
        validate_args: bool | None = None,
        *,
        scale: Tensor | None = None,
        draw: Tensor | None = None,
    ) -> None:
        self.log_scale = log_scale
        self._draw = draw
        super().__init__(loc, log_scale.exp() if scale is None else scale, validate_args=validate_args)

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


def log_scale_normals(
    locs: Sequence[Tensor], log_scales: Sequence[Tensor], noise: Sequence[Tensor]
) -> list[LogScaleNormal]:
    """N(m, s²) of several sites, whose first draws are m + s ε, all of them one node of the graph.

    Args:
        locs: m of each site.
        log_scales: log s, of the same shapes.
        noise: ε, of the same shapes.
    """
    scales = [log_scale.exp() for log_scale in log_scales]
    # From here on each log s passes through the draws, where its gradients meet.
    passed = _Draws.apply([scale.detach() for scale in scales], noise, *locs, *log_scales)
    sites = zip(locs, passed[len(locs) :], scales, passed[: len(locs)], strict=True)
    return [LogScaleNormal(loc, log_scale, scale=scale, draw=draw) for loc, log_scale, scale, draw in sites]


class _Draws(torch.autograd.Function):
    """m + s ε of all sites, and then each log s, for whoever needs it besides; by the m of all sites, then their log s.

    The derivatives of a draw are 1 by m and s ε by log s.
    """

    @staticmethod
    def forward(ctx: Any, scales: Sequence[Tensor], noise: Sequence[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        locs, log_scales = parameters[: len(scales)], parameters[len(scales) :]
        deviations = [epsilon * scale for epsilon, scale in zip(noise, scales, strict=True)]
        ctx.save_for_backward(*deviations)
        return *(loc + deviation for loc, deviation in zip(locs, deviations, strict=True)), *log_scales

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        deviations = ctx.saved_tensors
        by_draw, by_log_scale = gradients[: len(deviations)], list(gradients[len(deviations) :])
        for site, (deviation, outer) in enumerate(zip(deviations, by_draw, strict=True)):
            if outer is not None:
                # Both in one pass, and in place, for new memory is slow; autograd refuses a second way back from any.
                besides = by_log_scale[site]
                if besides is None:
                    by_log_scale[site] = deviation.mul_(outer)
                else:
                    by_log_scale[site] = torch.addcmul(besides, deviation, outer, out=deviation)
        return None, None, *by_draw, *by_log_scale
