"""Output of commands: log records as text or JSON, results as tables."""

from __future__ import annotations

import json
import logging
import sys
import typing
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import click

from dwp_pyro.runtime.progress import show_bars

if typing.TYPE_CHECKING:
    from dwp_pyro.metrics import Summary
    from dwp_pyro.runtime.table import Table

__all__ = ["count_cases", "exit_with_error", "logger", "print_rows", "print_table", "print_tables", "set_up_logging"]

logger = logging.getLogger("dwp_pyro")


class _Console(logging.Handler):
    """Log handler: messages to standard output, the rest and all JSON to standard error."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def emit(self, record: logging.LogRecord) -> None:
        progress: dict[str, Any] | None = getattr(record, "progress", None)
        text = record.getMessage()
        if self.as_json:
            level = "message" if record.levelno == logging.INFO else record.levelname.lower()
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "event": "progress" if progress else level, **(progress or {"message": text})}
            click.echo(json.dumps(line), err=True)
        elif record.levelno > logging.INFO:
            click.echo(f"{record.levelname.capitalize()}: {text}", err=True)
        else:
            click.echo(text, err=progress is not None)


def set_up_logging(log_format: Literal["text", "json"], *, quiet: bool) -> None:
    """Print the package's log records as text or JSON; if `quiet`, only errors."""
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Console)]:
        logger.removeHandler(handler)
    logger.addHandler(_Console(log_format == "json"))
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    show_bars(log_format == "text")


def exit_with_error(problem: str, code: int) -> typing.NoReturn:
    """Log an error in one line and exit."""
    logger.error("%s", " ".join(problem.split()))
    sys.exit(code)


def count_cases(count: int) -> str:
    """Return "1 case", "2 cases", etc."""
    return f"{count} case{'s' if count != 1 else ''}"


def print_table(table: dict[str, dict[str, Summary]]) -> None:
    """Print the headline metrics by name of the run."""
    from dwp_pyro.metrics import HEADLINE, MEASURES, show

    rows = [[name, *(show(metric, summary.get(metric)) for metric in HEADLINE)] for name, summary in table.items()]
    print_rows(["", *(MEASURES[metric][0] for metric in HEADLINE)], rows)


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables and their notes, separated by empty lines."""
    for number, table in enumerate(tables):
        if number:
            click.echo()
        print_rows(table.header, table.rows)
        click.echo(table.note)


def print_rows(header: list[str], rows: list[list[str]]) -> None:
    """Print rows in aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
