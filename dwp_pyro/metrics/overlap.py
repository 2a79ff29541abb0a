"""Overlap of two masks, and mean overlap of many."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from monai.metrics import compute_dice
from numpy.typing import NDArray

__all__ = ["PairwiseDice", "as_batch", "dice", "mean_dice"]


def dice(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Return 2 |A ∩ B| / (|A| + |B|) of two masks [X, Y, Z]; 1 if both are empty."""
    return float(compute_dice(as_batch(predicted), as_batch(truth), ignore_empty=False))


def mean_dice(cases: Iterable[tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> float:
    """Return the mean Dice over cases and regions, of predicted and true masks [R, X, Y, Z].

    A region that a case lacks is skipped, because an empty prediction would score 1 there. If every case lacks every
    region, an empty prediction scores 1 and any other 0.
    """
    present: list[float] = []
    absent: list[float] = []
    for predicted, truth in cases:
        for mask, true_mask in zip(predicted, truth, strict=True):
            (present if true_mask.any() else absent).append(dice(mask, true_mask))
    scores = present or absent
    return sum(scores) / len(scores)


def as_batch(mask: NDArray[np.bool_]) -> torch.Tensor:
    """Return a mask [X, Y, Z] as [1, 1, X, Y, Z], the shape of MONAI's metrics."""
    return torch.from_numpy(mask)[None, None]


class PairwiseDice:
    """Running mean of Dice over all pairs of masks; 1 for a pair of empty masks.

    Over the segmentations of S weight samples it measures their agreement; low values predict a failed segmentation
    (Roy et al. 2019; Zenk et al. 2025). Masks are kept at one bit per voxel.
    """

    def __init__(self) -> None:
        self._masks: list[NDArray[np.uint64]] = []
        self._sizes: list[int] = []
        self._total = 0.0

    def add(self, mask: NDArray[np.bool_]) -> None:
        """Compare a mask with all earlier ones; all must have the same number of voxels."""
        packed = np.packbits(mask)
        bits = np.pad(packed, (0, -len(packed) % 8)).view(np.uint64)
        size = _count(bits)
        for other, other_size in zip(self._masks, self._sizes, strict=True):
            both = size + other_size
            self._total += 2 * _count(bits & other) / both if both else 1.0
        self._masks.append(bits)
        self._sizes.append(size)

    def mean(self) -> float:
        """Return the mean over S (S − 1) / 2 pairs; NaN if there are none."""
        pairs = len(self._masks) * (len(self._masks) - 1) // 2
        return self._total / pairs if pairs else float("nan")


def _count(bits: NDArray[np.uint64]) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))
