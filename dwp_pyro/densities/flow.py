"""A normalizing flow over convolution kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from dwp_pyro.densities.gradient_fit import GradientFitted

# Importing zuko turns off the argument checks of every distribution of torch and Pyro.
_checks = Distribution._validate_args
from zuko.flows import MAF  # noqa: E402

Distribution.set_default_validate_args(_checks)

__all__ = ["KernelFlow"]


class KernelFlow(GradientFitted):
    """p(u) as zuko's masked autoregressive flow (Papamakarios et al. 2017), initialized to N(0, I): an exact density.

    Args:
        kernel_shape: Spatial shape of a kernel; D is its product.
        hidden: Widths of the hidden layers of each transform.
        transforms: Number of autoregressive transforms, each in the reverse order of the previous one.
    """

    def __init__(self, kernel_shape: Sequence[int], hidden: Sequence[int] = (32, 32), transforms: int = 3) -> None:
        super().__init__(kernel_shape)
        self.hidden = tuple(hidden)
        self.transforms = transforms
        self.flow = MAF(self.kernel_shape.numel(), transforms=transforms, hidden_features=self.hidden)
        for transform in self.flow.transform.transforms:
            last = transform.hyper[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def init_args(self) -> dict[str, Any]:
        return {"hidden": list(self.hidden), "transforms": self.transforms}

    def log_prob_standardized(self, u: Tensor, samples: int = 1) -> Tensor:
        log_prob: Tensor = self.flow().log_prob(u)
        return log_prob

    def rsample_standardized(self, shape: Sequence[int]) -> Tensor:
        u: Tensor = self.flow().rsample(torch.Size(shape))
        return u
