"""A command in a process of its own, which is killed at a moment of one's choosing.

Starting Python with torch takes seconds. Here a server process imports everything once, and each trial is a fork of it.
"""

from __future__ import annotations

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

_MODULES = ("experiment", "fit_prior", "finetune", "predict", "svi")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

_forks = get_context("forkserver")
_forks.set_forkserver_preload(["pytest", "tests.faults.trial", *(f"dwp_pyro.pipeline.{name}" for name in _MODULES)])


@dataclass(frozen=True)
class Ended:
    """How a trial ended.

    Args:
        code: exit code; negative: the signal that killed it.
        seconds: that it took.
        changes: of files in its folder, before which it might have been killed.
        said: on both outputs.
    """

    code: int
    seconds: float
    changes: int
    said: str


def run(
    arguments: Sequence[object],
    folder: Path,
    out: Path,
    *,
    after: float | None = None,
    before_change: int | None = None,
    prepare: Callable[..., None] | None = None,
    given: tuple[Any, ...] = (),
) -> Ended:
    """Run a command to its end, or kill it.

    Args:
        arguments: of dwp-pyro.
        folder: the current one.
        out: the folder that it changes.
        after: seconds until it is killed by SIGKILL, its workers living on until they notice.
        before_change: number, from 1, of the change in `out` ahead of which the process that makes it kills itself.
        prepare: called in the process ahead of the command, with `given`; a function of a module.
    """
    log = out.with_name(f"{out.name}.log")
    whole = tuple(map(str, arguments))
    process = _forks.Process(target=_child, args=(whole, folder, out, log, before_change, prepare, given))
    start = time.monotonic()
    process.start()
    process.join(after)
    if process.is_alive():
        process.kill()
    process.join()
    seconds = time.monotonic() - start
    assert process.exitcode is not None
    said = log.read_text()
    counted = re.search(r"^changes: (\d+)$", said, re.MULTILINE)
    return Ended(process.exitcode, seconds, int(counted[1]) if counted else 0, said)


def _child(
    arguments: tuple[str, ...],
    folder: Path,
    out: Path,
    log: Path,
    before_change: int | None,
    prepare: Callable[..., None] | None,
    given: tuple[Any, ...],
) -> None:
    os.chdir(folder)
    os.environ.pop("DWP_PYRO_DATA", None)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115 - to the end
    torch.set_num_threads(1)
    _patch()
    changes = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal changes
        changed = event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES)
        if changed and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(str(out)):
            changes += 1
            if changes == before_change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if prepare is not None:
        prepare(*given)
    try:
        main(arguments, prog_name="dwp-pyro")
    finally:
        print(f"changes: {changes}", file=sys.stderr, flush=True)


def _patch() -> None:
    import dwp_pyro.inference.svi
    import dwp_pyro.pipeline.workers

    # A checkpoint a step: kills hit them, and the runs that go on from them.
    dwp_pyro.inference.svi._CHECKPOINT_INTERVAL = 0.0
    # Workers are forks too, with a thread each.
    dwp_pyro.pipeline.workers.get_context = lambda method: get_context("fork")
    os.sched_getaffinity = lambda pid: {0}
