"""A data set: cases of one layout, and what their label values mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.regions import default_regions
from dwp_pyro.errors import DataError

__all__ = ["DataSet", "Found", "Layout"]


@dataclass(frozen=True)
class Found:
    """What a layout finds in a folder.

    Args:
        cases: at least one, in any order.
        labels: label value → name; None where nothing says what the values mean.
        regions: region → label values, where the data set defines them itself; else they follow from the names.
    """

    cases: Sequence[Case]
    labels: Mapping[int, str] | None
    regions: Mapping[str, frozenset[int]] | None = None


@dataclass(frozen=True)
class Layout:
    """How data sets of one kind lie on disk.

    Args:
        name: as the command line calls it.
        find: root → what is there; None if the root has another layout. It reads no voxel, and goes by names of
            folders and files and by descriptions beside the scans, never by values in a mask.
        expected: what the root should look like, for messages.
    """

    name: str
    find: Callable[[Path], Found | None]
    expected: str


@dataclass(frozen=True)
class DataSet:
    """Cases of one layout.

    Args:
        root: the folder, or the manifest, that they are from.
        layout: its name.
        cases: sorted by id.
        labels: label value → structure, background left out; see `regions.structure`.
        regions: region → the label values that make it up.
    """

    root: Path
    layout: str
    cases: tuple[Case, ...]
    labels: Mapping[int, str]
    regions: Mapping[str, frozenset[int]]

    @property
    def by_id(self) -> dict[str, Case]:
        """The cases by their ids."""
        return {case.id: case for case in self.cases}

    @property
    def patients(self) -> dict[str, str]:
        """Case id → patient; a case that names none is a patient of its own."""
        return {case.id: case.patient or case.id for case in self.cases}

    def region_values(self, regions: Sequence[str] | None) -> dict[str, frozenset[int]]:
        """The label values of some regions, or of the default ones: the whole of a tumour; else every label.

        Raises:
            DataError: if the data set has no such region, or no labels at all.
        """
        if not self.regions:
            raise DataError(
                f"{self.root}: there is nothing to learn, for no case has a label file, or --label-map leaves no "
                "label but background and ignore; add labels, or name them"
            )
        chosen = default_regions(self.regions) if regions is None else regions
        for name in chosen:
            if name not in self.regions:
                known = ", ".join(self.regions)
                raise DataError(f"region: '{name}' is not one of {known}, which these {self.layout} scans have")
        return {name: self.regions[name] for name in chosen}
