"""`check-data`: what a folder of scans holds, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dwp_pyro.data.case import Case, Layout, read_case
from dwp_pyro.data.layouts import find_cases
from dwp_pyro.errors import DataError
from dwp_pyro.progress import progress

__all__ = ["check_data"]


def check_data(root: Path, layout: Layout, modalities: Sequence[str] = ()) -> dict[str, Any]:
    """Read every file of every case.

    Args:
        root: folder of the scans.
        layout: it has.
        modalities: that each case must have; those that any case has, if empty.

    Returns:
        {"layout": name, "cases": [{"id", "modalities", "label" (is there one), "labels" (structure →
        voxels), "spacing" (mm), "shape", "problems" (one line each)}]}.

    Raises:
        DataError: if the folder holds no case of this layout.
    """
    cases = find_cases(root, layout)
    wanted = list(modalities) or sorted({name for case in cases for name in case.images})
    rows = []
    with progress("checking", len(cases)) as advance:
        for case in cases:
            rows.append(_check(case, layout, wanted))
            advance(case.id)
    return {"layout": layout.name, "cases": rows}


def _check(case: Case, layout: Layout, wanted: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": case.id,
        "modalities": list(case.images),
        "label": case.label is not None,
        "labels": {},
        "spacing": None,
        "shape": None,
        "problems": [],
    }
    missing = [name for name in wanted if name not in case.images]
    if missing:
        row["problems"].append(f"case {case.id}: has no {', '.join(missing)} scan")
    try:
        scan = read_case(case, list(case.images), layout.labels)
    except DataError as problem:
        row["problems"].append(str(problem))
        return row
    row["shape"] = list(scan.brain.shape)
    row["spacing"] = [round(float(side), 4) for side in (scan.affine[:3, :3] ** 2).sum(0) ** 0.5]
    if scan.label is not None:
        row["labels"] = {name: int((scan.label == value).sum()) for value, name in layout.labels.items()}
    return row
