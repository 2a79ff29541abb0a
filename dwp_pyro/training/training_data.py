"""Training data: scans found, split, read and preprocessed as the settings say."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dwp_pyro.config.training import DEFAULT_WIDTHS, FitPriorConfig, TargetConfig, TrainingConfig
from dwp_pyro.data.case import Case, Scan, read_case
from dwp_pyro.data.dataset import DataSet, join_data_sets
from dwp_pyro.data.layouts import open_dataset
from dwp_pyro.data.mapped import mapped
from dwp_pyro.data.patches import patch_shape
from dwp_pyro.data.preprocessing import Example, Preprocessing
from dwp_pyro.data.regions import parse_label_map
from dwp_pyro.data.split import Split, read_split, seeded_split
from dwp_pyro.inference.posterior import Posterior
from dwp_pyro.models.registry import NETWORKS
from dwp_pyro.runtime.errors import DataError
from dwp_pyro.runtime.progress import each

__all__ = [
    "SOURCE",
    "TrainingData",
    "choose_spacing",
    "find_split",
    "find_unlabelled",
    "load_training_data",
    "load_unlabelled",
    "open_scans",
    "resolve",
]

_logger = logging.getLogger(__name__)

#: File of the source networks in the folder of a prior: one per bootstrap, the best first.
SOURCE = "source.safetensors"


@dataclass(frozen=True)
class TrainingData:
    """Preprocessed training and validation data, in memory-mapped files.

    Args:
        layout: Name of the scans' layout.
        regions: Segmented region → its label values.
        split: Case ids by role.
        train: Training examples, in the split's order.
        validation: Validation examples.
        patch: Shape of a training patch, [x, y, z].
        patients: Case id → patient.
        files: Scans and labels that they were read from.
    """

    layout: str
    regions: Mapping[str, frozenset[int]]
    split: Split
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    patch: tuple[int, int, int]
    patients: Mapping[str, str]
    files: tuple[Path, ...]


_MAX_SCANS = 20  # from which the spacing is chosen

# Least length of a patch. What surrounds a structure tells it from what looks like it: with 1.5 times the structures
# instead of once, at equal voxels, Dice on gliomas rose from .60 to .65 (docs/results.md).
_PATCH_OVER_STRUCTURE = 1.5

_SettingsT = TypeVar("_SettingsT", bound=TrainingConfig)


def open_scans(settings: TrainingConfig) -> DataSet:
    """Open the data set of the settings, or several as one.

    Raises:
        DataError: see `open_dataset` and `join_data_sets`.
    """
    root, layout = settings.scans
    label_map = parse_label_map(settings.label_map or ())
    data = open_dataset(root, layout, label_map)
    more = settings.more_roots if isinstance(settings, FitPriorConfig) else None
    return join_data_sets([data, *(open_dataset(Path(other), None, label_map) for other in more)]) if more else data


def resolve(settings: _SettingsT, n: int | None) -> _SettingsT:
    """Return the settings with root, layout, regions and spacing filled in from the scans, and the network's widths.

    `n` as for `find_split`.

    Raises:
        DataError: if there are no scans, they lack a region, or a scan from which the spacing is chosen is invalid.
    """
    _, layout = settings.scans
    data, split = find_split(settings, n)
    known = sorted({name for case in data.cases for name in case.images})
    for name in settings.modality:
        if name not in known and settings.modality_dropout > 0:
            _logger.warning("%s: no case has the modality '%s', only %s", data.root, name, ", ".join(known))
    regions = data.region_values(settings.region)
    spacing = settings.spacing
    if spacing is None:
        scans = (_read(data.by_id[name], settings, data) for name in split.train[:_MAX_SCANS])
        spacing = choose_spacing(scans, tuple(regions.values()), settings.patch, settings.patch_over_brain)
    found: dict[str, Any] = {
        "root": str(data.root),
        "dataset": layout or data.layout,
        "region": tuple(regions),
        "spacing": spacing,
    }
    if settings.widths is None:
        found["widths"] = _source_widths(settings) or DEFAULT_WIDTHS
    return dataclasses.replace(settings, **found)


def _source_widths(settings: TrainingConfig) -> tuple[int, ...] | None:
    """Return the widths of the source network that a target starts from or is centered on; None without one."""
    files = settings.learned_from() if isinstance(settings, TargetConfig) else ()
    sources = [path for path in files if path.name == SOURCE and path.exists()]
    return Posterior.load(sources[0]).network_config.widths if sources else None


def choose_spacing(
    scans: Iterable[Scan], regions: Sequence[frozenset[int]], patch: int, patch_over_brain: float
) -> float:
    """Choose the side of cubic voxels in mm so that a patch covers a structure and its surroundings.

    The finest side of the scans' voxels, enlarged until a patch is 1.5 times as long as the structures (the longest
    side of the bounding box of a region's largest component) and `patch_over_brain` times as long as the brain (the
    geometric mean of the sides of its bounding box). Each length is the median over the scans.

    Args:
        scans: Labeled scans.
        regions: Label values of each region.
        patch: Side of a patch, in voxels.
        patch_over_brain: Least length of a patch, relative to the brain.
    """
    finest, brains, structures = [], [], []
    for scan in scans:
        finest.append(min(scan.spacing))
        brains.append(float(np.prod(_box_sides(scan.brain_mask.astype(np.uint8), 0, scan.spacing)) ** (1 / 3)))
        for values in regions:
            components, count = ndimage.label(scan.mask(values))
            if count:
                largest = int(np.argmax(np.bincount(components.ravel())[1:]))
                structures.append(max(_box_sides(components, largest, scan.spacing)))
    needed = patch_over_brain * np.median(brains)
    if structures:
        needed = max(needed, _PATCH_OVER_STRUCTURE * np.median(structures))
    return float(f"{max(np.median(finest), needed / patch):.3g}")


def _box_sides(components: NDArray[Any], number: int, spacing: Sequence[float]) -> list[float]:
    """Return the sides in mm of the bounding box of a component, numbered from 0."""
    box = ndimage.find_objects(components)[number]
    return [(part.stop - part.start) * mm for part, mm in zip(box, spacing, strict=True)]


def find_split(settings: TrainingConfig, n: int | None) -> tuple[DataSet, Split]:
    """Return the data set and the role of each case, without reading scans.

    Cases without a label have no role; `n` is the number of training patients, None for all.

    Raises:
        DataError: if there are too few cases, two patients have the same scans, or the split file does not fit or
            contains a case without label.
    """
    data = open_scans(settings)
    patients = data.patients
    _check_patients(data, settings.modality)
    rest = (n, settings.validation, settings.seed if settings.split_seed is None else settings.split_seed)
    if settings.split is None:
        labeled = {case.id: patients[case.id] for case in data.cases if case.label is not None}
        if not labeled:
            raise DataError(f"{data.root}: no case has a label file; add them, or name them in a CSV file")
        return data, seeded_split(labeled, *rest)
    split = read_split(Path(settings.split), patients, *rest)
    cases = data.by_id
    for name in (*split.train, *split.validation, *split.test):
        if cases[name].label is None:
            raise DataError(f"{settings.split}: case '{name}' has no label file; add one, or take it out of the split")
    return data, split


def _check_patients(data: DataSet, modalities: Sequence[str]) -> None:
    """Raise DataError if labeled cases of two patients have the same scans, which could be in training and in test."""
    owners: dict[tuple[Any, ...], Case] = {}
    patients = data.patients
    for case in data.cases:
        scans = tuple(
            (os.path.realpath(case.images[name]), case.channels.get(name)) for name in modalities if name in case.images
        )
        if scans and case.label is not None:
            other = owners.setdefault(scans, case)
            if patients[other.id] != patients[case.id]:
                raise DataError(
                    f"{data.root}: cases '{other.id}' and '{case.id}' have the same scan {scans[0][0]}, but not the "
                    "same patient; remove one, or list both in a CSV file with a column 'patient'"
                )


def load_training_data(settings: TrainingConfig, n: int | None) -> TrainingData:
    """Find, split, read, check and preprocess the cases; `n` as for `find_split`.

    Raises:
        DataError: if a case is invalid, or there are too few.
    """
    data, split = find_split(settings, n)
    regions = data.region_values(settings.region)
    unlabelled = [case.id for case in data.cases if case.label is None]
    if unlabelled:
        _logger.info("skipping %d of %d cases without a label: %s", len(unlabelled), len(data.cases), unlabelled[0])
    preprocess = Preprocessing(settings.spacing or None)
    examples = {}
    ids = (*split.train, *split.validation)
    for name in each(ids, f"reading {data.layout} scans"):
        examples[name] = mapped(preprocess(_read(data.by_id[name], settings, data), tuple(regions.values())))
    train = tuple(examples[name] for name in split.train)
    if not any(len(region) for example in train for region in example.indices[1:]):
        raise DataError(
            f"{data.root}: no training case holds any voxel of {', '.join(regions)}; there is nothing to learn"
        )
    validation = tuple(examples[name] for name in split.validation)
    patch = patch_shape(train, settings.patch, NETWORKS[settings.network].stride)
    files = tuple(path for name in ids for path in data.by_id[name].files(settings.modality, label=True))
    return TrainingData(data.layout, regions, split, train, validation, patch, data.patients, files)


def find_unlabelled(settings: TargetConfig, split: Split) -> DataSet | None:
    """Return the scans of the setting `unlabelled`, a folder or CSV file, without their labels; None without it.

    Patients with a scan of a patient of the split are left out: test patients stay unseen. Copies of a scan are not
    recognized.

    Raises:
        DataError: if there is no scan beside those of the split.
    """
    if settings.unlabelled is None:
        return None
    labeled, folder = open_scans(settings), Path(settings.unlabelled)
    patient_of = labeled.patients
    patients = {patient_of[name] for name in (*split.train, *split.validation, *split.test)}

    def scans(case: Case) -> set[Path]:
        return {case.images[name].resolve() for name in settings.modality if name in case.images}

    used = {path for case in labeled.cases if patient_of[case.id] in patients for path in scans(case)}
    same = folder.resolve() == labeled.root.resolve()
    data = open_dataset(folder, labeled.layout if same else None, needs_labels=False)
    patient_of = data.patients
    patients = {patient_of[case.id] for case in data.cases if scans(case) & used}
    cases = tuple(dataclasses.replace(case, label=None) for case in data.cases if patient_of[case.id] not in patients)
    if not cases:
        raise DataError(f"{folder}: holds no scan beside those of the split; give a folder of other scans")
    return dataclasses.replace(data, cases=cases)


def load_unlabelled(settings: TrainingConfig, data: DataSet) -> tuple[Example, ...]:
    """Read and preprocess the result of `find_unlabelled`, as resolved settings say.

    Raises:
        DataError: if a scan is invalid.
    """
    preprocess = Preprocessing(settings.spacing or None)
    examples = []
    for case in each(data.cases, "reading unlabelled scans"):
        examples.append(mapped(preprocess(_read(case, settings, data), ())))
    return tuple(examples)


def _read(case: Case, settings: TrainingConfig, data: DataSet) -> Scan:
    return read_case(case, settings.modality, data.labels, may_lack_modalities=settings.modality_dropout > 0)
