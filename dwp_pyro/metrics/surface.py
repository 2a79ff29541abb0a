"""Distances between the surfaces of two masks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray

from dwp_pyro.metrics.overlap import as_batch

__all__ = ["hd95", "surface_dice"]


def hd95(predicted: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: Sequence[float], one_empty: float) -> float:
    """Return the 95th percentile of the distances between two surfaces in mm, the larger of both directions.

    Args:
        predicted: Predicted mask [X, Y, Z].
        truth: True mask [X, Y, Z].
        spacing: Voxel sides in mm.
        one_empty: Value in mm if exactly one mask is empty; it is 0 if both are.
    """
    if not (truth.any() and predicted.any()):
        return one_empty if truth.any() or predicted.any() else 0.0
    a, b = as_batch(predicted), as_batch(truth)
    with _quiet():
        distance = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=list(spacing))
    return float(distance)


def surface_dice(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: Sequence[float], tolerance: float = 1.0
) -> float:
    """Return the normalized surface Dice (NSD): the fraction of both surfaces within a tolerance of the other.

    Surface voxels have a face on the outside of the mask (Seidlitz et al. 2022, after Nikolov et al. 2018). The value
    is 1 if both masks are empty, 0 if one is.

    Args:
        predicted: Predicted mask [X, Y, Z].
        truth: True mask [X, Y, Z].
        spacing: Voxel sides in mm.
        tolerance: Tolerance in mm.
    """
    if not (truth.any() and predicted.any()):
        return float(not (truth.any() or predicted.any()))
    a, b = as_batch(predicted), as_batch(truth)
    tolerance *= 1 + 1e-4  # spacings are rounded
    with _quiet():
        return float(compute_surface_dice(a, b, [tolerance], include_background=True, spacing=list(spacing)))


def _quiet() -> warnings.catch_warnings[None]:
    """Suppress the FutureWarnings that MONAI raises about its own calls."""
    return warnings.catch_warnings(category=FutureWarning, action="ignore")
