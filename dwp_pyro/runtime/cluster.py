"""Parallel tasks on the workers of a Dask cluster."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dwp_pyro.runtime.errors import ConfigError, Interrupted, RunError, UserError, with_task_name
from dwp_pyro.runtime.signals import defer_signals

__all__ = ["map_on_cluster"]

_POLL = 0.5  # seconds between two checks for a signal
_LOST_WORKERS = 10  # a task may lose before it fails
_TIMEOUT = 10.0  # seconds to find the scheduler
_FILE_TIMEOUT = 60.0  # seconds until the file of a scheduler that is starting must exist

_logger = logging.getLogger(__name__)

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

_one_at_a_time = threading.Lock()


def map_on_cluster(
    work: Callable[[_Task], _Result], tasks: Sequence[_Task], cluster: str, finished: Callable[[_Task, _Result], None]
) -> None:
    """Run tasks on a Dask cluster; the task of a worker that dies goes to another one.

    Args:
        work: Function at module level, called in a worker, one task at a time; it resumes what an earlier call began.
        tasks: Arguments of `work`; messages name them by str(task).
        cluster: Address of the scheduler ("tcp://host:8786"), or its file.
        finished: Callback for each task and its result, called in this process in the order of completion.

    Raises:
        ConfigError: if Dask is not installed.
        Interrupted: after a signal; tasks that workers have begun run to their end.
        UserError: if a task raises one; its message starts with the task's name.
        RunError: if there is no scheduler, or it ends.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError as problem:
        raise ConfigError("cluster: Dask is not installed; pip install 'dwp-pyro[cluster]'") from problem
    where: dict[str, Any] = {"address": cluster} if "://" in cluster else {"scheduler_file": cluster}
    end = time.monotonic() + _FILE_TIMEOUT
    while "://" not in cluster and not Path(cluster).exists():  # Dask would wait forever
        if time.monotonic() > end:
            raise RunError(f"{cluster}: no such file of a scheduler; start one with 'dask scheduler --scheduler-file'")
        time.sleep(_POLL)
    try:
        client = Client(**where, timeout=_TIMEOUT, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError, ValueError) as problem:
        raise RunError(f"{cluster}: no scheduler of a cluster answers; start one with 'dask scheduler'") from problem
    with _silent_client(), client, defer_signals() as stopped:
        _logger.info(f"Dashboard of the cluster: {client.dashboard_link}")
        executor = client.get_executor(retries=_LOST_WORKERS, pure=False)  # type: ignore[no-untyped-call]
        running: dict[Future[_Result], _Task] = {executor.submit(_exclusive, work, task): task for task in tasks}
        try:
            while running:
                done, _ = wait(running, _POLL, FIRST_COMPLETED)
                if client.status != "running":
                    raise CancelledError
                for future in done:
                    task = running.pop(future)
                    try:
                        result = future.result()
                    except UserError as problem:
                        raise with_task_name(task, problem) from problem
                    except KilledWorker as problem:
                        raise RunError(f"{task}: its workers were killed (out of memory?)") from problem
                    finished(task, result)
                if stopped() and running:
                    raise Interrupted(stopped())
        except CancelledError as problem:
            raise RunError(f"{cluster}: the scheduler has ended; start it, and resume the command") from problem
        finally:
            for future in running:
                future.cancel()


@contextmanager
def _silent_client() -> Iterator[None]:
    # The end of the scheduler is one line of ours; Dask would add the traceback of the reconnection that we cancel.
    logger = logging.getLogger("distributed.client")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _exclusive(work: Callable[[_Task], _Result], task: _Task) -> _Result:
    # Random generators and Pyro's parameters belong to the process, and a worker may have several threads.
    with _one_at_a_time:
        return work(task)
