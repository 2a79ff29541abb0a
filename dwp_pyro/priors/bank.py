"""Kernel banks: kernels of trained networks by site, and their origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwp_pyro.densities import BlockKernels
from dwp_pyro.runtime.errors import PriorError
from dwp_pyro.runtime.files import read_json, write_json
from dwp_pyro.runtime.tensors import load_tensors, save_tensors

__all__ = ["MAX_WEIGHTS", "KernelBank", "KernelSource", "collect_kernels", "read_kernels"]

FORMAT_VERSION = 1

MAX_WEIGHTS = 1331  # per kernel; its covariance has the square of that
_MAX_SIZE = 1e12  # of a weight; sums of its square stay finite in float32

_MAX_SOURCES = 10**6  # source networks, and snapshots of one


@dataclass(frozen=True)
class KernelSource:
    """Origin of the kernels of a snapshot.

    Args:
        bootstrap: Number of the source network.
        snapshot: Number of the learning-rate cycle.
        dataset: Layout of the scans.
        network: Description of the network.
        dice: Dice of the snapshot on the source's validation cases; None without such cases.
        start_correlation: Correlation of the snapshot's kernels with the network's initial ones; None if unknown.
    """

    bootstrap: int
    snapshot: int
    dataset: str
    network: Mapping[str, Any]
    dice: float | None
    start_correlation: float | None = None


@dataclass(frozen=True)
class KernelBank:
    """Kernels by site; every source contributes the same number to a site, in the order of `sources`.

    Args:
        kernels: Site → kernels, [n, k₁, …, k_d]; the single site "*" for kernels without names.
        sources: Origin of each snapshot; empty if unknown.
    """

    kernels: Mapping[str, Tensor]
    sources: tuple[KernelSource, ...] = ()

    def bootstraps(self, site: str) -> Tensor:
        """Return the bootstrap of each kernel of a site, [n]; 0 without sources."""
        n = len(self.kernels[site])
        if not self.sources:
            return torch.zeros(n, dtype=torch.long)
        return torch.tensor([source.bootstrap for source in self.sources]).repeat_interleave(n // len(self.sources))

    def identities(self, site: str) -> Tensor:
        """Return a number for each kernel of a site, [n]: one per bootstrap and position, shared by snapshots."""
        n = len(self.kernels[site])
        places = n // max(1, len(self.sources))
        return self.bootstraps(site) * places + torch.arange(n) % places

    def block(self, sites: Sequence[str]) -> BlockKernels:
        """Return the kernels of several sites of one kernel shape, [n, k₁, …, k_d]; identities differ between sites."""
        return BlockKernels(
            torch.cat([self.kernels[site] for site in sites]),
            torch.cat([self.bootstraps(site) for site in sites]),
            # Those of a site are far below 2⁴⁸.
            torch.cat([self.identities(site) + (number << 48) for number, site in enumerate(sites)]),
        )

    def save(self, folder: Path) -> None:
        """Write `kernels.safetensors` and `kernels.json`."""
        save_tensors(folder / "kernels.safetensors", self.kernels)
        sources = [asdict(source) for source in self.sources]
        write_json(folder / "kernels.json", {"format": FORMAT_VERSION, "sources": sources})


def collect_kernels(snapshots: Sequence[tuple[KernelSource, Mapping[str, Tensor]]]) -> KernelBank:
    """Collect the kernels of snapshots: sources and their weights, site → [out, in, k₁, …, k_d], of the same sites."""
    sites = snapshots[0][1].keys()
    kernels = {site: torch.cat([weights[site].flatten(0, 1) for _, weights in snapshots]) for site in sites}
    return KernelBank(kernels, tuple(source for source, _ in snapshots))


def read_kernels(path: Path) -> KernelBank:
    """Read a kernel bank (`.safetensors`, with an optional `.json` beside it) or an `.npy` array.

    An array has the shape [n, k₁, k₂] or [n, k₁, k₂, k₃], with an optional axis of length 1 after the first.

    Raises:
        PriorError: If the file cannot be read or does not hold finite kernels.
    """
    if path.suffix == ".npy":
        bank = KernelBank({"*": _read_array(path)})
    elif path.suffix == ".safetensors":
        bank = _read_bank(path)
    else:
        raise PriorError(f"{path}: kernels are read from .safetensors and .npy files; convert it first")
    for site, kernels in bank.kernels.items():
        where = path if site == "*" else f"{path}, '{site}'"
        if kernels.dim() not in (3, 4) or len(kernels) < 2 or not 2 <= kernels[0].numel() <= MAX_WEIGHTS:
            raise PriorError(
                f"{where}: expected at least two kernels, [n, k, k] or [n, k, k, k], of 2 to {MAX_WEIGHTS} weights "
                f"each, found {list(kernels.shape)}"
            )
        if len(bank.identities(site).unique()) < 2:
            raise PriorError(f"{where}: holds snapshots of one kernel; expected at least two kernels")
        if not torch.isfinite(kernels).all():
            raise PriorError(f"{where}: holds NaN or infinity; remove those kernels")
        if float(kernels.abs().max()) > _MAX_SIZE:
            raise PriorError(
                f"{where}: holds a weight of {float(kernels.abs().max()):.2g}, the limit is {_MAX_SIZE:g}; remove or "
                "scale those kernels"
            )
        if not kernels.any():
            raise PriorError(f"{where}: every weight is 0; expected kernels of a trained network")
    return bank


def _read_array(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as problem:  # numpy raises whatever a damaged header evaluates to
        reason = " ".join(str(problem).split())
        raise PriorError(f"{path}: cannot be read as a numpy array ({reason})") from problem
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise PriorError(f"{path}: expected one array of numbers")
    if array.ndim >= 4 and array.shape[1] == 1:
        array = array[:, 0]
    return torch.from_numpy(array.astype(np.float32))


def _read_bank(path: Path) -> KernelBank:
    kernels, _ = load_tensors(path, PriorError)
    if not kernels:
        raise PriorError(f"{path}: holds no kernels")
    kernels = {site: tensor.float() for site, tensor in kernels.items()}
    description_path = path.with_suffix(".json")
    if not description_path.exists():
        return KernelBank(kernels)
    description = read_json(description_path, PriorError)
    try:
        if description["format"] != FORMAT_VERSION:
            raise ValueError(f"format {description['format']!r}, expected {FORMAT_VERSION}")
        sources = tuple(KernelSource(**source) for source in description["sources"])
        if not all(isinstance(source.network, dict) for source in sources):
            raise ValueError("the network of a source must be a mapping")
        for number in (number for source in sources for number in (source.bootstrap, source.snapshot)):
            if not isinstance(number, int) or not 0 <= number < _MAX_SOURCES:
                raise ValueError(f"bootstrap and snapshot must be integers from 0 to {_MAX_SOURCES - 1}")
    except (KeyError, TypeError, ValueError) as problem:
        raise PriorError(f"{description_path}: is not the description of a kernel bank ({problem})") from problem
    for site, tensor in kernels.items():
        if sources and len(tensor) % len(sources):
            raise PriorError(
                f"{path}, '{site}': {len(tensor)} kernels, not a multiple of {description_path.name}'s sources"
            )
    return KernelBank(kernels, sources)
