"""The kernel bank: kernels of trained networks, site by site, and where each came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwp_pyro.errors import PriorError
from dwp_pyro.storage import read_json, write_json
from dwp_pyro.tensors import load_tensors, save_tensors

__all__ = ["KernelBank", "KernelSource", "collect_kernels", "read_kernels"]

FORMAT_VERSION = 1

_MAX_WEIGHTS = 2048  # in a kernel: its covariance has the square of that
_MAX_SIZE = 1e12  # of a weight: its square is a number in float32, and so are sums of these

_MOST_SOURCES = 10**6  # source networks, and snapshots of one

#: What numpy raises on damaged headers and contents.
_UNREADABLE = (
    *(OSError, EOFError, MemoryError, OverflowError, RecursionError),
    *(SyntaxError, TokenError, TypeError, ValueError),
)


@dataclass(frozen=True)
class KernelSource:
    """Where some kernels came from.

    Args:
        bootstrap: number of the source network.
        snapshot: number of the learning-rate cycle.
        dataset: layout of the scans.
        network: form of the network.
        dice: of the snapshot on the source's validation cases; None where there are none.
        start_correlation: of the snapshot's kernels with those the network started from; None where that is not known.
    """

    bootstrap: int
    snapshot: int
    dataset: str
    network: Mapping[str, Any]
    dice: float | None
    start_correlation: float | None = None


@dataclass(frozen=True)
class KernelBank:
    """Kernels by site, [n, k₁, …, k_d] each; every source gave the same number to a site, in the order of `sources`.

    Args:
        kernels: site → kernels; the one site "*" where the kernels came without names.
        sources: none where the file did not say.
    """

    kernels: Mapping[str, Tensor]
    sources: tuple[KernelSource, ...] = ()

    def bootstraps(self, site: str) -> Tensor:
        """The bootstrap of each kernel of a site, [n]; all 0 without sources."""
        n = len(self.kernels[site])
        if not self.sources:
            return torch.zeros(n, dtype=torch.long)
        return torch.tensor([source.bootstrap for source in self.sources]).repeat_interleave(n // len(self.sources))

    def identities(self, site: str) -> Tensor:
        """A number for each kernel of a site, [n], that its snapshots share: (bootstrap, place in the network)."""
        n = len(self.kernels[site])
        places = n // max(1, len(self.sources))
        return self.bootstraps(site) * places + torch.arange(n) % places

    def save(self, folder: Path) -> None:
        """Write `kernels.safetensors` and `kernels.json`."""
        save_tensors(folder / "kernels.safetensors", self.kernels)
        sources = [asdict(source) for source in self.sources]
        write_json(folder / "kernels.json", {"format": FORMAT_VERSION, "sources": sources})


def collect_kernels(snapshots: Sequence[tuple[KernelSource, Mapping[str, Tensor]]]) -> KernelBank:
    """Gather the kernels of snapshots.

    Args:
        snapshots: pairs of a source and its kernels, site → weight [out, in, k₁, …, k_d]; the same sites in each.
    """
    sites = snapshots[0][1].keys()
    kernels = {site: torch.cat([weights[site].flatten(0, 1) for _, weights in snapshots]) for site in sites}
    return KernelBank(kernels, tuple(source for source, _ in snapshots))


def read_kernels(path: Path) -> KernelBank:
    """Read a kernel bank (`.safetensors`, with its `.json` beside it if there is one) or an `.npy` array.

    An array holds [n, k₁, k₂], [n, k₁, k₂, k₃], or either with an axis of length 1 after the first.

    Raises:
        PriorError: naming the file, if it cannot be read or does not hold finite kernels.
    """
    if path.suffix == ".npy":
        bank = KernelBank({"*": _read_array(path)})
    elif path.suffix == ".safetensors":
        bank = _read_bank(path)
    else:
        raise PriorError(f"{path}: kernels are read from .safetensors and .npy files; convert it first")
    for site, kernels in bank.kernels.items():
        where = path if site == "*" else f"{path}, '{site}'"
        if kernels.dim() not in (3, 4) or len(kernels) < 2 or not 2 <= kernels[0].numel() <= _MAX_WEIGHTS:
            raise PriorError(
                f"{where}: expected at least two kernels, [n, k, k] or [n, k, k, k], of 2 to {_MAX_WEIGHTS} weights "
                f"each, found {list(kernels.shape)}"
            )
        if len(bank.identities(site).unique()) < 2:
            raise PriorError(f"{where}: holds snapshots of one kernel alone; give at least two kernels")
        if not torch.isfinite(kernels).all():
            raise PriorError(f"{where}: holds NaN or infinity; remove those kernels")
        if float(kernels.abs().max()) > _MAX_SIZE:
            raise PriorError(
                f"{where}: holds a weight of {float(kernels.abs().max()):.2g}, no trained network's; remove those "
                "kernels, or scale them"
            )
        if not kernels.any():
            raise PriorError(f"{where}: every weight is 0; there is nothing to learn from")
    return bank


def _read_array(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except _UNREADABLE as problem:
        reason = " ".join(str(problem).split())
        raise PriorError(f"{path}: cannot be read as a numpy array ({reason})") from problem
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise PriorError(f"{path}: should hold one array of numbers")
    if array.ndim >= 4 and array.shape[1] == 1:
        array = array[:, 0]
    return torch.from_numpy(array.astype(np.float32))


def _read_bank(path: Path) -> KernelBank:
    kernels, _ = load_tensors(path, PriorError)
    if not kernels:
        raise PriorError(f"{path}: holds no kernels")
    kernels = {site: tensor.float() for site, tensor in kernels.items()}
    card = path.with_suffix(".json")
    if not card.exists():
        return KernelBank(kernels)
    description = read_json(card, PriorError)
    try:
        if description["format"] != FORMAT_VERSION:
            raise ValueError(f"format {description['format']!r}, expected {FORMAT_VERSION}")
        sources = tuple(KernelSource(**source) for source in description["sources"])
        for number in (number for source in sources for number in (source.bootstrap, source.snapshot)):
            if not isinstance(number, int) or not 0 <= number < _MOST_SOURCES:
                raise ValueError(f"bootstrap and snapshot should be whole numbers from 0 to {_MOST_SOURCES - 1}")
    except (KeyError, TypeError, ValueError) as problem:
        raise PriorError(f"{card}: is not the description of a kernel bank ({problem})") from problem
    for site, tensor in kernels.items():
        if sources and len(tensor) % len(sources):
            raise PriorError(f"{path}, '{site}': {len(tensor)} kernels, not a multiple of {card.name}'s sources")
    return KernelBank(kernels, sources)
