"""MSLesSeg: `train/P1/T1/P1_T1_{FLAIR,T1,T2,MASK}.nii.gz`, the first T1 a time point, and each of these a case.

Patients of one time point have no folder for it: `test/P54/P54_{FLAIR,T1,T2,MASK}.nii.gz`.
"""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts.files import case_of_stems, found, nifti_files, subfolders

__all__ = ["LAYOUT"]


def _find(root: Path) -> Found | None:
    cases = []
    for place in (root, *subfolders(root, "train|test")):
        for patient in subfolders(place, r"p\d+"):
            visits = {f"{patient.name}_{folder.name}": folder for folder in subfolders(patient, r"t\d+")}
            for name, folder in {patient.name: patient, **visits}.items():
                prefix = name.casefold()
                images = {modality: (f"{prefix}_{modality}",) for modality in ("flair", "t1", "t2")}
                mask = (f"{prefix}_mask",)
                cases.append(case_of_stems(name, nifti_files(folder), images, mask, patient=patient.name))
    return found(cases, {1: "lesion"})


LAYOUT = Layout(
    name="mslesseg",
    find=_find,
    expected="train/P1/T1/P1_T1_FLAIR.nii.gz, with T1, T2, MASK",
)
