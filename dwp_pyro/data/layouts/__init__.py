"""Layouts of data sets on disk."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import DataSet, Found, Layout
from dwp_pyro.data.layouts import bids, brats, manifest, ms, msd, nnunet
from dwp_pyro.data.regions import regions_of, structure
from dwp_pyro.errors import ConfigError, DataError

__all__ = ["LAYOUTS", "fitting", "open_dataset"]

_LAYOUTS = (*brats.LAYOUTS, *ms.LAYOUTS, bids.LAYOUT, msd.LAYOUT, nnunet.LAYOUT, manifest.LAYOUT)

#: Name on the command line → layout.
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _LAYOUTS}
LAYOUTS["ms"] = LAYOUTS["openms"]


def open_dataset(
    root: Path,
    layout: str | None = None,
    label_map: Mapping[int, str] | None = None,
    *,
    needs_labels: bool = True,
) -> DataSet:
    """The data set in a folder; no voxel is read.

    Args:
        root: folder of the scans, or a manifest.
        layout: its name; None to tell it from the folder.
        label_map: label value → structure; wins over the layout's own names.
        needs_labels: whether labels whose values nobody has named are refused; else they are left out.

    Raises:
        DataError: if there is nothing, no case of this layout or of any, several layouts that differ, two cases of
            one name, or labels of unknown meaning.
    """
    if not os.path.exists(root):
        raise DataError(f"{root}: no such folder or file; give the scans' folder by --root, or set DWP_PYRO_DATA")
    found = fitting(root) if layout is None else {LAYOUTS[layout].name: LAYOUTS[layout].find(root)}
    there = {name: one for name, one in found.items() if one is not None}
    if not there and layout is not None:
        raise DataError(
            f"{root}: holds no case of the layout '{LAYOUTS[layout].name}'; expected {LAYOUTS[layout].expected}"
        )
    if not there:
        raise DataError(
            f"{root}: has none of the known layouts ({', '.join(fitted.name for fitted in _LAYOUTS)}); "
            "list the scans in a CSV file (id,flair,label) and give that by --root"
        )
    name, chosen = next(iter(there.items()))
    labels = chosen.labels
    if len(there) > 1:
        if any(list(one.cases) != list(chosen.cases) for one in there.values()):
            raise DataError(f"{root}: has several layouts ({', '.join(there)}); choose one by --dataset")
        labels = None  # which of them, only the values would tell
    cases = tuple(sorted(chosen.cases, key=lambda case: case.id))
    _check_ids(root, [case.id for case in cases])
    if not any(case.label for case in cases):
        return DataSet(root, name, cases, {}, {})
    if labels is None and not label_map:
        if not needs_labels:
            return DataSet(root, name, tuple(_without_label(case) for case in cases), {}, {})
        which = f"may be {' or '.join(there)}, and" if len(there) > 1 else f"({name})"
        raise DataError(
            f"{root}: {which} does not say what its label values mean; name them by --label-map, "
            "for example 1=oedema,2=necrosis,3=enhancing"
        )
    try:
        named = {value: structure(meaning) for value, meaning in (labels or {}).items()} | dict(label_map or {})
    except ConfigError as problem:
        raise DataError(f"{root}: {problem}") from problem
    regions = regions_of(named) if chosen.regions is None or label_map else dict(chosen.regions)
    return DataSet(root, name, cases, named, regions)


def fitting(root: Path) -> dict[str, Found]:
    """What each layout finds in a folder, of those that find anything: one, unless names alone do not tell."""
    found = {layout.name: layout.find(root) for layout in _LAYOUTS}
    return {name: one for name, one in found.items() if one is not None}


def _without_label(case: Case) -> Case:
    return dataclasses.replace(case, label=None)


def _check_ids(root: Path, ids: list[str]) -> None:
    """Ids are unique, and fit for the names of files."""
    for name, next_name in zip(ids, [*ids[1:], None], strict=True):
        if name == next_name:
            raise DataError(f"{root}: two cases are called '{name}'; rename one")
        if not name or name.startswith(".") or os.sep in name or not name.isprintable():
            raise DataError(f"{root}: the case id {name!r} cannot name a file; rename it")
