"""Plot of the benchmark: Dice of the test patients against the number of annotated scans.

$ python studies/gliomas/learning_curve.py studies/gliomas/results/learning_curve.csv docs/learning-curve.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

from dwp_pyro.plots.style import COLORS, save_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    rows = list(csv.DictReader(arguments.table.read_text().splitlines()))
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    ax = figure.subplots()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for index, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        ax.errorbar(
            # Shift the methods: error bars at the same place hide each other.
            [float(row["n"]) + 0.2 * index for row in own],
            [float(row["dice"]) for row in own],
            [float(row["standard_error"] or "nan") for row in own],
            label=method,
            color=(*COLORS, "#7f7f7f")[index],
            marker="osD^vPX*"[index],
            capsize=3,
        )
    ax.set_xticks(sorted({int(row["n"]) for row in rows}))
    ax.set(xlabel="annotated scans for training", ylabel="Dice of 44 test patients")
    ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_figure(arguments.out, figure)


if __name__ == "__main__":
    main()
