"""`evaluate`: predictions of the test cases against their labels."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dwp_pyro.config import PredictConfig, data_root
from dwp_pyro.data.case import read_case, read_volume
from dwp_pyro.data.layouts import LAYOUTS, find_cases
from dwp_pyro.errors import DataError, RunError
from dwp_pyro.inference.device import torch_device
from dwp_pyro.metrics import EMPTY_MASK_POLICY, Summary, case_metrics, summarise
from dwp_pyro.pipeline.predict import is_predicted, load_run, predict_cases
from dwp_pyro.progress import progress
from dwp_pyro.storage import read_json, read_yaml, write_bytes, write_json

__all__ = ["evaluate"]


def evaluate(run: Path, config: PredictConfig, *, root: str | None = None, device: str = "auto") -> dict[str, Summary]:
    """Measure a run on the test cases of its split, on each scan's own grid.

    Test cases that have no prediction with these settings in `run/predictions` are predicted first.
    Writes `evaluation.csv`, a line a case, and `evaluation.json`: cases, summary, the run's settings
    (prior, likelihood, β, n), and the policy on empty masks.

    Args:
        run: folder of a finished `svi` or `finetune` run.
        config: settings of the predictions.
        root: folder of the scans, if it has moved since the run.
        device: to compute on.

    Returns:
        Each measure's mean and standard error over the cases.

    Raises:
        UserError: if the run, its split or a scan is unfit.
    """
    trained = load_run(run)
    card = trained.posterior.card
    settings = read_yaml(run / "config.yaml")
    test = read_json(run / "split.json").get("test")
    dataset, saved_root = settings.get("dataset"), settings.get("root")
    if dataset not in LAYOUTS or not isinstance(saved_root, str):
        raise RunError(f"{run / 'config.yaml'}: does not say which scans were used; train it again")
    if not isinstance(test, list) or not all(isinstance(name, str) for name in test):
        raise RunError(f"{run / 'split.json'}: has no list of test cases; train it again")
    layout = LAYOUTS[dataset]
    folder = data_root(dataset, root or saved_root)
    cases = {case.id: case for case in find_cases(folder, layout)}
    for name in test:
        if name not in cases:
            raise DataError(f"{folder}: test case '{name}' is not among the scans; give the right --root")
        if cases[name].label is None:
            raise DataError(f"case {name}: has no label file, which evaluation needs; add it")
    if not test:
        raise RunError(f"{run / 'split.json'}: names no test cases; there is nothing to evaluate")
    out = run / "predictions"
    missing = [cases[name] for name in test if not is_predicted(out, cases[name], trained, config)]
    predict_cases(trained, missing, layout, config, out, torch_device(device))
    _, values = layout.region_values(card.region)
    rows: dict[str, dict[str, float]] = {}
    with progress("evaluating", len(test)) as advance:
        for name in test:
            scan = read_case(cases[name], card.modalities, layout.labels)
            assert scan.label is not None
            probability = read_volume(out / f"{name}_prob.nii.gz")
            rows[name] = case_metrics(
                probability.data, np.isin(scan.label, sorted(values)), scan.brain, probability.spacing
            )
            advance(f"Dice {rows[name]['dice']:.3f}")
    summary = summarise(rows.values())
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["case", *summary])
    writer.writerows([name, *row.values()] for name, row in rows.items())
    write_bytes(run / "evaluation.csv", table.getvalue().encode())
    write_json(
        run / "evaluation.json",
        {
            "region": card.region,
            "run": settings,
            "prediction": config.to_mapping(),
            "empty_masks": EMPTY_MASK_POLICY,
            "summary": {name: asdict(value) for name, value in summary.items()},
            "cases": rows,
        },
    )
    return summary
