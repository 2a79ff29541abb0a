"""`score-prior`: log-density of kernels under a prior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dwp_pyro.densities.fit_density import score_kernels
from dwp_pyro.priors.bank import read_kernels
from dwp_pyro.priors.kernel_prior import ANY_SITE, KernelPrior
from dwp_pyro.runtime.errors import PriorError
from dwp_pyro.runtime.progress import each

__all__ = ["score_prior"]


def score_prior(prior: Path, kernels: Path, *, samples: int = 500, seed: int = 0) -> dict[str, Any]:
    """Return the mean log-density in nats over all kernels of a file, each under the block of its site.

    Returns:
        {"nats_per_kernel": {"prior", "standard_normal", "isotropic", "full_gaussian"}, "kernels": n};
        see `score_kernels`.

    Raises:
        PriorError: if prior or kernels cannot be read, or do not match.
    """
    kernel_prior = KernelPrior.load(prior)
    bank = read_kernels(kernels)
    if ANY_SITE in bank.kernels and len(kernel_prior.block_infos) > 1:
        raise PriorError(
            f"{kernels}: names no sites, but {prior} has {len(kernel_prior.block_infos)} blocks; "
            "give a .safetensors bank"
        )
    try:
        blocks = {site: kernel_prior.block_at(site, (0, 0, *values.shape[1:])) for site, values in bank.kernels.items()}
    except PriorError as problem:
        raise PriorError(f"{kernels}: does not fit {prior}; {problem}") from problem
    torch.manual_seed(seed)
    totals: dict[str, float] = {}
    for site, values in each(bank.kernels.items(), "scoring kernels"):
        for key, nats in score_kernels(blocks[site], values, samples).items():
            totals[key] = totals.get(key, 0.0) + nats * len(values)
    count = sum(map(len, bank.kernels.values()))
    return {"nats_per_kernel": {key: total / count for key, total in totals.items()}, "kernels": count}
