"""A manifest: a CSV file that lists the scans, for whatever lies in no known layout.

Columns: `id`; `label` and `brain` (a mask) if there are any; `patient`, where a patient has several scans; every other
one is a modality. Paths start at the CSV's folder, and an empty cell is a file that is not there. It does not say what
label values mean.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts.files import modality_name
from dwp_pyro.errors import DataError

__all__ = ["LAYOUT"]

_NO_MODALITY = ("id", "label", "brain", "patient")


def _find(root: Path) -> Found | None:
    if root.suffix.casefold() != ".csv" or os.path.isdir(root):
        return None
    try:
        with open(root, encoding="utf-8-sig", newline="") as file:
            header, *lines = [[cell.strip() for cell in line] for line in csv.reader(file)] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DataError(f"{root}: cannot be read as CSV ({problem})") from problem
    columns = [name.casefold() for name in header]
    columns = [name if name in _NO_MODALITY else modality_name(name) for name in columns]
    if "id" not in columns:
        raise DataError(f"{root}: has no column 'id' (its first line is '{','.join(header)}'); add it, by commas")
    if not set(columns) - {*_NO_MODALITY}:
        raise DataError(f"{root}: has no column of a modality, as flair or t1, beside {', '.join(columns)}; add one")
    for name in columns:
        if not name or columns.count(name) > 1:
            raise DataError(f"{root}: two columns are called '{name}', or one has no name; rename or remove one")
    cases: dict[str, Case] = {}
    for number, line in enumerate(lines, start=2):
        if any(line):
            case = _case(root, number, columns, line)
            if case.id in cases:
                raise DataError(f"{root}: line {number}: id '{case.id}' is there twice; rename one")
            cases[case.id] = case
    if not cases:
        raise DataError(f"{root}: lists no case; add a line for each")
    return Found(list(cases.values()), None)


def _case(root: Path, number: int, columns: list[str], line: list[str]) -> Case:
    if len(line) != len(columns):
        raise DataError(f"{root}: line {number}: has {len(line)} cells for {len(columns)} columns; mend it")
    cells = dict(zip(columns, line, strict=True))
    name, patient = cells.pop("id"), cells.pop("patient", "")
    files = {column: root.parent / cell for column, cell in cells.items() if cell}
    for column, path in files.items():
        if not os.path.isfile(path):
            raise DataError(f"{root}: line {number}: {column} {path}: no such file; paths start at the CSV's folder")
    label, brain = files.pop("label", None), files.pop("brain", None)
    if not files:
        raise DataError(f"{root}: line {number}: case '{name}' has no scan; add one, or remove the line")
    return Case(name, files, label, brain, patient=patient)


LAYOUT = Layout(
    name="manifest",
    find=_find,
    expected="a CSV file with the columns id, a modality each (as flair), and patient, label, brain if there are any",
)
