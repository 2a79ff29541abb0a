"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["stop_signals"]


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Hold SIGINT and SIGTERM back; yields a function that says which came (0: none)."""
    received = 0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signum

    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
