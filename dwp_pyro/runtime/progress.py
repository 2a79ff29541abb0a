"""Progress reports: log records, or a bar on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["each", "progress", "show_bars"]

_LOG_INTERVAL = 10.0  # seconds between two records

_logger = logging.getLogger(__name__)
_bars = False

_ItemT = TypeVar("_ItemT")


def show_bars(show: bool) -> None:
    """Show bars instead of log records if standard error is a terminal."""
    global _bars
    _bars = show


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Report progress over `total` items, with the remaining time.

    Log records have level INFO and an attribute `progress`: a dictionary of what, done, total, seconds_left and note.

    Args:
        description: Name of the work, e.g. "svi dwp".
        total: Number of items.
        done: Number of items that an earlier run completed.

    Yields:
        Function to call after each item, with a short note such as "loss 1.2e4" (or "").
    """
    if not _logger.isEnabledFor(logging.INFO):
        yield lambda note: None
    elif _bars and sys.stderr.isatty():
        with _bar(description, total, done) as advance:
            yield advance
    else:
        yield _records(description, total, done)


def each(items: Collection[_ItemT], description: str) -> Iterator[_ItemT]:
    """Yield items, and report the progress over them.

    For `for` statements: in a comprehension, Python 3.11 would keep the bar after an exception.
    """
    with progress(description, len(items)) as advance:
        for item in items:
            yield item
            advance("")


@contextmanager
def _bar(description: str, total: int, done: int) -> Iterator[Callable[[str], None]]:
    # Imported late, to keep --help and shell completion fast.
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    items = TextColumn("{task.completed}/{task.total}  {task.fields[note]}")
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), items, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=done, note="")
        yield lambda note: bar.update(task, advance=1, note=note)


def _records(description: str, total: int, done: int) -> Callable[[str], None]:
    """Return a function that logs one record per interval and one at the end."""
    start = last = time.monotonic()
    first = done

    def advance(note: str) -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if done < total and now - last < _LOG_INTERVAL:
            return
        last = now
        left = (now - start) / (done - first) * (total - done)
        fields = {"what": description, "done": done, "total": total, "seconds_left": round(left, 1), "note": note}
        text = f"{description}: {done}/{total}, {left:.0f} s left  {note}".rstrip()
        _logger.info("%s", text, extra={"progress": fields})

    return advance
