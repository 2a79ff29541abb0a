"""From settings to examples in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dwp_pyro.config import DataSettings, TrainingSettings
from dwp_pyro.data.case import Case, Scan, read_case
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.data.regions import parse_label_map
from dwp_pyro.data.split import Split, read_split, seeded_split
from dwp_pyro.data.transforms import Example, Preprocessing, patch_shape
from dwp_pyro.errors import DataError
from dwp_pyro.models.networks import NETWORKS
from dwp_pyro.progress import message, progress

__all__ = ["TrainingData", "choose_spacing", "find_split", "load_training_data", "open_scans", "with_defaults"]


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
        patients: Case id → patient.
    """

    layout: str
    regions: Mapping[str, frozenset[int]]
    split: Split
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    patch: tuple[int, int, int]
    patients: Mapping[str, str]


_MAX_SCANS = 20  # that the spacing follows from

_SettingsT = TypeVar("_SettingsT", bound=DataSettings)


def open_scans(settings: DataSettings) -> DataSet:
    """The data set that the settings name.

    Raises:
        DataError: see `open_dataset`.
    """
    root, layout = settings.scans
    return open_dataset(root, layout, parse_label_map(settings.label_map or ()))


def with_defaults(settings: _SettingsT, n: int | None) -> _SettingsT:
    """The settings with what is found where nothing is given: root, layout, regions and spacing.

    Args:
        settings: of the command.
        n: Training patients; None takes all.

    Raises:
        DataError: if there are no scans, they have no such region, or one that the spacing follows from is unfit.
    """
    _, layout = settings.scans
    data, split = find_split(settings, n)
    regions = data.region_values(settings.region)
    spacing = settings.spacing
    if spacing is None:
        scans = (_read(data.by_id[name], settings, data) for name in split.train[:_MAX_SCANS])
        spacing = choose_spacing(scans, tuple(regions.values()), settings.patch)
    return dataclasses.replace(
        settings, root=str(data.root), dataset=layout or data.layout, region=tuple(regions), spacing=spacing
    )


def choose_spacing(scans: Iterable[Scan], regions: Sequence[frozenset[int]], patch: int) -> float:
    """Side of cubic voxels with which a patch holds a structure and shows where it lies, in mm.

    The finest side of the scans' voxels; or more, until a patch is as long as the structures (the longest side of the
    box around a region's largest component), and half as long as the brain (the geometric mean of its box's sides).
    Each is the median over the scans.

    Args:
        scans: Labelled scans.
        regions: Label values of each region.
        patch: Side of a patch, in voxels.
    """
    finest, brains, structures = [], [], []
    for scan in scans:
        finest.append(min(scan.spacing))
        brains.append(float(np.prod(_box_sides(scan.brain.astype(np.uint8), 0, scan.spacing)) ** (1 / 3)))
        for values in regions:
            components, count = ndimage.label(np.isin(np.asarray(scan.label), sorted(values)))
            if count:
                largest = int(np.argmax(np.bincount(components.ravel())[1:]))
                structures.append(max(_box_sides(components, largest, scan.spacing)))
    needed = [np.median(brains) / 2 / patch, np.median(structures) / patch if structures else 0.0]
    return float(f"{max(np.median(finest), *needed):.3g}")


def _box_sides(components: NDArray[Any], number: int, spacing: Sequence[float]) -> list[float]:
    """Sides in mm of the box around a component, numbered from 0."""
    box = ndimage.find_objects(components)[number]
    return [(part.stop - part.start) * mm for part, mm in zip(box, spacing, strict=True)]


def find_split(settings: DataSettings, n: int | None) -> tuple[DataSet, Split]:
    """The data set, and the role of each case; no scan is read.

    Cases without a label have no role.

    Args:
        settings: of the command.
        n: Training patients; None takes all.

    Raises:
        DataError: if there are too few cases, or the split file does not fit, or gives a role to a case without label.
    """
    data = open_scans(settings)
    rest = (n, settings.validation, settings.seed)
    if settings.split is None:
        labelled = {case.id: data.patients[case.id] for case in data.cases if case.label is not None}
        return data, seeded_split(labelled, *rest)
    split = read_split(Path(settings.split), data.patients, *rest)
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
    preprocess = Preprocessing(settings.spacing or None)
    examples = {}
    ids = (*split.train, *split.validation)
    with progress(f"reading {data.layout} scans", len(ids)) as advance:
        for name in ids:
            examples[name] = preprocess(_read(cases[name], settings, data), tuple(regions.values()))
            advance("")
    train = tuple(examples[name] for name in split.train)
    if not any(len(region) for example in train for region in example.indices[1:]):
        raise DataError(
            f"{data.root}: no training case holds any voxel of {', '.join(regions)}; there is nothing to learn"
        )
    validation = tuple(examples[name] for name in split.validation)
    patch = patch_shape(train, settings.patch, NETWORKS[settings.network].stride)
    return TrainingData(data.layout, regions, split, train, validation, patch, data.patients)


def _read(case: Case, settings: DataSettings, data: DataSet) -> Scan:
    lacking = isinstance(settings, TrainingSettings) and settings.modality_dropout > 0
    return read_case(case, settings.modality, data.labels, may_lack_modalities=lacking)
