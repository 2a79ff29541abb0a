"""Dice and HD95 of each method on the test patients that training with all annotations misses, and on the others.

$ python studies/gliomas/missed.py studies/gliomas/results/test.csv --data data/real/lgg

A patient is missed if `svi` at n = 28 has a mean Dice below 0.3 over its draws. The contrast of a tumor is the
probability that one of its voxels is brighter than one of the rest of the tissue (above a tenth of percentile 98).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median

import numpy as np
from scipy.stats import mannwhitneyu

from dwp_pyro.data.case import Case, read_case
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.runtime.table import Table, markdown
from dwp_pyro.study.comparison import Row
from dwp_pyro.study.runner import read_rows

_REFERENCE = ("svi", 28)
_LEAST_DICE = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    rows = read_rows(arguments.results)
    reference = [row for row in rows if (row.method, row.n) == _REFERENCE]
    cases = {row.case for row in reference}
    missed = {case for case in cases if _mean([row for row in reference if row.case == case], "dice") < _LEAST_DICE}
    data = open_dataset(arguments.data, "nnunet")
    tumors = {case: _volume_and_contrast(data.by_id[case], data.labels) for case in sorted(cases)}
    for case in sorted(missed):
        print("{}: {:.0f} ml, contrast {:.2f}".format(case, *tumors[case]))
    print(
        "the others: {:.0f} ml, contrast {:.2f} (medians)\n".format(
            *(median(tumors[case][number] for case in cases - missed) for number in range(2))
        )
    )
    lines = []
    for n, method in sorted({(row.n, row.method) for row in rows}):
        own = [row for row in rows if (row.method, row.n) == (method, n)]
        groups = [[row for row in own if (row.case in missed) == among] for among in (True, False)]
        cells = [f"{_mean(group, 'dice'):.3f} / {_mean(group, 'hd95'):.1f}" for group in groups]
        lines.append([str(n), method, *cells])
    titles = [f"{len(missed)} missed: Dice / HD95 (mm)", f"{len(cases) - len(missed)} others: Dice / HD95 (mm)"]
    print(markdown([Table(["n", "method", *titles], lines, "")]))


def _volume_and_contrast(case: Case, labels: Mapping[int, str]) -> tuple[float, float]:
    scan = read_case(case, ("flair",), labels)
    image, tumor = scan.images[0], np.asarray(scan.label) > 0
    tissue = ~tumor & (image > np.percentile(image, 98) / 10)
    larger = mannwhitneyu(image[tumor], image[tissue]).statistic / (tumor.sum() * tissue.sum())
    return tumor.sum() * np.prod(scan.spacing) / 1000, larger


def _mean(rows: Sequence[Row], measure: str) -> float:
    return mean(row.measures[measure] for row in rows)


if __name__ == "__main__":
    main()
