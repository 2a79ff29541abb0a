"""Tables of several `results.csv`: all cases, those of the sites in training, and those of the site that is not.

$ python studies/gliomas/table.py runs/gliomas/results.csv runs/nnunet.csv --reference "svi" --plot curves.png

The plot has the methods that were measured at several n.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dwp_pyro.plots.curves import save_learning_curves
from dwp_pyro.runtime.table import markdown
from dwp_pyro.study.comparison import compare, summarize_methods
from dwp_pyro.study.runner import read_rows

_UNSEEN = "TCGA_HT_"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--reference")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    rows = [row for path in arguments.results for row in read_rows(path)]
    unseen = [row for row in rows if row.case.startswith(_UNSEEN)]
    groups = {"All cases": rows}
    if unseen:
        groups |= {
            "Sites in training": [row for row in rows if not row.case.startswith(_UNSEEN)],
            "Another site (HT)": unseen,
        }
    if arguments.plot:
        measured = {(row.method, row.n) for row in rows}
        curves = {method for method, n in measured if any(method == other and n != m for other, m in measured)}
        save_learning_curves(arguments.plot, summarize_methods(row for row in rows if row.method in curves))
    for title, listed in groups.items():
        print(f"# {title}\n\n{markdown(compare(listed, arguments.reference))}")


if __name__ == "__main__":
    main()
