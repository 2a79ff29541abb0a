"""BraTS 2020, without grades: `BraTS20_Training_001/BraTS20_Training_001_{flair,t1,t1ce,t2,seg}.nii[.gz]`."""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.layouts.brats_files import underscored_cases

__all__ = ["find_cases"]

_LABEL_OF_355 = "w39_1998.09.19_segm"  # what a common copy calls the label of BraTS20_Training_355


def find_cases(root: Path) -> list[Case]:
    """Cases under the root, or the release in it."""
    return underscored_cases(root, r"brats20_(training|validation|testing)_.+", (_LABEL_OF_355,))
