"""What a kernel distribution is fitted to, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["BlockKernels", "FitSettings"]


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


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit.

    Args:
        latent_size: Latent size of a VAE.
        hidden: Widths of a VAE's hidden layers.
        steps: Maximum number of optimization steps of a VAE or a flow.
        seed: Seed of the initialization, the minibatches and the noise.
    """

    latent_size: int
    hidden: Sequence[int]
    steps: int
    seed: int
