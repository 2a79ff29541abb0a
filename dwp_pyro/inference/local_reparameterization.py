"""Local reparameterization as an effect handler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["LocalReparameterization"]


class LocalReparameterization(Messenger):
    """Sample activations instead of weights: N(x∗m, x²∗s²), two convolutions (Kingma et al. 2015, section 2.3).

    Enter it around the loss; it handles the convolution effects of `BayesianConv`. Each activation has the mean and
    variance that a shared kernel would give it, but activations are independent given x, where a shared kernel
    correlates them. For one convolution under a voxelwise likelihood the expected loss is the same; with norms, further
    layers or Dice the objective differs (it is that of the paper).

    Args:
        posterior: Site → mean and standard deviation of its weights, as functions of the guide's parameters
            (`MeanFieldNormal.posterior`).

    Examples:
        >>> import torch
        >>> from dwp_pyro import LocalReparameterization, MeanFieldNormal, ResidualUNet3d, bayesianize
        >>> network = ResidualUNet3d(1, 2, widths=(2, 3, 4, 5))
        >>> guide = MeanFieldNormal(bayesianize(network, "normal"))
        >>> with LocalReparameterization(guide.posterior):
        ...     logits = network(torch.zeros(1, 1, 16, 16, 16))
        >>> tuple(logits.shape)
        (1, 2, 16, 16, 16)
    """

    def __init__(self, posterior: Callable[[str], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.posterior = posterior

    def _pyro_convolution(self, msg: Any) -> None:
        convolve, input, _, bias = msg["args"]
        loc, scale = self.posterior(msg["infer"]["site"])
        mean = convolve(input, loc, bias)
        # The floor keeps the gradient of the square root finite where the input is 0.
        variance = convolve(input.square(), scale.square(), None).clamp_min(1e-12)
        msg["value"] = mean + variance.sqrt() * torch.randn_like(mean)
        msg["done"] = True
