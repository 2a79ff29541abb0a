"""Which device to compute on, and what it has no room for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dwp_pyro.errors import ConfigError, RunError
from dwp_pyro.progress import message

__all__ = [
    "PREDICTS_IN_LESS",
    "TRAINS_IN_LESS",
    "has_bfloat16",
    "torch_device",
    "warn_of_emulation",
    "within_memory",
]


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
def within_memory(what: str, remedy: str) -> Iterator[None]:
    """Where a GPU may turn out too small.

    Args:
        what: needs the memory: the folder of a run, a case.
        remedy: what needs less.

    Raises:
        RunError: instead of torch's error; it names both.
    """
    try:
        yield
    except RuntimeError as problem:
        if not _is_want_of_memory(problem):
            raise
        raise RunError(f"{what}: the device ran out of memory; {remedy}") from problem


#: Of a training; of a prediction.
TRAINS_IN_LESS = "try a smaller --patch or --batch-size, or --device cpu"
PREDICTS_IN_LESS = "predict on the CPU by --device cpu"


def _is_want_of_memory(problem: BaseException) -> bool:
    # CUDA itself, cuBLAS and cuDNN say so in words alone.
    said = str(problem)
    if isinstance(problem, torch.OutOfMemoryError) or "out of memory" in said or "ALLOC_FAILED" in said:
        return True
    # While a step is recorded, the end of the recording fails in its turn.
    return problem.__context__ is not None and _is_want_of_memory(problem.__context__)
