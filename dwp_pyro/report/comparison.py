"""Arms side by side: means over seeds, and paired differences with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dwp_pyro.metrics import EMPTY_MASK_POLICY, HEADLINE, MEASURES, Summary, show, summarise

__all__ = [
    "COMPARED",
    "Interval",
    "Row",
    "Table",
    "bootstrap_interval",
    "bootstrap_means",
    "compare",
    "markdown",
    "paired_difference",
    "summarise_arms",
]

#: Measures whose differences are shown; every row has them.
COMPARED = ("dice", "nll", "ece")
_DRAWS = 10_000
_BLOCK = 1_000  # draws at once

_MEANS_NOTE = (
    "Mean ± standard error over seeds, of the means over cases. Behind the best: mean Dice by which the best arm of "
    "each seed's split is ahead, and its 95 % bootstrap interval; the best is chosen on these very cases, so "
    f"equal arms lie behind too. Empty masks: {EMPTY_MASK_POLICY}."
)
_DIFFERENCES_NOTE = (
    "Mean difference over the seeds and cases that both arms have, and its 95 % bootstrap interval. The intervals "
    "resample seeds and cases, both arms alike (of one seed, the cases alone); they speak of these cases only."
)


@dataclass(frozen=True)
class Row:
    """What one case measured under one training.

    Args:
        arm: its name.
        n: training cases.
        seed: of the training.
        case: id of the case.
        measures: those of `MEASURES` that were measured; a row that is older than a measure lacks it.
        seconds: that the training took.
        settings: digest of all that the row depends on.
    """

    arm: str
    n: int
    seed: int
    case: str
    measures: Mapping[str, float]
    seconds: float
    settings: str


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """Text in rows and columns, and what to know about it."""

    header: list[str]
    rows: list[list[str]]
    note: str


def summarise_arms(rows: Iterable[Row]) -> dict[int, dict[str, dict[str, Summary]]]:
    """n → arm → measure → summary over seeds, of the means over cases; "seconds" beside the measures.

    Each n has its arms by mean Dice, the best first.
    """
    seeds: dict[int, dict[str, dict[int, list[Row]]]] = {}
    for row in rows:
        seeds.setdefault(row.n, {}).setdefault(row.arm, {}).setdefault(row.seed, []).append(row)
    table = {}
    for n, arms in sorted(seeds.items()):
        summaries = {arm: summarise(_means(cases) for cases in of_seed.values()) for arm, of_seed in arms.items()}
        table[n] = dict(sorted(summaries.items(), key=lambda item: -item[1]["dice"].mean))
    return table


def _means(rows: Iterable[Row]) -> dict[str, float]:
    return {name: s.mean for name, s in summarise({**row.measures, "seconds": row.seconds} for row in rows).items()}


def bootstrap_means(values: NDArray[np.float64], draws: int, seed: int = 0) -> NDArray[np.float64]:
    """Means of a table under resampling of its rows and of its columns, each with replacement (Owen 2007).

    Args:
        values: [seeds, cases]; NaN where a case is not measured with a seed.
        draws: number of resamples.
        seed: of the resamples.

    Returns:
        [draws] means over the values drawn; fewer, where a draw of a table with gaps holds none.
    """
    rng = np.random.default_rng(seed)
    present = ~np.isnan(values)
    filled, measured = np.where(present, values, 0), present.astype(np.float64)
    means = []
    for seeds, cases in zip(*(_resamples(rng, size, draws) for size in values.shape), strict=True):
        counts = ((seeds @ measured) * cases).sum(1)
        drawn = counts > 0
        means.append(((seeds @ filled) * cases).sum(1)[drawn] / counts[drawn])
    return np.concatenate(means)


def _resamples(rng: np.random.Generator, size: int, draws: int) -> list[NDArray[np.unsignedinteger[Any]]]:
    """How often each of `size` things is drawn, [draws, size] in blocks, in few bytes: doubles would take most of the
    memory of a study with many seeds."""
    blocks = [len(block) for block in np.array_split(np.arange(draws), math.ceil(draws / _BLOCK))]
    small = np.min_scalar_type(size)
    return [rng.multinomial(size, np.full(size, 1 / size), block).astype(small) for block in blocks]


def bootstrap_interval(values: NDArray[np.float64]) -> Interval:
    """The mean of a table [seeds, cases], NaN where it has gaps, and the percentiles of its `bootstrap_means`."""
    low, high = np.percentile(bootstrap_means(values, _DRAWS), [2.5, 97.5])
    return Interval(float(np.nanmean(values)), float(low), float(high))


def paired_difference(reference: Mapping[tuple[int, str], float], arm: Mapping[tuple[int, str], float]) -> Interval:
    """Reference − arm over the pairs (seed, case) that both have, of which there must be one.

    The interval is that of `bootstrap_means`, a draw of seeds and cases being the same for both arms.
    """
    pairs = [pair for pair in reference if pair in arm]
    seeds, cases = sorted({seed for seed, _ in pairs}), sorted({case for _, case in pairs})
    differences = np.full((len(seeds), len(cases)), np.nan)
    for seed, case in pairs:
        differences[seeds.index(seed), cases.index(case)] = reference[seed, case] - arm[seed, case]
    return bootstrap_interval(differences)


def compare(rows: Iterable[Row], reference: str | None) -> list[Table]:
    """The arms' means at each n, and the differences of a reference from the others, if there are any.

    Args:
        rows: of all arms.
        reference: an arm; None for the one of the highest mean Dice at each n.
    """
    rows = list(rows)
    summaries = summarise_arms(rows)
    means = []
    for n, arms in summaries.items():
        leaders = _best_of_each_split(row for row in rows if row.n == n)
        for arm, summary in arms.items():
            measured = _pairs((row for row in rows if (row.n, row.arm) == (n, arm)), "dice")
            figures = [show(name, summary.get(name)) for name in (*HEADLINE, "seconds")]
            common = leaders.keys() & measured.keys()  # arms may have other cases
            behind = _show_interval(paired_difference(leaders, measured), "dice") if common else "-"
            means.append([f"{n}", arm, f"{summary['dice'].cases}", *figures, behind])
    titles = [MEASURES[name][0] for name in HEADLINE]
    tables = [Table(["n", "arm", "seeds", *titles, "seconds", "behind the best"], means, _MEANS_NOTE)]
    differences = []
    for n, arms in summaries.items():
        chosen = next(iter(arms)) if reference is None else reference
        others = {arm: [row for row in rows if (row.n, row.arm) == (n, arm)] for arm in arms}
        own = others.pop(chosen, [])
        for arm, theirs in others.items():
            seeds = {seed for seed, _ in _pairs(own, "dice").keys() & _pairs(theirs, "dice").keys()}
            if seeds:
                shown = (_difference(own, theirs, name) for name in COMPARED)
                differences.append([f"{n}", f"{chosen} − {arm}", f"{len(seeds)}", *shown])
    if differences:
        header = ["n", "difference", "seeds", *(MEASURES[name][0] for name in COMPARED)]
        tables.append(Table(header, differences, _DIFFERENCES_NOTE))
    return tables


def markdown(tables: Iterable[Table]) -> str:
    """The tables, one below the other."""
    parts = []
    for table in tables:
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        parts += ["\n".join(f"| {' | '.join(line)} |" for line in escaped), table.note]
    return "\n\n".join(parts) + "\n"


def _difference(reference: Iterable[Row], arm: Iterable[Row], name: str) -> str:
    return _show_interval(paired_difference(_pairs(reference, name), _pairs(arm, name)), name)


def _show_interval(interval: Interval, name: str) -> str:
    _, digits = MEASURES[name]
    mean, low, high = (f"{x:+.{digits}f}" for x in interval)
    return f"{mean} [{low}, {high}]"


def _best_of_each_split(rows: Iterable[Row]) -> dict[tuple[int, str], float]:
    """Of one n: (seed, case) → Dice of the arm with the highest mean Dice over the seed's cases."""
    means: dict[int, dict[str, list[Row]]] = {}
    for row in rows:
        means.setdefault(row.seed, {}).setdefault(row.arm, []).append(row)
    best: dict[tuple[int, str], float] = {}
    for arms in means.values():
        best |= _pairs(max(arms.values(), key=lambda cases: _means(cases)["dice"]), "dice")
    return best


def _pairs(rows: Iterable[Row], name: str) -> dict[tuple[int, str], float]:
    return {(row.seed, row.case): row.measures[name] for row in rows}
