"""Manifest: a CSV file that lists scans in any other layout.

Columns: `id`; optionally `label`, `brain` (a mask) and `patient` (if patients have several scans); all others are
modalities. Paths are relative to the folder of the CSV file; an empty cell is a missing file. The meaning of the label
values is unknown.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import Layout, LayoutMatch
from dwp_pyro.data.modalities import modality_name
from dwp_pyro.runtime.errors import DataError

__all__ = ["LAYOUT"]

_OTHER_COLUMNS = ("id", "label", "brain", "patient")


def _find(root: Path) -> LayoutMatch | None:
    if root.suffix.casefold() != ".csv" or os.path.isdir(root):
        return None
    try:
        with open(root, encoding="utf-8-sig", newline="") as file:
            header, *lines = [[cell.strip() for cell in line] for line in csv.reader(file)] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DataError(f"{root}: cannot be read as CSV ({problem})") from problem
    columns = [name.casefold() for name in header]
    columns = [name if name in _OTHER_COLUMNS else modality_name(name) for name in columns]
    if "id" not in columns:
        raise DataError(
            f"{root}: has no column 'id' (its first line is '{','.join(header)}'); add it; separate columns by commas"
        )
    if not set(columns) - {*_OTHER_COLUMNS}:
        raise DataError(f"{root}: has no modality column such as flair or t1, only {', '.join(columns)}; add one")
    for name in columns:
        if not name or columns.count(name) > 1:
            raise DataError(
                f"{root}: two columns have the name '{name}', or a column has no name; rename or remove one"
            )
    cases: dict[str, Case] = {}
    for number, line in enumerate(lines, start=2):
        if any(line):
            case = _case(root, number, columns, line)
            if case.id in cases:
                raise DataError(f"{root}: line {number}: id '{case.id}' is a duplicate; rename one")
            cases[case.id] = case
    if not cases:
        raise DataError(f"{root}: lists no case; add one line per case")
    return LayoutMatch(list(cases.values()), None)


def _case(root: Path, number: int, columns: list[str], line: list[str]) -> Case:
    if len(line) != len(columns):
        raise DataError(f"{root}: line {number}: has {len(line)} cells for {len(columns)} columns; fix it")
    cells = dict(zip(columns, line, strict=True))
    name, patient = cells.pop("id"), cells.pop("patient", "")
    files = {column: root.parent / cell for column, cell in cells.items() if cell}
    for column, path in files.items():
        if not os.path.isfile(path):
            raise DataError(
                f"{root}: line {number}: {column} {path}: no such file; paths are relative to the CSV's folder"
            )
    label, brain_mask = files.pop("label", None), files.pop("brain", None)
    if not files:
        raise DataError(f"{root}: line {number}: case '{name}' has no scan; add one or remove the line")
    return Case(name, files, label, brain_mask, patient=patient)


LAYOUT = Layout(
    name="manifest",
    find=_find,
    expected="a CSV file with the columns id, one per modality (as flair), and optionally patient, label, brain",
)
