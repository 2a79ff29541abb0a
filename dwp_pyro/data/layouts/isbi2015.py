"""ISBI 2015: several visits a patient, each a case, and two raters, of whom the first is the label.

`[training/]training01/preprocessed/training01_01_{flair,mprage,t2,pd}_pp.nii`, `masks/training01_01_mask1.nii`.
"""

from __future__ import annotations

import re
from pathlib import Path

from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts.files import case_of_stems, found, nifti_files, subfolders

__all__ = ["LAYOUT"]

_STEMS = {"flair": "flair", "t1": "mprage", "t2": "t2", "pd": "pd"}


def _find(root: Path) -> Found | None:
    cases = []
    for place in (root, *subfolders(root, "training|test(data_website)?")):
        for patient in subfolders(place, r"(training|test)\d+"):
            files = nifti_files(patient / "preprocessed")
            visits = {match[1] for stem in files if (match := re.fullmatch(r"(\w+_\d+)_[a-z0-9]+_pp", stem))}
            files |= nifti_files(patient / "masks")
            for visit in sorted(visits):
                images = {modality: (f"{visit}_{stem}_pp",) for modality, stem in _STEMS.items()}
                cases.append(case_of_stems(visit, files, images, (f"{visit}_mask1",), patient=patient.name))
    return found(cases, {1: "lesion"})


LAYOUT = Layout(
    name="isbi2015",
    find=_find,
    expected="training01/preprocessed/training01_01_flair_pp.nii, with masks/training01_01_mask1.nii",
)
