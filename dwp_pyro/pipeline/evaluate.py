"""`evaluate`: predictions of the test cases against their labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dwp_pyro.config import PredictConfig, data_root
from dwp_pyro.data.case import Case, Layout, Scan, read_case, read_volume
from dwp_pyro.data.layouts import LAYOUTS, find_cases
from dwp_pyro.errors import DataError, RunError
from dwp_pyro.inference.device import torch_device
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.metrics import EMPTY_MASK_POLICY, Summary, case_metrics, summarise
from dwp_pyro.pipeline.predict import is_predicted, load_run, predict_case, predict_cases
from dwp_pyro.progress import progress
from dwp_pyro.storage import read_json, read_yaml, write_bytes, write_json

__all__ = ["evaluate", "find_test_cases", "measure"]


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
    cases, layout = find_test_cases(run, root)
    out = run / "predictions"
    missing = [case for case in cases if not is_predicted(out, case, trained, config)]
    predict_cases(trained, missing, layout, config, out, torch_device(device))
    rows: dict[str, dict[str, float]] = {}
    with progress("evaluating", len(cases)) as advance:
        for case in cases:
            scan = read_case(case, card.modalities, layout.labels)
            rows[case.id] = _figures(read_volume(out / f"{case.id}_prob.nii.gz").data, scan, layout, card.region)
            advance(f"Dice {rows[case.id]['dice']:.3f}")
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


def find_test_cases(run: Path, root: str | None) -> tuple[list[Case], Layout]:
    """The test cases of a run's split, and their layout.

    Args:
        run: folder of the run.
        root: folder of the scans, if it has moved since the run.

    Raises:
        UserError: if the run does not name its scans, there are no test cases, or one is missing or has no label.
    """
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
    return [cases[name] for name in test], layout


def measure(
    posterior: Posterior, cases: Sequence[Case], layout: Layout, config: PredictConfig, device: torch.device
) -> dict[str, dict[str, float]]:
    """The figures that `evaluate` gives, of cases predicted in memory; nothing is written.

    Args:
        posterior: on the device.
        cases: with labels.
        layout: of their files.
        config: settings of the predictions.
        device: to compute on.

    Returns:
        Case → measure → value.

    Raises:
        DataError: if a scan is unfit.
        RunError: if the device's memory is too small.
    """
    rows = {}
    for case in cases:
        prediction = predict_case(posterior, case, layout, config, device)
        rows[case.id] = _figures(prediction.probability, prediction.scan, layout, posterior.card.region)
    return rows


def _figures(probability: NDArray[np.float32], scan: Scan, layout: Layout, region: str) -> dict[str, float]:
    assert scan.label is not None
    _, values = layout.region_values(region)
    return case_metrics(probability, np.isin(scan.label, sorted(values)), scan.brain, scan.spacing)
