"""`score-prior`: the log-density that a prior gives to kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dwp_pyro.distributions.kernel_prior import ANY_SITE, KernelPrior
from dwp_pyro.errors import PriorError
from dwp_pyro.inference.fit_kernel_vae import score_kernels
from dwp_pyro.pipeline.collect_kernels import read_kernels

__all__ = ["score_prior"]


def score_prior(prior: Path, kernels: Path, *, samples: int = 500, seed: int = 0) -> dict[str, Any]:
    """Mean nats per kernel over all kernels of a file, each under the block that stands for its site.

    Args:
        prior: folder of a kernel prior.
        kernels: a bank or an array; see `read_kernels`.
        samples: K of the importance-weighted bound.
        seed: of its samples.

    Returns:
        {"nats_per_kernel": {"prior", "standard_normal", "full_gaussian"}, "kernels": n}; see `score_kernels`.

    Raises:
        PriorError: if prior or kernels cannot be read, or do not fit each other.
    """
    kernel_prior = KernelPrior.load(prior)
    bank = read_kernels(kernels)
    torch.manual_seed(seed)
    totals: dict[str, float] = {}
    count = 0
    for site, values in bank.kernels.items():
        if site == ANY_SITE and len(kernel_prior.cards) > 1:
            raise PriorError(
                f"{kernels}: names no sites, and {prior} has {len(kernel_prior.cards)} blocks; give a .safetensors bank"
            )
        name = next(iter(kernel_prior.cards)) if site == ANY_SITE else site
        block = kernel_prior.block(name) if site == ANY_SITE else kernel_prior.block_at(site, (0, 0, *values.shape[1:]))
        if tuple(block.kernel_shape) != tuple(values.shape[1:]):
            raise PriorError(
                f"{kernels}: holds {'×'.join(map(str, values.shape[1:]))} kernels, {prior} is for "
                f"{'×'.join(map(str, block.kernel_shape))} kernels"
            )
        for key, nats in score_kernels(block, values, samples).items():
            totals[key] = totals.get(key, 0.0) + nats * len(values)
        count += len(values)
    return {"nats_per_kernel": {key: total / count for key, total in totals.items()}, "kernels": count}
