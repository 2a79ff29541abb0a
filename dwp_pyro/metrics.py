"""Measures of one predicted case against its label."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.metrics import calibration_binning, compute_dice, compute_hausdorff_distance, compute_iou
from numpy.typing import NDArray

__all__ = ["EMPTY_MASK_POLICY", "MEASURES", "Summary", "case_metrics", "show", "summarise"]

#: What `case_metrics` measures → its title in tables, and the decimals it is shown with.
MEASURES = {"dice": ("Dice", 3), "iou": ("IoU", 3), "hd95": ("HD95 (mm)", 1), "nll": ("NLL", 4), "ece": ("ECE", 4)}

#: What is done about empty masks; written beside every figure.
EMPTY_MASK_POLICY = (
    "truth and prediction both empty: Dice 1, IoU 1, HD95 0 mm; one of them empty: Dice 0, IoU 0, "
    "HD95 the diagonal of the scan"
)

_SMALLEST_PROBABILITY = 1e-7
_BINS = 15


def case_metrics(
    probability: NDArray[np.float32],
    truth: NDArray[np.bool_],
    brain: NDArray[np.bool_],
    spacing: tuple[float, ...],
) -> dict[str, float]:
    """Dice, IoU, HD95, NLL and ECE of one case.

    Args:
        probability: of the region, [X, Y, Z]; segmented where it is above 1/2.
        truth: the region, [X, Y, Z].
        brain: voxels over which NLL and ECE are taken, [X, Y, Z].
        spacing: sides of a voxel, in mm.

    Returns:
        "dice", "iou"; "hd95", the 95th percentile of the distance between the surfaces, the larger of
        both directions, in mm; "nll", mean −log p(truth) of a brain voxel in nats, probabilities held
        off 0 and 1 by 1e-7; "ece", the expected calibration error of the region's probability over the
        brain, 15 equal bins. Empty masks: `EMPTY_MASK_POLICY`.
    """
    predicted = probability > 0.5
    if truth.any() and predicted.any():
        a, b = (_as_batch(mask) for mask in (predicted, truth))
        dice, iou = float(compute_dice(a, b)), float(compute_iou(a, b))
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # MONAI's, at its own call
            distance = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=list(spacing))
        hd95 = float(distance)
    elif truth.any() or predicted.any():
        dice = iou = 0.0
        hd95 = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
    else:
        dice, iou, hd95 = 1.0, 1.0, 0.0
    p = np.clip(probability[brain].astype(np.float64), _SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
    nll = float(-np.log(np.where(truth[brain], p, 1 - p)).mean())
    bins = calibration_binning(_as_batch(probability[brain]), _as_batch(truth[brain]), num_bins=_BINS)
    confidence, frequency, count = (part[0, 0] for part in bins)
    gaps = torch.nan_to_num((confidence - frequency).abs()) * count
    return {"dice": dice, "iou": iou, "hd95": hd95, "nll": nll, "ece": float(gaps.sum() / count.sum())}


def _as_batch(values: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))[None, None]


@dataclass(frozen=True)
class Summary:
    """Of one measure over cases: mean, standard error of the mean (NaN for one case), number of cases."""

    mean: float
    standard_error: float
    cases: int


def summarise(cases: Iterable[Mapping[str, float]]) -> dict[str, Summary]:
    """Each measure over the cases; all cases have the same measures."""
    rows = list(cases)
    summaries = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
        summaries[name] = Summary(float(values.mean()), error, len(values))
    return summaries


def show(measure: str, summary: Summary) -> str:
    """Mean ± standard error, of one case the mean alone; a measure that is none of `MEASURES` without decimals."""
    _, digits = MEASURES.get(measure, ("", 0))
    error = f" ± {summary.standard_error:.{digits}f}" if summary.cases > 1 else ""
    return f"{summary.mean:.{digits}f}{error}"
