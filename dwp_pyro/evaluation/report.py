"""`report`: HTML page about an evaluated run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.data.split import read_roles
from dwp_pyro.evaluation.evaluate import find_test_cases
from dwp_pyro.evaluation.page import Metrics, Report, page
from dwp_pyro.evaluation.viewer import CaseView, case_view
from dwp_pyro.inference.decision import Decision
from dwp_pyro.prediction.labels import read_scan, shown_image
from dwp_pyro.prediction.outputs import MAPS, read_maps, read_prediction
from dwp_pyro.prediction.predict import TrainedRun, load_run, not_predicted
from dwp_pyro.runtime.errors import ConfigError, RunError
from dwp_pyro.runtime.files import file_digest, read_json, read_yaml, write_bytes
from dwp_pyro.runtime.progress import each
from dwp_pyro.training.metrics_log import read_metrics
from dwp_pyro.training.posterior_summary import NULLS

__all__ = ["report"]


def report(run: Path, *, root: str | None = None, out: Path | None = None, region: str | None = None) -> Path:
    """Write an HTML page about a run: results, cases in a viewer, calibration, training, data and settings.

    The page is one file, loads nothing from a network, and contains the scans of three test cases: best, median and
    worst by Dice of `region`, by default the first. Return the path of the page, by default `run/report.html`.

    Raises:
        UserError: if the run is not evaluated, or its predictions, scans or labels have changed since; nothing is
            written.
    """
    out = out or run / "report.html"
    if out.is_dir():
        raise RunError(f"{out}: is a folder, expected a file name")
    trained = load_run(run)
    network_config = trained.posterior.network_config
    shown = region or network_config.regions[0]
    if shown not in network_config.regions:
        raise ConfigError(f"region: '{shown}' is not one of {', '.join(network_config.regions)}, which {run} segments")
    regions, curves, prediction, labels = _read_evaluation(run)
    data = find_test_cases(run, root)
    if regions.keys() != set(network_config.regions) or any(
        data.by_id.keys() != metrics.keys() for metrics in regions.values()
    ):
        raise _outdated(run, "is of other test cases or regions than the run")
    changed = [case.id for case in data.cases if case.label and file_digest(case.label) != labels.get(case.id)]
    if changed:
        raise _outdated(run, f"is of another label of '{changed[0]}' than {data.by_id[changed[0]].label}")
    chosen = _best_median_worst(regions[shown])
    missing = not_predicted(run / "predictions", data.cases, trained, prediction)
    if missing:
        raise _outdated(run, f"does not match the prediction of '{missing[0].id}' in {run / 'predictions'}")
    predicted = {name: read_prediction(run / "predictions", name, network_config.regions) for name in data.by_id}
    decision = predicted[data.cases[0].id].decision  # that of all
    views = {}
    for rank, name in each(chosen.items(), "reading scans"):
        views[rank] = (name, _view(run, data.by_id[name], data, trained, shown, decision))
    split = read_roles(run / "split.json", RunError)
    state = read_json(run / "run.json")
    command = str(state.get("command"))
    posterior = _posterior(run, state["summary"]) if "summary" in state else {}
    learned_from = read_json(run / "learned_from.json")
    n = len(split.get("train", ()))
    content = Report(
        name=run.resolve().name,
        summary=f"{', '.join(network_config.regions)} of {data.layout} scans, learned from {n} cases",
        data={
            "layout": data.layout,
            "modalities": ", ".join(network_config.modalities),
            **{
                f"region “{name}”": ", ".join(data.labels[value] for value in sorted(values))
                for name, values in data.region_values(network_config.regions).items()
            },
            "voxels": "as scanned" if network_config.spacing is None else f"resampled to {network_config.spacing:g} mm",
        },
        roles=split,
        settings={
            **({"Posterior": posterior} if posterior else {}),
            f"Training ({command})": read_yaml(run / "config.yaml"),
            "Prediction": {**prediction.to_mapping(), "masks": str(decision)},
            **({"Learned from (SHA-256)": learned_from} if learned_from else {}),
        },
        training=read_metrics(run / "metrics.jsonl"),
        patients=data.patients,
        regions=regions,
        volumes_ml={name: {case: of.regions[name]["volume_ml"] for case, of in predicted.items()} for name in regions},
        curves=curves,
        shown=shown,
        views=views,
    )
    write_bytes(out, page(content).encode())
    return out


def _posterior(run: Path, summary: Any) -> dict[str, str]:
    """Return label → text for the `summary` of a run; see `summarize`."""

    def shown(value: Any, digits: int) -> str:
        return "–" if value is None else f"{value:,.{digits}f}"

    try:
        terms = {
            "elbo": "ELBO (nats)",
            "log_likelihood": "log-likelihood",
            "kl": "KL",
            "log_prior": "log prior of deterministic weights and prior scales",
        }
        rows = {
            label: f"{shown(summary[name], 0)} ± {shown(summary[f'{name}_error'], 0)}" for name, label in terms.items()
        }
        for null, label in NULLS.items():
            if f"above_{null}" in summary:
                above = summary[f"above_{null}"]
                rows[f"ELBO minus that of {label}"] = f"{shown(above['nats'], 0)} ± {shown(above['error'], 0)}"
        for block, of in summary["blocks"].items():
            rows[f"block {block}"] = (
                f"s/prior {shown(of['s_over_prior'], 2)}, shift/prior {shown(of['shift_over_prior'], 2)}, "
                f"KL per kernel {shown(of['kl_per_kernel'], 2)}, prior scale {shown(of['prior_scale'], 3)}"
            )
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise RunError(f"{run / 'run.json'}: 'summary' is not of this version; train the run again") from problem
    return rows


def _outdated(run: Path, how: str) -> RunError:
    return RunError(f"{run / 'evaluation.json'}: {how}; run 'dwp-pyro evaluate {run}' again")


def _read_evaluation(
    run: Path,
) -> tuple[dict[str, dict[str, Metrics]], dict[str, dict[str, Any]], PredictConfig, dict[str, str]]:
    """Read evaluation.json.

    Returns:
        Region → case → metric → value; region → curve → points; settings of the predictions; case → digest of its
        label.
    """
    path = run / "evaluation.json"
    if not path.exists():
        raise RunError(f"{run}: is not evaluated yet; run 'dwp-pyro evaluate {run}' first")
    evaluation = read_json(path)
    try:
        prediction = PredictConfig.from_mapping(evaluation["prediction"])
        regions = {name: dict(region["cases"]) for name, region in evaluation["regions"].items()}
        for cases in regions.values():
            if not cases or not all(_numbers([*metrics.values(), metrics["dice"]]) for metrics in cases.values()):
                raise ValueError
        labels = dict(evaluation["labels"])
        curves = {name: _curves(region["curves"]) for name, region in evaluation["regions"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as problem:
        raise _outdated(run, "is not an evaluation of this version") from problem
    return regions, curves, prediction, labels


def _curves(of_region: Mapping[str, Any]) -> dict[str, Any]:
    """Return the curves of a page, with finite points and equally long axes."""
    axes = {
        "reliability": ("confidence", "frequency", "count"),
        "risk_coverage": ("coverage", "risk"),
        "case_risk_coverage": ("coverage", "risk"),
    }
    curves = {name: {axis: of_region[name][axis] for axis in of} for name, of in axes.items()}
    for curve in curves.values():
        if not all(map(_numbers, curve.values())) or len({len(points) for points in curve.values()}) != 1:
            raise ValueError
    if None in curves["reliability"]["count"]:
        raise ValueError
    return curves


def _numbers(values: Any) -> bool:
    """Return whether this is a nonempty list of numbers of plausible size, or None where one is undefined."""
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(value is None or (isinstance(value, int | float) and abs(value) < 1e15) for value in values)
    )


def _best_median_worst(metrics: Mapping[str, Metrics]) -> dict[str, str]:
    """Return rank → best, median and worst case by Dice; no median of two cases, a single rank of one."""
    order = sorted(metrics, key=lambda name: -(metrics[name]["dice"] or 0.0))
    if len(order) == 1:
        return {"only case": order[0]}
    middle = {"median": order[len(order) // 2]} if len(order) > 2 else {}
    return {"best": order[0], **middle, "worst": order[-1]}


def _view(run: Path, case: Case, data: DataSet, trained: TrainedRun, region: str, decision: Decision) -> CaseView:
    network_config = trained.posterior.network_config
    scan = read_scan(case, network_config, data)
    modality, image = shown_image(scan, case, network_config)
    probability, entropy, mutual_information = (
        read_maps(run / "predictions", case.id, kind, network_config) for kind in MAPS
    )
    number = network_config.regions.index(region)
    return case_view(
        modality,
        scan.affine,
        image,
        scan.brain_mask,
        scan.mask(data.region_values([region])[region]),
        network_config.masks(probability, decision, scan.spacing)[number],
        probability[number],
        entropy[number],
        mutual_information[number],
    )
