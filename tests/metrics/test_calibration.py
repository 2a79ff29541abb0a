"""Calibration against values by hand, MONAI and TorchMetrics."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import calibration_binning

from dwp_pyro.metrics.calibration import Reliability, ace, brier, nll


def voxels(*groups: tuple[float, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities and truth of groups (probability, voxels in the region, voxels outside)."""
    probability = np.concatenate([np.full(inside + outside, p, np.float32) for p, inside, outside in groups])
    return probability, np.concatenate([np.arange(inside + outside) < inside for _, inside, outside in groups])


def test_errors_of_two_bins():
    # At .1: one of four voxels in the region, gap .15. At .9: none of one, gap .9.
    reliability = Reliability.of(*voxels((0.1, 1, 3), (0.9, 0, 1)))
    assert reliability.ece == pytest.approx((4 * 0.15 + 0.9) / 5)
    assert reliability.mce == pytest.approx(0.9)
    assert reliability.count.tolist() == [0, 4] + [0] * 11 + [1, 0]
    assert reliability.confidence[[1, 13]] == pytest.approx([0.1, 0.9])
    assert reliability.frequency[[1, 13]] == pytest.approx([0.25, 0])
    assert np.isnan(reliability.confidence[0]) and np.isnan(reliability.frequency[0])


def test_certain_voxels_have_bins_too():
    assert Reliability.of(*voxels((0.0, 0, 2), (1.0, 3, 0))).count[[0, -1]].tolist() == [2, 3]


def test_the_sum_of_cases_is_that_of_their_voxels():
    a, b = voxels((0.1, 1, 3), (0.9, 0, 1)), voxels((0.1, 3, 1), (0.5, 1, 1))
    together = Reliability.of(*(np.concatenate(pair) for pair in zip(a, b, strict=True)))
    total = Reliability.of(*a) + Reliability.of(*b)
    for name in ("count", "positives", "probability"):
        np.testing.assert_allclose(getattr(total, name), getattr(together, name))


def test_bins_are_those_of_monai():
    rng = np.random.default_rng(0)
    probability = rng.random(5000).astype(np.float32)
    truth = rng.random(5000) < probability**2
    batches = (torch.from_numpy(x.astype(np.float32))[None, None] for x in (probability, truth))
    confidence, frequency, count = (part[0, 0].numpy() for part in calibration_binning(*batches, num_bins=15))
    ours = Reliability.of(probability, truth)
    np.testing.assert_array_equal(ours.count, count)
    np.testing.assert_allclose(ours.confidence, confidence, rtol=1e-4)
    np.testing.assert_allclose(ours.frequency, frequency, rtol=1e-4)


@pytest.mark.parametrize("skew", [0.5, 1.0, 3.0])
def test_calibration_errors_are_those_of_torchmetrics(skew):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    rng = np.random.default_rng(1)
    probability = rng.random(20_000).astype(np.float32) ** np.float32(skew)
    truth = rng.random(20_000) < 0.2 + 0.5 * probability
    reliability = Reliability.of(probability, truth)
    batches = torch.from_numpy(probability).double(), torch.from_numpy(truth).long()
    for ours, norm in ((reliability.ece, "l1"), (reliability.mce, "max")):
        theirs = functional.binary_calibration_error(*batches, n_bins=15, norm=norm)
        assert ours == pytest.approx(float(theirs), rel=1e-5)


def test_small_probabilities_of_many_voxels_add_up():
    """A float32 sum would stop growing."""
    probability = np.concatenate([np.full(40_000, 0.06), np.full(200_000, 1e-5)]).astype(np.float32)
    reliability = Reliability.of(probability, np.zeros(240_000, bool))
    assert reliability.probability.sum() == pytest.approx(2402, rel=1e-6)


def test_adaptive_bins_tell_apart_what_equal_ones_cancel():
    # Both groups are in the first of 15 equal bins: 2 of 8 voxels in the region at a mean probability of .03.
    probability, truth = voxels((0.01, 2, 2), (0.05, 0, 4))
    assert Reliability.of(probability, truth).ece == pytest.approx(0.22)
    assert ace(probability, truth) == pytest.approx((4 * 0.49 + 4 * 0.05) / 8)


def test_adaptive_bins_of_equal_mass():
    """Each bin holds two neighbors of 30 different probabilities, in any order of the voxels."""
    probability = np.arange(1, 31, dtype=np.float32) / 100
    truth = np.arange(30) % 4 < 2  # both voxels of a bin in the region, or none
    gaps = [abs(probability[i : i + 2].mean() - truth[i]) for i in range(0, 30, 2)]
    shuffled = np.random.default_rng(0).permutation(30)
    assert ace(probability, truth) == pytest.approx(np.mean(gaps))
    assert ace(probability[shuffled], truth[shuffled]) == pytest.approx(np.mean(gaps))


def test_most_voxels_at_one_probability_share_a_bin():
    assert ace(*voxels((0.0, 1, 99), (0.5, 0, 2))) == pytest.approx((100 * 0.01 + 2 * 0.5) / 102)
    assert ace(*voxels((0.6, 3, 1))) == pytest.approx(0.15)


def test_scores_of_each_voxel():
    few = voxels((0.6, 3, 1))
    assert brier(*few) == pytest.approx((3 * 0.16 + 0.36) / 4)
    assert nll(*few) == pytest.approx(-(3 * math.log(0.6) + math.log(0.4)) / 4)


def test_a_certain_error_costs_a_bounded_nll():
    assert nll(*voxels((0.0, 1, 0))) == pytest.approx(-math.log(1e-7))
