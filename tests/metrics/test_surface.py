"""Surface distances by hand: lines of voxels, all on the surface."""

import numpy as np
import pytest

from dwp_pyro.metrics.surface import hd95, surface_dice


def line(x: slice) -> np.ndarray:
    mask = np.zeros((12, 5, 5), bool)
    mask[x, 2, 2] = True
    return mask


@pytest.mark.parametrize(("side", "tolerance", "expected"), [(1.0, 1.0, 6 / 10), (2.0, 1.0, 4 / 10), (2.0, 2.0, 0.6)])
def test_surface_dice_counts_what_lies_within_the_tolerance(side, tolerance, expected):
    # Truth 2 to 5, prediction 4 to 9: 2 voxels coincide; their neighbors 3 and 6 are one voxel side away.
    assert surface_dice(line(slice(4, 10)), line(slice(2, 6)), (side, 1.0, 1.0), tolerance) == pytest.approx(expected)


def test_the_default_tolerance_is_a_millimetre():
    assert surface_dice(line(slice(1, 5)), line(slice(2, 6)), (1.0, 1.0, 1.0)) == 1
    assert surface_dice(line(slice(1, 5)), line(slice(2, 6)), (1.1, 1.0, 1.0)) < 1


def test_the_tolerance_allows_for_a_rounded_spacing():
    assert surface_dice(line(slice(1, 5)), line(slice(2, 6)), (1.0000001, 1.0, 1.0)) == 1


def test_hd95_is_in_mm_and_of_the_worse_direction():
    # Prediction 4 to 9 is 0, 0, 1, 2, 3, 4 sides of 2 mm from the truth; the 95th percentile is 3.75 sides.
    assert hd95(line(slice(4, 10)), line(slice(2, 6)), (2.0, 1.0, 1.0), 99.0) == pytest.approx(7.5)
    assert hd95(line(slice(2, 6)), line(slice(4, 10)), (2.0, 1.0, 1.0), 99.0) == pytest.approx(7.5)


def test_empty_masks():
    full, empty, spacing = line(slice(2, 6)), line(slice(0)), (1.0, 1.0, 1.0)
    assert surface_dice(empty, empty, spacing) == 1
    assert hd95(empty, empty, spacing, 99.0) == 0
    for masks in ((full, empty), (empty, full)):
        assert surface_dice(*masks, spacing) == 0
        assert hd95(*masks, spacing, 99.0) == 99
