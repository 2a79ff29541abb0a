"""Each measure against an example worked by hand."""

import math

import numpy as np
import pytest

from dwp_pyro.metrics import case_metrics, summarise

SHAPE = (12, 10, 8)


def box(x: slice, value: float = 1.0) -> np.ndarray:
    volume = np.zeros(SHAPE, np.float32)
    volume[x, 2:6, 2:6] = value
    return volume


def test_overlap_and_distance_of_two_boxes():
    # 4 and 4 slices of 16 voxels, 2 shared: Dice 2·2/8, IoU 2/6; ends are 2 slices of 3 mm apart.
    truth, predicted = box(slice(2, 6)) > 0, box(slice(4, 8), 0.9)
    measures = case_metrics(predicted, truth, np.ones(SHAPE, bool), (3.0, 1.0, 1.0))
    assert measures["dice"] == pytest.approx(0.5)
    assert measures["iou"] == pytest.approx(1 / 3)
    assert measures["hd95"] == pytest.approx(6.0)


def test_nll_and_calibration_over_the_brain_alone():
    brain = box(slice(0, 4)) > 0  # 64 voxels
    truth = box(slice(0, 3)) > 0  # 48 of them
    probability = np.full(SHAPE, 0.6, np.float32)
    measures = case_metrics(probability, truth, brain, (1.0, 1.0, 1.0))
    assert measures["nll"] == pytest.approx(-(48 * math.log(0.6) + 16 * math.log(0.4)) / 64, rel=1e-5)
    # One bin, confidence .6, frequency .75.
    assert measures["ece"] == pytest.approx(0.15, abs=1e-6)


def test_a_certain_error_costs_a_bounded_nll():
    brain = np.ones(SHAPE, bool)
    measures = case_metrics(np.zeros(SHAPE, np.float32), brain, brain, (1.0, 1.0, 1.0))
    assert measures["nll"] == pytest.approx(-math.log(1e-7))


def test_empty_masks_follow_the_policy():
    empty, full, brain = np.zeros(SHAPE, np.float32), box(slice(2, 6)), np.ones(SHAPE, bool)
    spacing = (3.0, 1.0, 2.0)
    diagonal = math.sqrt(36**2 + 10**2 + 16**2)
    assert case_metrics(empty, empty > 0, brain, spacing)["dice"] == 1
    assert case_metrics(empty, empty > 0, brain, spacing)["hd95"] == 0
    for probability, truth in ((empty, full > 0), (full, empty > 0)):
        measures = case_metrics(probability, truth, brain, spacing)
        assert (measures["dice"], measures["iou"]) == (0, 0)
        assert measures["hd95"] == pytest.approx(diagonal)


def test_summary_is_the_mean_and_its_standard_error():
    summary = summarise([{"dice": 0.2}, {"dice": 0.4}, {"dice": 0.9}])["dice"]
    assert summary.mean == pytest.approx(0.5)
    assert summary.standard_error == pytest.approx(math.sqrt(0.13 / 3))
    assert summary.cases == 3
    assert math.isnan(summarise([{"dice": 0.2}])["dice"].standard_error)
