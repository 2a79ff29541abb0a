"""A command in a process of its own, which is killed at a moment of one's choosing.

Starting Python with torch takes seconds. Here a server process imports everything once, and each trial is a fork of it.
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

#: Whatever commands import late: of an optimiser that is torch._dynamo, which takes two seconds.
_MODULES = ("torch._dynamo", "torch.utils.tensorboard.writer", "mpl_toolkits.axes_grid1", "rich.progress")
_MODULES += ("dwp_pyro.study.runner", "dwp_pyro.prediction.predict")
_MODULES += tuple(f"dwp_pyro.training.{name}" for name in ("fit_prior", "finetune", "svi"))
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

_forks = get_context("forkserver")
_forks.set_forkserver_preload(["pytest", "tests.robustness.trial", *_MODULES])


@dataclass(frozen=True)
class Ended:
    """How a trial ended.

    Args:
        code: exit code; negative: the signal that killed it.
        pid: of the process, and of its group: its workers are in it.
        seconds: that it took.
        at: when that was, on the monotonic clock.
        changes: of files in its folder, before which it might have been killed.
        said: on both outputs.
    """

    code: int
    pid: int
    seconds: float
    at: float
    changes: int
    said: str


def run(
    arguments: Sequence[object],
    folder: Path,
    out: Path,
    *,
    after: float | None = None,
    signum: int = signal.SIGKILL,
    before_change: int | None = None,
    prepare: Callable[..., None] | None = None,
    given: tuple[Any, ...] = (),
    watch: Callable[[int], None] = lambda pid: None,
    watch_every: float = 60.0,
) -> Ended:
    """Run a command to its end, or stop it.

    Args:
        arguments: of dwp-pyro.
        folder: the current one.
        out: the folder that it changes.
        after: seconds until it gets a signal, its workers none: they live on until they notice.
        signum: the signal.
        before_change: number, from 1, of the change in `out` ahead of which the process that makes it kills itself.
        prepare: called in the process ahead of the command, with `given`; a function of a module.
        watch: called with the process's id while it runs, every so many seconds.
    """
    log = out.with_name(f"{out.name}.log")
    log.write_text("")
    whole = tuple(map(str, arguments))
    process = _forks.Process(target=_child, args=(whole, folder, out, log, before_change, prepare, given))
    start = time.monotonic()
    process.start()
    while process.is_alive() and (after is None or time.monotonic() < start + after):
        left = math.inf if after is None else start + after - time.monotonic()
        process.join(max(0, min(left, watch_every)))
        watch(process.pid)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signum)
    process.join()
    ended = time.monotonic()
    assert process.pid is not None and process.exitcode is not None
    said = log.read_text()
    counted = re.search(r"^changes: (\d+)$", said, re.MULTILINE)
    return Ended(process.exitcode, process.pid, ended - start, ended, int(counted[1]) if counted else 0, said)


def _child(
    arguments: tuple[str, ...],
    folder: Path,
    out: Path,
    log: Path,
    before_change: int | None,
    prepare: Callable[..., None] | None,
    given: tuple[Any, ...],
) -> None:
    os.setpgrp()
    os.chdir(folder)
    os.environ.pop("DWP_PYRO_DATA", None)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115 - to the end
    torch.set_num_threads(1)
    _patch()
    changes = get_context("fork").Value("q", 0)  # workers count on

    def watch(event: str, args: tuple[Any, ...]) -> None:
        changed = event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES)
        if changed and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(str(out)):
            changes.value += 1
            if changes.value == before_change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if prepare is not None:
        prepare(*given)
    try:
        main(arguments, prog_name="dwp-pyro")
    finally:
        print(f"changes: {changes.value}", file=sys.stderr, flush=True)


def _patch() -> None:
    import dwp_pyro.inference.loop
    import dwp_pyro.runtime.processes

    # A checkpoint a step: kills hit them, and the runs that go on from them.
    dwp_pyro.inference.loop._CHECKPOINT_INTERVAL = 0.0
    # Workers are forks too, with a thread each; as processes begun anew they have none of the parent's open files.
    initialize = dwp_pyro.runtime.processes._initialize

    def initialize_without_locks(*given: Any) -> None:
        for handle in Path("/proc/self/fd").iterdir():
            if handle.exists() and handle.readlink().name == ".lock":
                os.close(int(handle.name))
        initialize(*given)

    dwp_pyro.runtime.processes._initialize = initialize_without_locks
    dwp_pyro.runtime.processes.get_context = lambda method: get_context("fork")
    os.sched_getaffinity = lambda pid: {0}
