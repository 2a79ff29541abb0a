"""Content and problems of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dwp_pyro.data.case import Case, read_case
from dwp_pyro.data.dataset import DataSet
from dwp_pyro.data.regions import BACKGROUND
from dwp_pyro.runtime.errors import DataError
from dwp_pyro.runtime.progress import progress

__all__ = ["check_data"]


def check_data(data: DataSet, modalities: Sequence[str] = ()) -> dict[str, Any]:
    """Read every file of every case and list the problems.

    Args:
        data: Data set.
        modalities: Modalities that each case must have; if empty, all modalities of any case.

    Returns:
        {"layout": name, "regions": region → label values, "cases": [{"id", "modalities", "label" (whether there is
        one), "labels" (structure → voxels), "spacing" (mm), "shape", "problems" (one line each)}]}. A missing label is
        not a problem.
    """
    required = list(modalities) or sorted({name for case in data.cases for name in case.images})
    rows = []
    with progress("checking", len(data.cases)) as advance:
        for case in data.cases:
            rows.append(_check(case, data, required))
            advance(case.id)
    regions = {name: sorted(values) for name, values in data.regions.items()}
    return {"layout": data.layout, "regions": regions, "cases": rows}


def _check(case: Case, data: DataSet, required: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": case.id,
        "modalities": list(case.images),
        "label": case.label is not None,
        "labels": {},
        "spacing": None,
        "shape": None,
        "problems": [],
    }
    missing = [name for name in required if name not in case.images]
    if missing:
        row["problems"].append(f"case {case.id}: has no {', '.join(missing)} scan")
    try:
        scan = read_case(case, list(case.images), data.labels)
    except DataError as problem:
        row["problems"].append(str(problem))
        return row
    for (name, path), image in zip(case.images.items(), scan.images, strict=True):
        if not image.any():
            row["problems"].append(f"{path}: is 0 everywhere, an empty {name} scan")
    row["shape"] = list(scan.brain_mask.shape)
    row["spacing"] = [round(side, 4) for side in scan.spacing]
    if scan.label is not None:
        for value, name in data.labels.items():
            if name != BACKGROUND:
                row["labels"][name] = row["labels"].get(name, 0) + int((scan.label == value).sum())
    return row
