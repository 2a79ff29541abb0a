"""Regions of a network, and their values in a label map."""

from __future__ import annotations

import logging
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwp_pyro.data.case import Case, Scan, read_case
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.inference.posterior import NetworkConfig

__all__ = ["label_values", "overlay_order", "read_scan", "shown_image", "to_label_map", "warn_of_crossing_regions"]

_logger = logging.getLogger(__name__)


def read_scan(case: Case, network_config: NetworkConfig, data: DataSet) -> Scan:
    """Read the modalities of a network from a case; see `read_case`."""
    return read_case(
        case, network_config.modalities, data.labels, may_lack_modalities=network_config.may_lack_modalities
    )


def shown_image(scan: Scan, case: Case, network_config: NetworkConfig) -> tuple[str, NDArray[np.float32]]:
    """Return the name and the image [X, Y, Z] of the first modality that the case has, for pictures."""
    number, name = next((number, name) for number, name in enumerate(network_config.modalities) if name in case.images)
    return name, scan.images[number]


def label_values(network_config: NetworkConfig) -> tuple[int, ...]:
    """Return the value of each region in a label map; all values differ.

    A single region has 1. One of several has the smallest label value, in the training scans, that belongs to the
    region but to no region inside it: whole, core and enhancing of BraTS get the values of edema, necrosis and
    enhancing tumor. If there is none, or another region has it, the next value that the training scans do not use.
    """
    if len(network_config.regions) == 1:
        return (1,)
    sets = [set(values) for values in network_config.values]
    chosen: list[int] = []
    for values in sets:
        own = values.difference(*(other for other in sets if other < values), chosen)
        chosen.append(min(own) if own else max({*chosen, *set().union(*sets)}) + 1)
    return tuple(chosen)


def overlay_order(network_config: NetworkConfig) -> list[int]:
    """Return the indices of the regions, outer regions before those they contain."""
    return sorted(range(len(network_config.regions)), key=lambda number: -len(network_config.values[number]))


def to_label_map(masks: NDArray[np.bool_], network_config: NetworkConfig) -> NDArray[Any]:
    """Merge masks of the regions [R, X, Y, Z] into `label_values` [X, Y, Z]; inner regions override outer ones."""
    values = label_values(network_config)
    label = np.zeros(masks.shape[1:], np.min_scalar_type(max(values)))
    for number in overlay_order(network_config):
        label[masks[number]] = values[number]
    return label


def warn_of_crossing_regions(network_config: NetworkConfig) -> None:
    """Warn if a label map cannot hold the regions: two share voxels, and neither contains the other."""
    for first, second in combinations(overlay_order(network_config), 2):
        outer, inner = (set(network_config.values[number]) for number in (first, second))
        if outer & inner and not inner < outer:
            names = network_config.regions[first], network_config.regions[second]
            _logger.warning("label maps show only '%s' where it overlaps '%s'; _prob has both", names[1], names[0])
