"""Layouts of data sets on disk: a file each."""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.case import Case, Layout
from dwp_pyro.data.layouts import brats, openms
from dwp_pyro.errors import DataError

__all__ = ["LAYOUTS", "detect_layout", "find_cases"]

#: Name on the command line → layout.
LAYOUTS: dict[str, Layout] = {"brats": brats.LAYOUT, "openms": openms.LAYOUT, "ms": openms.LAYOUT}


def find_cases(root: Path, layout: Layout) -> list[Case]:
    """The cases under a folder.

    Raises:
        DataError: if the folder is missing, holds no case of this layout, or two cases of one name.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give the scans' folder by --root, or set DWP_PYRO_DATA")
    cases = layout.find_cases(root)
    if not cases:
        raise DataError(f"{root}: holds no case of the layout '{layout.name}'; expected {layout.expected}")
    ids = [case.id for case in cases]
    doubled = sorted({name for name in ids if ids.count(name) > 1})
    if doubled:
        raise DataError(f"{root}: two cases are called '{doubled[0]}'; rename one")
    return cases


def detect_layout(root: Path) -> Layout:
    """The layout of a folder, told from its structure.

    Raises:
        DataError: if no layout fits.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    layouts = {layout.name: layout for layout in LAYOUTS.values()}.values()
    for layout in layouts:
        if layout.find_cases(root):
            return layout
    expected = "; ".join(f"{layout.name}: {layout.expected}" for layout in layouts)
    raise DataError(f"{root}: has none of the known layouts ({expected})")
