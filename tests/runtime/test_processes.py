"""Worker processes: behavior that the tests of the commands do not cover."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from dwp_pyro.runtime.errors import RunError
from dwp_pyro.runtime.processes import map_in_processes


def _deaf_or_failing(task: tuple[str, Path]) -> str:
    kind, heard = task
    if kind == "deaf":
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        heard.touch()
        time.sleep(1)
        return kind
    while not heard.exists():
        time.sleep(0.05)
    raise RunError("fails")


def test_a_worker_that_misses_the_signal_does_not_block_the_parent(tmp_path):
    """A worker that has just finished its task may lose a signal."""
    tasks = [("deaf", tmp_path / "heard"), ("failing", tmp_path / "heard")]

    def too_long(signum, frame):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        with pytest.raises(RunError, match="fails"):
            map_in_processes(_deaf_or_failing, tasks, 2, lambda task, result: None)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
