"""All metrics of a case: inputs, and the policy on empty masks."""

import math

import numpy as np
import pytest
from scipy.spatial import distance

from dwp_pyro.metrics import HEADLINE, MEASURES, case_metrics

SHAPE = (12, 10, 8)
BRAIN = np.ones(SHAPE, bool)


def box(x: slice, value: float = 1.0) -> np.ndarray:
    volume = np.zeros(SHAPE, np.float32)
    volume[x, 2:6, 2:6] = value
    return volume


def entropy(p: np.ndarray) -> np.ndarray:
    return -sum(q * np.log(q, where=q > 0, out=np.zeros_like(q)) for q in (p, 1 - p))


def measure(probability, truth, brain_mask=BRAIN, spacing=(1.0, 1.0, 1.0)):
    return case_metrics(probability, probability > 0.5, entropy(probability), truth > 0, brain_mask, spacing).measures


def test_every_measure_has_a_title():
    measures = measure(box(slice(2, 6)), box(slice(2, 6)))
    assert [*measures, "pairwise_dice"] == list(MEASURES)
    assert all(type(value) is float for value in measures.values())
    assert set(HEADLINE) <= set(MEASURES)


def test_two_boxes():
    # 4 and 4 slices of 16 voxels, 2 shared: Dice 2·2/8, IoU 2/6; ends are 2 slices of 3 mm apart.
    measures = measure(box(slice(4, 8), 0.9), box(slice(2, 6)), spacing=(3.0, 1.0, 1.0))
    assert measures["dice"] == measures["lesion_dice"] == pytest.approx(0.5)
    assert measures["lesion_f1"] == 1
    assert measures["iou"] == pytest.approx(1 / 3)
    assert measures["hd95"] == pytest.approx(6.0)
    # Each surface has 56 voxels. Those of the shared slices are within 1 mm of the other: a rim of 12 voxels on an end,
    # and an end of 16, of which 12 are on a rim and 4 next to it.
    assert measures["nsd"] == pytest.approx(2 * (12 + 16) / (2 * 56))


@pytest.mark.parametrize("densities", [(0.3, 0.6), (0.01, 0.5), (1.0, 1.0)])
def test_iou_is_that_of_the_counted_voxels_and_of_scipy(densities):
    a, b = np.random.default_rng(0).random((2, *SHAPE)) < np.reshape(densities, (2, 1, 1, 1))
    iou = measure(a.astype(np.float32), b)["iou"]
    assert iou == pytest.approx((a & b).sum() / (a | b).sum())
    assert iou == pytest.approx(1 - distance.jaccard(a.ravel(), b.ravel()))


def test_a_whole_case_by_one_probability():
    brain_mask = box(slice(0, 4)) > 0  # 64 voxels
    truth = box(slice(0, 3))  # 48 of them
    probability = np.full(SHAPE, 0.6, np.float32)
    measures = measure(probability, truth, brain_mask)
    assert measures["nll"] == pytest.approx(-(48 * math.log(0.6) + 16 * math.log(0.4)) / 64, rel=1e-5)
    assert measures["brier"] == pytest.approx((48 * 0.16 + 16 * 0.36) / 64, rel=1e-5)
    # One bin, confidence .6, frequency .75.
    for name in ("ece", "ace", "mce"):
        assert measures[name] == pytest.approx(0.15, abs=1e-6)
    # All voxels are equally uncertain, a quarter is wrong. Their uncertainty of 97.1 is reached at the 40th of 41
    # thresholds; below it Dice is 1 and no true positive is kept.
    assert measures["aurc"] == pytest.approx(0.25)
    dice = (38 + (1 + 96 / 112) / 2 + 96 / 112) / 40
    assert measures["qu_brats"] == pytest.approx((dice + (1 - 38.5 / 40) + 1) / 3)


def test_curves_are_over_the_brain():
    brain_mask = box(slice(0, 4)) > 0
    probability = box(slice(0, 12), 0.9)
    case = case_metrics(
        probability, probability > 0.5, entropy(probability), box(slice(0, 2)) > 0, brain_mask, (1.0, 1.0, 1.0)
    )
    assert case.reliability.count.sum() == 64
    assert case.risk_coverage.risk == pytest.approx([0.5] * 100)
    assert case.risk_coverage.coverage[[0, -1]] == pytest.approx([0.01, 1])


def test_empty_masks_follow_the_policy():
    empty, full = np.zeros(SHAPE, np.float32), box(slice(2, 6))
    spacing = (3.0, 1.0, 2.0)
    perfect = ("dice", "iou", "nsd", "lesion_dice", "lesion_f1")
    nothing = measure(empty, empty, spacing=spacing)
    assert [nothing[name] for name in perfect] == [1] * 5
    assert nothing["hd95"] == 0 and nothing["qu_brats"] == 1 and nothing["aurc"] == 0
    for probability, truth in ((empty, full), (full, empty)):
        measures = measure(probability, truth, spacing=spacing)
        assert [measures[name] for name in perfect] == [0] * 5
        assert measures["hd95"] == pytest.approx(math.sqrt(36**2 + 10**2 + 16**2))
