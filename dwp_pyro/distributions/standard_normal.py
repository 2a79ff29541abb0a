"""Standard normal noise, on both of two cores."""

from __future__ import annotations

import os
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
    seeds = torch.randint(2**32, (2,)).tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # What is drawn is the same with one thread. (Inference mode is a thread's own.)
    if torch.get_num_threads() > 1 and not torch.is_inference_mode_enabled():
        first = _other_core().submit(halves[0].normal_, generator=generators[0])
        halves[1].normal_(generator=generators[1])
        first.result()
    else:
        for half, generator in zip(halves, generators, strict=True):
            half.normal_(generator=generator)
    return noise


@cache
def _other_core() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "noise")


# A forked process has none of its parent's threads.
os.register_at_fork(after_in_child=_other_core.cache_clear)
