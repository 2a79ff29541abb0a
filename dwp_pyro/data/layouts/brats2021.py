"""BraTS 2021, without grades: `BraTS2021_00000/BraTS2021_00000_{flair,t1,t1ce,t2,seg}.nii.gz`."""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.layouts.brats_files import underscored_cases

__all__ = ["find_cases"]


def find_cases(root: Path) -> list[Case]:
    """Cases under the root, or the release in it."""
    return underscored_cases(root, r"brats2021_\d+")
