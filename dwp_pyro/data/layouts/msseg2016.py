"""MSSEG 2016, both releases.

The first is flat: `01016SACH/{3DFLAIR,3DT1,3DT1GADO,T2,DP,Consensus}.nii.gz`. The second has folders:
`{Training,Testing}/Center_01/Patient_01/Preprocessed_Data/{FLAIR,T1,GADO,T2,DP}_preprocessed.nii.gz` (Raw_Data where
these are missing) and `Masks/{Consensus,Brain_Mask}.nii.gz`. The consensus of the seven raters is the label.
"""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts.files import case_of_stems, found, nifti_files, subfolders

__all__ = ["LAYOUT"]

_FLAT = {"flair": ("3dflair",), "t1": ("3dt1",), "t1ce": ("3dt1gado",), "t2": ("t2",), "pd": ("dp",)}
_RAW = {"flair": ("flair",), "t1": ("t1",), "t1ce": ("gado",), "t2": ("t2",), "pd": ("dp",)}
_PREPROCESSED = {modality: (f"{stem}_preprocessed",) for modality, (stem,) in _RAW.items()}
_LABEL = ("consensus",)
_BRAIN = ("brain_mask", "mask_registered", "brainmask")


def _find(root: Path) -> Found | None:
    parts = [root, *subfolders(root, "training|testing|train|test")]
    centres = [centre for part in parts for centre in subfolders(part, r"center_?\d+")]
    patients = [patient for centre in centres for patient in subfolders(centre, r"patient_?\d+")]
    cases = [_case(patient, "_".join(patient.relative_to(root).parts)) for patient in patients]
    cases += [_flat_case(folder) for part in parts for folder in subfolders(part, r"\d+\w+")]
    return found(cases, {1: "lesion"})


def _case(folder: Path, name: str) -> Case | None:
    inside = {path.name.casefold(): nifti_files(path) for path in subfolders(folder)}
    masks = inside.get("masks", {})
    for images, stems in (("preprocessed_data", _PREPROCESSED), ("raw_data", _RAW)):
        case = case_of_stems(name, inside.get(images, {}) | masks, stems, _LABEL, _BRAIN)
        if case is not None:
            return case
    return None


def _flat_case(folder: Path) -> Case | None:
    files = nifti_files(folder)
    return case_of_stems(folder.name, files, _FLAT, _LABEL, _BRAIN) if "3dflair" in files else None


LAYOUT = Layout(
    name="msseg2016",
    find=_find,
    expected="Training/Center_01/Patient_01/Preprocessed_Data/FLAIR_preprocessed.nii.gz, with Masks/Consensus.nii.gz",
)
