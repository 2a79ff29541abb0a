"""Case in three planes: image, segmentations, uncertainty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dwp_pyro.plots.style import save_figure

__all__ = ["largest_section", "save_case_figure", "shown_region"]

_PLANES = ("sagittal", "coronal", "axial")


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
    """Draw axial, coronal and sagittal planes through the region: image, outlines and maps.

    All volumes are [X, Y, Z] on the grid of the scan. Planes are in radiological convention (right side on the left),
    each through the largest section of the region.
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
    axes = figure.subplots(3, len(volumes), subplot_kw={"xticks": [], "yticks": []})
    ras_axes = nibabel.orientations.io_orientation(affine)[:, 0]
    spacing = nibabel.affines.voxel_sizes(affine)[np.argsort(ras_axes)]
    outlines = [
        (_to_ras(mask, affine), color) for mask, color in ((truth, "lime"), (predicted, "red")) if mask is not None
    ]
    for row, plane in enumerate((2, 1, 0)):
        position = largest_section(region_ras, plane)
        sides = [side for axis, side in enumerate(spacing) if axis != plane]
        for column, (name, (volume, colors, top)) in enumerate(volumes.items()):
            ax = axes[row, column]
            slice_ = _slice(_to_ras(volume, affine), plane, position)
            low, high = (0.0, top) if top else (float(slice_.min()), float(np.percentile(slice_, 99.8)) or 1.0)
            shown = ax.imshow(slice_, cmap=colors, vmin=low, vmax=high, aspect=sides[1] / sides[0], origin="lower")
            if column == 1:
                for mask, color in outlines:
                    outline = _slice(mask, plane, position)
                    if outline.any() and not outline.all():
                        ax.contour(outline, levels=[0.5], colors=color, linewidths=1.2)
            if column > 1 and row == 0:
                bar = figure.colorbar(shown, ax=axes[:, column], location="bottom", shrink=0.8)
                bar.ax.locator_params(nbins=3)
            if row == 0:
                ax.set_title(name, fontsize=10)
            if column == 0:
                ax.set_ylabel(_PLANES[plane])
    figure.suptitle(title, parse_math=False)
    save_figure(path, figure, dpi=90)


def shown_region(
    truth: NDArray[np.bool_] | None, predicted: NDArray[np.bool_], probability: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Return the region to center a picture on: the true one; if empty, the predicted one, or the likeliest voxels."""
    for region in (truth, predicted):
        if region is not None and region.any():
            return region
    best_guess: NDArray[np.bool_] = probability >= probability.max()
    return best_guess


def largest_section(region: NDArray[np.bool_], axis: int) -> int:
    """Return the index along an axis at which the region [X, Y, Z] has its largest section."""
    return int(region.sum(tuple(other for other in range(3) if other != axis)).argmax())


def _to_ras(volume: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    orientation = nibabel.orientations.io_orientation(affine)
    return np.asarray(nibabel.orientations.apply_orientation(volume, orientation))


def _slice(volume: NDArray[Any], plane: int, position: int) -> NDArray[Any]:
    """Return a plane of a RAS volume, rows upwards, in radiological convention."""
    slice_: NDArray[Any] = np.take(volume, position, axis=plane).T
    return slice_ if plane == 0 else slice_[:, ::-1]
