"""Whether uncertainty ranks errors: of voxels in a case, and of cases in a test set."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["RiskCoverage", "qu_brats", "risk_coverage"]

_THRESHOLDS = np.linspace(0, 100, 41)


def qu_brats(predicted: NDArray[np.bool_], truth: NDArray[np.bool_], uncertainty: NDArray[np.float32]) -> float:
    """Return the QU-BraTS score of a region (Mehta et al. 2022), in [0, 1].

    At each of 41 thresholds τ from 0 to 100 the voxels with uncertainty u ≤ τ are kept. With areas over τ / 100 by the
    trapezoidal rule, the score is

        [AUC Dice + (1 − AUC FTP) + (1 − AUC FTN)] / 3

    with Dice of the kept voxels (1 if both masks are empty there), FTP the fraction of true positives that is not kept,
    and FTN that of true negatives (0 if there are none). It is high if errors are uncertain and correct voxels certain.

    Args:
        predicted: Predicted mask of the brain's voxels, [V].
        truth: True mask, [V].
        uncertainty: Uncertainty from 0 to 100, [V].
    """
    # Per voxel: the first threshold that keeps it, and its kind (true negative, false negative, false positive, true
    # positive).
    first = np.minimum(np.searchsorted(_THRESHOLDS, uncertainty), len(_THRESHOLDS) - 1)
    kind = 2 * predicted.astype(np.int64) + truth
    table = np.bincount(4 * first + kind, minlength=4 * len(_THRESHOLDS)).reshape(-1, 4)
    tn, fn, fp, tp = table.cumsum(0).T
    size = 2 * tp + fp + fn
    dice = np.where(size > 0, 2 * tp / np.maximum(size, 1), 1.0)
    ftp, ftn = (1 - kept / kept[-1] if kept[-1] else np.zeros(len(kept)) for kept in (tp, tn))
    return float(np.trapezoid((dice + (1 - ftp) + (1 - ftn)) / 3, _THRESHOLDS / 100))


class RiskCoverage(NamedTuple):
    """Selective risk against coverage, [C] each: the mean risk of the most certain fraction, and that fraction."""

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]

    @property
    def aurc(self) -> float:
        """Area under the curve: the mean of its risks."""
        return float(self.risk.mean())


def risk_coverage(
    uncertainty: NDArray[np.floating], risk: NDArray[np.floating] | NDArray[np.bool_], points: int
) -> RiskCoverage:
    """Return the risk-coverage curve of n items (Geifman and El-Yaniv 2017; Jaeger et al. 2023).

    At coverage c = 1 / C, 2 / C, …, 1 the selective risk is the sum of the risks of the c·n most certain items over
    c·n; an item covered in part counts in part. Ties have their mean risk. With C = n the mean of the curve is the AURC
    of Geifman, Uziel and El-Yaniv 2019; with fewer points it approximates that area in steps of 1 / C.

    Args:
        uncertainty: Uncertainty in any unit, of which only the order matters, [n].
        risk: Risk, [n]: the error of a voxel, or 1 − Dice of a case.
        points: Number of points C.
    """
    order = np.argsort(uncertainty)
    ranked = uncertainty[order]
    ends = np.append(np.flatnonzero(ranked[1:] > ranked[:-1]) + 1, len(ranked))  # of ties
    totals = risk[order].cumsum(dtype=np.float64)[ends - 1]
    coverage = np.arange(1, points + 1) / points
    covered = coverage * len(ranked)
    return RiskCoverage(coverage, np.interp(covered, np.append(0, ends), np.append(0, totals)) / covered)
