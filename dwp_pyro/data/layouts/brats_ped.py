"""BraTS of children (PED): `BraTS-PED-00001-000/BraTS-PED-00001-000-{t1n,t1c,t2w,t2f,seg}.nii.gz`."""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts.brats_files import hyphenated_cases
from dwp_pyro.data.layouts.files import found

__all__ = ["LAYOUT"]


def _find(root: Path) -> Found | None:
    return found(hyphenated_cases(root, r"brats-ped-\d+(-\d+)?"), {1: "ET", 2: "NET", 3: "CC", 4: "ED"})


LAYOUT = Layout(
    name="brats-ped",
    find=_find,
    expected="BraTS-PED-00001-000/BraTS-PED-00001-000-t2f.nii.gz, with t1n, t1c, t2w, seg",
)
