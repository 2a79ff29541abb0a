"""Layouts of data sets on disk, and their detection."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from dwp_pyro.data.dataset import DataSet, Layout, LayoutMatch
from dwp_pyro.data.layouts import bids, brats, manifest, ms, msd, nnunet
from dwp_pyro.data.regions import regions_of, structure
from dwp_pyro.runtime.errors import ConfigError, DataError, LabelsUnknown

__all__ = ["LAYOUTS", "detect_layouts", "open_dataset"]

_LAYOUTS = (*brats.LAYOUTS, *ms.LAYOUTS, bids.LAYOUT, msd.LAYOUT, nnunet.LAYOUT, manifest.LAYOUT)

#: Name on the command line → layout.
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _LAYOUTS}
LAYOUTS["ms"] = LAYOUTS["openms"]


def open_dataset(
    root: Path, layout: str | None = None, label_map: Mapping[int, str] | None = None, *, needs_labels: bool = True
) -> DataSet:
    """Open the data set in a folder, without reading voxels.

    Args:
        root: Folder of the scans, or manifest.
        layout: Name of the layout; None to detect it.
        label_map: Label value → structure; overrides the names of the layout.
        needs_labels: Whether label values without names are an error; otherwise the labels are ignored.

    Raises:
        DataError: if the root does not exist, has no case of the layout or of any layout, has several layouts with
            different cases, two cases with the same id, or label values without names.
    """
    if not os.path.exists(root):
        raise DataError(f"{root}: no such folder or file; expected a folder of scans")
    matches = detect_layouts(root, _LAYOUTS if layout is None else (LAYOUTS[layout],))
    if not matches and layout is not None:
        raise DataError(
            f"{root}: holds no case of the layout '{LAYOUTS[layout].name}'; expected {LAYOUTS[layout].expected}"
        )
    if not matches:
        raise DataError(
            f"{root}: has none of the known layouts ({', '.join(known.name for known in _LAYOUTS)}); "
            "give the folder that holds all cases, or list the scans in a CSV file (id,flair,label) and give that file"
        )
    name, match = next(iter(matches.items()))
    labels = match.labels
    if len(matches) > 1:
        if any(list(other.cases) != list(match.cases) for other in matches.values()):
            raise DataError(
                f"{root}: has several layouts ({', '.join(matches)}); choose one, or list the scans in a CSV file and "
                "give that file instead"
            )
        labels = None  # the layouts differ only in the meaning of the label values
    cases = tuple(sorted(match.cases, key=lambda case: case.id))
    _check_ids(root, [case.id for case in cases])
    if not any(case.label for case in cases):
        return DataSet(root, name, cases, {}, {})
    if labels is None and not label_map:
        if not needs_labels:
            return DataSet(root, name, tuple(dataclasses.replace(case, label=None) for case in cases), {}, {})
        layouts = f"may be {' or '.join(matches)}, and" if len(matches) > 1 else f"({name})"
        raise LabelsUnknown(f"{root}: {layouts} does not define the meaning of its label values")
    try:
        named = {value: structure(meaning) for value, meaning in (labels or {}).items()} | dict(label_map or {})
    except ConfigError as problem:
        raise DataError(f"{root}: {problem}") from problem
    regions = regions_of(named) if match.regions is None or label_map else dict(match.regions)
    return DataSet(root, name, cases, named, regions)


def detect_layouts(root: Path, layouts: Iterable[Layout] = _LAYOUTS) -> dict[str, LayoutMatch]:
    """Return the layouts that match a folder by name; several if the names of files are ambiguous."""
    return {layout.name: match for layout in layouts if (match := layout.find(root)) is not None}


def _check_ids(root: Path, ids: list[str]) -> None:
    """Raise DataError unless the sorted ids are unique and valid file names."""
    for name, next_name in zip(ids, [*ids[1:], None], strict=True):
        if name == next_name:
            raise DataError(f"{root}: two cases have the id '{name}'; rename one")
        if not name or name.startswith(".") or os.sep in name or not name.isprintable():
            raise DataError(f"{root}: the case id {name!r} cannot name a file; rename it")
