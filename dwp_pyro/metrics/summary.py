"""Summaries of metrics over cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dwp_pyro.metrics.measures import MEASURES

__all__ = ["Summary", "patient_means", "show", "summarize_cases"]


@dataclass(frozen=True)
class Summary:
    """Mean of a metric over cases or patients, its standard error (NaN for a single one), and their number."""

    mean: float
    standard_error: float
    cases: int


def summarize_cases(cases: Iterable[Mapping[str, float]]) -> dict[str, Summary]:
    """Summarize each metric over the cases that have it."""
    rows = list(cases)
    summaries = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = np.array([row[name] for row in rows if name in row])
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
        summaries[name] = Summary(float(values.mean()), error, len(values))
    return summaries


def patient_means(cases: Mapping[str, Mapping[str, float]], patients: Mapping[str, str]) -> list[dict[str, float]]:
    """Return each patient's mean of each metric over its cases; visits of a patient are not independent."""
    visits: dict[str, list[Mapping[str, float]]] = {}
    for case, metrics in cases.items():
        visits.setdefault(patients[case], []).append(metrics)
    return [{name: each.mean for name, each in summarize_cases(rows).items()} for rows in visits.values()]


def show(measure: str, summary: Summary | None) -> str:
    """Format as mean ± standard error; a dash without cases; no decimals for metrics outside `MEASURES`."""
    if summary is None:
        return "-"
    _, digits = MEASURES.get(measure, ("", 0))
    error = f" ± {summary.standard_error:.{digits}f}" if summary.cases > 1 else ""
    return f"{summary.mean:.{digits}f}{error}"
