"""Whether probabilities are what they say: of voxels, [V], beside whether they are in the region, [V]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Reliability", "ace", "brier", "nll"]

_SMALLEST_PROBABILITY = 1e-7
_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram (Guo et al. 2017) as sums over voxels in 15 equal bins of probability, [15] each.

    That of several cases is the sum of theirs.

    Args:
        count: voxels.
        positives: voxels in the region.
        probability: sum of the probabilities.
    """

    count: NDArray[np.int64]
    positives: NDArray[np.int64]
    probability: NDArray[np.float64]

    @classmethod
    def of(cls, probability: NDArray[np.float32], truth: NDArray[np.bool_]) -> Reliability:
        """Of voxels, [V] each."""
        # Not by MONAI's `calibration_binning`: its sums are float32, and lose what most voxels of a scan add.
        bins = np.minimum((probability * _BINS).astype(np.int64), _BINS - 1)
        count, positives = (np.bincount(some, minlength=_BINS) for some in (bins, bins[truth]))
        return cls(count, positives, np.bincount(bins, probability, _BINS).astype(np.float64))

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(
            self.count + other.count, self.positives + other.positives, self.probability + other.probability
        )

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Mean probability of each bin; NaN where it is empty."""
        return _quotient(self.probability, self.count)

    @property
    def frequency(self) -> NDArray[np.float64]:
        """Part of each bin's voxels that is in the region; NaN where it is empty."""
        return _quotient(self.positives, self.count)

    @property
    def ece(self) -> float:
        """Expected calibration error: mean over voxels of their bin's |confidence − frequency|."""
        return float(np.abs(self.probability - self.positives).sum() / self.count.sum())

    @property
    def mce(self) -> float:
        """Maximum calibration error: the largest |confidence − frequency| of a bin."""
        return float(np.nanmax(np.abs(self.confidence - self.frequency)))


def ace(probability: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """Adaptive calibration error (Nixon et al. 2019): as ECE, the 15 bins between quantiles of the probabilities.

    Equal probabilities share a bin. Most voxels of a brain are surely outside the region, and fill one of ECE's bins;
    here they are told apart.
    """
    edges = np.unique(np.quantile(probability, np.arange(1, _BINS) / _BINS))
    gaps = np.bincount(np.searchsorted(edges, probability), probability - truth.astype(np.float64))
    return float(np.abs(gaps).sum() / len(probability))


def brier(probability: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """Mean squared difference of probability and truth (Brier 1950), of the region alone: in [0, 1]."""
    return float(np.square(probability - truth.astype(np.float64)).mean())


def nll(probability: NDArray[np.float32], truth: NDArray[np.bool_]) -> float:
    """Mean −log p(truth) in nats, probabilities held off 0 and 1 by 1e-7."""
    p = np.clip(probability.astype(np.float64), _SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
    return float(-np.log(np.where(truth, p, 1 - p)).mean())


def _quotient(sums: NDArray[Any], count: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(sums, count, out=np.full(len(count), np.nan), where=count > 0)
