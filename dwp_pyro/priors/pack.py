"""Prior packs: the files of a prior that are shared, without images, kernels and names of cases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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


def save_pack(folder: Path, prior: KernelPrior, moments: Mapping[str, Moments]) -> None:
    """Write a prior, its card, and the moments of the kernels of each block."""
    tensors: dict[str, Tensor] = {}
    for block, of_block in moments.items():
        tensors |= {f"{block}.total": of_block.total, f"{block}.outer": of_block.outer}
    counts = {block: of_block.count for block, of_block in moments.items()}
    save_tensors(folder / MOMENTS, tensors, {"counts": counts})
    write_bytes(folder / "card.md", markdown(model_card(prior)).encode())
    prior.save(folder)


def read_moments(folder: Path) -> dict[str, Moments]:
    """Read the moments of the kernels of each block.

    Raises:
        PriorError: If the pack has none, or the file is damaged.
    """
    path = folder / MOMENTS
    if not path.exists():
        raise PriorError(f"{folder}: holds no moments of its kernels ({MOMENTS}); fit the prior again")
    tensors, metadata = load_tensors(path, PriorError)
    try:
        moments = {
            str(block): Moments(int(count), tensors[f"{block}.total"], tensors[f"{block}.outer"])
            for block, count in metadata["counts"].items()
        }
        for block, of_block in moments.items():
            if of_block.count < 1 or of_block.outer.shape != 2 * of_block.total.shape:
                raise ValueError(f"block '{block}' has {of_block.count} kernels or another shape")
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise PriorError(f"{path}: is not a file of moments ({problem!r}); fit the prior again") from problem
    return moments
