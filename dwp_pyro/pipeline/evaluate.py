"""`evaluate`: predictions of the test cases against their labels."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dwp_pyro.config import PredictConfig
from dwp_pyro.data.case import Scan
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.data.layouts import LAYOUTS, open_dataset
from dwp_pyro.data.regions import parse_label_map
from dwp_pyro.data.split import read_roles
from dwp_pyro.errors import ConfigError, DataError, RunError
from dwp_pyro.inference.device import torch_device
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.metrics import EMPTY_MASK_POLICY, MEASURES, CaseMetrics, Summary, case_metrics, summarise
from dwp_pyro.metrics.uncertainty import RiskCoverage, risk_coverage
from dwp_pyro.pipeline.predict import (
    load_run,
    not_predicted,
    predict_case,
    predict_cases,
    read_figures,
    read_maps,
    read_scan,
)
from dwp_pyro.progress import progress
from dwp_pyro.report.figures import save_reliability, save_risk_coverage
from dwp_pyro.storage import read_yaml, write_bytes, write_json

__all__ = ["evaluate", "find_test_cases", "measure"]


def evaluate(
    run: Path, config: PredictConfig, *, root: str | None = None, device: str = "auto"
) -> dict[str, dict[str, Summary]]:
    """Measure a run on the test cases of its split, on each scan's own grid.

    Test cases that have no prediction with these settings in `run/predictions` are predicted first.
    Writes `evaluation.csv`, a line a case and region; `evaluation.json`: of each region cases, summary and curves;
    the run's settings (prior, likelihood, β, n), and the policy on empty masks; and the curves as `reliability.png`
    and `risk_coverage.png`, of several regions `reliability_core.png`.

    Args:
        run: folder of a finished `svi` or `finetune` run.
        config: settings of the predictions.
        root: folder of the scans, if it has moved since the run.
        device: to compute on.

    Returns:
        Of each region each measure's mean and standard error over the cases.

    Raises:
        UserError: if the run, its split or a scan is unfit.
    """
    trained = load_run(run)
    card = trained.posterior.card
    settings = read_yaml(run / "config.yaml")
    data = find_test_cases(run, root)
    out = run / "predictions"
    missing = not_predicted(out, data.cases, trained, config)
    predict_cases(trained, missing, data, config, out, torch_device(device))
    measured: dict[str, dict[str, CaseMetrics]] = {region: {} for region in card.regions}
    entropies: dict[str, list[float]] = {region: [] for region in card.regions}
    with progress("evaluating", len(data.cases)) as advance:
        for case in data.cases:
            scan = read_scan(case, card, data)
            predicted = read_figures(out, case.id, card)
            probabilities, entropy_maps = (read_maps(out, case.id, kind, card) for kind in ("prob", "entropy"))
            maps = zip(card.regions, probabilities, card.masks(probabilities), entropy_maps, strict=True)
            for region, probability, mask, entropy in maps:
                agreement = predicted[region]["pairwise_dice"]
                agreement = math.nan if agreement is None else agreement
                measured[region][case.id] = _measure(probability, mask, entropy, agreement, scan, data, region)
                entropies[region].append(float(entropy[scan.counted].mean()))
            advance(", ".join(f"Dice {of_region[case.id].measures['dice']:.3f}" for of_region in measured.values()))
    rows = {region: {name: each.measures for name, each in of.items()} for region, of in measured.items()}
    summary = {region: summarise(of_region.values()) for region, of_region in rows.items()}
    table = io.StringIO()
    writer = csv.DictWriter(table, ["case", "region", *MEASURES], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {"case": case.id, "region": region, **rows[region][case.id]} for case in data.cases for region in rows
    )
    write_bytes(run / "evaluation.csv", table.getvalue().encode())
    curves = {
        region: _curves(run, "" if len(measured) == 1 else f"_{region}", list(of_region.values()), entropies[region])
        for region, of_region in measured.items()
    }
    write_json(
        run / "evaluation.json",
        {
            "run": settings,
            "prediction": config.to_mapping(),
            "empty_masks": EMPTY_MASK_POLICY,
            "regions": {
                region: {
                    "summary": {name: asdict(value) for name, value in summary[region].items()},
                    "cases": rows[region],
                    "curves": curves[region],
                }
                for region in card.regions
            },
        },
    )
    return summary


def find_test_cases(run: Path, root: str | None) -> DataSet:
    """The test cases of a run's split.

    Args:
        run: folder of the run.
        root: folder of the scans, if it has moved since the run.

    Raises:
        UserError: if the run does not name its scans, there are no test cases, or one is missing or has no label.
    """
    settings = read_yaml(run / "config.yaml")
    test = read_roles(run / "split.json", RunError).get("test")
    dataset, saved_root, label_map = settings.get("dataset"), settings.get("root"), settings.get("label_map") or []
    if dataset not in LAYOUTS or not isinstance(saved_root, str) or not isinstance(label_map, list):
        raise RunError(f"{run / 'config.yaml'}: does not say which scans were used; train it again")
    if not test:
        raise RunError(f"{run / 'split.json'}: names no test cases; there is nothing to evaluate")
    folder = Path(root or saved_root)
    try:
        labels = parse_label_map(map(str, label_map))
    except ConfigError as problem:
        raise RunError(f"{run / 'config.yaml'}: {problem}") from problem
    data = open_dataset(folder, dataset, labels)
    cases = data.by_id
    for name in test:
        if name not in cases:
            raise DataError(
                f"{folder}: has no case '{name}', which {run / 'split.json'} names for the test; give the right --root"
            )
        if cases[name].label is None:
            raise DataError(f"case {name}: has no label file, which evaluation needs; add it")
    return replace(data, cases=tuple(cases[name] for name in test))


def measure(
    posterior: Posterior, data: DataSet, config: PredictConfig, device: torch.device
) -> dict[str, dict[str, float]]:
    """The figures that `evaluate` gives, of cases predicted in memory; nothing is written.

    Args:
        posterior: is moved to the device.
        data: cases with labels.
        config: settings of the predictions.
        device: to compute on.

    Returns:
        Case → measure → value; of several regions their mean.

    Raises:
        DataError: if a scan is unfit.
        RunError: if the device's memory is too small, or a network's output is no number.
    """
    rows = {}
    for case in data.cases:
        scan, probability, entropy, _, agreement = predict_case(posterior, case, data, config, device)
        masks = posterior.card.masks(probability)
        regions = [
            _measure(
                probability[number], masks[number], entropy[number], agreement[number], scan, data, region
            ).measures
            for number, region in enumerate(posterior.card.regions)
        ]
        rows[case.id] = {name: sum(figures[name] for figures in regions) / len(regions) for name in regions[0]}
    return rows


def _measure(
    probability: NDArray[np.float32],
    segmented: NDArray[np.bool_],
    entropy: NDArray[np.float32],
    agreement: float,
    scan: Scan,
    data: DataSet,
    region: str,
) -> CaseMetrics:
    """With "pairwise_dice" where there were several passes; ignored voxels are background, and in no brain."""
    assert scan.label is not None
    values = data.region_values([region])[region]
    truth = np.isin(scan.label, sorted(values))
    if scan.ignored is not None:
        probability, segmented = probability * ~scan.ignored, segmented & ~scan.ignored
    measured = case_metrics(probability, segmented, entropy, truth, scan.counted, scan.spacing)
    if not math.isnan(agreement):
        measured.measures["pairwise_dice"] = agreement
    return measured


def _curves(run: Path, suffix: str, cases: Sequence[CaseMetrics], entropies: Sequence[float]) -> dict[str, Any]:
    """Draw the curves of a region over its cases, and return what was drawn."""
    reliability = reduce(add, (case.reliability for case in cases))
    each = [case.risk_coverage for case in cases]
    of_voxels = RiskCoverage(each[0].coverage, np.mean([curve.risk for curve in each], 0))
    score, of_cases = _case_risk_coverage([case.measures for case in cases], entropies)
    save_reliability(run / f"reliability{suffix}.png", reliability)
    panels = {
        f"Voxels of the brain, by entropy: AURC {of_voxels.aurc:.2g}": (of_voxels, "voxels"),
        f"Cases, by {score}: AURC {of_cases.aurc:.2g}": (of_cases, "cases"),
    }
    save_risk_coverage(run / f"risk_coverage{suffix}.png", panels)
    return {
        "reliability": {name: getattr(reliability, name).tolist() for name in ("confidence", "frequency", "count")},
        "risk_coverage": _as_lists(of_voxels),
        "case_risk_coverage": {**_as_lists(of_cases), "score": score, "aurc": of_cases.aurc},
    }


def _case_risk_coverage(rows: Sequence[Mapping[str, float]], entropies: Sequence[float]) -> tuple[str, RiskCoverage]:
    """What says that a case has failed, and the curve of the risk 1 − Dice that it gives.

    It is the pairwise Dice of the weight samples; where a case has none, for all the mean entropy of the brain.
    """
    risk = np.array([1 - row["dice"] for row in rows])
    if all("pairwise_dice" in row for row in rows):
        disagreement = np.array([1 - row["pairwise_dice"] for row in rows])
        return "pairwise Dice", risk_coverage(disagreement, risk, len(rows))
    return "mean entropy of the brain", risk_coverage(np.array(entropies), risk, len(rows))


def _as_lists(curve: RiskCoverage) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in curve._asdict().items()}
