"""Regions and their values in a label map."""

from __future__ import annotations

import numpy as np
import pytest

from dwp_pyro.inference.posterior import NetworkConfig
from dwp_pyro.prediction.labels import label_values, overlay_order, to_label_map, warn_of_crossing_regions


def config_of(**regions: list[int]) -> NetworkConfig:
    values = tuple(tuple(values) for values in regions.values())
    return NetworkConfig(("flair",), tuple(regions), values, "brats", spacing=None, patch=(16, 16, 16))


BRATS = {"whole": [1, 2, 4], "core": [1, 4], "enhancing": [4]}


@pytest.mark.parametrize("names", [list(BRATS), list(BRATS)[::-1]], ids=["outer first", "inner first"])
def test_label_map_of_nested_regions_is_the_label(names):
    config = config_of(**{name: BRATS[name] for name in names})
    label = np.random.default_rng(0).choice([0, 1, 2, 4], (3, 4, 5)).astype(np.uint8)
    masks = np.stack([np.isin(label, values) for values in config.values])
    values = label_values(config)
    assert dict(zip(names, values, strict=True)) == {"whole": 2, "core": 1, "enhancing": 4}
    assert [names[number] for number in overlay_order(config)] == list(BRATS)
    np.testing.assert_array_equal(to_label_map(masks, config), label)


def test_one_region_is_1():
    assert label_values(config_of(lesion=[7])) == (1,)


def test_a_region_without_a_value_of_its_own_gets_a_new_one():
    assert label_values(config_of(whole=[1, 2], left=[1], right=[2])) == (3, 1, 2)


def test_values_above_255_need_16_bits():
    config = config_of(a=[1], b=[300])
    masks = np.eye(2, dtype=bool)[:, :, None, None]
    label = to_label_map(masks, config)
    assert label.dtype == np.uint16
    assert label.ravel().tolist() == [1, 300]
    assert to_label_map(masks, config_of(a=[1], b=[65537])).ravel().tolist() == [1, 65537]


def test_regions_that_a_label_map_cannot_hold_are_warned_about(caplog):
    warn_of_crossing_regions(config_of(**BRATS))
    warn_of_crossing_regions(config_of(left=[1], right=[2], whole=[1, 2]))
    assert not caplog.records
    config = config_of(a=[1, 2, 3], b=[3, 4])
    warn_of_crossing_regions(config)
    assert "show only 'b' where it overlaps 'a'" in caplog.text
    warn_of_crossing_regions(config_of(c=[1], d=[1]))
    assert "show only 'd' where it overlaps 'c'" in caplog.text
    both = np.ones((2, 1, 1, 1), bool)
    assert to_label_map(both, config) == label_values(config)[1]
