"""BraTS 2018 to 2021: four ways to lie on disk, one meaning of the label values."""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts import brats2018, brats2019, brats2020, brats2021
from dwp_pyro.data.layouts.files import found

__all__ = ["LAYOUT"]

_LABELS = {1: "necrosis", 2: "oedema", 4: "enhancing"}


def _find(root: Path) -> Found | None:
    years = (brats2018, brats2019, brats2020, brats2021)
    return found((case for year in years for case in year.find_cases(root)), _LABELS)


LAYOUT = Layout(
    name="brats",
    find=_find,
    expected="HGG/Brats18_X_1/Brats18_X_1_flair.nii.gz, with t1, t1ce, t2, seg (BraTS 2018 to 2021)",
)
