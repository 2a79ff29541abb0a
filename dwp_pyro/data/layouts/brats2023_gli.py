"""BraTS 2023, glioma before treatment: `BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t1n,t1c,t2w,t2f,seg}.nii.gz`."""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts.brats_files import find_gli
from dwp_pyro.data.layouts.files import found

__all__ = ["LAYOUT"]


def _find(root: Path) -> Found | None:
    return found(find_gli(root, 2023), {1: "NCR", 2: "ED", 3: "ET"})


LAYOUT = Layout(
    name="brats2023-gli",
    find=_find,
    expected="BraTS-GLI-00000-000/BraTS-GLI-00000-000-t2f.nii.gz, with t1n, t1c, t2w, seg",
)
