"""BraTS 2024, glioma after treatment: `BraTS-GLI-00005-100/BraTS-GLI-00005-100-{t1n,t1c,t2w,t2f,seg}.nii.gz`."""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts.brats_files import find_gli
from dwp_pyro.data.layouts.files import found

__all__ = ["LAYOUT"]


def _find(root: Path) -> Found | None:
    return found(find_gli(root, 2024), {1: "NETC", 2: "SNFH", 3: "ET", 4: "resection cavity"})


LAYOUT = Layout(
    name="brats2024-gli",
    find=_find,
    expected="BraTS-GLI-00005-100/BraTS-GLI-00005-100-t2f.nii.gz, with t1n, t1c, t2w, seg",
)
