"""Curves of learning, training, reliability, and risk against coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure

from dwp_pyro.metrics import MEASURES, Summary
from dwp_pyro.plots.style import COLORS, save_figure

__all__ = ["reliability_figure", "risk_coverage_figure", "save_learning_curves", "training_figure"]

_MARKERS = "osD^vPX*"

_TRAINING = {
    "log_likelihood": "log-likelihood (nats)",
    "kl": "KL from the prior (nats)",
    "validation_dice": "Dice of validation cases",
}


def save_learning_curves(path: Path, summaries: Mapping[int, Mapping[str, Mapping[str, Summary]]]) -> None:
    """Draw Dice and IoU against n, one line per method, with the standard error over seeds.

    `summaries` is n → method → metric → summary over seeds.
    """
    methods = sorted({method for at_n in summaries.values() for method in at_n})
    sizes = sorted(summaries)
    figure = Figure(figsize=(11.2, 4.6), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), ("dice", "iou"), strict=True):
        for index, method in enumerate(methods):
            points = {n: at_n[method][name] for n, at_n in summaries.items() if method in at_n}
            # Shift the methods: error bars at the same place hide each other.
            shift = 0.4 * ((index + 0.5) / len(methods) - 0.5)
            ax.errorbar(
                [sizes.index(n) + shift for n in points],
                [summary.mean for summary in points.values()],
                [summary.standard_error if summary.cases > 1 else 0.0 for summary in points.values()],
                label=method,
                color=COLORS[index % len(COLORS)],
                marker=_MARKERS[index % len(_MARKERS)],
                capsize=3,
            )
        ax.set_xticks(range(len(sizes)), [str(n) for n in sizes])
        ax.set_xlabel("training cases n")
        ax.set_ylabel(MEASURES[name][0])
        ax.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle("Mean and standard error over seeds")
    save_figure(path, figure)


def training_figure(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw log-likelihood, KL and validation Dice of `metrics.jsonl` against steps, one line per stage.

    Return None if there are none.
    """
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {name: {} for name in _TRAINING}
    for record in records:
        for name in _TRAINING.keys() & record.keys():
            lines[name].setdefault(record["stage"], []).append((record["step"], record[name]))
    if not any(value for line in lines["kl"].values() for _, value in line):
        lines["kl"] = {}  # deterministic networks have none
    drawn = {name: stages for name, stages in lines.items() if stages}
    if not drawn:
        return None
    figure = Figure(figsize=(3.4 * len(drawn), 2.8), layout="constrained")
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for ax, (name, stages) in zip(axes, drawn.items(), strict=True):
        for index, (stage, line) in enumerate(stages.items()):
            color = COLORS[index % len(COLORS)]
            marker = _MARKERS[index % len(_MARKERS)] if name == "validation_dice" else None
            ax.plot(*zip(*line, strict=True), color=color, marker=marker, label=stage, lw=1.3)
        ax.set_title(_TRAINING[name], fontsize="medium")
        ax.set_xlabel("step")
        ax.ticklabel_format(axis="y", scilimits=(-3, 4))
        ax.grid()
    labels = figure.axes[0].get_legend_handles_labels()
    if len(labels[0]) > 1:
        figure.legend(*labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def reliability_figure(confidence: Sequence[Any], frequency: Sequence[Any], count: Sequence[float]) -> Figure:
    """Draw observed frequency against predicted probability, above the fraction of voxels.

    All are [bins]; confidence and frequency are None or NaN in empty bins (see `Reliability`).
    """
    figure = Figure(figsize=(3.8, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=rcParams["axes.labelcolor"], lw=0.8, ls="--", alpha=0.6)
    points = np.array([confidence, frequency], dtype=float)  # converts None to NaN
    filled = points[:, ~np.isnan(points).any(0)]
    upper.plot(*filled, color=COLORS[0], marker=_MARKERS[0], ms=4)
    upper.set(ylabel="observed frequency", xlim=(0, 1), ylim=(0, 1))
    middles = (np.arange(len(count)) + 0.5) / len(count)
    lower.bar(middles, np.divide(count, np.sum(count)), 0.9 / len(count), color=COLORS[0], alpha=0.6)
    lower.set(xlabel="predicted probability", ylabel="fraction of voxels", yscale="log")
    for ax in (upper, lower):
        ax.grid(alpha=0.2)
    return figure


def risk_coverage_figure(panels: Mapping[str, tuple[Any, Any, str]]) -> Figure:
    """Draw risk [C] against coverage [C] in units such as "voxels", one panel per title → (coverage, risk, unit)."""
    figure = Figure(figsize=(3.8 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, (coverage, risk, unit)) in zip(axes, panels.items(), strict=True):
        ax.plot(coverage, risk, color=COLORS[1], lw=1.6)
        ax.set_title(title, fontsize="medium")
        ax.set(xlabel=f"fraction of {unit} kept, most certain first", ylabel="risk", xlim=(0, 1))
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.2)
    return figure
