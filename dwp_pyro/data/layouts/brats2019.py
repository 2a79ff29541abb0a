"""BraTS 2019: `{HGG,LGG}/BraTS19_TCIA10_410_1/BraTS19_TCIA10_410_1_{flair,t1,t1ce,t2,seg}.nii.gz`."""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.layouts.brats_files import underscored_cases

__all__ = ["find_cases"]


def find_cases(root: Path) -> list[Case]:
    """Cases under the root, its grades, or the release in it."""
    return underscored_cases(root, r"brats19_.+")
