"""Tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Table", "markdown"]


@dataclass(frozen=True)
class Table:
    """Table of text, with a note below it."""

    header: list[str]
    rows: list[list[str]]
    note: str


def markdown(tables: Iterable[Table]) -> str:
    """Format tables as Markdown, one below the other."""
    parts = []
    for table in tables:
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        parts += ["\n".join(f"| {' | '.join(line)} |" for line in escaped), table.note]
    return "\n\n".join(parts) + "\n"
