"""Worker processes: behavior that the tests of the commands do not cover."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from dwp_pyro.runtime.errors import Interrupted, RunError
from dwp_pyro.runtime.processes import map_in_processes
from dwp_pyro.runtime.signals import defer_signals


@pytest.fixture(autouse=True)
def _no_hanging() -> Iterator[None]:
    """Fail after a minute: a pool that waits for a worker defers every other signal."""

    def too_long(signum, frame):
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def _work(task: tuple[str, Path]) -> str:
    kind, started = task
    if kind == "deaf":
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        started.touch()
        time.sleep(1)
    elif kind == "training":  # saves a checkpoint before it stops
        with defer_signals() as stopped:
            started.touch()
            while not stopped():
                time.sleep(0.05)
        raise Interrupted(stopped(), saved=True)
    elif kind == "killed":
        _wait_for(started)
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "failing":
        _wait_for(started)
        raise RunError("fails")
    return kind


def test_a_worker_that_misses_the_signal_does_not_block_the_parent(tmp_path):
    """A worker that has just finished its task may lose a signal."""
    tasks = [("deaf", tmp_path / "started"), ("failing", tmp_path / "started")]
    with pytest.raises(RunError, match="fails"):
        map_in_processes(_work, tasks, 2, lambda task, result: None)


def test_an_idle_worker_does_not_block_one_that_saves_its_checkpoint(tmp_path):
    """As at the end of a study: the idle worker is terminated while it holds the lock of the pool's queue."""
    started, finished = tmp_path / "started", []

    def interrupt(task, result):
        finished.append(result)
        _wait_for(started)
        time.sleep(1)  # until the other worker waits for a task
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        map_in_processes(_work, [("training", started), ("quick", started)], 2, interrupt)
    assert finished == ["quick"]


def test_a_killed_worker_is_an_error_that_names_what_was_running(tmp_path):
    """And a process of the calling program is left alone."""
    child = get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    try:
        tasks = [("training", tmp_path / "started"), ("killed", tmp_path / "started")]
        with pytest.raises(RunError, match=r"training.* or .*killed.*: a worker process was killed"):
            map_in_processes(_work, tasks, 2, lambda task, result: None)
        assert child.is_alive()
    finally:
        child.kill()
        child.join()
