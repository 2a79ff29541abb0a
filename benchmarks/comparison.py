"""What every benchmark shares: two sides timed in turns, and the table of their ratios."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Row", "chosen", "print_rows", "ratio", "report", "time_in_turns"]


@dataclass(frozen=True)
class Row:
    """A ratio and its target.

    Args:
        what: that is measured.
        against: what it is compared with.
        target: the most that the ratio may be, or the least if `at_least`.
        figure: the ratio.
        low: its spread: the quartiles over the rounds.
        high: the other quartile.
        note: more figures, for people.
        at_least: whether more is better.
    """

    what: str
    against: str
    target: float
    figure: float
    low: float
    high: float
    note: str = ""
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.figure >= self.target if self.at_least else self.figure <= self.target


def chosen(**numbers: int) -> argparse.Namespace:
    """The command line: `device`, "cpu" where it says nothing, and these numbers where it names no others.

    A GPU is named in the output, for it is what was measured.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    if arguments.device.type == "cuda":
        print(f"{torch.cuda.get_device_name(arguments.device)}\n")
    return arguments


def time_in_turns(
    sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds of each side, `rounds` times in turns, after a call of each that does not count (on a GPU two: the second
    may be recorded).

    Every second round goes backwards: no side always finds the caches as a certain other left them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    uncounted = 2 if device is not None and device.type == "cuda" else 1
    for number in range(rounds + uncounted):
        for name in names if number % 2 else reversed(names):
            start = time.perf_counter()
            sides[name]()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= uncounted:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float]:
    """Ratio of the medians, and the quartiles of the ratios of each round."""
    each = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, _, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return statistics.median(numerator) / statistics.median(denominator), low, high


def print_rows(rows: Iterable[Row]) -> bool:
    """Print the table, a line as each row is done; returns whether every row holds."""
    good = True
    print("| what | compared with | target | measured | quartiles | | |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for row in rows:
        good = good and row.holds
        target = f"{'≥' if row.at_least else '≤'} {row.target:g}"
        verdict = "holds" if row.holds else "**missed**"
        spread = f"{row.low:.2f} to {row.high:.2f}"
        print(
            f"| {row.what} | {row.against} | {target} | {row.figure:.2f} | {spread} | {verdict} | {row.note} |",
            flush=True,
        )
    return good


def report(rows: Iterable[Row]) -> None:
    """Print the table of one benchmark; exit 1 if a row misses its target."""
    sys.exit(not print_rows(rows))
