"""A segmentation lesion by lesion: which are found, and how well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["LesionScores", "lesion_scores"]

_NEIGHBOURS_18, _NEIGHBOURS_26 = (ndimage.generate_binary_structure(3, order) for order in (2, 3))


class LesionScores(NamedTuple):
    """Each in [0, 1].

    Args:
        dice: Σ Dice of a lesion / (true lesions + false ones), 0 for the missed.
        f1: 2 found / (2 found + missed + false ones).
    """

    dice: float
    f1: float


def lesion_scores(
    predicted: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    spacing: Sequence[float],
    *,
    dilation: int = 3,
    smallest: float = 50.0,
) -> LesionScores:
    """Lesion-wise Dice and F1, lesions matched as in BraTS 2023 (Saluja et al. 2023); the defaults are for gliomas.

    The truth is dilated; what is one 26-connected component of that is one lesion, and all 26-connected components of
    the prediction that touch it are its match (one may match several lesions). A component that touches none is a
    false lesion. A lesion's Dice is that of its own voxels and of its whole match. Both scores are 1 where no
    lesion counts, neither a true nor a false one.

    Args:
        predicted: mask [X, Y, Z].
        truth: mask [X, Y, Z].
        spacing: sides of a voxel, in mm.
        dilation: steps to the 18 neighbours, in voxels.
        smallest: true lesions of this volume or less, in mm³, do not count, found or not; false ones always do.
    """
    parts, number_of_parts = ndimage.label(predicted, _NEIGHBOURS_26)
    # SciPy takes 0 iterations for endless ones.
    merged = ndimage.binary_dilation(truth, _NEIGHBOURS_18, dilation) if dilation else truth
    lesions, number_of_lesions = ndimage.label(merged, _NEIGHBOURS_26)
    # Of each lesion (0 is none): its voxels, those of them predicted, the voxels of its match.
    size = np.bincount(lesions[truth], minlength=number_of_lesions + 1)
    common = np.bincount(lesions[truth & predicted], minlength=number_of_lesions + 1)
    touching = merged & predicted
    pairs = np.unique(lesions[touching].astype(np.int64) * (number_of_parts + 1) + parts[touching])
    lesion, part = np.divmod(pairs, number_of_parts + 1)
    part_size = np.bincount(parts[predicted], minlength=number_of_parts + 1)
    match = np.bincount(lesion, part_size[part], number_of_lesions + 1)

    counts = size * np.prod(spacing) > smallest
    found = int(np.count_nonzero(match[counts]))
    false = number_of_parts - len(np.unique(part))
    every = int(np.count_nonzero(counts)) + false
    if not every:
        return LesionScores(1.0, 1.0)
    of_each = 2 * common[counts] / (size[counts] + match[counts])
    return LesionScores(float(of_each.sum() / every), 2 * found / (found + every))
