"""Distributions over one convolution kernel: what all families share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dwp_pyro.densities.kernel_normal import KernelNormal

__all__ = ["BlockKernels", "KernelDistribution"]


@dataclass(frozen=True)
class BlockKernels:
    """The kernels of a block and their origin.

    Args:
        kernels: Kernels, [n, k₁, …, k_d], n ≥ 2.
        bootstraps: Number of each kernel's source network, [n] integers.
        identities: Number of each kernel, shared by its snapshots, [n] integers.
    """

    kernels: Tensor
    bootstraps: Tensor
    identities: Tensor

    def __getitem__(self, index: Tensor) -> BlockKernels:
        return BlockKernels(self.kernels[index], self.bootstraps[index], self.identities[index])

    def __len__(self) -> int:
        return len(self.kernels)


class KernelDistribution(nn.Module, ABC):
    """p(w) of one kernel w = b + A u, given by a density of the standardized kernel u (D numbers).

    A fit first sets (b, A) to the mean and a lower-triangular root of the kernels' covariance. Neighboring weights of a
    kernel are strongly correlated; those of u are not. If u ~ N(0, I), p(w) is the full-covariance Gaussian, from which
    every fit starts.

    Args:
        kernel_shape: Spatial shape of a kernel, [k₁, …, k_d]; D is its product.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, kernel_shape: Sequence[int]) -> None:
        super().__init__()
        self.kernel_shape = torch.Size(kernel_shape)
        size = self.kernel_shape.numel()
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("scale_tril", torch.eye(size))

    def init_args(self) -> dict[str, Any]:
        """Return the constructor arguments besides `kernel_shape`, as plain JSON values."""
        return {}

    def fit(self, kernels: Tensor, steps: int, *, validation: Tensor | None = None, chosen: int | None = None) -> int:
        """Fit the parameters of p(u) to kernels whose mean and covariance root are (b, A), in place.

        Does nothing for a family whose p(u) has no parameters.

        Args:
            kernels: Kernels to fit to, [n, k₁, …, k_d].
            steps: Maximum number of optimization steps of a VAE or a flow.
            validation: Kernels to choose the complexity on, [m, k₁, …, k_d]; None to fit without a choice.
            chosen: Complexity to fit with, where there is no `validation`: what an earlier fit returned.

        Returns:
            The complexity: the number of optimization steps or of components; 0 for a family without a choice.

        Raises:
            PriorError: If the loss or its gradient stays NaN or infinite.
        """
        return 0

    def standardize_by(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set b, [D], and the lower-triangular A, [D, D]."""
        self.loc.copy_(loc)
        self.scale_tril.copy_(scale_tril)

    @abstractmethod
    def log_prob_standardized(self, u: Tensor, samples: int = 1) -> Tensor:
        """Return log p(u) in nats, or one draw of a lower bound on it: [..., D] → [...].

        Args:
            u: Standardized kernels.
            samples: Number of samples K of the bound; unused for an exact density.
        """

    def log_prob_estimate(self, w: Tensor, samples: int = 1) -> Tensor:
        """Return log p(w) in nats of the raw kernel, or one draw of a lower bound on it: [..., *kernel_shape] → [...].

        Args:
            w: Kernels.
            samples: Number of samples K of the bound; unused for an exact density.
        """
        return self.log_prob_standardized(self.standardize(w), samples) - self.log_abs_det()

    @abstractmethod
    def rsample_standardized(self, shape: Sequence[int]) -> Tensor:
        """Draw u, [*shape, D]."""

    def rsample(self, shape: Sequence[int] = ()) -> Tensor:
        """Draw kernels from p(w), [*shape, *kernel_shape]."""
        w = self.loc + F.linear(self.rsample_standardized(shape), self.scale_tril)
        return w.reshape(*shape, *self.kernel_shape)

    def kl_from_normal(self, q: KernelNormal, center: Tensor, scale: float | Tensor) -> Tensor | None:
        """Return KL(q‖p) of each kernel in closed form, [*batch_shape of q]; None for a family without one.

        Args:
            q: Distribution of kernels w.
            center: Kernels a that p is moved to, broadcastable to those of q.
            scale: Factor c by which p is scaled: w = a + c A u.
        """
        return None

    def standardize(self, w: Tensor, center: Tensor | None = None, scale: float | Tensor = 1.0) -> Tensor:
        """Return u = A⁻¹ (w − a) / c: [..., *kernel_shape] → [..., D].

        Args:
            w: Kernels.
            center: Kernels a, broadcastable to w; None for b.
            scale: Factor c.
        """
        dims = len(self.kernel_shape)
        center = self.loc if center is None else center.flatten(-dims)
        return F.linear(w.flatten(-dims) - center, self.whitening()) / scale

    def log_abs_det(self, scale: float | Tensor = 1.0) -> Tensor:
        """Return log |det c A| for a factor c: log p(w) = log p(u) − log |det c A|."""
        log_scale = scale.log() if isinstance(scale, Tensor) else math.log(scale)
        return self.scale_tril.diagonal().log().sum() + len(self.loc) * log_scale

    def root_mean_square(self) -> Tensor:
        """Return the root mean square of a kernel's weights under N(b, A Aᵀ), []."""
        return (self.loc.square() + self.scale_tril.square().sum(-1)).mean().sqrt()

    def whitening(self) -> Tensor:
        """Return A⁻¹, [D, D]."""
        identity = torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        inverse: Tensor = torch.linalg.solve_triangular(self.scale_tril, identity, upper=False)
        return inverse
