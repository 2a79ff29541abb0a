"""Standard normal noise, on both of two cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

__all__ = ["fill_with_standard_normals", "standard_normals_like"]

_SHARED_FROM = 100_000  # numbers: below, handing over takes longer


def standard_normals_like(tensors: Sequence[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """ε ~ N(0, I) in the shape of each, by `fill_with_standard_normals`."""
    noise = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    fill_with_standard_normals(noise, generator)
    return noise


def fill_with_standard_normals(tensors: Sequence[Tensor], generator: torch.Generator | None = None) -> None:
    """Write ε ~ N(0, I) over each. PyTorch draws on one core of a CPU; here two share the work, each with a generator
    of its own.

    Args:
        tensors: on one device, contiguous.
        generator: of that device, from which all follows; None for PyTorch's own.
    """
    total = sum(tensor.numel() for tensor in tensors)
    if total < _SHARED_FROM or any(tensor.device.type != "cpu" for tensor in tensors):
        for tensor in tensors:
            tensor.normal_(generator=generator)
        return
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    left = (total + 1) // 2
    for tensor in tensors:
        cut = min(left, tensor.numel())
        for half, piece in zip(halves, tensor.view(-1).split((cut, tensor.numel() - cut)), strict=True):
            half.append(piece)
        left -= cut
    seeds = torch.randint(2**32, (2,), generator=generator).tolist()
    # What is drawn is the same with one thread. (Inference mode is a thread's own.)
    if torch.get_num_threads() > 1 and not torch.is_inference_mode_enabled():
        first = _other_core().submit(_fill, halves[0], seeds[0])
        _fill(halves[1], seeds[1])
        first.result()
    else:
        for half, seed in zip(halves, seeds, strict=True):
            _fill(half, seed)


def _fill(tensors: Sequence[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.normal_(generator=generator)


@cache
def _other_core() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "noise")


# A forked process has none of its parent's threads.
os.register_at_fork(after_in_child=_other_core.cache_clear)
