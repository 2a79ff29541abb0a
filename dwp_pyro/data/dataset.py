"""Data sets: cases of one layout, and the names of their label values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.regions import default_regions
from dwp_pyro.runtime.errors import DataError

__all__ = ["DataSet", "Layout", "LayoutMatch", "join_data_sets"]


@dataclass(frozen=True)
class LayoutMatch:
    """Cases of a layout found in a folder.

    Args:
        cases: Cases in any order, at least one.
        labels: Label value → name; None if unknown.
        regions: Region → label values if the data set defines regions; None to derive them from the names.
    """

    cases: Sequence[Case]
    labels: Mapping[int, str] | None
    regions: Mapping[str, frozenset[int]] | None = None


@dataclass(frozen=True)
class Layout:
    """Arrangement of a kind of data set on disk.

    Args:
        name: Name on the command line.
        find: Function from a root to its cases, or to None if the root does not have this layout. It uses the names of
            folders and files and the descriptions beside the scans, and reads no voxels.
        expected: Example of the file names, for messages.
    """

    name: str
    find: Callable[[Path], LayoutMatch | None]
    expected: str


@dataclass(frozen=True)
class DataSet:
    """Cases of one layout with names of labels and regions.

    Args:
        root: Folder or manifest of the cases.
        layout: Name of the layout.
        cases: Cases, sorted by id.
        labels: Label value → structure, without background; see `regions.structure`.
        regions: Region → label values.
    """

    root: Path
    layout: str
    cases: tuple[Case, ...]
    labels: Mapping[int, str]
    regions: Mapping[str, frozenset[int]]

    @property
    def by_id(self) -> dict[str, Case]:
        """Cases by id."""
        return {case.id: case for case in self.cases}

    @property
    def patients(self) -> dict[str, str]:
        """Case id → patient; the patient of a case without one is its id."""
        return {case.id: case.patient or case.id for case in self.cases}

    def scans(self, modalities: Sequence[str]) -> list[Path]:
        """Return the files of all cases without their labels."""
        return [path for case in self.cases for path in case.files(modalities, label=False)]

    def region_values(self, regions: Sequence[str] | None) -> dict[str, frozenset[int]]:
        """Return the label values of regions.

        Args:
            regions: Names of the regions; None for those of `regions.default_regions`.

        Raises:
            DataError: if the data set does not have such a region or has no labels.
        """
        if not self.regions:
            raise DataError(
                f"{self.root}: no case has a label file, or the label map has only background and ignore; add labels "
                "or name them"
            )
        chosen = default_regions(self.regions) if regions is None else regions
        for name in chosen:
            if name not in self.regions:
                known = ", ".join(self.regions)
                raise DataError(f"region: '{name}' is not one of {known}, which these {self.layout} scans have")
        return {name: self.regions[name] for name in chosen}


def join_data_sets(data_sets: Sequence[DataSet]) -> DataSet:
    """Return the cases of several data sets as one, with the root and the layout of the first.

    Ids of cases and patients start with the folder name of their data set ("openms-patient01"), and its number where
    two have the same name. The regions are those that have the same label values in all data sets.

    Raises:
        DataError: if a label value has different names in two data sets, if they share no region, if only some have
            labels, or if two cases would have the same id.
    """
    first = data_sets[0]
    if any(each.regions for each in data_sets):
        for each in data_sets:
            each.region_values(None)  # raises if it has no labels
    labels: dict[int, str] = {}
    cases: list[Case] = []
    names = [each.root.resolve().name.removesuffix(".csv") for each in data_sets]
    for number, (each, name) in enumerate(zip(data_sets, names, strict=True), start=1):
        for value, structure in each.labels.items():
            known = labels.setdefault(value, structure)
            if known != structure:
                raise DataError(
                    f"{each.root}: label {value} is '{structure}', and '{known}' in another data set; recode one"
                )
        prefix = name if names.count(name) == 1 else f"{name}{number}"
        for case in each.cases:
            patient = case.patient and f"{prefix}-{case.patient}"
            cases.append(replace(case, id=f"{prefix}-{case.id}", patient=patient))
    shared = set.intersection(*(set(each.regions.items()) for each in data_sets))
    regions = {name: values for name, values in first.regions.items() if (name, values) in shared}
    if not regions and any(each.regions for each in data_sets):
        raise DataError(f"{first.root}: shares no region with the other data sets; name and number it alike")
    ids = [case.id for case in cases]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise DataError(f"{first.root}: two cases of the data sets would have the id '{twice}'; rename a folder")
    return replace(first, cases=tuple(sorted(cases, key=lambda case: case.id)), labels=labels, regions=regions)
