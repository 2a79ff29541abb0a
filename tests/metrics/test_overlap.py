"""Overlap by hand, and the mean over pairs against its definition."""

import math
from itertools import combinations

import numpy as np
import pytest

from dwp_pyro.metrics.overlap import PairwiseDice, dice, iou


def line(*voxels: int) -> np.ndarray:
    mask = np.zeros((12, 1, 1), bool)
    mask[list(voxels)] = True
    return mask


def pairwise(masks) -> float:
    pairs = PairwiseDice()
    for mask in masks:
        pairs.add(mask)
    return pairs.mean()


def test_overlap_of_two_masks():
    a, b = line(0, 1, 2, 3), line(2, 3, 4, 5)
    assert dice(a, b) == pytest.approx(2 * 2 / 8)
    assert iou(a, b) == pytest.approx(2 / 6)
    for measure in (dice, iou):
        assert (measure(a, line()), measure(line(), a), measure(line(), line())) == (0, 0, 1)


def test_pairs_by_hand():
    # Two masks that share half, and two empty ones: of six pairs one has .5, the empty one 1, four 0.
    assert pairwise([line(0, 1, 2, 3), line(2, 3, 4, 5), line(), line()]) == pytest.approx(1.5 / 6)
    assert pairwise([line(0, 1), line(0, 1)]) == 1


def test_one_mask_has_no_pair():
    assert math.isnan(pairwise([line(0)]))


@pytest.mark.parametrize("shape", [(3, 5, 7), (8, 8, 8)])
def test_pairs_are_those_of_the_definition(shape):
    """Of any number of voxels, also one that fills no whole word."""
    masks = np.random.default_rng(0).random((5, *shape)) < 0.3
    expected = np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in combinations(masks, 2)])
    assert pairwise(masks) == pytest.approx(expected, rel=1e-12)
