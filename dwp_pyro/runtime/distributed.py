"""Several processes of one run, one per device, as `torchrun` starts them."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from dwp_pyro.runtime.errors import ConfigError, Interrupted, ProcessLost, UserError

__all__ = [
    "any_signal",
    "average",
    "fail_together",
    "gather",
    "join_processes",
    "lost_processes",
    "process_count",
    "process_number",
]

_T = TypeVar("_T")

_PATIENCE = timedelta(days=1)  # for a process that predicts more or larger cases; a lost one is noticed at once


def process_number() -> int:
    """Return the rank of this process in its run: 0 for the one that prints and writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def process_count() -> int:
    """Return the number of processes of this run: 1 without `torchrun`."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def join_processes(device: str, out: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Join the processes that `torchrun` started for one run; without `torchrun`, do nothing.

    Every process runs the same program on the same data. Only process 0 prints, and writes to `out`; each of the others
    works in a temporary folder, a copy of `out`, so that it resumes what process 0 resumes.

    Args:
        device: Name of the device, as for `torch_device`.
        out: Folder of the run; None for a command whose processes write to one folder.

    Yields:
        Device and folder of this process.
    """
    folder = Path() if out is None else out
    if not distributed.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield device, folder
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ConfigError(f"device: process {local} has no GPU of its own ({torch.cuda.device_count()} found)")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    elif device not in ("auto", "cpu"):
        raise ConfigError(f"device: each process needs a device of its own, got '{device}'; choose auto, cpu or cuda")
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        files = _broadcast(None if out is None else _read_files(out))
        if process_number() == 0:
            yield device, folder
            return
        with tempfile.TemporaryDirectory() as scratch, _silent():
            for name, content in (files or {}).items():
                path = Path(scratch) / "run" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            yield device, folder if out is None else Path(scratch) / "run"
    finally:
        with contextlib.suppress(RuntimeError):  # a process is lost
            distributed.destroy_process_group()


def _read_files(folder: Path) -> dict[str, bytes]:
    """Return name → content of the files that a resumed run reads."""
    if process_number() > 0 or not (folder / "run.json").exists():
        return {}
    unread = {"tensorboard", "predictions"}
    paths = [path for path in folder.rglob("*") if path.is_file() and unread.isdisjoint(path.relative_to(folder).parts)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if not path.name.startswith(".lock")}


def _broadcast(value: _T) -> _T:
    """Return the value of process 0."""
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


@contextmanager
def _silent() -> Iterator[None]:
    """Print nothing but warnings, and errors with the number of the process; the rest is the same as of process 0."""
    logger = logging.getLogger("dwp_pyro")
    logger.setLevel(max(logger.level, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except UserError as problem:
        print(f"Process {process_number()}: {problem}", file=sys.stderr)
        raise SystemExit(2) from problem
    except Interrupted as stop:
        raise SystemExit(128 + stop.signum) from stop


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turn the errors of a communication whose other side is gone into ProcessLost."""
    try:
        yield
    except RuntimeError as problem:
        if isinstance(problem, distributed.DistError) or "gloo" in str(problem).casefold():
            raise ProcessLost("another process of this run has ended") from problem
        raise


def average(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the means of scalars over the processes."""
    if process_count() == 1:
        return values
    device = next(iter(values.values())).device
    stacked = torch.stack([value.to(device) for value in values.values()])
    distributed.all_reduce(stacked)
    return dict(zip(values, stacked / process_count(), strict=True))


def any_signal(signum: int) -> int:
    """Return the highest of the signals that the processes have received, 0 for none, so that all stop at one step."""
    if process_count() == 1:
        return signum
    received = torch.tensor(signum)
    distributed.all_reduce(received, distributed.ReduceOp.MAX)
    return int(received)


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise a UserError of any process in all of them, at the end of the block, where they wait for each other."""
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    for each in gather({f"{process_number()}": problem}).values():
        if each is not None:
            raise each


def gather(values: dict[str, Any]) -> dict[str, Any]:
    """Return the union of the mappings of all processes."""
    if process_count() == 1:
        return values
    parts: list[Any] = [None] * process_count()
    distributed.all_gather_object(parts, values)
    return {key: value for part in parts for key, value in part.items()}
