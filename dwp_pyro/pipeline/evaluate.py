"""`evaluate`: predictions of the test cases against their labels."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dwp_pyro.config import PredictConfig
from dwp_pyro.data.case import Scan, read_case, read_volume
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.data.layouts import LAYOUTS, open_dataset
from dwp_pyro.data.regions import parse_label_map
from dwp_pyro.errors import DataError, RunError
from dwp_pyro.inference.device import torch_device
from dwp_pyro.inference.posterior import NetworkCard, Posterior
from dwp_pyro.metrics import EMPTY_MASK_POLICY, Summary, case_metrics, summarise
from dwp_pyro.pipeline.predict import is_predicted, load_run, map_path, predict_case, predict_cases
from dwp_pyro.progress import progress
from dwp_pyro.storage import read_json, read_yaml, write_bytes, write_json

__all__ = ["evaluate", "measure"]


def evaluate(
    run: Path, config: PredictConfig, *, root: str | None = None, device: str = "auto"
) -> dict[str, dict[str, Summary]]:
    """Measure a run on the test cases of its split, on each scan's own grid.

    Test cases that have no prediction with these settings in `run/predictions` are predicted first.
    Writes `evaluation.csv`, a line a case and region, and `evaluation.json`: of each region the cases and
    their summary; the run's settings (prior, likelihood, β, n), and the policy on empty masks.

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
    test = read_json(run / "split.json").get("test")
    dataset, saved_root, label_map = settings.get("dataset"), settings.get("root"), settings.get("label_map") or []
    if dataset not in LAYOUTS or not isinstance(saved_root, str) or not isinstance(label_map, list):
        raise RunError(f"{run / 'config.yaml'}: does not say which scans were used; train it again")
    if not isinstance(test, list) or not all(isinstance(name, str) for name in test):
        raise RunError(f"{run / 'split.json'}: has no list of test cases; train it again")
    folder = Path(root or saved_root)
    data = open_dataset(folder, dataset, parse_label_map(map(str, label_map)))
    cases = data.by_id
    for name in test:
        if name not in cases:
            raise DataError(f"{folder}: test case '{name}' is not among the scans; give the right --root")
        if cases[name].label is None:
            raise DataError(f"case {name}: has no label file, which evaluation needs; add it")
    if not test:
        raise RunError(f"{run / 'split.json'}: names no test cases; there is nothing to evaluate")
    out = run / "predictions"
    missing = [cases[name] for name in test if not is_predicted(out, cases[name], trained, config)]
    predict_cases(trained, missing, data, config, out, torch_device(device))
    rows: dict[str, dict[str, dict[str, float]]] = {region: {} for region in card.regions}
    with progress("evaluating", len(test)) as advance:
        for name in test:
            scan = read_case(cases[name], card.modalities, data.labels)
            maps = [read_volume(map_path(out, name, "prob", region, card)).data for region in card.regions]
            for region, figures in _figures(np.stack(maps), scan, data, card).items():
                rows[region][name] = figures
            advance(", ".join(f"Dice {of_region[name]['dice']:.3f}" for of_region in rows.values()))
    summary = {region: summarise(of_region.values()) for region, of_region in rows.items()}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["case", "region", *summary[card.regions[0]]])
    writer.writerows([name, region, *rows[region][name].values()] for name in test for region in card.regions)
    write_bytes(run / "evaluation.csv", table.getvalue().encode())
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
                }
                for region in card.regions
            },
        },
    )
    return summary


def measure(
    posterior: Posterior, data: DataSet, config: PredictConfig, device: torch.device
) -> dict[str, dict[str, float]]:
    """The figures that `evaluate` gives, of cases predicted in memory; nothing is written.

    Args:
        posterior: on the device.
        data: cases with labels.
        config: settings of the predictions.
        device: to compute on.

    Returns:
        Case → measure → value; of several regions their mean.

    Raises:
        DataError: if a scan is unfit.
        RunError: if the device's memory is too small.
    """
    rows = {}
    for case in data.cases:
        prediction = predict_case(posterior, case, data, config, device)
        regions = list(_figures(prediction.probability, prediction.scan, data, posterior.card).values())
        rows[case.id] = {name: sum(figures[name] for figures in regions) / len(regions) for name in regions[0]}
    return rows


def _figures(
    probability: NDArray[np.float32], scan: Scan, data: DataSet, card: NetworkCard
) -> dict[str, dict[str, float]]:
    """Probability [R, X, Y, Z] → region → measure → value; ignored voxels are background, and in no brain."""
    assert scan.label is not None
    regions = data.region_values(card.regions)
    if scan.ignored is not None:
        probability = probability * ~scan.ignored
    return {
        region: case_metrics(probability[number], np.isin(scan.label, sorted(values)), scan.counted, scan.spacing)
        for number, (region, values) in enumerate(regions.items())
    }
