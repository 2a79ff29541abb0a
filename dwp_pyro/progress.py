"""Progress of everything long: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["note", "progress", "silence"]

_LOG_INTERVAL = 10.0  # seconds between two lines in a log

_silent = False


def silence() -> None:
    """Show no progress of this process any more: of a worker, whose parent shows its own."""
    global _silent
    _silent = True


def note(line: str) -> None:
    """Print a line on standard error, unless this process is silent."""
    if not _silent:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Show the progress of `total` pieces of work on standard error.

    Args:
        description: of the work, e.g. "svi dwp".
        total: pieces of work.
        done: pieces done by an earlier run.

    Yields:
        A function to call after each piece, with a short note such as "loss 1.2e4" (or "").
    """
    if _silent:
        yield lambda note: None
        return
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(description, total=total, completed=done, note="")
            yield lambda note: bar.update(task, advance=1, note=note)
        return

    start = last = time.monotonic()
    first = done

    def advance(note: str) -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if done == total or now - last >= _LOG_INTERVAL:
            last = now
            left = (now - start) / (done - first) * (total - done)
            print(f"{description}: {done}/{total}, {left:.0f} s left  {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance
