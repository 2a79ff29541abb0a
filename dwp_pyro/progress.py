"""What a command says while it works, decided here alone: bars on a terminal, lines in a log, JSON, or nothing.

Results are not said but printed, on standard output, by the command line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

__all__ = ["Style", "errors_are_json", "fail", "message", "progress", "set_style"]

#: "text": for people. "json": an object a line on standard error, for a cluster's log. "quiet": errors alone.
Style = Literal["text", "json", "quiet"]

_LOG_INTERVAL = 10.0  # seconds between two lines in a log

_style: Style = "text"
_errors_as_json = False


def set_style(style: Style, *, errors_as_json: bool = False) -> None:
    """How this process speaks from now on.

    Args:
        style: of progress and messages.
        errors_as_json: errors are JSON too, whatever the style.
    """
    global _style, _errors_as_json
    _style, _errors_as_json = style, errors_as_json


def errors_are_json() -> bool:
    """Whether errors are said as JSON."""
    return _errors_as_json


def message(text: str) -> None:
    """Say a line about the work under way: on standard output, or as JSON on standard error."""
    if _style == "text":
        print(text, flush=True)
    elif _style == "json":
        _emit("message", message=text)


def fail(text: str) -> None:
    """Say what went wrong, on standard error."""
    if _errors_as_json:
        _emit("error", message=text)
    else:
        print(f"Error: {text}", file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Show the progress of `total` pieces of work on standard error, with the time that is left.

    Args:
        description: of the work, e.g. "svi dwp".
        total: pieces of work.
        done: pieces done by an earlier run.

    Yields:
        A function to call after each piece, with a short note such as "loss 1.2e4" (or "").
    """
    if _style == "quiet":
        yield lambda note: None
    elif _style == "text" and sys.stderr.isatty():
        with _bar(description, total, done) as advance:
            yield advance
    else:
        yield _lines(description, total, done)


@contextmanager
def _bar(description: str, total: int, done: int) -> Iterator[Callable[[str], None]]:
    # Here, so that --help and shell completion do not wait for it.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=done, note="")
        yield lambda note: bar.update(task, advance=1, note=note)


def _lines(description: str, total: int, done: int) -> Callable[[str], None]:
    """A line now and then, and one at the end."""
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
        if _style == "json":
            _emit("progress", what=description, done=done, total=total, seconds_left=round(left, 1), note=note)
        else:
            print(f"{description}: {done}/{total}, {left:.0f} s left  {note}".rstrip(), file=sys.stderr, flush=True)

    return advance


def _emit(event: str, **fields: Any) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(json.dumps({"time": now, "event": event, **fields}), file=sys.stderr, flush=True)
