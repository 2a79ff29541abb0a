"""Overlap of masks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from monai.metrics import compute_dice
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

__all__ = ["as_batch", "dice", "mean_dice", "pairwise_dice"]


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


def pairwise_dice(masks: Sequence[NDArray[np.bool_]]) -> float:
    """Return the mean Dice over all pairs of masks [voxels]; 1 for a pair of empty masks, NaN for a single mask.

    Over the segmentations of weight samples it measures their agreement; low values predict a failed segmentation
    (Roy et al. 2019; Zenk et al. 2025).
    """
    if len(masks) < 2:
        return math.nan
    stacked = np.stack(masks)
    stacked = stacked[:, stacked.any(0)]  # `pdist` takes eight bytes per voxel
    return 1 - float(np.nan_to_num(pdist(stacked, "dice")).mean())  # NaN: two empty masks
