"""Handling of SIGINT and SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dwp_pyro.runtime.errors import Interrupted

__all__ = ["defer_signals", "interrupt_on_signal", "resumable"]


@contextmanager
def interrupt_on_signal() -> Iterator[None]:
    """Raise Interrupted on SIGINT and SIGTERM, so that unfinished files are cleaned up."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    with _handled_by(interrupt):
        yield


@contextmanager
def defer_signals() -> Iterator[Callable[[], int]]:
    """Defer SIGINT and SIGTERM; yield a function that returns the last one received (0 for none)."""
    received = 0

    def defer(signum: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signum

    with _handled_by(defer):
        yield lambda: received


@contextmanager
def resumable() -> Iterator[None]:
    """Mark each Interrupted that leaves the block as resumable."""
    try:
        yield
    except Interrupted as stop:
        stop.resumable = True
        raise


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # a worker of a cluster; only the main one may
        yield
        return
    previous = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, previous_handler in previous.items():
            signal.signal(signum, previous_handler)
