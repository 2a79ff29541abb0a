"""Devices by name, their support of bfloat16, and out-of-memory errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dwp_pyro.runtime.errors import ConfigError, OutOfMemory

_logger = logging.getLogger(__name__)

__all__ = ["catch_out_of_memory", "has_bfloat16", "torch_device", "warn_if_emulated"]


def torch_device(name: str) -> torch.device:
    """Return the device named "auto" (a GPU if available), "cpu", "cuda" or "cuda:1".

    Raises:
        ConfigError: if the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError) as problem:
        raise ConfigError(f"device: '{name}' cannot be used here; choose auto, cpu or cuda") from problem
    raise ConfigError(f"device: '{name}' is not supported; choose auto, cpu or cuda")


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device supports bfloat16 natively; emulated on a CPU, a step takes minutes."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_if_emulated(precision: str, device: torch.device) -> None:
    """Log a warning if a device emulates a precision; not an error, since a run may be resumed on another machine."""
    if precision == "bf16" and not has_bfloat16(device):
        _logger.warning("precision: %s only emulates bf16, many times slower than float32", device.type)


@contextmanager
def catch_out_of_memory(what: str) -> Iterator[None]:
    """Turn the out-of-memory errors of torch and NumPy into `OutOfMemory` about `what`: the folder of a run, a case."""
    try:
        yield
    except (RuntimeError, MemoryError) as problem:
        if not _is_out_of_memory(problem):
            raise
        raise OutOfMemory(f"{what}: the device ran out of memory") from problem


def _is_out_of_memory(problem: BaseException) -> bool:
    # CUDA, cuBLAS, cuDNN and the allocator of the CPU raise plain RuntimeErrors.
    texts = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    if isinstance(problem, torch.OutOfMemoryError | MemoryError) or any(text in str(problem) for text in texts):
        return True
    # An error during a CUDA graph capture makes the end of the capture fail, too; MONAI wraps those of transforms.
    return problem.__context__ is not None and _is_out_of_memory(problem.__context__)
