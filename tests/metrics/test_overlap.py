"""Overlap against values by hand, SciPy and MONAI, and the mean over pairs against its definition."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric
from scipy.spatial import distance

from dwp_pyro.metrics.overlap import dice, pairwise_dice


def line(*voxels: int) -> np.ndarray:
    mask = np.zeros((12, 1, 1), bool)
    mask[list(voxels)] = True
    return mask


def pairwise(masks) -> float:
    return pairwise_dice([mask.ravel() for mask in masks])


def test_overlap_of_two_masks():
    a, b = line(0, 1, 2, 3), line(2, 3, 4, 5)
    assert dice(a, b) == pytest.approx(2 * 2 / 8)
    assert (dice(a, line()), dice(line(), a), dice(line(), line())) == (0, 0, 1)


def test_overlap_is_that_of_scipy():
    a, b = np.random.default_rng(0).random((2, 7, 6, 5)) < np.reshape([0.3, 0.6], (2, 1, 1, 1))
    assert dice(a, b) == pytest.approx(1 - distance.dice(a.ravel(), b.ravel()))


@pytest.mark.parametrize("densities", [(0.3, 0.6), (0.01, 0.5), (0.0, 0.2), (0.0, 0.0)])
def test_dice_is_that_of_monai_with_the_policy_on_empty_masks(densities):
    a, b = np.random.default_rng(1).random((2, 9, 8, 7)) < np.reshape(densities, (2, 1, 1, 1))
    metric = DiceMetric(include_background=True, ignore_empty=False)
    metric(*(torch.from_numpy(mask)[None, None].float() for mask in (a, b)))
    expected = float(metric.aggregate())
    assert dice(a, b) == pytest.approx(expected)
    assert pairwise([a, b]) == pytest.approx(expected)


def test_pairs_by_hand():
    # Two masks that share half, and two empty ones: Dice of the six pairs is .5, 1 for the empty pair, and 0 for four.
    assert pairwise([line(0, 1, 2, 3), line(2, 3, 4, 5), line(), line()]) == pytest.approx(1.5 / 6)
    assert pairwise([line(0, 1), line(0, 1)]) == 1


def test_one_mask_has_no_pair():
    assert math.isnan(pairwise([line(0)]))


@pytest.mark.parametrize("shape", [(3, 5, 7), (8, 8, 8)])
def test_pairs_are_those_of_the_definition(shape):
    masks = np.random.default_rng(0).random((5, *shape)) < 0.3
    expected = np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in combinations(masks, 2)])
    assert pairwise(masks) == pytest.approx(expected, rel=1e-12)
