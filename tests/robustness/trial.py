"""Run a command in its own process and kill it at a chosen point.

Starting Python with torch takes seconds, so a fork server imports everything once and each trial is a fork of it.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dwp_pyro.cli import main

#: Modules that commands import late; an optimizer imports torch._dynamo, which takes two seconds.
_MODULES = ("torch._dynamo", "torch.utils.tensorboard.writer", "mpl_toolkits.axes_grid1", "rich.progress")
_MODULES += ("dwp_pyro.study.runner", "dwp_pyro.prediction.predict")
_MODULES += tuple(f"dwp_pyro.training.{name}" for name in ("fit_prior", "finetune", "svi"))
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGE_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

_forks = get_context("forkserver")
_forks.set_forkserver_preload(["pytest", "tests.robustness.trial", *_MODULES])


@dataclass(frozen=True)
class TrialResult:
    """Result of a trial.

    Args:
        exit_code: Exit code; negative for the signal that killed it.
        pid: Process id; also the id of its group, which includes its workers.
        seconds: Duration.
        ended_at: Time of the end, on the monotonic clock.
        changes: Number of file changes in the output folder.
        output: Text on stdout and stderr.
    """

    exit_code: int
    pid: int
    seconds: float
    ended_at: float
    changes: int
    output: str


def run(
    arguments: Sequence[object],
    folder: Path,
    out: Path,
    *,
    after: float | None = None,
    signum: int = signal.SIGKILL,
    before_change: int | None = None,
    prepare: Callable[..., None] | None = None,
    args: tuple[Any, ...] = (),
    watch: Callable[[int], None] = lambda pid: None,
    watch_every: float = 60.0,
) -> TrialResult:
    """Run a command to its end, or stop it.

    Args:
        arguments: Arguments of dwp-pyro.
        folder: Working folder.
        out: Output folder, in which changes are counted.
        after: Seconds until the process receives the signal; its workers do not receive it.
        signum: Signal to send.
        before_change: Number of the change in `out`, from 1, before which the process that makes it kills itself.
        prepare: Function at module level, called in the process before the command.
        args: Arguments of `prepare`.
        watch: Callback with the process id, called while the process runs.
        watch_every: Seconds between two calls of `watch`.
    """
    log = out.with_name(f"{out.name}.log")
    log.write_text("")
    words = tuple(map(str, arguments))
    process = _forks.Process(target=_child, args=(words, folder, out, log, before_change, prepare, args))
    start = time.monotonic()
    process.start()
    while process.is_alive() and (after is None or time.monotonic() < start + after):
        remaining = math.inf if after is None else start + after - time.monotonic()
        process.join(max(0, min(remaining, watch_every)))
        watch(process.pid)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signum)
    process.join()
    end = time.monotonic()
    assert process.pid is not None and process.exitcode is not None
    output = log.read_text()
    match = re.search(r"^changes: (\d+)$", output, re.MULTILINE)
    return TrialResult(process.exitcode, process.pid, end - start, end, int(match[1]) if match else 0, output)


def _child(
    arguments: tuple[str, ...],
    folder: Path,
    out: Path,
    log: Path,
    before_change: int | None,
    prepare: Callable[..., None] | None,
    args: tuple[Any, ...],
) -> None:
    os.setpgrp()
    os.chdir(folder)
    os.environ.pop("DWP_PYRO_DATA", None)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115 - open until the process ends
    torch.set_num_threads(1)
    _patch()
    changes = get_context("fork").Value("q", 0)  # shared with workers

    def count_changes(event: str, details: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(details[2], int) and details[2] & _WRITE_FLAGS
        if not writes and event not in _CHANGE_EVENTS:
            return
        if isinstance(details[0], str | os.PathLike) and os.fspath(details[0]).startswith(str(out)):
            changes.value += 1
            if changes.value == before_change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_changes)
    if prepare is not None:
        prepare(*args)
    try:
        main(arguments, prog_name="dwp-pyro")
    finally:
        print(f"changes: {changes.value}", file=sys.stderr, flush=True)


def _patch() -> None:
    import dwp_pyro.inference.loop
    import dwp_pyro.runtime.processes

    # Save a checkpoint after every step, so that kills hit the saving and the resumed runs.
    dwp_pyro.inference.loop._CHECKPOINT_INTERVAL = 0.0
    # Workers are forks with one thread each; like spawned processes, they must not hold the locks of the parent.
    initialize = dwp_pyro.runtime.processes._initialize

    def initialize_without_locks(*args: Any) -> None:
        for handle in Path("/proc/self/fd").iterdir():
            if handle.exists() and handle.readlink().name.startswith(".lock"):
                os.close(int(handle.name))
        initialize(*args)

    dwp_pyro.runtime.processes._initialize = initialize_without_locks
    dwp_pyro.runtime.processes.get_context = lambda method: get_context("fork")
