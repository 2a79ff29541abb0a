"""Pictures: a case in three planes, learning curves, curves of training and of calibration."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dwp_pyro.metrics import MEASURES, Summary
from dwp_pyro.metrics.calibration import Reliability
from dwp_pyro.metrics.uncertainty import RiskCoverage
from dwp_pyro.storage import atomic_path

__all__ = [
    "COLOURS",
    "largest_section",
    "reliability_svg",
    "risk_coverage_svg",
    "save_case_figure",
    "save_figure",
    "save_learning_curves",
    "save_reliability",
    "save_risk_coverage",
    "shown_region",
    "training_svg",
]

_PLANES = ("sagittal", "coronal", "axial")
#: Told apart by the colour-blind too: Okabe and Ito 2008, yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX*"
_INK = "#010203"  # of text and axes in an SVG, until it becomes the colour of the text around
_PAGE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dwp-pyro",
}
_TRAINING = {
    "log_likelihood": "log-likelihood (nats)",
    "kl": "KL from the prior (nats)",
    "validation_dice": "Dice of validation cases",
}


def save_case_figure(
    path: Path,
    title: str,
    affine: NDArray[np.float64],
    image: NDArray[np.float32],
    truth: NDArray[np.bool_] | None,
    predicted: NDArray[np.bool_],
    probability: NDArray[np.float32],
    entropy: NDArray[np.float32],
    mutual_information: NDArray[np.float32],
) -> None:
    """Draw the axial, coronal and sagittal plane through the region: image, outlines, and the maps.

    All volumes are [X, Y, Z] on the scan's grid; planes are shown in radiological convention (the
    person's right on the left), each through the largest cross-section of the region, true or predicted.
    """
    volumes: dict[str, tuple[Any, str | None, float | None]] = {
        "image": (image, "gray", None),
        "prediction (red)" if truth is None else "truth (green), prediction (red)": (image, "gray", None),
        "probability": (probability, "viridis", 1.0),
        "entropy (nats)": (entropy, "magma", float(np.log(2))),
        "mutual information (nats)": (mutual_information, "magma", max(float(mutual_information.max()), 1e-3)),
    }
    region_ras = _to_ras(shown_region(truth, predicted, probability), affine)
    figure = Figure(figsize=(3.2 * len(volumes), 9.6), layout="constrained")
    axes = figure.subplots(3, len(volumes))
    spacing = np.linalg.norm(_ras_affine(image, affine)[:3, :3], axis=0)
    outlines = [
        (_to_ras(mask, affine), colour) for mask, colour in ((truth, "lime"), (predicted, "red")) if mask is not None
    ]
    for row, plane in enumerate((2, 1, 0)):
        position = largest_section(region_ras, plane)
        sides = [side for axis, side in enumerate(spacing) if axis != plane]
        for column, (name, (volume, colours, top)) in enumerate(volumes.items()):
            ax = axes[row, column]
            slice_ = _slice(_to_ras(volume, affine), plane, position)
            low, high = (0.0, top) if top else (float(slice_.min()), float(np.percentile(slice_, 99.8)) or 1.0)
            shown = ax.imshow(slice_, cmap=colours, vmin=low, vmax=high, aspect=sides[1] / sides[0], origin="lower")
            if column == 1:
                for mask, colour in outlines:
                    outline = _slice(mask, plane, position)
                    if outline.any() and not outline.all():
                        ax.contour(outline, levels=[0.5], colors=colour, linewidths=1.2)
            if column > 1 and row == 0:
                bar = figure.colorbar(shown, ax=axes[:, column], location="bottom", shrink=0.8)
                bar.ax.locator_params(nbins=3)
            ax.set_xticks([])
            ax.set_yticks([])
            if row == 0:
                ax.set_title(name, fontsize=10)
            if column == 0:
                ax.set_ylabel(_PLANES[plane])
    figure.suptitle(title, parse_math=False)
    save_figure(path, figure, dpi=90)


def shown_region(
    truth: NDArray[np.bool_] | None, predicted: NDArray[np.bool_], probability: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """What a picture of a case is centred on: the true region; if empty the predicted one, or its best guess."""
    for region in (truth, predicted):
        if region is not None and region.any():
            return region
    return probability >= probability.max()


def largest_section(region: NDArray[np.bool_], axis: int) -> int:
    """Where along an axis the region [X, Y, Z] is largest."""
    return int(region.sum(tuple(other for other in range(3) if other != axis)).argmax())


def save_learning_curves(path: Path, summaries: Mapping[int, Mapping[str, Mapping[str, Summary]]]) -> None:
    """Draw Dice and IoU against n, a line an arm, with the standard error over seeds.

    Args:
        path: of the picture.
        summaries: n → arm → measure → summary over seeds.
    """
    arms = sorted({arm for at_n in summaries.values() for arm in at_n})
    sizes = sorted(summaries)
    figure = Figure(figsize=(11.2, 4.6), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), ("dice", "iou"), strict=True):
        for index, arm in enumerate(arms):
            points = {n: at_n[arm][name] for n, at_n in summaries.items() if arm in at_n}
            # Side by side: error bars at one place hide each other.
            shift = 0.4 * ((index + 0.5) / len(arms) - 0.5)
            ax.errorbar(
                [sizes.index(n) + shift for n in points],
                [summary.mean for summary in points.values()],
                [summary.standard_error if summary.cases > 1 else 0.0 for summary in points.values()],
                label=arm,
                color=COLOURS[index % len(COLOURS)],
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


def training_svg(records: Sequence[Mapping[str, Any]]) -> str:
    """Log-likelihood, KL and validation Dice against steps, a line a stage, as SVG for a page.

    Args:
        records: lines of `metrics.jsonl`: "stage", "step" and metrics.

    Returns:
        "" if there is nothing to draw.
    """
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {name: {} for name in _TRAINING}
    for record in records:
        for name in _TRAINING.keys() & record.keys():
            lines[name].setdefault(record["stage"], []).append((record["step"], record[name]))
    if not any(value for line in lines["kl"].values() for _, value in line):
        lines["kl"] = {}  # of a deterministic network
    drawn = {name: stages for name, stages in lines.items() if stages}
    if not drawn:
        return ""
    with rc_context(_PAGE):
        figure = Figure(figsize=(3.4 * len(drawn), 2.8), layout="constrained")
        axes = figure.subplots(1, len(drawn), squeeze=False)[0]
        for ax, (name, stages) in zip(axes, drawn.items(), strict=True):
            for index, (stage, line) in enumerate(stages.items()):
                colour = COLOURS[index % len(COLOURS)]
                marker = _MARKERS[index % len(_MARKERS)] if name == "validation_dice" else None
                ax.plot(*zip(*line, strict=True), color=colour, marker=marker, label=stage, lw=1.3)
            ax.set_title(_TRAINING[name], fontsize="medium")
            ax.set_xlabel("step")
            ax.ticklabel_format(axis="y", scilimits=(-3, 4))
            ax.grid()
        labels = figure.axes[0].get_legend_handles_labels()
        if len(labels[0]) > 1:
            figure.legend(*labels, loc="outside lower center", ncols=4, fontsize="small")
        return _svg(figure)


def save_reliability(path: Path, reliability: Reliability) -> None:
    """Draw `reliability_svg` as a picture."""
    save_figure(path, _reliability(*(getattr(reliability, name) for name in ("confidence", "frequency", "count"))))


def reliability_svg(
    confidence: Sequence[float | None], frequency: Sequence[float | None], count: Sequence[float]
) -> str:
    """Observed frequency against stated probability, above the share of voxels, as SVG for a page.

    Args:
        confidence: [bins] mean probability of the region's voxels; None or NaN in an empty bin.
        frequency: [bins] share of them within the region; None or NaN in an empty bin.
        count: [bins] number of voxels.
    """
    with rc_context(_PAGE):
        return _svg(_reliability(confidence, frequency, count))


def _reliability(confidence: Sequence[Any], frequency: Sequence[Any], count: Sequence[float]) -> Figure:
    figure = Figure(figsize=(3.8, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=rcParams["axes.labelcolor"], lw=0.8, ls="--", alpha=0.6)
    points = np.array([confidence, frequency], dtype=float)  # None becomes NaN
    filled = points[:, ~np.isnan(points).any(0)]
    upper.plot(*filled, color=COLOURS[0], marker=_MARKERS[0], ms=4)
    upper.set(ylabel="share that is region", xlim=(0, 1), ylim=(0, 1))
    middles = (np.arange(len(count)) + 0.5) / len(count)
    lower.bar(middles, np.divide(count, np.sum(count)), 0.9 / len(count), color=COLOURS[0], alpha=0.6)
    lower.set(xlabel="probability given", ylabel="share of voxels", yscale="log")
    for ax in (upper, lower):
        ax.grid(alpha=0.2)
    return figure


def save_risk_coverage(path: Path, panels: Mapping[str, tuple[RiskCoverage, str]]) -> None:
    """Draw `risk_coverage_svg`, a panel a curve, as a picture.

    Args:
        path: of the picture.
        panels: title → curve, and the unit that is kept or left out.
    """
    save_figure(path, _risk_coverage({title: (*curve, unit) for title, (curve, unit) in panels.items()}))


def risk_coverage_svg(coverage: Sequence[float], risk: Sequence[float], unit: str) -> str:
    """Risk against coverage, as SVG for a page.

    Args:
        coverage: shares that are kept, the most certain first.
        risk: of what is kept.
        unit: what is kept or left out: "voxels", "cases".
    """
    with rc_context(_PAGE):
        return _svg(_risk_coverage({"": (coverage, risk, unit)}))


def _risk_coverage(panels: Mapping[str, tuple[Any, Any, str]]) -> Figure:
    figure = Figure(figsize=(3.8 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, (coverage, risk, unit)) in zip(axes, panels.items(), strict=True):
        ax.plot(coverage, risk, color=COLOURS[1], lw=1.6)
        ax.set_title(title, fontsize="medium")
        ax.set(xlabel=f"share of {unit} kept, the most certain first", ylabel="risk", xlim=(0, 1))
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.2)
    return figure


def save_figure(path: Path, figure: Figure, dpi: int = 120) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def _svg(figure: Figure) -> str:
    """A figure as an element of a page: its text is text, and takes font and colour from the text around it."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    # Names of groups are the same in every figure, which a page must not have twice; nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    return svg.replace(_INK, "currentColor")


def _to_ras(volume: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    orientation = nibabel.orientations.io_orientation(affine)
    return np.asarray(nibabel.orientations.apply_orientation(volume, orientation))


def _ras_affine(volume: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    orientation = nibabel.orientations.io_orientation(affine)
    return np.asarray(affine @ nibabel.orientations.inv_ornt_aff(orientation, volume.shape))


def _slice(volume: NDArray[Any], plane: int, position: int) -> NDArray[Any]:
    """One plane of a RAS volume, rows upwards; where it shows both sides, the person's right is on the left."""
    slice_ = np.take(volume, position, axis=plane).T
    return slice_ if plane == 0 else slice_[:, ::-1]
