"""open_ms_data: one folder a patient, with or without the patient's name before each file."""

from __future__ import annotations

from pathlib import Path

from dwp_pyro.data.case import Case, Layout
from dwp_pyro.data.layouts.files import find_file

__all__ = ["LAYOUT", "find_cases"]

_MODALITIES = {"flair": "FLAIR", "t1": "T1W", "t1ce": "T1WKS", "t2": "T2W"}


def find_cases(root: Path) -> list[Case]:
    """Cases of `root/patientNN/[patientNN_]{FLAIR,T1W,T1WKS,T2W,consensus_gt,brainmask}.nii[.gz]`."""
    cases = []
    for folder in sorted(path for path in root.glob("patient*") if path.is_dir()):

        def find(stem: str, folder: Path = folder) -> Path | None:
            return find_file(folder, f"{folder.name}_{stem}", stem)

        found = {modality: find(stem) for modality, stem in _MODALITIES.items()}
        images = {modality: path for modality, path in found.items() if path is not None}
        if images:
            cases.append(Case(folder.name, images, find("consensus_gt"), find("brainmask")))
    return cases


LAYOUT = Layout(
    name="openms",
    find_cases=find_cases,
    labels={1: "lesion"},
    regions={"lesion": frozenset({1})},
    expected="patient01/patient01_FLAIR.nii.gz or patient01/FLAIR.nii.gz, with T1W, T1WKS, T2W, consensus_gt",
)
