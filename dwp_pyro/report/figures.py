"""Pictures: a case in three planes, learning curves, and those of `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dwp_pyro.metrics import MEASURES, Summary
from dwp_pyro.metrics.calibration import Reliability
from dwp_pyro.metrics.uncertainty import RiskCoverage
from dwp_pyro.storage import atomic_path

__all__ = ["save_case_figure", "save_learning_curves", "save_reliability", "save_risk_coverage"]

_PLANES = ("sagittal", "coronal", "axial")
# Told apart by the colour-blind too: Okabe and Ito 2008, yellow left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX*"


def save_case_figure(
    path: Path,
    title: str,
    affine: NDArray[np.float64],
    image: NDArray[np.float32],
    truth: NDArray[np.bool_] | None,
    probability: NDArray[np.float32],
    entropy: NDArray[np.float32],
    mutual_information: NDArray[np.float32],
) -> None:
    """Draw the axial, coronal and sagittal plane through the region: image, outlines, and the maps.

    All volumes are [X, Y, Z] on the scan's grid; planes are shown in radiological convention (the
    person's right on the left), each through the largest cross-section of the region, true or predicted.
    """
    predicted = probability > 0.5
    region = predicted if truth is None or not truth.any() else truth
    if not region.any():
        region = probability >= probability.max()
    volumes: dict[str, tuple[Any, str | None, float | None]] = {
        "image": (image, "gray", None),
        "truth (green), prediction (red)": (image, "gray", None),
        "probability": (probability, "viridis", 1.0),
        "entropy (nats)": (entropy, "magma", float(np.log(2))),
        "mutual information (nats)": (mutual_information, "magma", max(float(mutual_information.max()), 1e-3)),
    }
    region_ras = _to_ras(region, affine)
    figure = Figure(figsize=(3.2 * len(volumes), 9.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(volumes))
    spacing = np.linalg.norm(_ras_affine(image, affine)[:3, :3], axis=0)
    outlines = [
        (_to_ras(mask, affine), colour) for mask, colour in ((truth, "lime"), (predicted, "red")) if mask is not None
    ]
    for row, plane in enumerate((2, 1, 0)):
        position = int(region_ras.sum(tuple(axis for axis in range(3) if axis != plane)).argmax())
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
                figure.colorbar(shown, ax=axes[:, column], location="bottom", shrink=0.8)
            ax.set_xticks([])
            ax.set_yticks([])
            if row == 0:
                ax.set_title(name, fontsize=10)
            if column == 0:
                ax.set_ylabel(_PLANES[plane])
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")


def save_learning_curves(path: Path, summaries: Mapping[int, Mapping[str, Mapping[str, Summary]]]) -> None:
    """Draw Dice and IoU against n, a line an arm, with the standard error over seeds.

    Args:
        path: of the picture.
        summaries: n → arm → measure → summary over seeds.
    """
    arms = sorted({arm for at_n in summaries.values() for arm in at_n})
    sizes = sorted(summaries)
    figure = Figure(figsize=(11.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
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
                color=_COLOURS[index % len(_COLOURS)],
                marker=_MARKERS[index % len(_MARKERS)],
                capsize=3,
            )
        ax.set_xticks(range(len(sizes)), [str(n) for n in sizes])
        ax.set_xlabel("training cases n")
        ax.set_ylabel(MEASURES[name][0])
        ax.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle("Mean and standard error over seeds")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def save_reliability(path: Path, reliability: Reliability) -> None:
    """Draw the observed frequency of each bin against its mean probability, above how many voxels it holds."""
    figure = Figure(figsize=(4.8, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    above.plot(reliability.confidence, reliability.frequency, color=_COLOURS[0], marker="o", label="observed")
    above.set_ylabel("part of the voxels in the region")
    above.legend()
    bins = len(reliability.count)
    below.bar(np.arange(bins) / bins, reliability.count, 1 / bins, align="edge", color=_COLOURS[0], edgecolor="white")
    below.set_yscale("symlog", linthresh=1)  # empty bins are 0
    below.set_xlabel("probability of the region")
    below.set_ylabel("voxels")
    for ax in (above, below):
        ax.grid(alpha=0.3)
    figure.suptitle("Reliability over the brain's voxels")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def save_risk_coverage(path: Path, voxels: RiskCoverage, cases: RiskCoverage, score: str) -> None:
    """Draw selective risk against coverage.

    Args:
        path: of the picture.
        voxels: most certain first, their risk an error.
        cases: most certain first, their risk 1 − Dice.
        score: what cases are sorted by.
    """
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "Voxels of the brain, by entropy": (voxels, "part of the voxels that is wrong", ""),
        f"Cases, by {score}": (cases, "mean of 1 − Dice", "o"),
    }
    for ax, (title, (curve, risk, marker)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        ax.plot(curve.coverage, curve.risk, color=_COLOURS[0], marker=marker)
        ax.set_title(f"{title}: AURC {curve.aurc:.3g}", fontsize=10)
        ax.set_xlabel("coverage: part kept, the most certain")
        ax.set_ylabel(risk)
        ax.set_xlim(0, 1.03)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


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
