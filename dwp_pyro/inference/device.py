"""Which device to compute on, and what it has no room for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dwp_pyro.errors import ConfigError, RunError
from dwp_pyro.progress import message

__all__ = ["has_bfloat16", "predicts_in_memory", "torch_device", "trains_in_memory", "warn_of_emulation"]


def torch_device(name: str) -> torch.device:
    """ "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1" → device.

    Raises:
        ConfigError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise ConfigError(f"device: '{name}' cannot be used here; choose auto, cpu or cuda") from problem
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; emulated, a step takes minutes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_of_emulation(precision: str, device: torch.device) -> None:
    """Say so if a precision will be slow here; it is not refused, for a run may go on from another machine."""
    if precision == "bf16" and not has_bfloat16(device):
        message(f"precision: {device.type} here only emulates bf16, many times slower than float32")


@contextmanager
def trains_in_memory(run: Path) -> Iterator[None]:
    """Where a training may find a GPU too small.

    Raises:
        RunError: instead of torch's error; it names the folder of the run, and what takes less.
    """
    try:
        yield
    except RuntimeError as problem:
        if not _is_want_of_memory(problem):
            raise
        raise RunError(
            f"{run}: the device ran out of memory; try a smaller --patch or --batch-size, or --device cpu"
        ) from problem


@contextmanager
def predicts_in_memory(case: str) -> Iterator[None]:
    """Where the prediction of a case may find a GPU too small.

    Raises:
        RunError: instead of torch's error; it names the case.
    """
    try:
        yield
    except RuntimeError as problem:
        if not _is_want_of_memory(problem):
            raise
        raise RunError(f"case {case}: the device ran out of memory; predict on the CPU by --device cpu") from problem


def _is_want_of_memory(problem: RuntimeError) -> bool:
    # CUDA itself, cuBLAS and cuDNN say so in words alone.
    said = str(problem)
    return isinstance(problem, torch.OutOfMemoryError) or "out of memory" in said or "ALLOC_FAILED" in said
