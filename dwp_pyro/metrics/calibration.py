"""Calibration of voxel probabilities [V] against membership in the region [V]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Reliability", "ace", "brier", "nll"]

_MIN_PROBABILITY = 1e-7
_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Reliability diagram (Guo et al. 2017) as sums over voxels in 15 equal bins of probability, [15] each.

    Diagrams of several cases are added.

    Args:
        count: Number of voxels.
        positives: Number of voxels in the region.
        probability: Sum of the probabilities.
    """

    count: NDArray[np.int64]
    positives: NDArray[np.int64]
    probability: NDArray[np.float64]

    @classmethod
    def of(cls, probability: NDArray[np.float32], truth: NDArray[np.bool_]) -> Reliability:
        """Bin voxels, [V] each."""
        # MONAI's `calibration_binning` sums in float32, which loses the small terms of a whole scan.
        bins = np.minimum((probability * _BINS).astype(np.int64), _BINS - 1)
        count, positives = (np.bincount(some, minlength=_BINS) for some in (bins, bins[truth]))
        return cls(count, positives, np.bincount(bins, probability, _BINS).astype(np.float64))

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(
            self.count + other.count, self.positives + other.positives, self.probability + other.probability
        )

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Mean probability per bin; NaN in empty bins."""
        return _quotient(self.probability, self.count)

    @property
    def frequency(self) -> NDArray[np.float64]:
        """Fraction of voxels in the region per bin; NaN in empty bins."""
        return _quotient(self.positives, self.count)

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |confidence − frequency| over bins, weighted by their voxels."""
        return float(np.abs(self.probability - self.positives).sum() / self.count.sum())

    @property
    def mce(self) -> float:
        """Maximum calibration error: largest |confidence − frequency| over bins."""
        return float(np.nanmax(np.abs(self.confidence - self.frequency)))


def ace(probability: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """Return the adaptive calibration error (Nixon et al. 2019): ECE with bins between the 15-quantiles.

    Equal probabilities share a bin. ECE puts most voxels of a brain, which are far from the region, into one bin;
    quantiles separate them.
    """
    edges = np.unique(np.quantile(probability, np.arange(1, _BINS) / _BINS))
    gaps = np.bincount(np.searchsorted(edges, probability), probability - truth.astype(np.float64))
    return float(np.abs(gaps).sum() / len(probability))


def brier(probability: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """Return the mean squared difference of probability and truth (Brier 1950), in [0, 1]."""
    return float(np.square(probability - truth.astype(np.float64)).mean())


def nll(probability: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """Return the mean −log p(truth) in nats, with probabilities clipped to [1e-7, 1 − 1e-7]."""
    p = np.clip(probability.astype(np.float64), _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    return float(-np.log(np.where(truth, p, 1 - p)).mean())


def _quotient(sums: NDArray[Any], count: NDArray[np.int64]) -> NDArray[np.float64]:
    quotient: NDArray[np.float64] = np.divide(sums, count, out=np.full(len(count), np.nan), where=count > 0)
    return quotient
