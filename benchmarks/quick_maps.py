"""Maps of a few passes against those of 51 weight samples, on the validation cases of a run.

$ python -m benchmarks.quick_maps RUN
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

from dwp_pyro.config.training import SviConfig
from dwp_pyro.inference.predictive import PredictiveMoments, posterior_predictive
from dwp_pyro.metrics.overlap import dice
from dwp_pyro.prediction.predict import load_run
from dwp_pyro.training.training_data import load_training_data

_REFERENCE = range(1000, 1051)
_TRIALS = {"posterior means": None} | {f"{samples} samples": range(samples) for samples in (3, 6, 12, 20)}


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def _dice(moments: PredictiveMoments, label: Tensor) -> float:
    return dice((moments.probability[0] > 0.5).numpy(), label.numpy())


def main(run: Path) -> None:
    config = SviConfig.from_yaml(run / "config.yaml")
    posterior = load_run(run).posterior
    cases = load_training_data(config, config.n).validation
    metrics: dict[str, list[tuple[float, float]]] = {name: [] for name in _TRIALS}
    for case in cases:
        assert case.label is not None
        image, brain_mask, label = (x.as_tensor() for x in (case.image, case.brain_mask, case.label))
        brain_mask, label = brain_mask[0] > 0, label[0] > 0
        reference = posterior_predictive(posterior, image, _REFERENCE)
        for name, seeds in _TRIALS.items():
            moments = posterior_predictive(posterior, image, seeds)
            pair = (each.mutual_information[0][brain_mask] for each in (moments, reference))
            metrics[name].append((_correlation(*pair), abs(_dice(moments, label) - _dice(reference, label))))
    print(f"{len(cases)} cases, {len(posterior.members)} members, against {len(_REFERENCE)} samples")
    print("| maps of | correlation of the mutual information: mean, smallest | largest change of Dice |")
    print("|---|---|---|")
    for name, values in metrics.items():
        correlations, changes = zip(*values, strict=True)
        print(f"| {name} | {statistics.mean(correlations):.3f}, {min(correlations):.3f} | {max(changes):.4f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
