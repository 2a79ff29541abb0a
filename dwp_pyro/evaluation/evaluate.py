"""`evaluate`: compare predictions of the test cases with their labels."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.data.case import Case, Scan
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.data.layouts import LAYOUTS, open_dataset
from dwp_pyro.data.regions import parse_label_map
from dwp_pyro.data.split import read_roles
from dwp_pyro.inference.posterior import NetworkConfig, Posterior
from dwp_pyro.metrics import EMPTY_MASK_POLICY, MEASURES, Summary, case_metrics, summarize_cases
from dwp_pyro.metrics.lesions import lesion_matching
from dwp_pyro.metrics.measures import CaseMetrics
from dwp_pyro.metrics.summary import patient_means
from dwp_pyro.metrics.uncertainty import RiskCoverage, risk_coverage
from dwp_pyro.plots.curves import reliability_figure, risk_coverage_figure
from dwp_pyro.plots.style import save_figure
from dwp_pyro.prediction.labels import read_scan
from dwp_pyro.prediction.outputs import read_maps, read_prediction
from dwp_pyro.prediction.predict import TrainedRun, load_run, not_predicted, predict_case, predict_cases
from dwp_pyro.runtime.errors import ConfigError, DataError, RunError
from dwp_pyro.runtime.files import file_digest, read_yaml, write_bytes, write_json
from dwp_pyro.runtime.progress import progress
from dwp_pyro.runtime.workers import Workers

__all__ = ["evaluate", "find_test_cases", "measure"]

_logger = logging.getLogger(__name__)


def evaluate(
    run: Path, config: PredictConfig, *, root: str | None = None, device: str = "auto", workers: Workers | None = None
) -> dict[str, dict[str, Summary]]:
    """Measure a run on the test cases of its split, on the grid of each scan.

    Test cases without a prediction with these settings in `run/predictions` are predicted first. Writes
    `evaluation.csv`, one line per case and region; `evaluation.json`, with cases, summary and curves per region, the
    settings of the run, the policy on empty masks and digests of the labels; and `reliability.png` and
    `risk_coverage.png`, per region if there are several (`reliability_core.png`).

    Args:
        run: Folder of a finished `svi` or `finetune` run.
        config: Settings of the predictions.
        root: Folder of the scans if it differs from that of the run.
        device: Device to run on.
        workers: Workers that predict and measure several cases at the same time.

    Returns:
        Region → metric → summary over patients; cases of one patient are averaged first.

    Raises:
        UserError: if the run, its split or a scan cannot be used.

    Examples:
        With the run of `svi`'s example:

        >>> from pathlib import Path
        >>> from dwp_pyro import PredictConfig, evaluate
        >>> summary = evaluate(Path("runs/svi"), PredictConfig(samples=2))
        >>> summary["whole"]["dice"].cases
        2
    """
    trained = load_run(run)
    data = find_test_cases(run, root)
    out = run / "predictions"
    missing = not_predicted(out, data.cases, trained, config)
    if replaced := [case.id for case in missing if (out / f"{case.id}.json").exists()]:
        _logger.warning(
            "%s: replacing %d predictions, incomplete or of other scans, settings or posteriors, for example '%s'",
            out,
            len(replaced),
            replaced[0],
        )
    predict_cases(trained, missing, data, config, out, device, workers)
    labels = {case.id: file_digest(case.label) for case in data.cases if case.label is not None}
    results = _measure_all(trained, data, workers)
    if not_predicted(out, data.cases, trained, config):
        raise RunError(f"{out}: another process has replaced predictions while they were measured; evaluate again")
    return _write(run, config, labels, data.patients, results)


def _measure_all(trained: TrainedRun, data: DataSet, workers: Workers | None) -> dict[str, dict[str, CaseMetrics]]:
    """Return case → region → metrics."""
    network_config = trained.posterior.network_config
    measure_one = partial(_measure_predicted, trained.folder / "predictions", network_config, replace(data, cases=()))
    results: dict[str, dict[str, CaseMetrics]] = {}
    with progress("evaluating", len(data.cases)) as advance:

        def finished(case: Case, result: dict[str, CaseMetrics]) -> None:
            results[case.id] = result
            advance(f"{case.id} Dice " + ", ".join(f"{metrics.measures['dice']:.3f}" for metrics in result.values()))

        if workers is None:
            for case in data.cases:
                finished(case, measure_one(case))
        else:
            workers.at_most(len(data.cases)).map(measure_one, data.cases, finished)
    return results


def _write(
    run: Path,
    config: PredictConfig,
    labels: Mapping[str, str],
    patients: Mapping[str, str],
    results: Mapping[str, Mapping[str, CaseMetrics]],
) -> dict[str, dict[str, Summary]]:
    """Write the files of `evaluate`, and return region → metric → summary.

    `labels` is case → digest of its label, `results` case → region → metrics.
    """
    regions = list(next(iter(results.values())))
    measured = {region: {case: results[case][region] for case in labels} for region in regions}
    table = io.StringIO()
    writer = csv.DictWriter(table, ["case", "patient", "region", *MEASURES], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {"case": case, "patient": patients[case], "region": region, **of_region[case].measures}
        for case in labels
        for region, of_region in measured.items()
    )
    write_bytes(run / "evaluation.csv", table.getvalue().encode())
    summary, written = {}, {}
    for region, of_region in measured.items():
        rows = {name: each.measures for name, each in of_region.items()}
        summary[region] = summarize_cases(patient_means(rows, patients))
        suffix = "" if len(measured) == 1 else f"_{region}"
        written[region] = {
            "summary": {name: asdict(value) for name, value in summary[region].items()},
            "cases": rows,
            "curves": _curves(run, suffix, list(of_region.values())),
        }
    write_json(
        run / "evaluation.json",
        {
            "run": read_yaml(run / "config.yaml"),
            "prediction": config.to_mapping(),
            "empty_masks": EMPTY_MASK_POLICY,
            "labels": labels,
            "regions": written,
        },
    )
    return summary


def _measure_predicted(out: Path, network_config: NetworkConfig, data: DataSet, case: Case) -> dict[str, CaseMetrics]:
    """Return the metrics of each region of a predicted case."""
    scan = read_scan(case, network_config, data)
    predicted = read_prediction(out, case.id, network_config.regions)
    probabilities, entropies = (read_maps(out, case.id, kind, network_config) for kind in ("prob", "entropy"))
    masks = network_config.masks(probabilities, predicted.decision, scan.spacing)
    measured = {}
    for region, probability, mask, entropy in zip(network_config.regions, probabilities, masks, entropies, strict=True):
        pairwise_dice = predicted.regions[region]["pairwise_dice"]
        pairwise_dice = math.nan if pairwise_dice is None else pairwise_dice
        measured[region] = _measure(probability, mask, entropy, pairwise_dice, scan, data, region)
    return measured


def find_test_cases(run: Path, root: str | None) -> DataSet:
    """Return the test cases of a run's split.

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
            raise DataError(f"{folder}: has no case '{name}', which {run / 'split.json'} names as a test case")
        if cases[name].label is None:
            raise DataError(f"case {name}: has no label file, which evaluation needs; add it")
    return replace(data, cases=tuple(cases[name] for name in test))


