"""Memory that is used again."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@cache
def keep_freed_memory() -> None:
    """Let this process use freed memory again instead of giving it back to the system.

    By default the GNU C library returns large blocks at once, and the next tensor of that size is paged in
    anew, page by page: on a CPU that took longer than what was computed in it (docs/performance.md). The process
    then holds the memory of its largest moment until it ends. Elsewhere this does nothing.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            # Older versions of the library refuse more than 32 MiB.
            if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
                mallopt(_M_MMAP_THRESHOLD, 32 << 20)
            mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
