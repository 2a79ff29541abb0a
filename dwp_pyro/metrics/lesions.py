"""Lesion-wise metrics: detection, and overlap per lesion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["TUMORS", "LesionMatching", "LesionScores", "lesion_matching", "lesion_scores"]

_NEIGHBORS_18, _NEIGHBORS_26 = (ndimage.generate_binary_structure(3, order) for order in (2, 3))


class LesionMatching(NamedTuple):
    """What counts as one lesion.

    Args:
        dilation: Number of dilations of the truth to the 18 neighbors, which join what lies closer together.
        smallest: Volume in mm³ up to which true lesions are ignored, found or not; false lesions always count.
    """

    dilation: int
    smallest: float


#: Gliomas, as in BraTS 2023 (Saluja et al. 2023).
TUMORS = LesionMatching(3, 50.0)

#: Lesions of multiple sclerosis, of which many are small and close together: those up to 3 mm³ are ignored, as in the
#: challenges MSSEG (Commowick et al. 2018) and MSSEG-2.
_LESIONS = LesionMatching(0, 3.0)


def lesion_matching(region: str) -> LesionMatching:
    """Return the matching of a region: that of multiple sclerosis for "lesion", otherwise that of gliomas."""
    return _LESIONS if region == "lesion" else TUMORS


class LesionScores(NamedTuple):
    """Lesion-wise scores, each in [0, 1].

    Args:
        dice: Sum of the Dice of all true lesions, 0 for missed ones, over the number of true and false lesions.
        f1: 2 found / (2 found + missed + false).
    """

    dice: float
    f1: float


def lesion_scores(
    predicted: NDArray[np.bool_], truth: NDArray[np.bool_], spacing: Sequence[float], matching: LesionMatching = TUMORS
) -> LesionScores:
    """Return lesion-wise Dice and F1, matched as in BraTS 2023 (Saluja et al. 2023).

    True voxels in one 26-connected component of the dilated truth are one lesion. Its match is the union of all
    26-connected components of the prediction that touch the dilated component; a component can match several lesions.
    A component that touches none is a false lesion. The Dice of a lesion compares its voxels with its whole match. Both
    scores are 1 if there are neither true nor false lesions.

    Args:
        predicted: Predicted mask [X, Y, Z].
        truth: True mask [X, Y, Z].
        spacing: Voxel sides in mm.
        matching: What counts as one lesion.
    """
    dilation, smallest = matching
    parts, number_of_parts = ndimage.label(predicted, _NEIGHBORS_26)
    # SciPy repeats a dilation of 0 iterations until nothing changes.
    merged = ndimage.binary_dilation(truth, _NEIGHBORS_18, dilation) if dilation else truth
    lesions, number_of_lesions = ndimage.label(merged, _NEIGHBORS_26)
    # Per lesion, with 0 for the background: its voxels, its predicted voxels, the voxels of its match.
    size = np.bincount(lesions[truth], minlength=number_of_lesions + 1)
    common = np.bincount(lesions[truth & predicted], minlength=number_of_lesions + 1)
    touching = merged & predicted
    pairs = np.unique(lesions[touching].astype(np.int64) * (number_of_parts + 1) + parts[touching])
    lesion, part = np.divmod(pairs, number_of_parts + 1)
    part_size = np.bincount(parts[predicted], minlength=number_of_parts + 1)
    match = np.bincount(lesion, part_size[part], number_of_lesions + 1)

    counts = size * np.prod(spacing) > smallest * (1 + 1e-4)  # spacings of oblique scans are rounded
    found = int(np.count_nonzero(match[counts]))
    false = number_of_parts - len(np.unique(part))
    total = int(np.count_nonzero(counts)) + false
    if not total:
        return LesionScores(1.0, 1.0)
    dice = 2 * common[counts] / (size[counts] + match[counts])
    return LesionScores(float(dice.sum() / total), 2 * found / (found + total))
