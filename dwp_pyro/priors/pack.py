"""Prior packs: the files of a prior that are shared, without images, kernels and names of cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dwp_pyro.densities.moments import Moments
from dwp_pyro.priors.kernel_prior import KernelPrior
from dwp_pyro.priors.model_card import model_card
from dwp_pyro.runtime.errors import PriorError
from dwp_pyro.runtime.files import write_bytes
from dwp_pyro.runtime.table import markdown
from dwp_pyro.runtime.tensors import load_tensors, save_tensors

__all__ = ["MOMENTS", "read_moments", "save_pack"]

#: File of the moments of each block's kernels, from which priors are merged.
MOMENTS = "moments.safetensors"


def save_pack(folder: Path, prior: KernelPrior, moments: Mapping[str, Sequence[Moments]]) -> None:
    """Write a prior, its card, and the moments of the folds of each block's kernels (`fold_moments`)."""
    tensors: dict[str, Tensor] = {}
    for block, folds in moments.items():
        for number, fold in enumerate(folds):
            tensors |= {f"{block}.{number}.mean": fold.mean, f"{block}.{number}.scatter": fold.scatter}
    counts = {block: [fold.count for fold in folds] for block, folds in moments.items()}
    save_tensors(folder / MOMENTS, tensors, {"counts": counts, "noise": bool(prior.provenance.get("privacy"))})
    write_bytes(folder / "card.md", markdown(model_card(prior)).encode())
    prior.save(folder)


def read_moments(folder: Path) -> dict[str, list[Moments]]:
    """Read the moments of the folds of each block's kernels.

    Raises:
        PriorError: If the pack has none, or the file is damaged.
    """
    path = folder / MOMENTS
    if not path.exists():
        raise PriorError(f"{folder}: holds no moments of its kernels ({MOMENTS}); fit the prior again")
    tensors, metadata = load_tensors(path, PriorError)
    try:
        return {
            str(block): [
                _checked(
                    Moments(count, tensors[f"{block}.{number}.mean"], tensors[f"{block}.{number}.scatter"]),
                    noise=metadata.get("noise", False),
                )
                for number, count in enumerate(counts)
            ]
            for block, counts in metadata["counts"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise PriorError(f"{path}: is not a file of moments ({problem!r}); fit the prior again") from problem


def _checked(moments: Moments, *, noise: bool) -> Moments:
    """Return moments if kernels can have them, but for noise that makes them private; raise ValueError otherwise."""
    if not isinstance(moments.count, int) or moments.count < 1:
        raise ValueError(f"a fold of {moments.count} kernels")
    size = len(moments.mean)
    if moments.mean.dim() != 1 or moments.scatter.shape != (size, size):
        raise ValueError("mean and scatter do not have the shapes [D] and [D, D]")
    if moments.mean.dtype != torch.float64 or moments.scatter.dtype != torch.float64:
        raise ValueError("mean and scatter are not in double precision")
    spread = torch.linalg.eigvalsh(moments.scatter)
    negative = not noise and spread[0] < -1e-6 * spread[-1].abs()
    if negative or not moments.scatter.allclose(moments.scatter.T):
        raise ValueError("a scatter that no kernels have")
    return moments
