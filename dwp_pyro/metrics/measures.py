"""All metrics of one region of one predicted case against its label."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dwp_pyro.metrics.calibration import Reliability, ace, brier, nll
from dwp_pyro.metrics.lesions import TUMORS, LesionMatching, lesion_scores
from dwp_pyro.metrics.overlap import dice
from dwp_pyro.metrics.surface import hd95, surface_dice
from dwp_pyro.metrics.uncertainty import RiskCoverage, qu_brats, risk_coverage

__all__ = ["EMPTY_MASK_POLICY", "HEADLINE", "MEASURES", "CaseMetrics", "case_metrics"]

#: Metric → title in tables and number of decimals.
MEASURES = {
    "dice": ("Dice", 3),
    "iou": ("IoU", 3),
    "hd95": ("HD95 (mm)", 1),
    "nsd": ("NSD", 3),
    "lesion_dice": ("lesion Dice", 3),
    "lesion_f1": ("lesion F1", 3),
    "nll": ("NLL", 4),
    "brier": ("Brier", 4),
    "ece": ("ECE", 4),
    "ace": ("ACE", 4),
    "mce": ("MCE", 3),
    "qu_brats": ("QU-BraTS", 3),
    "aurc": ("AURC", 5),
    "pairwise_dice": ("pairwise Dice", 3),
}

#: Metrics that tables show; files hold all.
HEADLINE = ("dice", "hd95", "nsd", "lesion_f1", "nll", "ece", "qu_brats")

#: Values for empty masks; written with every result.
EMPTY_MASK_POLICY = (
    "two masks both empty: Dice, IoU, NSD, lesion Dice, lesion F1 and pairwise Dice 1, HD95 0 mm; one of them empty: "
    "these 0, HD95 the diagonal of the scan. For lesion Dice and lesion F1 the truth is empty if all its lesions are "
    "ignored (those up to 50 mm³, of the region “lesion” up to 3 mm³), the prediction if it lies on ignored ones alone"
)

_CURVE_POINTS = 100


class CaseMetrics(NamedTuple):
    """Metrics of one region of one case.

    Args:
        measures: Values of `MEASURES`, except "pairwise_dice", which needs the weight samples.
        reliability: Reliability over brain voxels; summed over cases.
        risk_coverage: Curve over brain voxels, 100 points; averaged over cases.
        mean_entropy: Mean entropy of the brain voxels in nats.
    """

    measures: dict[str, float]
    reliability: Reliability
    risk_coverage: RiskCoverage
    mean_entropy: float


def case_metrics(
    probability: NDArray[np.float32],
    segmented: NDArray[np.bool_],
    entropy: NDArray[np.float32],
    truth: NDArray[np.bool_],
    brain_mask: NDArray[np.bool_],
    spacing: tuple[float, ...],
    matching: LesionMatching = TUMORS,
) -> CaseMetrics:
    """Measure one region of one case; for empty masks see `EMPTY_MASK_POLICY`.

    Args:
        probability: Probability of the region, [X, Y, Z].
        segmented: Predicted mask of the region, [X, Y, Z].
        entropy: Entropy of the probability in nats, [X, Y, Z]; the uncertainty of "qu_brats" and "aurc".
        truth: True mask of the region, [X, Y, Z].
        brain_mask: Voxels of calibration and uncertainty metrics, [X, Y, Z]; at least one.
        spacing: Voxel sides in mm.
        matching: What counts as one lesion, for "lesion_dice" and "lesion_f1".
    """
    diagonal = math.hypot(*(side * voxels for side, voxels in zip(spacing, truth.shape, strict=True)))
    # Crop both masks to their bounding box, which is small compared with the scan.
    (box,) = ndimage.find_objects((segmented | truth).view(np.uint8)) or [...]
    masks = segmented[box], truth[box]
    overlap = dice(*masks)
    lesions = lesion_scores(*masks, spacing, matching)
    p, y, predicted = probability[brain_mask], truth[brain_mask], segmented[brain_mask]
    uncertainty = entropy[brain_mask] * (100 / math.log(2))
    reliability = Reliability.of(p, y)
    curve = risk_coverage(uncertainty, predicted != y, _CURVE_POINTS)
    measures = {
        "dice": overlap,
        "iou": overlap / (2 - overlap),
        "hd95": hd95(*masks, spacing, diagonal),
        "nsd": surface_dice(*masks, spacing),
        "lesion_dice": lesions.dice,
        "lesion_f1": lesions.f1,
        "nll": nll(p, y),
        "brier": brier(p, y),
        "ece": reliability.ece,
        "ace": ace(p, y),
        "mce": reliability.mce,
        "qu_brats": qu_brats(predicted, y, uncertainty),
        "aurc": curve.aurc,
    }
    return CaseMetrics(measures, reliability, curve, float(entropy[brain_mask].mean()))
