"""The files of `evaluate`, from metrics that are known."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.evaluation.evaluate import _write
from dwp_pyro.metrics import case_metrics
from dwp_pyro.metrics.measures import CaseMetrics
from dwp_pyro.runtime.files import write_yaml

PATIENTS = {"v1": "p", "v2": "p", "q": "q"}
DICE = {"v1": 1.0, "v2": 0.0, "q": 1.0}


def metrics_of(dice: float) -> CaseMetrics:
    truth = np.zeros((4, 4, 4), bool)
    truth[1:3, 1:3, 1:3] = True
    segmented = truth if dice == 1 else np.roll(truth, 2, 0)
    entropy = np.full(truth.shape, 0.1, np.float32)
    return case_metrics(segmented * np.float32(0.9), segmented, entropy, truth, np.ones_like(truth), (1.0, 1.0, 1.0))


def test_visits_of_a_patient_are_averaged_before_the_summary(tmp_path: Path):
    """Patient p has a mean Dice of 0.5, q of 1; over the three scans the mean were 2/3."""
    write_yaml(tmp_path / "config.yaml", {})
    results = {case: {"whole": metrics_of(dice)} for case, dice in DICE.items()}
    summary = _write(tmp_path, PredictConfig(), dict.fromkeys(PATIENTS, "digest"), PATIENTS, results)["whole"]["dice"]
    assert (summary.mean, summary.standard_error, summary.cases) == (0.75, pytest.approx(0.25), 2)
    saved = json.loads((tmp_path / "evaluation.json").read_text())["regions"]["whole"]
    assert saved["summary"]["dice"]["mean"] == 0.75
    assert {case: metrics["dice"] for case, metrics in saved["cases"].items()} == DICE
    with open(tmp_path / "evaluation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"]: row["patient"] for row in rows} == PATIENTS
