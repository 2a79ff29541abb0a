"""Work in processes: what no command shows."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from dwp_pyro.errors import RunError
from dwp_pyro.pipeline.workers import in_processes


def _deaf_or_failing(task: tuple[str, Path]) -> str:
    kind, heard = task
    if kind == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        heard.touch()
        time.sleep(1)
        return kind
    while not heard.exists():
        time.sleep(0.05)
    raise RunError("fails")


def test_a_worker_that_misses_the_signal_is_not_waited_for_for_ever(tmp_path):
    """As one does that has finished its task at that very moment, and waits for another."""
    tasks = [("deaf", tmp_path / "heard"), ("failing", tmp_path / "heard")]

    def too_long(signum, frame):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        with pytest.raises(RunError, match="fails"):
            in_processes(_deaf_or_failing, tasks, 2, lambda task, result: None)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
