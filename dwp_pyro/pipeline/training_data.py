"""From settings to examples in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dwp_pyro.config import DataSettings, TrainingSettings
from dwp_pyro.data.case import read_case
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.data.regions import parse_label_map
from dwp_pyro.data.split import Split, read_split, seeded_split
from dwp_pyro.data.transforms import Example, Preprocessing, patch_shape
from dwp_pyro.errors import DataError
from dwp_pyro.models.networks import NETWORKS
from dwp_pyro.progress import message, progress

__all__ = ["TrainingData", "find_split", "load_training_data", "open_scans", "with_defaults"]


@dataclass(frozen=True)
class TrainingData:
    """What a network is trained on, preprocessed and in memory.

    Args:
        layout: name of the scans' layout.
        regions: that are segmented, each with the label values that make it up.
        split: case ids by role.
        train: examples to train on, in the split's order.
        validation: examples to validate on.
        patch: shape of a training patch, [x, y, z].
    """

    layout: str
    regions: Mapping[str, frozenset[int]]
    split: Split
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    patch: tuple[int, int, int]


_SettingsT = TypeVar("_SettingsT", bound=DataSettings)


def open_scans(settings: DataSettings) -> DataSet:
    """The data set that the settings name.

    Raises:
        DataError: see `open_dataset`.
    """
    root, layout = settings.scans
    return open_dataset(root, layout, parse_label_map(settings.label_map or ()))


def with_defaults(settings: _SettingsT) -> _SettingsT:
    """The settings with what is found where nothing is given, root, layout and regions: what a run's config should say.

    Raises:
        DataError: if there are no scans, or they have no such region.
    """
    _, layout = settings.scans
    data = open_scans(settings)
    regions = data.region_values(settings.region)
    return dataclasses.replace(settings, root=str(data.root), dataset=layout or data.layout, region=tuple(regions))


def find_split(settings: DataSettings, n: int | None) -> tuple[DataSet, Split]:
    """The data set, and the role of each case; no scan is read.

    Cases without a label have no role.

    Args:
        settings: of the command.
        n: training cases; None takes all.

    Raises:
        DataError: if there are too few cases, or the split file does not fit, or gives a role to a case without label.
    """
    data = open_scans(settings)
    rest = (n, settings.validation, settings.seed)
    if settings.split is None:
        return data, seeded_split([case.id for case in data.cases if case.label is not None], *rest)
    split = read_split(Path(settings.split), list(data.by_id), *rest)
    for name in (*split.train, *split.validation, *split.test):
        if data.by_id[name].label is None:
            raise DataError(f"{settings.split}: case '{name}' has no label file; add one, or take it out of the split")
    return data, split


def load_training_data(settings: TrainingSettings, n: int | None) -> TrainingData:
    """Find, split, read, check and preprocess the cases; nothing is written.

    Args:
        settings: of the command.
        n: training cases; None takes all.

    Raises:
        DataError: if a case is unfit, or there are too few.
    """
    data, split = find_split(settings, n)
    regions = data.region_values(settings.region)
    unlabelled = [case.id for case in data.cases if case.label is None]
    if unlabelled:
        message(f"{len(unlabelled)} of {len(data.cases)} cases have no label and are skipped, first: {unlabelled[0]}")
    cases = data.by_id
    preprocess = Preprocessing(settings.spacing)
    examples = {}
    ids = (*split.train, *split.validation)
    with progress(f"reading {data.layout} scans", len(ids)) as advance:
        for name in ids:
            lacking = settings.modality_dropout > 0
            scan = read_case(cases[name], settings.modality, data.labels, may_lack_modalities=lacking)
            examples[name] = preprocess(scan, tuple(regions.values()))
            advance("")
    train = tuple(examples[name] for name in split.train)
    if not any(len(example.fg_indices) for example in train):
        raise DataError(
            f"{data.root}: no training case holds any voxel of {', '.join(regions)}; there is nothing to learn"
        )
    validation = tuple(examples[name] for name in split.validation)
    patch = patch_shape(train, settings.patch, NETWORKS[settings.network].stride)
    return TrainingData(data.layout, regions, split, train, validation, patch)
