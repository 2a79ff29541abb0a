"""From settings to examples in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dwp_pyro.config import DataSettings, TrainingSettings, data_root
from dwp_pyro.data.case import Case, Layout, read_case
from dwp_pyro.data.layouts import LAYOUTS, find_cases
from dwp_pyro.data.split import Split, read_split, seeded_split
from dwp_pyro.data.transforms import Example, Preprocessing, patch_shape
from dwp_pyro.errors import DataError
from dwp_pyro.models.networks import NETWORKS
from dwp_pyro.progress import progress

__all__ = ["TrainingData", "find_split", "load_training_data", "with_defaults"]


@dataclass(frozen=True)
class TrainingData:
    """What a network is trained on, preprocessed and in memory.

    Args:
        layout: of the scans.
        regions: that are segmented, each with the label values that make it up.
        split: case ids by role.
        train: examples to train on, in the split's order.
        validation: examples to validate on.
        patch: shape of a training patch, [x, y, z].
    """

    layout: Layout
    regions: Mapping[str, frozenset[int]]
    split: Split
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    patch: tuple[int, int, int]


_SettingsT = TypeVar("_SettingsT", bound=DataSettings)


def with_defaults(settings: _SettingsT) -> _SettingsT:
    """The settings with root and regions as they are found when none are given: what a run's config should say.

    Raises:
        DataError: if the layout has no such region.
    """
    regions = LAYOUTS[settings.dataset].region_values(settings.region)
    return dataclasses.replace(settings, root=str(data_root(settings.dataset, settings.root)), region=tuple(regions))


def find_split(settings: DataSettings, n: int | None) -> tuple[dict[str, Case], Split]:
    """All cases by id, and the role of each; no scan is read.

    Args:
        settings: of the command.
        n: training cases; None takes all.

    Raises:
        DataError: if there are too few cases, or the split file does not fit.
    """
    root = data_root(settings.dataset, settings.root)
    cases = {case.id: case for case in find_cases(root, LAYOUTS[settings.dataset])}
    chosen = (tuple(cases), n, settings.validation, settings.seed)
    return cases, seeded_split(*chosen) if settings.split is None else read_split(Path(settings.split), *chosen)


def load_training_data(settings: TrainingSettings, n: int | None) -> TrainingData:
    """Find, split, read, check and preprocess the cases; nothing is written.

    Args:
        settings: of the command.
        n: training cases; None takes all.

    Raises:
        DataError: if a case is unfit, or there are too few.
    """
    layout = LAYOUTS[settings.dataset]
    regions = layout.region_values(settings.region)
    cases, split = find_split(settings, n)
    preprocess = Preprocessing(settings.spacing)
    examples = {}
    ids = (*split.train, *split.validation)
    with progress(f"reading {settings.dataset} scans", len(ids)) as advance:
        for name in ids:
            case = cases[name]
            if case.label is None:
                raise DataError(f"case {name}: has no label file, which training needs; add it, or leave the case out")
            scan = read_case(case, settings.modality, layout.labels, may_lack_modalities=settings.modality_dropout > 0)
            examples[name] = preprocess(scan, tuple(regions.values()))
            advance("")
    train = tuple(examples[name] for name in split.train)
    if not any(len(example.fg_indices) for example in train):
        root = data_root(settings.dataset, settings.root)
        raise DataError(f"{root}: no training case holds any voxel of {', '.join(regions)}; there is nothing to learn")
    validation = tuple(examples[name] for name in split.validation)
    patch = patch_shape(train, settings.patch, NETWORKS[settings.network].stride)
    return TrainingData(layout, regions, split, train, validation, patch)