def measure(
    posterior: Posterior, data: DataSet, config: PredictConfig, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return the metrics of `evaluate` for labeled cases predicted in memory; moves the posterior to the device.

    Returns:
        Case → metric → value; the mean over regions if there are several.

    Raises:
        DataError: if a scan cannot be used.
        RunError: if the device runs out of memory, or the output of the network is NaN or infinite.
    """
    rows = {}
    for case in data.cases:
        scan, masks, probability, entropy, _, pairwise_dice = predict_case(posterior, case, data, config, device)
        regions = [
            _measure(
                probability[number], masks[number], entropy[number], pairwise_dice[number], scan, data, region
            ).measures
            for number, region in enumerate(posterior.network_config.regions)
        ]
        rows[case.id] = {name: sum(metrics[name] for metrics in regions) / len(regions) for name in regions[0]}
    return rows


def _measure(
    probability: NDArray[np.float32],
    segmented: NDArray[np.bool_],
    entropy: NDArray[np.float32],
    pairwise_dice: float,
    scan: Scan,
    data: DataSet,
    region: str,
) -> CaseMetrics:
    """Measure one region, with "pairwise_dice" after several passes; ignored voxels count as background."""
    truth = scan.mask(data.region_values([region])[region])
    if scan.ignored is not None:
        probability, segmented = probability * ~scan.ignored, segmented & ~scan.ignored
    measured = case_metrics(probability, segmented, entropy, truth, scan.counted, scan.spacing, lesion_matching(region))
    if not math.isnan(pairwise_dice):
        measured.measures["pairwise_dice"] = pairwise_dice
    return measured


def _curves(run: Path, suffix: str, cases: Sequence[CaseMetrics]) -> dict[str, Any]:
    """Draw the curves of a region over all cases, and return their points."""
    reliability = reduce(add, (case.reliability for case in cases))
    each = [case.risk_coverage for case in cases]
    of_voxels = RiskCoverage(each[0].coverage, np.mean([curve.risk for curve in each], 0))
    score, of_cases = _case_risk_coverage(cases)
    points = {name: getattr(reliability, name).tolist() for name in ("confidence", "frequency", "count")}
    save_figure(run / f"reliability{suffix}.png", reliability_figure(**points))
    panels = {
        f"Brain voxels, by entropy: AURC {of_voxels.aurc:.2g}": (*of_voxels, "voxels"),
        f"Cases, by {score}: AURC {of_cases.aurc:.2g}": (*of_cases, "cases"),
    }
    save_figure(run / f"risk_coverage{suffix}.png", risk_coverage_figure(panels))
    return {
        "reliability": points,
        "risk_coverage": _as_lists(of_voxels),
        "case_risk_coverage": {**_as_lists(of_cases), "score": score, "aurc": of_cases.aurc},
    }


def _case_risk_coverage(cases: Sequence[CaseMetrics]) -> tuple[str, RiskCoverage]:
    """Return the score that ranks cases, and the curve of the risk 1 − Dice under it.

    The score is the pairwise Dice of the weight samples or, if a case lacks it, the mean entropy of the brain.
    """
    rows = [case.measures for case in cases]
    risk = np.array([1 - row["dice"] for row in rows])
    if all("pairwise_dice" in row for row in rows):
        disagreement = np.array([1 - row["pairwise_dice"] for row in rows])
        return "pairwise Dice", risk_coverage(disagreement, risk, len(rows))
    return "mean entropy of the brain", risk_coverage(np.array([case.mean_entropy for case in cases]), risk, len(rows))


def _as_lists(curve: RiskCoverage) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in curve._asdict().items()}
