"""QU-BraTS score and risk-coverage curves of a few voxels by hand."""

import numpy as np
import pytest

from dwp_pyro.metrics.uncertainty import qu_brats, risk_coverage

KINDS = {"TP": (True, True), "FP": (True, False), "FN": (False, True), "TN": (False, False)}


def score(*voxels: tuple[str, float]) -> float:
    predicted, truth = np.array([KINDS[kind] for kind, _ in voxels]).T
    return qu_brats(predicted, truth, np.array([u for _, u in voxels], np.float32))


def test_an_error_that_is_uncertain_is_filtered():
    # Dice is 1 below τ = 50 and 2/3 above; of 40 steps 19 are at 1, one between, 20 at 2/3. Correct voxels are kept.
    area = (19 + (1 + 2 / 3) / 2 + 20 * 2 / 3) / 40
    for error in ("FP", "FN"):
        assert score(("TP", 0), ("TN", 0), (error, 50)) == pytest.approx((area + 2) / 3)
    assert score(("TP", 0), ("TN", 0), ("FP", 100)) > score(("TP", 0), ("TN", 0), ("FP", 0))


@pytest.mark.parametrize("kind", ["TP", "TN"])
def test_what_is_right_and_filtered_costs(kind):
    # Half of the kind is missing until the last of 40 steps.
    assert score((kind, 0), (kind, 100)) == pytest.approx((1 + (1 - 0.5 * 39.5 / 40) + 1) / 3)


def test_a_voxel_is_kept_at_its_own_threshold():
    assert score(("FP", 0)) == pytest.approx(2 / 3)
    assert score(("FP", 100 + 1e-4)) == pytest.approx((39.5 / 40 + 2) / 3)  # rounding may exceed 100


def test_nothing_there_and_nothing_uncertain_is_perfect():
    assert score(("TN", 0), ("TN", 0)) == 1


def test_the_risk_of_the_most_certain_by_hand():
    curve = risk_coverage(np.array([0.3, 0.1, 0.4, 0.2]), np.array([False, False, True, True]), 4)
    assert curve.coverage == pytest.approx([0.25, 0.5, 0.75, 1])
    assert curve.risk == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert curve.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_what_is_equally_uncertain_has_its_mean_risk():
    curve = risk_coverage(np.array([0.1, 0.2, 0.1]), np.array([1.0, 0.0, 0.0]), 3)
    assert curve.risk == pytest.approx([1 / 2, 1 / 2, 1 / 3])
    assert risk_coverage(np.zeros(4), np.array([0, 1, 0, 1]), 8).risk == pytest.approx([0.5] * 8)


def test_what_is_covered_in_part_counts_in_part():
    # 1.5 of 3 items: all of the first, half of the second.
    curve = risk_coverage(np.array([1, 2, 3]), np.array([0.2, 0.8, 1.0]), 2)
    assert curve.risk == pytest.approx([(0.2 + 0.5 * 0.8) / 1.5, 2 / 3])


def test_a_perfect_order_is_best_and_the_reverse_is_worst():
    rng = np.random.default_rng(0)
    risk = rng.random(50)
    areas = [risk_coverage(order, risk, 50).aurc for order in (risk, rng.random(50), -risk)]
    assert areas == sorted(areas)
    ranked = np.sort(risk)
    assert areas[0] == pytest.approx(np.mean([ranked[: i + 1].mean() for i in range(50)]))
