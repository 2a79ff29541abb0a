"""Fits of kernel distributions, and scores on held-out kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from dwp_pyro.densities import DENSITIES
from dwp_pyro.densities.gaussian import fold_moments, gaussian_of
from dwp_pyro.densities.kernel_distribution import BlockKernels, KernelDistribution

__all__ = ["fit_density", "score_kernels"]

_MAX_KERNELS = 10_000  # sufficient to choose or to score on
_CHUNK = 25_000  # kernels × samples evaluated at once, sized for a CPU's cache


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one core: layers this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def fit_density(
    family: str, block: BlockKernels, steps: int, seed: int, form: Mapping[str, Any] = MappingProxyType({})
) -> tuple[KernelDistribution, dict[str, float]]:
    """Fit a kernel distribution and score it on held-out kernels.

    The last bootstrap is held out to score, the one before it to choose (the optimization step to stop at, the number
    of components). With two bootstraps the last serves both purposes, and its score is slightly optimistic; with one, a
    random fifth of the kernels does. The distribution is then fitted again to all kernels, as chosen.

    Args:
        family: One of `DENSITIES`.
        block: Kernels to fit to.
        steps: Maximum number of optimization steps of a VAE or a flow.
        seed: Seed of the initialization, the minibatches and the noise.
        form: Arguments of the distribution besides the shape of a kernel; see `KernelDistribution.init_args`.

    Returns:
        The distribution, in evaluation mode and frozen, and its held-out nats per kernel beside those of its controls;
        see `score_kernels`.

    Raises:
        PriorError: If the loss or its gradient stays NaN or infinite.
    """
    torch.manual_seed(seed)
    fitted, validation, test = _hold_out(block)
    kernel_shape = block.kernels.shape[1:]
    trial, final = (DENSITIES[family](kernel_shape, **form) for _ in range(2))
    for density, part in ((trial, fitted), (final, block)):
        gaussian = gaussian_of(fold_moments(part.kernels, part.identities))
        density.standardize_by(gaussian.loc, gaussian.scale_tril)
    chosen = trial.fit(fitted.kernels, steps, validation=validation)
    final.fit(block.kernels, steps, chosen=chosen)
    for density in (trial, final):
        density.eval().requires_grad_(False)
    return final, score_kernels(trial, test)


@torch.no_grad()
def score_kernels(density: KernelDistribution, kernels: Tensor, samples: int = 500) -> dict[str, float]:
    """Return mean log-densities of kernels, in nats per kernel in the kernels' raw units.

    Args:
        density: Fitted distribution.
        kernels: Kernels, [n, k₁, …, k_d].
        samples: Number of samples K of a VAE's importance-weighted bound, per kernel.

    Returns:
        "prior": the density, or the VAE's bound on it; "standard_normal": N(0, 1) on each weight; "isotropic" and
        "full_gaussian": independent weights around 0 and the full-covariance Gaussian, with the moments of the kernels
        that the distribution was fitted to.
    """
    chunks = kernels.split(max(1, _CHUNK // samples))
    total = sum(float(density.log_prob_estimate(chunk, samples).double().sum()) for chunk in chunks)
    flat = kernels.flatten(1)
    gaussian = MultivariateNormal(density.loc, scale_tril=density.scale_tril)
    return {
        "prior": total / len(kernels),
        "standard_normal": float(Normal(0.0, 1.0).log_prob(flat).double().sum(1).mean()),
        "isotropic": float(Normal(0.0, density.root_mean_square()).log_prob(flat).double().sum(1).mean()),
        "full_gaussian": float(gaussian.log_prob(flat).double().mean()),
    }


def _hold_out(block: BlockKernels) -> tuple[BlockKernels, Tensor, Tensor]:
    """Split into kernels to fit to, to choose on and to score on."""
    bootstraps = block.bootstraps.unique()
    if len(bootstraps) > 1:
        test = block.bootstraps == bootstraps[-1]
        validation = block.bootstraps == bootstraps[max(-2, -len(bootstraps) + 1)]
    else:
        distinct = block.identities.unique()
        held_out = distinct[torch.randperm(len(distinct))[: max(1, len(distinct) // 5)]]
        test = validation = torch.isin(block.identities, held_out)
    parts = (block.kernels[where] for where in (validation, test))
    choosing, scoring = (part[torch.randperm(len(part))[:_MAX_KERNELS]] for part in parts)
    return block[~(validation | test)], choosing, scoring
