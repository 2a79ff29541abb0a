"""Worker processes: behavior that the tests of the commands do not cover."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from dwp_pyro.runtime.errors import DataError, Interrupted, OutOfMemory, RunError, with_task_name
from dwp_pyro.runtime.processes import map_in_processes
from dwp_pyro.runtime.signals import defer_signals
from dwp_pyro.runtime.workers import Workers
from dwp_pyro.training.metrics_log import MetricsLog, no_track, read_metrics


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


def test_errors_have_the_name_of_their_task_once():
    named, unnamed = OutOfMemory("case a: too little memory"), DataError("x.nii: is no image")
    assert str(with_task_name("case a", named)) == "case a: too little memory"
    assert str(with_task_name("case a", unnamed)) == "case a: x.nii: is no image"
    assert isinstance(with_task_name("case a", unnamed), DataError)


def test_workers_are_refused_within_torchrun_and_only_where_they_are_asked_for():
    code = "import dwp_pyro.prediction.predict, dwp_pyro.study.runner; from dwp_pyro import Workers; Workers(2)"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "ConfigError: workers, cluster: torchrun starts processes of its own" in result.stderr
    assert "dwp_pyro/study/runner.py" not in result.stderr


def _threads(_: str) -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize(("threads", "each"), [(4, 2), (1, 1)])
def test_the_workers_divide_the_threads_of_this_process(threads, each):
    """With more threads than free cores, every step would be several times slower."""
    found: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        map_in_processes(_threads, ["a", "b"], 2, lambda task, threads: found.append(threads))
    finally:
        torch.set_num_threads(before)
    assert found == [each, each]


def test_no_more_processes_than_tasks():
    assert Workers(8).at_most(3) == Workers(3)
    assert Workers(2, "tcp://host:1").at_most(0) == Workers(1, "tcp://host:1")


def test_logs_of_several_processes_lose_no_line(tmp_path):
    context = get_context("spawn")
    processes = [context.Process(target=_log, args=(tmp_path, stage)) for stage in ("a", "b", "c")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    records = [(record["stage"], record["step"]) for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert sorted(records) == [(stage, step) for stage in "abc" for step in range(1, 41)]


def _log(folder: Path, stage: str) -> None:
    for first in range(0, 40, 5):
        with MetricsLog(folder, stage, first, no_track) as log:
            for step in range(first + 1, first + 6):
                log(step, {"loss": 0.0})


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
