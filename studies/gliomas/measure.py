"""Metrics of another program's predictions, in the columns of `results.csv` of `dwp-pyro experiment`.

$ python studies/gliomas/measure.py DATA runs/nnunet-2d-0 --method "nnU-Net 2D" --n 5 --seed 0 >> runs/nnunet.csv

The folder holds `<case>_prob.nii.gz`, `<case>_seg.nii.gz` and `nnunet.json`, as from `nnunet.py`. `--header` writes the
names of the columns first. `seconds` is training alone; for `dwp-pyro` it includes reading and choosing the decision.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

from scipy.special import entr

from dwp_pyro.data.case import read_case, read_volume
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.metrics.measures import MEASURES, case_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("predictions", type=Path)
    parser.add_argument("--method", required=True)
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--header", action="store_true")
    arguments = parser.parse_args()
    cases = open_dataset(arguments.data, "nnunet")
    seconds = 60 * json.loads((arguments.predictions / "nnunet.json").read_text())["minutes"]
    columns = ("method", "n", "seed", "case", *MEASURES, "seconds", "settings")
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    if arguments.header:
        writer.writeheader()
    for path in sorted(arguments.predictions.glob("*_prob.nii.gz")):
        name = path.name.removesuffix("_prob.nii.gz")
        scan = read_case(cases.by_id[name], ("flair",), cases.labels)
        probability = read_volume(path).data.clip(0, 1)
        segmented = read_volume(path.with_name(f"{name}_seg.nii.gz")).data > 0
        entropy = entr(probability) + entr(1 - probability)
        measured = case_metrics(probability, segmented, entropy, scan.label > 0, scan.counted, scan.spacing)
        row = {"method": arguments.method, "n": arguments.n, "seed": arguments.seed, "case": name}
        writer.writerow({**row, **measured.measures, "seconds": f"{seconds:.1f}", "settings": "nnunet"})


if __name__ == "__main__":
    main()
