"""Merging of priors that were fitted at several sites, without their kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwp_pyro.densities import BlockKernels, KernelDistribution
from dwp_pyro.densities.fit_density import fit_density
from dwp_pyro.densities.gaussian import kernel_gaussian
from dwp_pyro.densities.moments import Moments
from dwp_pyro.priors.kernel_prior import BlockInfo, KernelPrior
from dwp_pyro.priors.pack import MOMENTS, read_moments
from dwp_pyro.runtime.errors import PriorError
from dwp_pyro.runtime.progress import each

__all__ = ["merge_priors"]

_MAX_SAMPLES = 50_000  # of a block
_STEPS = 2000  # of a fit by gradient descent
_STATED = ("source", "license", "dataset", "privacy")  # what a merged card lists of its parents


def merge_priors(folders: Sequence[Path], seed: int = 0) -> tuple[KernelPrior, dict[str, list[Moments]]]:
    """Merge priors of one family and the same blocks into the prior of all their kernels.

    A Gaussian is the fit to the sums of the moments, as if all kernels were in one place, with the folds of the sites.
    Another family is fitted to samples of all priors, in proportion to their kernels. The merged prior has no held-out
    scores, and source networks are not merged.

    Args:
        folders: Folders of the priors, at least two.
        seed: Seed of samples and fits.

    Returns:
        The prior, and the moments of the folds of each block.

    Raises:
        PriorError: If a prior cannot be read, has no moments, or differs from the first in family, blocks or shapes.
    """
    first = KernelPrior.load(folders[0])
    folds: dict[str, list[Moments]] = {name: [] for name in first.block_infos}
    sites: dict[str, dict[str, None]] = {name: {} for name in first.block_infos}
    parents: list[Mapping[str, Any]] = []
    for folder in each(folders, "merging priors"):
        prior, moments = KernelPrior.load(folder), read_moments(folder)
        _check_alike(first, prior, moments)
        for name, info in prior.block_infos.items():
            sites[name] |= dict.fromkeys(info.sites)
            folds[name] = _sum_folds(folds[name], moments[name])
        parents.append(prior.provenance)
    counts = {name: sum(fold.count for fold in of_block) for name, of_block in folds.items()}
    if first.family == "gaussian":
        densities: dict[str, KernelDistribution] = {
            name: kernel_gaussian(first.block(name).kernel_shape, of_block) for name, of_block in folds.items()
        }
    else:
        densities = _fit_to_samples(folders, first, counts, seed)
    infos = {name: BlockInfo(tuple(sites[name]), count) for name, count in counts.items()}
    provenance: dict[str, Any] = {key: _joined([parent.get(key) for parent in parents]) for key in _STATED}
    provenance["parents"] = _names(folders)
    prior = KernelPrior(first.family, densities, infos, provenance, "merged prior")
    return prior.requires_grad_(False), folds


def _sum_folds(folds: Sequence[Moments], others: Sequence[Moments]) -> list[Moments]:
    """Add the moments of two sets of folds, fold by fold."""
    pairs = zip_longest(folds, others)
    return [one + other if one and other else one or other for one, other in pairs]


def _check_alike(first: KernelPrior, prior: KernelPrior, moments: Mapping[str, Sequence[Moments]]) -> None:
    """Raise PriorError unless a prior has the family, blocks and shapes of the first, and the moments fit it."""
    if prior.family != first.family:
        raise PriorError(f"{prior.name}: is of the family '{prior.family}', {first.name} of '{first.family}'")
    shapes, expected = ({name: tuple(of.block(name).kernel_shape) for name in of.block_infos} for of in (prior, first))
    if shapes != expected:
        raise PriorError(f"{prior.name}: has the blocks {shapes}, {first.name} {expected}")
    found = {
        name: (sum(fold.count for fold in folds), {len(fold.mean) for fold in folds}) for name, folds in moments.items()
    }
    if found != {name: (prior.block_infos[name].kernels, {math.prod(shape)}) for name, shape in shapes.items()}:
        raise PriorError(f"{prior.name}: {MOMENTS} does not fit prior.json; fit the prior again")


def _fit_to_samples(
    folders: Sequence[Path], first: KernelPrior, counts: Mapping[str, int], seed: int
) -> dict[str, KernelDistribution]:
    """Return the density of each block, fitted to samples of all priors."""
    torch.manual_seed(seed)
    drawn: dict[str, list[Tensor]] = {name: [] for name in counts}
    owed = dict.fromkeys(counts, 0.0)  # samples that earlier priors were too small for
    for folder in each(folders, "sampling priors"):
        prior = KernelPrior.load(folder)
        for name, count in counts.items():
            owed[name] += min(_MAX_SAMPLES, count) * prior.block_infos[name].kernels / count
            drawn[name].append(prior.block(name).rsample([round(owed[name])]))
            owed[name] -= round(owed[name])
    densities = {}
    for number, (name, parts) in enumerate(each(drawn.items(), f"{first.family} prior of each block")):
        form = first.block(name).init_args()
        kernels = torch.cat(parts)
        origin = torch.cat([torch.full([len(part)], index) for index, part in enumerate(parts)])
        block = BlockKernels(kernels, origin, torch.arange(len(kernels)))
        densities[name], _ = fit_density(first.family, block, _STEPS, seed * 1009 + number, form)
    return densities


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the names of folders, with those of their parents if they are not distinct; a card names no other path."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else ["/".join(folder.resolve().parts[-2:]) for folder in folders]


def _joined(values: Sequence[Any]) -> str | None:
    """Return the distinct statements of the parents, with "not stated" for those that lack it; None if all do."""
    distinct = dict.fromkeys("not stated" if value is None else str(value) for value in values)
    return None if list(distinct) == ["not stated"] else ", ".join(distinct)
