"""What every learned density over single convolution kernels has in common, and the Gaussian, the simplest."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["KernelDensity", "KernelGaussian"]


class KernelDensity(nn.Module, ABC):
    """p(w) of one kernel w = b + A u, given by a density of the standardised kernel u (D numbers).

    (b, A) are fixed before the fit: the mean and a lower-triangular root of the kernels' covariance.
    Neighbouring weights of a kernel are strongly correlated; in u they are not, and a density of u that
    is N(0, I) *is* the full-covariance Gaussian of w, from which every fit starts.

    Args:
        kernel_shape: spatial shape of a kernel, [k₁, …, k_d]; D is its product.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, kernel_shape: Sequence[int]) -> None:
        super().__init__()
        self.kernel_shape = torch.Size(kernel_shape)
        size = self.kernel_shape.numel()
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("scale_tril", torch.eye(size))
        self._whitening: tuple[Tensor | None, int, Tensor] = (None, 0, self.scale_tril)

    def standardise_by(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set b, of shape [D], and the lower-triangular A, of shape [D, D]."""
        self.loc.copy_(loc)
        self.scale_tril.copy_(scale_tril)

    def form(self) -> dict[str, Any]:
        """The arguments, besides the kernel's shape, that make a density of this form; plain JSON values."""
        return {}

    @abstractmethod
    def log_prob_standard(self, u: Tensor, samples: int = 1) -> Tensor:
        """log p(u), or one draw of a lower bound on it, in nats of the standardised kernel: [..., D] → [...].

        Args:
            u: standardised kernels.
            samples: K of the bound, where it is one.
        """

    def log_prob_estimate(self, w: Tensor, samples: int = 1) -> Tensor:
        """The same of log p(w), in nats of the raw kernel: [..., *kernel_shape] → [...]."""
        return self.log_prob_standard(self.standardise(w), samples) - self.log_volume()

    @abstractmethod
    def rsample_standard(self, shape: Sequence[int]) -> Tensor:
        """Draws of u, [*shape, D]."""

    def rsample(self, shape: Sequence[int] = ()) -> Tensor:
        """Kernels drawn from p(w), [*shape, *kernel_shape]."""
        w = self.loc + F.linear(self.rsample_standard(shape), self.scale_tril)
        return w.reshape(*shape, *self.kernel_shape)

    def standardise(self, w: Tensor) -> Tensor:
        """Kernels [..., *kernel_shape] → u [..., D]."""
        return F.linear(w.flatten(-len(self.kernel_shape)) - self.loc, self.whitening())

    def log_volume(self) -> Tensor:
        """log |det A|: log p(w) = log p(u) − log |det A|."""
        return self.scale_tril.diagonal().log().sum()

    def root_mean_square(self) -> Tensor:
        """Of a kernel's weight about 0, under the Gaussian of (b, A)."""
        return (self.loc.square() + self.scale_tril.square().sum(-1)).mean().sqrt()

    def whitening(self) -> Tensor:
        """A⁻¹, [D, D]."""
        if self.scale_tril.requires_grad or self.scale_tril.is_inference():
            return self._inverse()
        # A step asks for it once a block and chunk: solved again only if A is another tensor, or was written to.
        made_of, version, inverse = self._whitening
        if made_of is not self.scale_tril or version != self.scale_tril._version:
            inverse = self._inverse()
            self._whitening = (self.scale_tril, self.scale_tril._version, inverse)
        return inverse

    def _inverse(self) -> Tensor:
        identity = torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        return torch.linalg.solve_triangular(self.scale_tril, identity, upper=False)


class KernelGaussian(KernelDensity):
    """The full-covariance Gaussian N(b, A Aᵀ): u ~ N(0, I)."""

    def log_prob_standard(self, u: Tensor, samples: int = 1) -> Tensor:
        return -0.5 * (u.square().sum(-1) + u.shape[-1] * math.log(2 * math.pi))

    def rsample_standard(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
