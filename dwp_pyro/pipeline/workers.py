"""Work in processes side by side."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import torch

from dwp_pyro.errors import Interrupted, RunError, UserError
from dwp_pyro.progress import set_style
from dwp_pyro.signals import raise_signals, stop_signals

__all__ = ["in_processes"]

_POLL = 0.5  # seconds until a signal is heeded

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def in_processes(
    work: Callable[[_Task], _Result],
    tasks: Sequence[_Task],
    workers: int,
    finished: Callable[[_Task, _Result], None],
) -> None:
    """Do tasks in order, `workers` at a time, each process with its share of the cores.

    After SIGINT or SIGTERM, or when a task fails, the tasks under way get SIGTERM and are waited for. If this
    process is killed, its workers end at once.

    Args:
        work: called in a worker; a function of a module.
        tasks: to call it with; str(task) names one in messages.
        workers: number of processes.
        finished: called here with each task and its result, as they come in.

    Raises:
        Interrupted: after a signal.
        UserError: of a task, which the message names.
        RunError: if a worker was killed.
    """
    threads = max(1, _cores() // workers)
    waiting = iter(tasks)
    processes: dict[Connection, SpawnProcess] = {}
    under_way: dict[Connection, _Task] = {}

    def hand_out(connection: Connection) -> None:
        for task in islice(waiting, 1):
            under_way[connection] = task
            connection.send(task)

    with stop_signals() as stopped:
        try:
            for _ in range(min(workers, len(tasks))):
                connection, process = _start(work, threads)
                processes[connection] = process
                hand_out(connection)
            while under_way:
                ready = wait(list(under_way), _POLL)
                for connection in [each for each in under_way if each in ready]:
                    task = under_way.pop(connection)
                    try:
                        result = connection.recv()
                    except (EOFError, OSError):
                        processes[connection].join()
                        if stopped():
                            raise Interrupted(stopped(), saved=True) from None
                        raise RunError(_obituary(task, processes[connection])) from None
                    if isinstance(result, UserError):
                        raise type(result)(f"{task}: {result}") from result
                    if isinstance(result, OSError):
                        raise result
                    finished(task, result)
                    hand_out(connection)
                if stopped() and under_way:
                    raise Interrupted(stopped(), saved=True)
        finally:
            for connection, process in processes.items():
                process.terminate()
                connection.close()  # or a worker that had just finished its task would wait for another
            for process in processes.values():
                process.join()


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _start(work: Callable[[Any], Any], threads: int) -> tuple[Connection, SpawnProcess]:
    """A worker, and this end of the pipe to it."""
    context = get_context("spawn")
    here, there = context.Pipe()
    # Not a daemon: beside a GPU a training has processes of its own.
    process = context.Process(target=_serve, args=(there, work, threads))
    # A terminal sends SIGINT to all; workers inherit the mask and heed their parent alone. (The tracker, which the
    # first start would start, takes the mask away.)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    there.close()
    return here, process


def _obituary(task: object, process: SpawnProcess) -> str:
    code = process.exitcode
    how = f"was stopped by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
    return f"{task}: its process {how} (for want of memory?); the same command goes on, try fewer --workers"


def _serve(connection: Connection, work: Callable[[Any], Any], threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_style("quiet")  # the parent shows its own progress
    torch.set_num_threads(threads)
    with suppress(EOFError, ConnectionError, Interrupted), raise_signals():
        while True:
            task = connection.recv()
            result: Any
            try:
                result = work(task)
            except (UserError, OSError) as problem:
                result = problem
            connection.send(result)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
