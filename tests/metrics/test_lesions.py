"""Lesion-wise metrics by hand: lines of voxels of 1 mm³."""

import numpy as np
import pytest
from scipy import ndimage

from dwp_pyro.metrics import case_metrics
from dwp_pyro.metrics.lesions import LesionMatching, lesion_matching, lesion_scores

SPACING = (1.0, 1.0, 1.0)


def line(*voxels: int) -> np.ndarray:
    mask = np.zeros((32, 9, 9), bool)
    mask[list(voxels), 4, 4] = True
    return mask


def point(*at: int) -> np.ndarray:
    mask = np.zeros((9, 9, 9), bool)
    mask[at] = True
    return mask


def one_by_one(predicted: np.ndarray, truth: np.ndarray, dilation: int, smallest: float) -> tuple[float, float]:
    """Compute the scores by definition, dilating each lesion separately."""
    near, around = (ndimage.generate_binary_structure(3, order) for order in (2, 3))
    parts, number = ndimage.label(predicted, around)
    merged, lesions = ndimage.label(ndimage.binary_dilation(truth, near, dilation), around)
    scores, matched = [], set()
    found = 0
    for each in range(1, lesions + 1):
        lesion = truth & (merged == each)
        touching = set(parts[ndimage.binary_dilation(lesion, near, dilation)]) - {0}
        matched |= touching
        match = np.isin(parts, list(touching))
        if lesion.sum() > smallest:
            scores.append(2 * (match & lesion).sum() / (match.sum() + lesion.sum()))
            found += bool(touching)
    false = number - len(matched)
    return sum(scores) / (len(scores) + false), 2 * found / (found + len(scores) + false)


@pytest.mark.parametrize("seed", range(5))
def test_random_lesions_are_scored_as_if_one_by_one(seed):
    """The result is the same when `case_metrics` crops the masks."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=(2, 40, 36, 32)), (0, 1.2, 1.2, 1.2))
    field = np.pad(field[:, 4:30, 6:30, 2:30], ((0, 0), (4, 10), (6, 6), (2, 2)))
    truth, predicted = field[0] > 0.28, field[0] + field[1] > 0.4
    expected = one_by_one(predicted, truth, 1, 5.0)
    assert lesion_scores(predicted, truth, SPACING, LesionMatching(1, 5.0)) == pytest.approx(expected)
    assert 0.05 < expected[0] < expected[1] < 1
    brain_mask = np.ones(truth.shape, bool)
    zeros = np.zeros(truth.shape, np.float32)
    measures = case_metrics(predicted.astype(np.float32), predicted, zeros, truth, brain_mask, SPACING)
    of_case = measures.measures["lesion_dice"], measures.measures["lesion_f1"]
    assert of_case == pytest.approx(one_by_one(predicted, truth, 3, 50.0))


def test_found_missed_and_false():
    truth = line(0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23)
    # First lesion: half found, as much beside it; second: missed; third: found in two parts; and a false one.
    predicted = line(2, 3, 4, 5, 20, 21, 23, 28)
    scores = lesion_scores(predicted, truth, SPACING, LesionMatching(1, 0))
    assert scores.dice == pytest.approx((2 * 2 / 8 + 0 + 2 * 3 / 7) / (3 + 1))
    assert scores.f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


def test_dilation_merges_what_is_near():
    truth, predicted = line(0, 1, 4, 5), line(0, 1)
    together = lesion_scores(predicted, truth, SPACING, LesionMatching(1, 0))
    assert together == pytest.approx((2 * 2 / 6, 1.0))
    apart = lesion_scores(predicted, truth, SPACING, LesionMatching(0, 0))
    assert apart == pytest.approx((0.5, 2 / 3))


def test_one_part_may_match_several_lesions_and_counts_whole_in_each():
    truth, predicted = line(0, 1, 8, 9), line(*range(10))
    scores = lesion_scores(predicted, truth, SPACING, LesionMatching(1, 0))
    assert scores == pytest.approx((2 * 2 / (2 + 10), 1.0))


def test_dilation_goes_to_18_neighbours():
    truth = point(4, 4, 4)
    assert lesion_scores(point(5, 5, 4), truth, SPACING, LesionMatching(1, 0)) == (0, 1)  # found, nothing covered
    assert lesion_scores(point(5, 5, 5), truth, SPACING, LesionMatching(1, 0)) == (0, 0)


def test_voxels_that_share_a_corner_are_one_lesion():
    both = point(4, 4, 4) | point(5, 5, 5)
    assert lesion_scores(point(4, 4, 4), both, SPACING, LesionMatching(0, 0)) == pytest.approx((2 / 3, 1.0))


def test_small_lesions_do_not_count():
    truth, predicted = line(0, 1, 2, 10), line(0, 1, 2)
    assert lesion_scores(predicted, truth, SPACING, LesionMatching(1, 1)) == (1, 1)
    assert lesion_scores(predicted, truth, (1.5, 1.0, 1.0), LesionMatching(1, 1)) == pytest.approx((0.5, 2 / 3))
    # A small lesion that is found is not false either; a prediction without any lesion is.
    assert lesion_scores(line(10), line(10), SPACING, LesionMatching(1, 1)) == (1, 1)
    assert lesion_scores(line(20), line(10), SPACING, LesionMatching(1, 1)) == (0, 0)


def test_the_defaults_are_those_of_gliomas():
    """Three dilations; 50 mm³ are ignored, 51 count."""
    truth = line(*range(25)) & False
    truth[0:5, :5, :2] = True
    assert lesion_scores(truth & False, truth, SPACING) == (1, 1)
    truth[0, 0, 2] = True
    assert lesion_scores(truth & False, truth, SPACING) == (0, 0)
    truth[11:16, :5, :2] = True  # at a distance of six voxels, three per side
    found_one = truth.copy()
    found_one[11:] = False
    assert lesion_scores(found_one, truth, SPACING) == pytest.approx((2 * 51 / (51 + 101), 1.0))


def test_empty_masks():
    full, empty = line(*range(4)), line()
    assert lesion_scores(empty, empty, SPACING, LesionMatching(3, 0)) == (1, 1)
    for masks in ((full, empty), (empty, full)):
        assert lesion_scores(*masks, SPACING, LesionMatching(3, 0)) == (0, 0)


def test_small_lesions_of_multiple_sclerosis_count_apart():
    """Two lesions of 4 mm³ with a gap of 2 mm, and one of 3 mm³, which is ignored."""
    truth = line(0, 1, 2, 3, 6, 7, 8, 9, 20, 21, 22)
    assert lesion_scores(line(0, 1), truth, SPACING, lesion_matching("lesion")) == pytest.approx((2 * 2 / 6 / 2, 2 / 3))
    assert lesion_scores(line(0, 1), truth, SPACING, lesion_matching("whole")) == (1, 1)  # all up to 50 mm³


def test_rounded_spacings_count_as_what_they_are():
    truth, spacing = line(0, 1, 2), (1.0000001, 1.0, 1.0)
    assert lesion_scores(truth & False, truth, spacing, LesionMatching(0, 3.0)) == (1, 1)
