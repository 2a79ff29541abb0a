"""Differentially private moments of kernels; the unit of privacy is one source network.

Banks are neighbors if one network, with all its snapshots, is replaced by another. The numbers of networks and of their
kernels are public. The blocks and folds of a network are one vector, so that (ε, δ) holds for the whole pack:

    x = (√m_b / n_b · Σ w wᵀ over the network's kernels in block b and fold f)_{b, f}

with n_b kernels per network, m_b of them distinct and the others their snapshots. Variances of kernels fall with the
fan-in, and √m_b rises with it, so that the blocks' norms are similar. Sums about 0 need no private mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from torch import Tensor

from dwp_pyro.densities.gaussian import FOLDS
from dwp_pyro.densities.kernel_distribution import BlockKernels
from dwp_pyro.densities.moments import Moments
from dwp_pyro.priors.bank import KernelBank
from dwp_pyro.runtime.errors import PriorError

__all__ = [
    "check_networks",
    "clipped_contributions",
    "noise_multiplier",
    "noisy_moments",
    "privacy_statement",
    "private_moments",
]


def noise_multiplier(epsilon: float, delta: float) -> float:
    """Return the smallest σ/Δ for which Gaussian noise σ on a query of L2 sensitivity Δ is (ε, δ)-private.

    The exact condition is Φ(Δ/2σ − εσ/Δ) − e^ε Φ(−Δ/2σ − εσ/Δ) ≤ δ (Balle & Wang 2018, theorem 8).

    Args:
        epsilon: ε, above 0.
        delta: δ, between 0 and 1.
    """

    def excess(log_sigma: float) -> float:
        sigma = math.exp(log_sigma)
        a, b = 0.5 / sigma, epsilon * sigma
        return float(ndtr(a - b) - math.exp(epsilon + log_ndtr(-a - b))) - delta

    return math.exp(brentq(excess, -20, 30, xtol=1e-12))


def private_moments(
    blocks: Mapping[str, BlockKernels], epsilon: float, delta: float, clip: float, random: np.random.Generator
) -> dict[str, list[Moments]]:
    """Return (ε, δ)-private moments of the folds of each block's kernels, with mean 0.

    Args:
        blocks: Kernels of each block.
        epsilon: ε of all blocks together, above 0.
        delta: δ of all blocks together, between 0 and 1.
        clip: Bound C on the norm of a network's vector x, chosen without these kernels.
        random: Source of the noise; whoever knows its seed can subtract the noise.

    Returns:
        Moments of each block, as of `fold_moments`. A noisy scatter may have negative eigenvalues: it is unbiased, so
        that sums over sites are; `gaussian_of` projects them.
    """
    # x and y consist of positive semidefinite matrices: ⟨x, y⟩ ≥ 0, hence |x − y|² ≤ |x|² + |y|² ≤ 2 C².
    noise = math.sqrt(2) * clip * noise_multiplier(epsilon, delta)
    return noisy_moments(blocks, clipped_contributions(blocks, clip), noise, random)


def check_networks(bank: KernelBank, name: str) -> None:
    """Raise PriorError unless a bank lists its networks, each with the same number of snapshots."""
    snapshots = Counter(source.bootstrap for source in bank.sources)
    if len(set(snapshots.values())) != 1:
        raise PriorError(
            f"{name}: a private prior hides one source network, and needs a bank (.safetensors and .json) that lists "
            f"them, with equal numbers of snapshots; found {sorted(snapshots.values()) or 'no list'}"
        )


def privacy_statement(epsilon: float, delta: float, clip: float) -> str:
    """Return the privacy of a pack, for its card."""
    return (
        f"({epsilon:g}, {delta:g})-differentially private; unit: one source network with all its kernels; "
        f"Gaussian noise on second moments clipped at {clip:g}"
    )


def clipped_contributions(blocks: Mapping[str, BlockKernels], clip: float) -> dict[str, Tensor]:
    """Return the vectors x of the networks, scaled to norms of at most `clip`: block → [networks, folds, D, D]."""
    vectors = {}
    for name, block in blocks.items():
        networks = block.bootstraps.unique()
        flat, folds = block.kernels.flatten(1).double(), _folds(block)
        of_folds = [
            flat[(block.bootstraps == network) & (folds == fold)] for network in networks for fold in range(FOLDS)
        ]
        products = torch.stack([part.T @ part for part in of_folds]).unflatten(0, (len(networks), FOLDS))
        vectors[name] = products / _unit(block)
    norms = sum(x.square().sum((1, 2, 3)) for x in vectors.values()).sqrt()
    factors = (clip / norms).clamp_max(1)
    return {name: x * factors[:, None, None, None] for name, x in vectors.items()}


def noisy_moments(
    blocks: Mapping[str, BlockKernels], vectors: Mapping[str, Tensor], noise: float, random: np.random.Generator
) -> dict[str, list[Moments]]:
    """Return the moments of the sums of vectors x with Gaussian noise.

    `noise` is its standard deviation on each coordinate of Σ x; √2 times an element off the diagonal is one.
    """
    moments = {}
    for name, x in vectors.items():
        size = x.shape[-1]
        drawn = noise * torch.from_numpy(random.standard_normal((FOLDS, size, size)))
        scatters = (x.sum(0) + 0.5 * (drawn + drawn.mT)) * _unit(blocks[name])
        counts = _folds(blocks[name]).bincount(minlength=FOLDS).tolist()
        zero = torch.zeros(size, dtype=torch.float64)
        moments[name] = [
            Moments(count, zero, scatter) for count, scatter in zip(counts, scatters, strict=True) if count
        ]
    return moments


def _folds(block: BlockKernels) -> Tensor:
    """Return the fold of each kernel, [n], as in `fold_moments`."""
    folds: Tensor = block.identities.unique(return_inverse=True)[1] % FOLDS
    return folds


def _unit(block: BlockKernels) -> float:
    """Return n_b / √m_b."""
    networks = len(block.bootstraps.unique())
    return len(block) / networks / math.sqrt(len(block.identities.unique()) / networks)
