"""Whether what is uncertain is what is wrong: of voxels in a case, and of cases among others."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["RiskCoverage", "qu_brats", "risk_coverage"]

_THRESHOLDS = np.linspace(0, 100, 41)


def qu_brats(predicted: NDArray[np.bool_], truth: NDArray[np.bool_], uncertainty: NDArray[np.float32]) -> float:
    """The QU-BraTS score of a region (Mehta et al. 2022), in [0, 1].

    At each of 41 thresholds τ from 0 to 100 the voxels of uncertainty u ≤ τ are kept. Over τ / 100, by trapezia,

        [AUC Dice + (1 − AUC FTP) + (1 − AUC FTN)] / 3

    with Dice that of the kept voxels (1 where they hold no region, neither true nor predicted), FTP the part of all
    true positives that is not kept, FTN that of all true negatives (0 where there are none): high where the wrong
    voxels are uncertain, and the right ones certain.

    Args:
        predicted: of the brain's voxels, [V].
        truth: [V].
        uncertainty: from 0 to 100, [V].
    """
    # Of each voxel the first threshold that keeps it, and its kind: true, false negative, false, true positive.
    first = np.minimum(np.searchsorted(_THRESHOLDS, uncertainty), len(_THRESHOLDS) - 1)
    kind = 2 * predicted.astype(np.int64) + truth
    table = np.bincount(4 * first + kind, minlength=4 * len(_THRESHOLDS)).reshape(-1, 4)
    tn, fn, fp, tp = table.cumsum(0).T
    size = 2 * tp + fp + fn
    dice = np.where(size > 0, 2 * tp / np.maximum(size, 1), 1.0)
    ftp, ftn = (1 - kept / kept[-1] if kept[-1] else np.zeros(len(kept)) for kept in (tp, tn))
    return float(np.trapezoid((dice + (1 - ftp) + (1 - ftn)) / 3, _THRESHOLDS / 100))


class RiskCoverage(NamedTuple):
    """Selective risk against coverage, [C] each: the mean risk of the most certain part, and how large it is."""

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]

    @property
    def aurc(self) -> float:
        """The area under the curve, as the mean of its risks."""
        return float(self.risk.mean())


def risk_coverage(
    uncertainty: NDArray[np.floating], risk: NDArray[np.floating] | NDArray[np.bool_], points: int
) -> RiskCoverage:
    """The risk-coverage curve of n things (Geifman and El-Yaniv 2017; Jaeger et al. 2023).

    At coverage c = 1 / C, 2 / C, …, 1 the selective risk is the sum of the risks of the c·n most certain, divided by
    c·n; one that c·n covers in part counts in part. Things that are equally uncertain have their mean risk, as if in
    random order. With C = n the mean of the curve is the AURC of Geifman, Uziel and El-Yaniv 2019; with fewer points it
    is that area by steps of 1 / C.

    Args:
        uncertainty: [n], in any unit: their order is what counts.
        risk: [n]; of a voxel, whether it is wrong; of a case, 1 − Dice.
        points: C.
    """
    order = np.argsort(uncertainty)
    ranked = uncertainty[order]
    ends = np.append(np.flatnonzero(ranked[1:] > ranked[:-1]) + 1, len(ranked))  # of what is equally uncertain
    totals = risk[order].cumsum(dtype=np.float64)[ends - 1]
    coverage = np.arange(1, points + 1) / points
    covered = coverage * len(ranked)
    return RiskCoverage(coverage, np.interp(covered, np.append(0, ends), np.append(0, totals)) / covered)
