"""Shared parts of the benchmarks: interleaved timing of several sides, and the table of their ratios."""

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
    """Ratio and its target.

    Args:
        what: Measured quantity.
        against: Reference.
        target: Largest ratio allowed, or the smallest if `at_least`.
        value: Ratio.
        low: Lower quartile over the rounds.
        high: Upper quartile over the rounds.
        note: Additional values as text.
        at_least: Whether larger is better.
    """

    what: str
    against: str
    target: float
    value: float
    low: float
    high: float
    note: str = ""
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target


def chosen(**numbers: int) -> argparse.Namespace:
    """Parse the command line: `device`, "cpu" by default, and integer options with these defaults.

    Prints the name of a GPU, which belongs to the measurement.
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
    """Return the seconds of each side over `rounds` interleaved rounds.

    Warm-up rounds are not counted: one, or two on a GPU, where the second may be captured as a graph. Every other round
    is in reverse order, so that no side always runs after the same other one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    warmup = 2 if device is not None and device.type == "cuda" else 1
    for number in range(rounds + warmup):
        for name in names if number % 2 else reversed(names):
            start = time.perf_counter()
            sides[name]()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of the medians, and the quartiles of the ratios per round."""
    each = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, _, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return statistics.median(numerator) / statistics.median(denominator), low, high


def print_rows(rows: Iterable[Row]) -> bool:
    """Print the table, each row when it is done; return whether every row holds."""
    good = True
    print("| what | compared with | target | measured | quartiles | | |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for row in rows:
        good = good and row.holds
        target = f"{'≥' if row.at_least else '≤'} {row.target:g}"
        verdict = "holds" if row.holds else "**missed**"
        spread = f"{row.low:.2f} to {row.high:.2f}"
        print(
            f"| {row.what} | {row.against} | {target} | {row.value:.2f} | {spread} | {verdict} | {row.note} |",
            flush=True,
        )
    return good


def report(rows: Iterable[Row]) -> None:
    """Print the table of a benchmark; exit with code 1 if a row misses its target."""
    sys.exit(not print_rows(rows))
