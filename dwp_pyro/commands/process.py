"""Process-wide settings of thread waiting and memory allocation."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["tune_process"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_TRIM, _MMAP = (1 << 31) - 1, 1 << 30


def tune_process() -> None:
    """Tune thread waiting and memory allocation of this process and its children; call it before importing torch.

    Idle OpenMP threads spin for some microseconds, then sleep. Unlimited spinning made a step up to six times slower on
    a shared core; sleeping at once made a step of a small network half as long again.

    By default, glibc returns freed blocks above 32 MiB to the system, and page faults of the next large tensor took
    longer than its computation (docs/performance.md). Let it keep them.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        if not mallopt(_M_MMAP_THRESHOLD, _MMAP):  # older versions accept at most 32 MiB
            mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, _TRIM)
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(_MMAP))
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(_TRIM))
