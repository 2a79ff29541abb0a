"""Data sets with white matter lesions: open_ms_data, MSSEG 2016, ISBI 2015, WMH 2017 and MSLesSeg."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import Layout, LayoutMatch
from dwp_pyro.data.layouts.file_names import case_from_stems, match_cases, nifti_files, subfolders

__all__ = ["LAYOUTS"]

_LABELS = {1: "lesion"}
_OPENMS = {"flair": "flair", "t1": "t1w", "t1ce": "t1wks", "t2": "t2w"}
_ISBI = {"flair": "flair", "t1": "mprage", "t2": "t2", "pd": "pd"}
_MSSEG_FLAT = {"flair": ("3dflair",), "t1": ("3dt1",), "t1ce": ("3dt1gado",), "t2": ("t2",), "pd": ("dp",)}
_MSSEG_RAW = {"flair": ("flair",), "t1": ("t1",), "t1ce": ("gado",), "t2": ("t2",), "pd": ("dp",)}
_MSSEG_PREPROCESSED = {modality: (f"{stem}_preprocessed",) for modality, (stem,) in _MSSEG_RAW.items()}
_MSSEG_LABEL = ("consensus",)
_MSSEG_BRAIN = ("brain_mask", "mask_registered", "brainmask")
_WMH_DEPTH = 5  # maximum depth of a case: dataverse_files/training/Amsterdam/GE3T/100


def _find_openms(root: Path) -> LayoutMatch | None:
    """Find open_ms_data: one folder per patient, whose name may precede each file name.

    `[cross_sectional/coregistered/]patient01/[patient01_]{FLAIR,T1W,T1WKS,T2W,consensus_gt,brainmask}.nii.gz`.
    """
    cases = []
    for parent in (root, root / "coregistered", root / "cross_sectional" / "coregistered"):
        for folder in subfolders(parent, r"patient\d+"):
            prefix = f"{folder.name.casefold()}_"
            images = {modality: (prefix + stem, stem) for modality, stem in _OPENMS.items()}
            label, brain_mask = ((prefix + stem, stem) for stem in ("consensus_gt", "brainmask"))
            cases.append(case_from_stems(folder.name, nifti_files(folder), images, label, brain_mask))
    return match_cases(cases, _LABELS)


def _find_msseg2016(root: Path) -> LayoutMatch | None:
    """Find MSSEG 2016, both releases.

    The first is flat: `01016SACH/{3DFLAIR,3DT1,3DT1GADO,T2,DP,Consensus}.nii.gz`. The second has folders:
    `{Training,Testing}/Center_01/Patient_01/Preprocessed_Data/{FLAIR,T1,GADO,T2,DP}_preprocessed.nii.gz` (otherwise
    Raw_Data) and `Masks/{Consensus,Brain_Mask}.nii.gz`. The label is the consensus of the seven raters.
    """
    parts = [root, *subfolders(root, "training|testing|train|test")]
    centers = [center for part in parts for center in subfolders(part, r"center_?\d+")]
    patients = [patient for center in centers for patient in subfolders(center, r"patient_?\d+")]
    cases = [_msseg_case(patient, "_".join(patient.relative_to(root).parts)) for patient in patients]
    for folder in (folder for part in parts for folder in subfolders(part, r"\d+\w+")):
        files = nifti_files(folder)
        if "3dflair" in files:
            cases.append(case_from_stems(folder.name, files, _MSSEG_FLAT, _MSSEG_LABEL, _MSSEG_BRAIN))
    return match_cases(cases, _LABELS)


def _msseg_case(folder: Path, name: str) -> Case | None:
    files = {path.name.casefold(): nifti_files(path) for path in subfolders(folder)}
    masks = files.get("masks", {})
    cases = (
        case_from_stems(name, files.get(images, {}) | masks, stems, _MSSEG_LABEL, _MSSEG_BRAIN)
        for images, stems in (("preprocessed_data", _MSSEG_PREPROCESSED), ("raw_data", _MSSEG_RAW))
    )
    return next(filter(None, cases), None)


def _find_isbi2015(root: Path) -> LayoutMatch | None:
    """Find ISBI 2015: one case per visit; the label is the first of two raters.

    `[training/]training01/preprocessed/training01_01_{flair,mprage,t2,pd}_pp.nii`, `masks/training01_01_mask1.nii`.
    """
    cases = []
    for parent in (root, *subfolders(root, "training|test(data_website)?")):
        for patient in subfolders(parent, r"(training|test)\d+"):
            files = nifti_files(patient / "preprocessed")
            visits = {match[1] for stem in files if (match := re.fullmatch(r"(\w+_\d+)_[a-z0-9]+_pp", stem))}
            files |= nifti_files(patient / "masks")
            for visit in sorted(visits):
                images = {modality: (f"{visit}_{stem}_pp",) for modality, stem in _ISBI.items()}
                cases.append(case_from_stems(visit, files, images, (f"{visit}_mask1",), patient=patient.name))
    return match_cases(cases, _LABELS)


def _find_wmh2017(root: Path) -> LayoutMatch | None:
    """Find WMH 2017: `<site>[/<scanner>]/<id>/pre/{FLAIR,T1}.nii.gz` (otherwise `orig`) and `<id>/wmh.nii.gz`.

    Label 1 is white matter hyperintensity; label 2 is other pathology, which the challenge ignores.
    """
    folders = _wmh_folders(root, _WMH_DEPTH, {root.resolve()})
    return match_cases((_wmh_case(folder, root) for folder in folders), {1: "WMH", 2: "ignore"})


def _wmh_folders(folder: Path, depth: int, seen: set[Path]) -> Iterator[Path]:
    """Yield folders with `pre` or `orig`, down to a depth; do not descend into them or follow links twice."""
    children = subfolders(folder, r"(?!sub-|(derivatives|sourcedata)$).+")  # not those of BIDS, which are many
    if {path.name.casefold() for path in children} & {"pre", "orig"}:
        yield folder
    elif depth:
        for path in sorted(children, key=Path.is_symlink):  # links last
            target = path.resolve()
            if target not in seen:
                seen.add(target)
                yield from _wmh_folders(path, depth - 1, seen)


def _wmh_case(folder: Path, root: Path) -> Case | None:
    name = "_".join(folder.relative_to(root).parts) or folder.resolve().name
    label = nifti_files(folder)
    cases = (
        case_from_stems(name, nifti_files(images) | label, {"flair": ("flair",), "t1": ("t1",)}, ("wmh",))
        for images in subfolders(folder, "pre") + subfolders(folder, "orig")
    )
    return next(filter(None, cases), None)


def _find_mslesseg(root: Path) -> LayoutMatch | None:
    """Find MSLesSeg: `train/P1/T1/P1_T1_{FLAIR,T1,T2,MASK}.nii.gz`, one case per time point (here P1_T1).

    Patients with one time point have no folder for it: `test/P54/P54_{FLAIR,T1,T2,MASK}.nii.gz`.
    """
    cases = []
    for parent in (root, *subfolders(root, "train|test")):
        for patient in subfolders(parent, r"p\d+"):
            visits = {f"{patient.name}_{folder.name}": folder for folder in subfolders(patient, r"t\d+")}
            for name, folder in {patient.name: patient, **visits}.items():
                prefix = name.casefold()
                images = {modality: (f"{prefix}_{modality}",) for modality in ("flair", "t1", "t2")}
                mask = (f"{prefix}_mask",)
                cases.append(case_from_stems(name, nifti_files(folder), images, mask, patient=patient.name))
    return match_cases(cases, _LABELS)


LAYOUTS = (
    Layout(
        "openms",
        _find_openms,
        "patient01/patient01_FLAIR.nii.gz or patient01/FLAIR.nii.gz, with T1W, T1WKS, T2W, consensus_gt",
    ),
    Layout(
        "msseg2016",
        _find_msseg2016,
        "Training/Center_01/Patient_01/Preprocessed_Data/FLAIR_preprocessed.nii.gz, with Masks/Consensus.nii.gz",
    ),
    Layout(
        "isbi2015",
        _find_isbi2015,
        "training01/preprocessed/training01_01_flair_pp.nii, with masks/training01_01_mask1.nii",
    ),
    Layout("wmh2017", _find_wmh2017, "Utrecht/0/pre/FLAIR.nii.gz, with T1, and Utrecht/0/wmh.nii.gz"),
    Layout("mslesseg", _find_mslesseg, "train/P1/T1/P1_T1_FLAIR.nii.gz, with T1, T2, MASK"),
)
