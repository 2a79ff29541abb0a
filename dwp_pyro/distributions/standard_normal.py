"""Standard normal noise, on both of two cores."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

__all__ = ["standard_normal_like"]

_SHARED_FROM = 100_000  # numbers: below, handing over takes longer


def standard_normal_like(tensor: Tensor) -> Tensor:
    """ε ~ N(0, I). PyTorch draws on one core of a CPU; here two share the work, each with a generator of its own."""
    if tensor.device.type != "cpu" or tensor.numel() < _SHARED_FROM:
        return torch.randn_like(tensor)
    noise = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    halves = noise.view(-1).split((tensor.numel() + 1) // 2)
    seeds = torch.randint(2**62, (2,)).tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    first = _other_core().submit(halves[0].normal_, generator=generators[0])
    halves[1].normal_(generator=generators[1])
    first.result()
    return noise


@cache
def _other_core() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "noise")
