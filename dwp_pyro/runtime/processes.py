"""Parallel tasks in worker processes."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import active_children, get_context, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from typing import TypeVar

import torch

from dwp_pyro.runtime.errors import Interrupted, RunError, UserError, with_task_name
from dwp_pyro.runtime.signals import defer_signals, interrupt_on_signal

__all__ = ["map_in_processes"]

_POLL = 0.5  # seconds between two checks for a signal

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def map_in_processes(
    work: Callable[[_Task], _Result], tasks: Sequence[_Task], workers: int, finished: Callable[[_Task, _Result], None]
) -> None:
    """Run tasks in order, `workers` at a time, and divide the threads of this process among the workers.

    After SIGINT, SIGTERM or a failed task, the running tasks receive SIGTERM and are joined. If this process is killed,
    its workers exit.

    Args:
        work: Function at module level, called in a worker.
        tasks: Arguments of `work`; messages name them by str(task).
        workers: Number of processes.
        finished: Callback for each task and its result, called in this process in the order of completion.

    Raises:
        Interrupted: after a signal.
        UserError: if a task raises one; its message starts with the task's name.
        RunError: if a worker was killed.
    """
    others = set(active_children())  # of the calling program
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _initialize, (threads,))
    waiting = iter(tasks)
    running: dict[Future[_Result], _Task] = {}
    processes: set[BaseProcess] = set()

    def submit_next() -> None:
        # A terminal sends SIGINT to all processes of its group; workers inherit the mask and stop at their parent's
        # SIGTERM only.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            # One task per worker at a time: the pool does not cancel tasks that it has queued for a worker.
            for task in islice(waiting, workers - len(running)):
                running[pool.submit(_call, work, task)] = task
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        processes.update(set(active_children()) - others)

    with defer_signals() as stopped, pool:
        resource_tracker.ensure_running()  # started by the first worker otherwise, it would reset the mask
        try:
            submit_next()
            while running:
                done, _ = wait(running, _POLL, FIRST_COMPLETED)
                # The pool may not watch a worker that it started last, until another one finishes.
                if any(process.exitcode is not None for process in processes):
                    raise BrokenProcessPool
                for future in done:
                    task = running[future]
                    try:
                        result = future.result()
                    except UserError as problem:
                        raise with_task_name(task, problem) from problem
                    del running[future]
                    finished(task, result)
                submit_next()
                if stopped() and running:
                    raise Interrupted(stopped())
        except BrokenProcessPool as problem:
            if stopped():
                raise Interrupted(stopped()) from None
            raise RunError(
                f"{' or '.join(map(str, running.values()))}: a worker process was killed (out of memory?); "
                "resume with fewer workers"
            ) from problem
        finally:
            for process in processes:
                process.terminate()


def _initialize(threads: int) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    logging.getLogger("dwp_pyro").setLevel(logging.ERROR)  # the parent reports its own progress
    torch.set_num_threads(threads)


def _call(work: Callable[[_Task], _Result], task: _Task) -> _Result:
    """Return the result of a task; exit if a signal stopped it."""
    try:
        with interrupt_on_signal():
            return work(task)
    except Interrupted:
        # Not back to the pool's queue: an idle worker that was terminated there still holds its lock.
        os._exit(1)


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
