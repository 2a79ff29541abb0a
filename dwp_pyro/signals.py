"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dwp_pyro.errors import Interrupted

__all__ = ["raise_signals", "resumable", "stop_signals"]


@contextmanager
def raise_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise Interrupted, wherever the program is: what is being written is tidied away."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    with _handled_by(interrupt):
        yield


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Hold SIGINT and SIGTERM back; yields a function that says which came (0: none)."""
    received = 0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signum

    with _handled_by(note):
        yield lambda: received


@contextmanager
def resumable() -> Iterator[None]:
    """Mark an Interrupted that passes: what was begun inside can be gone on with."""
    try:
        yield
    except Interrupted as stop:
        stop.resumable = True
        raise


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, former in previous.items():
            signal.signal(signum, former)
