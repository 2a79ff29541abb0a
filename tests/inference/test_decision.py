"""Masks from probabilities: thresholds, small components, nested and exclusive regions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dwp_pyro.inference.decision import Decision, expected_dice_threshold, remove_small_components

ONE = ((1,),)


def expected_dice(mask: np.ndarray, p: np.ndarray, draws: np.ndarray) -> float:
    """Return the mean Dice of a mask and truths drawn from independent voxels."""
    truths = draws < p
    return float(np.mean(2 * (truths & mask).sum(1) / (truths.sum(1) + mask.sum())))


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_has_the_highest_expected_dice(seed):
    """Against all thresholds, with the exact Dice of simulated truths."""
    rng = np.random.default_rng(seed)
    p = rng.beta(0.5, 2.0, 400).astype(np.float32)
    draws = rng.random((4000, 400))
    chosen = expected_dice_threshold(p)
    scores = np.array([expected_dice(p >= t, p, draws) for t in np.sort(p)[::5]])
    assert expected_dice(p >= chosen, p, draws) > scores.max() - 1e-3
    assert expected_dice(p >= chosen, p, draws) > expected_dice(p > 0.5, p, draws) + 0.01
    # Lipton et al. 2014: half of the highest expected Dice, up to the distance of neighboring probabilities.
    assert chosen == pytest.approx(scores.max() / 2, abs=0.01)


def test_without_probability_nothing_is_segmented():
    empty = np.zeros((2, 3, 3, 3), np.float32)
    for activation in ("softmax", "sigmoid"):
        assert not Decision("expected-dice", 0.5).masks(empty, ((1,), (2,)), activation).any()


@pytest.mark.parametrize("highest", [1e-6, 5e-4, 0.05])
def test_a_healthy_case_is_empty(highest):
    """Probabilities that are low everywhere, of many voxels."""
    p = highest * np.random.default_rng(0).random((1, 30, 30, 30)).astype(np.float32)
    assert not Decision("expected-dice").masks(p, ONE, "sigmoid").any()


def test_one_doubtful_voxel_is_more_likely_empty():
    assert math.isinf(expected_dice_threshold(np.array([0.3, 0.0, 0.0], np.float32)))
    assert expected_dice_threshold(np.array([0.6, 0.0, 0.0], np.float32)) == np.float32(0.6)


def test_components_are_kept_by_size_and_certainty():
    p = np.zeros((20, 3, 3), np.float32)
    p[0:8] = 0.9  # mass 64.8
    p[10:14] = 0.6  # mass 21.6, a third
    p[16:18] = 0.9  # mass 16.2, a quarter
    p[19, 0, 0] = 1.0
    mask = p > 0.5
    sizes = {f: int(remove_small_components(mask, p, f).sum()) for f in (0.001, 0.2, 0.3, 0.5, 1.0)}
    assert sizes == {0.001: 127, 0.2: 126, 0.3: 108, 0.5: 72, 1.0: 72}


def test_voxels_that_share_a_corner_are_connected():
    mask = np.zeros((3, 3, 3), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 2, 2] = True
    assert remove_small_components(mask, mask.astype(np.float32), 1.0).sum() == 3


def test_a_region_stays_inside_the_region_around_it():
    """A core outside of the largest component of the whole tumor goes with its component."""
    whole, core = np.zeros((2, 20, 3, 3), np.float32)
    whole[:10] = whole[15:17] = 0.9
    core[2:4] = core[15:17] = 0.8
    masks = Decision(min_mass=0.5).masks(np.stack([core, whole]), ((1, 4), (1, 2, 4)), "sigmoid")
    assert masks[0].any((1, 2)).nonzero()[0].tolist() == [2, 3]
    assert masks[1].any((1, 2)).nonzero()[0].tolist() == list(range(10))


def test_thresholds_of_regions_keep_the_nesting():
    """The core has the lower threshold of the two."""
    p = np.zeros((2, 10, 3, 3), np.float32)
    p[0, :4], p[1, :2] = 0.3, 1.0
    masks = Decision("expected-dice").masks(p, ((1,), (1, 2)), "sigmoid")
    assert not (masks[0] & ~masks[1]).any() and masks[1].any()


def test_exclusive_regions_never_overlap():
    p = np.random.default_rng(0).dirichlet([3.0, 0.4, 0.4], (6, 6, 6)).astype(np.float32).transpose(3, 0, 1, 2)[1:]
    for threshold in ("half", "expected-dice"):
        masks = Decision(threshold).masks(p, ((1,), (2,)), "softmax")
        assert masks.any((1, 2, 3)).all() and not masks.all(0).any()
    # A voxel below both thresholds belongs to none.
    low = [expected_dice_threshold(each) for each in p]
    assert not (masks.any(0) & (p < np.array(low, np.float32)[:, None, None, None]).all(0)).any()


def test_half_is_the_most_probable_class():
    p = np.array([0.4, 0.35, 0.6], np.float32).reshape(1, 3, 1, 1)
    other = np.array([0.35, 0.2, 0.1], np.float32).reshape(1, 3, 1, 1)
    both = np.concatenate([p, other])
    assert Decision().masks(both, ((1,), (2,)), "softmax")[0].ravel().tolist() == [True, False, True]
    assert Decision().masks(both, ((1,), (2,)), "sigmoid")[0].ravel().tolist() == [False, False, True]


def test_passes_take_turns_with_all_combinations_of_axes():
    assert Decision().flips == ((),)
    assert Decision(mirror=("x",)).flips == ((), (0,))
    assert Decision(mirror=("x", "z")).flips == ((), (0,), (2,), (0, 2))


def test_a_decision_survives_json():
    decision = Decision("expected-dice", 0.25, ("x", "y"))
    assert Decision(**decision.to_mapping()) == decision
    assert decision.to_mapping()["mirror"] == ["x", "y"]


@pytest.mark.parametrize(
    "wrong", [{"threshold": "0.3"}, {"min_mass": 2}, {"min_mass": "a"}, {"mirror": ["w"]}, {"a": 1}]
)
def test_invalid_decisions_are_refused(wrong):
    with pytest.raises((TypeError, ValueError)):
        Decision(**wrong)


def test_whether_nothing_is_segmented_does_not_depend_on_the_grid():
    """Eight doubtful voxels are no lesion, nor are they on a grid of 27 times as many voxels."""
    p = np.zeros((1, 8, 8, 8), np.float32)
    p[0, :2, :2, :2] = 0.15
    fine = p.repeat(3, 1).repeat(3, 2).repeat(3, 3)
    assert not Decision("expected-dice").masks(p, ONE, "sigmoid").any()
    assert not Decision("expected-dice").masks(fine, ONE, "sigmoid", 1 / 27).any()
    assert Decision("expected-dice").masks(fine, ONE, "sigmoid").any()


def test_one_half_keeps_the_nesting():
    p = np.full((2, 2, 2, 2), 0.6, np.float32)
    p[1, 0] = 0.4
    masks = Decision().masks(p, ((1,), (1, 2)), "sigmoid")
    assert (masks[0] == masks[1]).all() and masks[1].any()
