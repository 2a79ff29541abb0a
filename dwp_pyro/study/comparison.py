"""Comparison of methods: means, and paired differences with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dwp_pyro.metrics import EMPTY_MASK_POLICY, HEADLINE, MEASURES, Summary, show, summarize_cases
from dwp_pyro.metrics.bootstrap import Interval, bootstrap_interval
from dwp_pyro.runtime.table import Table

__all__ = ["COMPARED", "Row", "compare", "paired_difference", "summarize_methods"]

#: Metrics whose differences are shown; every row has them.
COMPARED = ("dice", "nll", "ece")

_MEANS_NOTE = (
    "Mean ± standard error over seeds of the means over patients. Gap to best: mean Dice of the best method of each "
    "seed minus that of the method, with its 95 % bootstrap interval; the best is selected on the same patients, so "
    f"equal methods have a gap, too. Empty masks: {EMPTY_MASK_POLICY}."
)

_DIFFERENCES_NOTE = (
    "Mean difference over the seeds and patients that both methods have, with its 95 % bootstrap interval. Intervals "
    "resample seeds and patients, jointly for both methods (patients alone if there is one seed); they hold for "
    "these patients only."
)


@dataclass(frozen=True)
class Row:
    """Metrics of one case in one run.

    Args:
        method: Name of the method.
        n: Number of training cases.
        seed: Seed of the run.
        case: Id of the case.
        measures: Values of `MEASURES`; rows of an older version may lack some.
        seconds: Duration of the training.
        settings: Digest of everything that the row depends on.
        patient: Patient of the case, or its id.
    """

    method: str
    n: int
    seed: int
    case: str
    measures: Mapping[str, float]
    seconds: float
    settings: str
    patient: str


def summarize_methods(rows: Iterable[Row]) -> dict[int, dict[str, dict[str, Summary]]]:
    """Return n → method → metric → summary over seeds of the means over patients; "seconds" is among the metrics.

    The methods of each n are in descending order of mean Dice.
    """
    seeds: dict[int, dict[str, dict[int, list[Row]]]] = {}
    for row in _patient_means(rows):
        seeds.setdefault(row.n, {}).setdefault(row.method, {}).setdefault(row.seed, []).append(row)
    table = {}
    for n, methods in sorted(seeds.items()):
        summaries = {
            method: summarize_cases(_means(cases) for cases in of_seed.values()) for method, of_seed in methods.items()
        }
        table[n] = dict(sorted(summaries.items(), key=lambda item: -item[1]["dice"].mean))
    return table


def _patient_means(rows: Iterable[Row]) -> list[Row]:
    """Return one row per run and patient, the mean over its cases: visits of a patient are not independent."""
    cases: dict[tuple[str, int, int, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row.method, row.n, row.seed, row.patient), []).append(row)
    return [
        replace(visits[0], case=visits[0].patient, measures=_mean_measures(visit.measures for visit in visits))
        for visits in cases.values()
    ]


def _means(rows: Iterable[Row]) -> dict[str, float]:
    return _mean_measures({**row.measures, "seconds": row.seconds} for row in rows)


def _mean_measures(measures: Iterable[Mapping[str, float]]) -> dict[str, float]:
    return {name: summary.mean for name, summary in summarize_cases(measures).items()}


def paired_difference(reference: Mapping[tuple[int, str], float], method: Mapping[tuple[int, str], float]) -> Interval:
    """Return reference − method over the pairs (seed, case) that both have; there must be at least one.

    The interval is that of `bootstrap_means`; each resample is the same for both methods.
    """
    pairs = [pair for pair in reference if pair in method]
    seeds, cases = sorted({seed for seed, _ in pairs}), sorted({case for _, case in pairs})
    differences = np.full((len(seeds), len(cases)), np.nan)
    for seed, case in pairs:
        differences[seeds.index(seed), cases.index(case)] = reference[seed, case] - method[seed, case]
    return bootstrap_interval(differences)


def compare(rows: Iterable[Row], reference: str | None) -> list[Table]:
    """Return a table of means per n and method, and one of differences between a reference and other methods, if any.

    The reference is by default (None) the method with the highest mean Dice at each n, over the seeds of all methods.
    """
    rows = _patient_means(rows)
    summaries = summarize_methods(rows)
    means, differences = [], []
    for n, methods in summaries.items():
        of_method = {method: [row for row in rows if (row.n, row.method) == (n, method)] for method in methods}
        leaders = _best_of_each_split(of_method)
        for method, summary in methods.items():
            measured = _pairs(of_method[method], "dice")
            metrics = [show(name, summary.get(name)) for name in (*HEADLINE, "seconds")]
            common = leaders.keys() & measured.keys()  # methods may have different cases
            gap = _difference(leaders, measured, "dice") if common else "-"
            means.append([f"{n}", method, f"{summary['dice'].cases}", *metrics, gap])
        chosen = _best(of_method) if reference is None else reference
        own = of_method.pop(chosen, [])
        for method, theirs in of_method.items():
            seeds = {seed for seed, _ in _pairs(own, "dice").keys() & _pairs(theirs, "dice").keys()}
            if seeds:
                shown = (_difference(_pairs(own, name), _pairs(theirs, name), name) for name in COMPARED)
                differences.append([f"{n}", f"{chosen} − {method}", f"{len(seeds)}", *shown])
    titles = [MEASURES[name][0] for name in HEADLINE]
    tables = [Table(["n", "method", "seeds", *titles, "seconds", "gap to best"], means, _MEANS_NOTE)]
    if differences:
        header = ["n", "difference", "seeds", *(MEASURES[name][0] for name in COMPARED)]
        tables.append(Table(header, differences, _DIFFERENCES_NOTE))
    return tables


def _best(rows: Mapping[str, Sequence[Row]]) -> str:
    """Return the method with the highest mean Dice over the seeds that all have, or without any over its own seeds."""
    shared = set.intersection(*({row.seed for row in of_method} for of_method in rows.values()))

    def dice(method: str) -> float:
        return _means(row for row in rows[method] if row.seed in shared or not shared)["dice"]

    return max(rows, key=dice)


def _difference(reference: Mapping[tuple[int, str], float], method: Mapping[tuple[int, str], float], name: str) -> str:
    """Format the paired difference of a metric, and its interval."""
    _, digits = MEASURES[name]
    mean, low, high = (f"{x:+.{digits}f}" for x in paired_difference(reference, method))
    return f"{mean} [{low}, {high}]"


def _best_of_each_split(rows: Mapping[str, Sequence[Row]]) -> dict[tuple[int, str], float]:
    """Return (seed, case) → Dice of the method with the highest mean Dice over the cases of the seed, for one n."""
    best: dict[tuple[int, str], float] = {}
    for seed in {row.seed for of_method in rows.values() for row in of_method}:
        of_seed = [[row for row in of_method if row.seed == seed] for of_method in rows.values()]
        best |= _pairs(max(filter(None, of_seed), key=lambda cases: _means(cases)["dice"]), "dice")
    return best


def _pairs(rows: Iterable[Row], name: str) -> dict[tuple[int, str], float]:
    return {(row.seed, row.case): row.measures[name] for row in rows}
