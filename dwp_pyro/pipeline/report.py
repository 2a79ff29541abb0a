"""`report`: one page about an evaluated run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dwp_pyro.config import PredictConfig
from dwp_pyro.data.case import Case, Layout, read_case, read_volume
from dwp_pyro.errors import ConfigError, RunError
from dwp_pyro.pipeline.evaluate import find_test_cases
from dwp_pyro.pipeline.predict import TrainedRun, is_predicted, load_run
from dwp_pyro.progress import progress
from dwp_pyro.report.html import Figures, Report, page
from dwp_pyro.report.layers import CaseView, case_view
from dwp_pyro.storage import read_json, read_yaml, write_bytes

__all__ = ["report"]

_CURVES = ("reliability", "risk_coverage", "case_risk_coverage")


def report(run: Path, *, root: str | None = None, out: Path | None = None) -> Path:
    """Write one HTML page about a run: results, cases in a viewer, calibration, training, data and settings.

    The page is one file, needs no network, and holds the scans of three test cases: best, median and worst by Dice.

    Args:
        run: folder of an evaluated `svi` or `finetune` run.
        root: folder of the scans, if it has moved since the run.
        out: the page; `run/report.html` by default.

    Returns:
        The page's path.

    Raises:
        UserError: if the run is not evaluated, or its predictions or scans have changed since; nothing is written.
    """
    out = out or run / "report.html"
    if out.is_dir():
        raise RunError(f"{out}: is a folder; --out names the file of the page")
    trained = load_run(run)
    evaluation, figures, prediction = _read_evaluation(run)
    found, layout = find_test_cases(run, root)
    cases = {case.id: case for case in found}
    if cases.keys() != figures.keys():
        raise _outdated(run, "is of other test cases than the split")
    chosen = _best_median_worst(figures)
    for name in chosen.values():
        if not is_predicted(run / "predictions", cases[name], trained, prediction):
            raise _outdated(run, f"is of another prediction of '{name}' than {run / 'predictions'} holds")
    views = {}
    with progress("reading scans", len(chosen)) as advance:
        for rank, name in chosen.items():
            views[rank] = (name, _view(run, cases[name], layout, trained))
            advance(name)
    card = trained.posterior.card
    _, values = layout.region_values(card.region)
    split = read_json(run / "split.json")
    command = str(read_json(run / "run.json").get("command"))
    learned_from = read_json(run / "learned_from.json")
    n = len(split.get("train", ()))
    html = page(
        Report(
            name=run.resolve().name,
            summary=f"The region “{card.region}” of {layout.name} scans, learned from {n} cases",
            data={
                "layout": layout.name,
                "modalities": ", ".join(card.modalities),
                "region": card.region,
                "labels of the region": ", ".join(layout.labels[value] for value in sorted(values)),
                "voxels": "as scanned" if card.spacing is None else f"resampled to {card.spacing:g} mm",
            },
            roles=split,
            settings={
                f"Training ({command})": read_yaml(run / "config.yaml"),
                "Prediction": prediction.to_mapping(),
                **({"Learned from (SHA-256)": learned_from} if learned_from else {}),
            },
            training=_read_lines(run / "metrics.jsonl"),
            cases=figures,
            volumes_ml={name: read_json(run / "predictions" / f"{name}.json")["volume_ml"] for name in cases},
            empty_masks=str(evaluation.get("empty_masks", "")),
            curves=_curves(evaluation.get("curves", {})),
            views=views,
        )
    )
    write_bytes(out, html.encode())
    return out


def _outdated(run: Path, how: str) -> RunError:
    return RunError(f"{run / 'evaluation.json'}: {how}; run 'dwp-pyro evaluate {run}' again")


def _read_evaluation(run: Path) -> tuple[dict[str, Any], dict[str, Figures], PredictConfig]:
    """What evaluation.json holds: all of it, case → measure → value, and the settings of the predictions."""
    path = run / "evaluation.json"
    if not path.exists():
        raise RunError(f"{run}: is not evaluated yet; run 'dwp-pyro evaluate {run}' first")
    evaluation = read_json(path)
    cases = evaluation.get("cases")
    try:
        prediction = PredictConfig.from_mapping(evaluation["prediction"])
        if not cases or not all(isinstance(figures["dice"], int | float) for figures in cases.values()):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as problem:
        raise _outdated(run, "is not an evaluation of this version") from problem
    return evaluation, cases, prediction


def _best_median_worst(figures: Mapping[str, Figures]) -> dict[str, str]:
    """Which case is the best, the median and the worst by Dice; of two cases there is no median, of one no choice."""
    order = sorted(figures, key=lambda name: -(figures[name]["dice"] or 0.0))
    if len(order) == 1:
        return {"only case": order[0]}
    middle = {"median": order[len(order) // 2]} if len(order) > 2 else {}
    return {"best": order[0], **middle, "worst": order[-1]}


def _view(run: Path, case: Case, layout: Layout, trained: TrainedRun) -> CaseView:
    card = trained.posterior.card
    scan = read_case(case, card.modalities, layout.labels)
    assert scan.label is not None
    probability, entropy, mutual_information = (
        read_volume(run / "predictions" / f"{case.id}_{name}.nii.gz").data for name in ("prob", "entropy", "mi")
    )
    return case_view(
        card.modalities[0],
        scan.affine,
        scan.images[0],
        scan.brain,
        np.isin(scan.label, sorted(layout.region_values(card.region)[1])),
        probability,
        entropy,
        mutual_information,
    )


def _curves(curves: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Region → curve → points; curves that stand for themselves are of the region ""."""
    return {"": curves} if any(name in curves for name in _CURVES) else dict(curves)


def _read_lines(path: Path) -> Sequence[dict[str, Any]]:
    """The lines of `metrics.jsonl`, if the run has kept them; those that a kill cut short are left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
