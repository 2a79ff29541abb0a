"""open_ms_data: one folder a patient, with or without the patient's name before each file.

`[cross_sectional/coregistered/]patient01/[patient01_]{FLAIR,T1W,T1WKS,T2W,consensus_gt,brainmask}.nii.gz`.
"""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts.files import case_of_stems, found, nifti_files, subfolders

__all__ = ["LAYOUT"]

_STEMS = {"flair": "flair", "t1": "t1w", "t1ce": "t1wks", "t2": "t2w"}


def _find(root: Path) -> Found | None:
    cases = []
    for place in (root, root / "coregistered", root / "cross_sectional" / "coregistered"):
        for folder in subfolders(place, r"patient\d+"):
            prefix = f"{folder.name.casefold()}_"
            images = {modality: (prefix + stem, stem) for modality, stem in _STEMS.items()}
            label, brain = ((prefix + stem, stem) for stem in ("consensus_gt", "brainmask"))
            cases.append(case_of_stems(folder.name, nifti_files(folder), images, label, brain))
    return found(cases, {1: "lesion"})


LAYOUT = Layout(
    name="openms",
    find=_find,
    expected="patient01/patient01_FLAIR.nii.gz or patient01/FLAIR.nii.gz, with T1W, T1WKS, T2W, consensus_gt",
)
