"""Masks from the posterior predictive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, permutations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from dwp_pyro.data.preprocessing import AXES
from dwp_pyro.models.likelihoods import region_masks

__all__ = ["THRESHOLDS", "Decision", "expected_dice_threshold", "remove_small_components"]

THRESHOLDS = ("half", "expected-dice")

_MIN_THRESHOLD = 0.1  # a mask with an expected Dice below 0.2 is no better than none

_CONNECTED = np.ones((3, 3, 3), bool)  # voxels that share a face, an edge or a corner


@dataclass(frozen=True)
class Decision:
    """How the masks of the regions follow from their mean probabilities.

    Args:
        threshold: "half": the most probable class, for regions that may overlap a probability above 1/2.
            "expected-dice": per case and region, `expected_dice_threshold`.
        min_mass: Mass of the smallest component that is kept, as a fraction of that of the largest; see
            `remove_small_components`.
        mirror: Axes ("x", "y", "z") along which some of the passes are mirrored: the passes take turns with all
            combinations of these axes.

    Raises:
        ValueError: If a value is invalid.
    """

    threshold: str = "half"
    min_mass: float = 0.0
    mirror: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "mirror", tuple(self.mirror))  # a list in JSON
        if self.threshold not in THRESHOLDS:
            raise ValueError(f"threshold {self.threshold!r}")
        if not 0 <= self.min_mass <= 1:
            raise ValueError(f"min_mass {self.min_mass!r}")
        if len(set(self.mirror)) < len(self.mirror) or not set(self.mirror) <= set(AXES):
            raise ValueError(f"mirror {self.mirror!r}")

    def to_mapping(self) -> dict[str, Any]:
        """Return the fields in types of JSON."""
        return {**asdict(self), "mirror": list(self.mirror)}

    def __str__(self) -> str:
        parts = ["probability above 1/2" if self.threshold == "half" else "threshold of highest expected Dice"]
        if self.min_mass:
            parts.append(f"components of at least {100 * self.min_mass:.0f} % of the largest")
        if self.mirror:
            parts.append(f"passes mirrored along {', '.join(self.mirror)}")
        return ", ".join(parts)

    @property
    def flips(self) -> tuple[tuple[int, ...], ...]:
        """Axes of [X, Y, Z] that a pass mirrors; the passes take turns with these."""
        axes = [AXES.index(axis) for axis in self.mirror]
        return tuple(flip for count in range(len(axes) + 1) for flip in combinations(axes, count))

    def masks(
        self, probability: NDArray[np.float32], values: Sequence[Sequence[int]], activation: str, size: float = 1.0
    ) -> NDArray[np.bool_]:
        """Return the masks of the regions, bool [R, X, Y, Z].

        Args:
            probability: Mean probability of each region, [R, X, Y, Z].
            values: Label values of each region; a region is limited to the regions that have all of its values and
                more, so that a label map can hold them.
            activation: "softmax" for regions that exclude each other, "sigmoid" for those that may overlap.
            size: Volume of a voxel; see `expected_dice_threshold`.
        """
        kept = self.above_threshold(probability, activation, size)
        if self.min_mass:
            parts = zip(kept, probability, strict=True)
            kept = np.stack([remove_small_components(mask, each, self.min_mass) for mask, each in parts])
        for inner, outer in permutations(range(len(values)), 2):
            if set(values[inner]) < set(values[outer]):
                kept[inner] &= kept[outer]
        return kept

    def above_threshold(
        self, probability: NDArray[np.float32], activation: str, size: float = 1.0
    ) -> NDArray[np.bool_]:
        """Return the masks that follow from the threshold alone; shapes and arguments as for `masks`."""
        if self.threshold == "half":
            halves: NDArray[np.bool_] = region_masks(torch.from_numpy(probability), activation).numpy()
            return halves
        each = [expected_dice_threshold(region, size) for region in probability]
        thresholds = np.array(each, np.float32)[:, None, None, None]
        masks = probability >= thresholds
        if activation == "softmax":
            best = (probability / thresholds).argmax(0)
            masks &= np.arange(len(masks))[:, None, None, None] == best
        return masks


def expected_dice_threshold(probability: NDArray[np.float32], size: float = 1.0) -> float:
    """Return the threshold t whose mask, all voxels with p ≥ t, has the highest expected Dice.

    For a mask A of independent voxels, E[2 |A ∩ B| / (|A| + |B|)] is approximated by 2 Σ_A p / (|A| + Σ p). At the
    maximum t is half of it, and at most 1/2 (Lipton et al. 2014, theorem 1). The empty mask has Dice 1 if B is empty,
    with probability Π (1 − p)^size; if that is higher, t is infinite. At least 0.1 is returned.

    Args:
        probability: Probability of each voxel, of any shape.
        size: Volume of a voxel, in voxels of the network's grid: those are independent, not the many that
            interpolation makes of one.
    """
    descending = np.sort(probability, axis=None)[::-1].astype(np.float64)
    sums = np.cumsum(descending)
    dice = 2 * sums / (np.arange(1, len(sums) + 1) + sums[-1])
    if np.exp(size * np.log1p(-descending.clip(max=1 - 1e-12)).sum()) >= dice.max():
        return math.inf
    return max(float(descending[dice.argmax()]), _MIN_THRESHOLD)


def remove_small_components(
    mask: NDArray[np.bool_], probability: NDArray[np.float32], min_mass: float
) -> NDArray[np.bool_]:
    """Return a mask without the components whose mass is below a fraction of that of the largest.

    Mass is the sum of the probability, the expected volume: it is small for small and for doubtful components.

    Args:
        mask: Mask, [X, Y, Z].
        probability: Probability of each voxel, [X, Y, Z].
        min_mass: Fraction; 1 keeps the largest component alone.
    """
    components, count = ndimage.label(mask, _CONNECTED)
    if count < 2:
        return mask
    mass = np.bincount(components.ravel(), probability.ravel())
    mass[0] = 0  # the background
    large = (mass >= min_mass * mass.max()) & (mass > 0)
    kept: NDArray[np.bool_] = large[components]
    return kept
