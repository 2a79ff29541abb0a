"""Ablation of the decision: Dice and HD95 of the test cases of runs, with parts of the decision turned off.

The scans must be where the runs found them.

$ python studies/gliomas/decisions.py runs/gliomas-development/runs/svi-n5-seed*/
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.config.training import FinetuneConfig, SviConfig
from dwp_pyro.evaluation.evaluate import find_test_cases
from dwp_pyro.inference.decision import Decision
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.metrics.measures import case_metrics
from dwp_pyro.prediction.predict import load_run, predict_case
from dwp_pyro.runtime.files import read_json, read_yaml
from dwp_pyro.training.choose_decision import choose_decision
from dwp_pyro.training.training_data import load_training_data

FULL = Decision("expected-dice", 0.5, ("x",))
DECISIONS = {
    "probability above 1/2": Decision(),
    "and mirrored passes": Decision(mirror=FULL.mirror),
    "and components of at least 25 %": Decision(min_mass=0.25),
    "and the largest component": Decision(min_mass=1.0),
    "and expected Dice": Decision("expected-dice"),
    "all three, 25 %": replace(FULL, min_mass=0.25),
    "all three, 50 %": FULL,
    "all three, largest": replace(FULL, min_mass=1.0),
}


def main() -> None:
    scores: dict[str, list[np.ndarray]] = {}
    for run in map(Path, sys.argv[1:]):
        posterior = load_run(run).posterior
        config, saved = posterior.network_config, posterior.decision
        now = _chosen_now(run, posterior)
        data = find_test_cases(run, None)
        of_run: dict[str, list[tuple[float, float]]] = {}
        for case in data.cases:
            predicted = {}
            for mirror in ((), FULL.mirror):
                posterior.decision = Decision(mirror=mirror)
                predicted[mirror] = predict_case(posterior, case, data, PredictConfig(samples=12), torch.device("cpu"))
            chosen = {"as chosen by the run": saved, "as chosen now": now}
            for name, decision in (DECISIONS | chosen).items():
                scan, _, probability, entropy, *_ = predicted[decision.mirror]
                truth = np.isin(scan.label, sorted(data.regions[config.regions[0]]))
                mask = config.masks(probability, decision, scan.spacing)[0]
                measures = case_metrics(probability[0], mask, entropy[0], truth, scan.counted, scan.spacing).measures
                of_run.setdefault(name, []).append((measures["dice"], measures["hd95"]))
        for name, values in of_run.items():
            scores.setdefault(name, []).append(np.mean(values, 0))
        print(f"{run.name}: {saved}; now {now}", file=sys.stderr)
    print("| decision | Dice of each run | mean | difference | HD95 (mm) |\n|---|---|---|---|---|")
    first = np.array(next(iter(scores.values())))
    for name, values in scores.items():
        each = np.array(values)
        error = (each - first).std(0, ddof=1) / len(each) ** 0.5 if len(each) > 1 else np.zeros(2)
        dice, hd95 = each.mean(0)
        runs = " ".join(f"{value:.3f}" for value in each[:, 0])
        print(f"| {name} | {runs} | {dice:.3f} | {(each - first).mean(0)[0]:+.3f} ± {error[0]:.3f} | {hd95:.1f} |")


def _chosen_now(run: Path, posterior: Posterior) -> Decision:
    """Return what this version chooses on the validation cases of a run."""
    settings = {name: value for name, value in read_yaml(run / "config.yaml").items() if value is not None}
    svi = read_json(run / "run.json")["command"] == "svi"
    config = (SviConfig if svi else FinetuneConfig).from_mapping(settings)
    return choose_decision(posterior, load_training_data(config, config.n), config.mirror, torch.device("cpu"))


if __name__ == "__main__":
    main()
