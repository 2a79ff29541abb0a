"""How far the surfaces of two masks lie apart."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray

from dwp_pyro.metrics.overlap import as_batch

__all__ = ["hd95", "surface_dice"]


def hd95(predicted: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: Sequence[float], one_empty: float) -> float:
    """The 95th percentile of the distance from one surface to the other, the larger of both directions, in mm.

    Args:
        predicted: mask [X, Y, Z].
        truth: mask [X, Y, Z].
        spacing: sides of a voxel, in mm.
        one_empty: what is returned if one of the masks is empty, in mm; if both are it is 0.
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
    """Normalised surface Dice (NSD): the part of both surfaces that lies within a tolerance of the other one.

    A surface is the voxels of a mask with a face on its outside (Seidlitz et al. 2022, after Nikolov et al. 2018).
    Both masks empty: 1; one of them: 0.

    Args:
        predicted: mask [X, Y, Z].
        truth: mask [X, Y, Z].
        spacing: sides of a voxel, in mm.
        tolerance: in mm.
    """
    if not (truth.any() and predicted.any()):
        return float(not (truth.any() or predicted.any()))
    a, b = as_batch(predicted), as_batch(truth)
    with _quiet():
        return float(compute_surface_dice(a, b, [tolerance], include_background=True, spacing=list(spacing)))


def _quiet() -> warnings.catch_warnings[None]:
    """Without MONAI's warnings of its own calls."""
    return warnings.catch_warnings(category=FutureWarning, action="ignore")
