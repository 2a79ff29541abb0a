"""BraTS: one folder per case in the root, in a grade (HGG, LGG) or in a release folder.

2018 to 2021: `Brats18_CBICA_AAP_1/Brats18_CBICA_AAP_1_{flair,t1,t1ce,t2,seg}.nii[.gz]`, `BraTS19_TCIA10_410_1/…`,
`BraTS20_Training_001/…`, `BraTS2021_00000/…`. Glioma before (2023) and after treatment (2024), and pediatric (PED):
`BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t1n,t1c,t2w,t2f,seg}.nii.gz`, `BraTS-PED-00001-000/…`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import Layout, LayoutMatch
from dwp_pyro.data.layouts.file_names import case_from_stems, distinct, match_cases, nifti_files, subfolders

__all__ = ["LAYOUTS"]

_MODALITIES = ("flair", "t1", "t1ce", "t2")
_UNDERSCORED = ("_flair", "_t1", "_t1ce", "_t2", "_seg")
_HYPHENATED = ("-t2f", "-t1n", "-t1c", "-t2w", "-seg")

# Folders between the root and the cases: grades, releases ("MICCAI_BraTS2020_TrainingData").
_PARENTS = r"hgg|lgg|(training|validation)_?data.*|(?!brats20_).*brats.*(train|valid|data|challenge).*"
_LABEL_OF_355 = "w39_1998.09.19_segm"  # label of BraTS20_Training_355 in a common copy


def _find(
    folders: tuple[str, ...], stems: tuple[str, ...], labels: Mapping[int, str], root: Path, year: int | None = None
) -> LayoutMatch | None:
    """Find the cases of releases that share a layout.

    Ids of glioma cases end in -000 to -099 in 2023 and in -100 and above in 2024, and the folder of the cases may name
    a year. If there is no evidence or it is contradictory, the cases match both years.

    `folders` are patterns of the names of case folders; `stems` the endings of the files of `_MODALITIES` and of the
    label; `year` that of a glioma release, because 2023 and 2024 differ only in the labels.
    """
    parents = subfolders(root, _PARENTS)
    nested = [folder for parent in parents for folder in subfolders(parent, _PARENTS)]
    all_parents = distinct([root, *parents, *nested])
    matching = [folder for name in folders for parent in all_parents for folder in subfolders(parent, name)]
    cases = [case for folder in matching if (case := _case(folder, stems)) is not None]
    if year and set().union(*map(_possible_years, cases)) not in ({year}, {2023, 2024}):
        return None
    return match_cases(cases, labels)


def _case(folder: Path, stems: tuple[str, ...]) -> Case | None:
    name = folder.name.casefold()
    *images, label = ((name + stem,) for stem in stems)
    labels = (*label, _LABEL_OF_355) if name.startswith("brats20_") else label
    # BraTS-GLI-00005-001 is a visit of patient BraTS-GLI-00005.
    visit = re.fullmatch(r"(brats-[a-z]+-\d+)(-\d+)?", folder.name, re.IGNORECASE)
    by_modality = dict(zip(_MODALITIES, images, strict=True))
    return case_from_stems(folder.name, nifti_files(folder), by_modality, labels, patient=visit[1] if visit else "")


def _possible_years(case: Case) -> set[int]:
    """Return the years in a case's parent folder and id; both without any."""
    parent = next(iter(case.images.values())).resolve().parents[1].name
    folder_year = re.search(r"brats[^0-9]*(2023|2024)", parent, re.IGNORECASE)
    visit = re.search(r"-\d+-(\d+)$", case.id)
    years = {int(folder_year[1])} if folder_year else set()
    years |= {2023 if int(visit[1]) < 100 else 2024} if visit else set()
    return years or {2023, 2024}


_GLI = (r"brats-gli-\d+(-\d+)?",)
LAYOUTS = (
    Layout(
        "brats",
        partial(
            _find,
            (r"brats18_.+", r"brats19_.+", r"brats20_(training|validation|testing)_.+", r"brats2021_\d+"),
            _UNDERSCORED,
            {1: "necrosis", 2: "oedema", 4: "enhancing"},
        ),
        "HGG/Brats18_X_1/Brats18_X_1_flair.nii.gz, with t1, t1ce, t2, seg (BraTS 2018 to 2021)",
    ),
    Layout(
        "brats2023-gli",
        partial(_find, _GLI, _HYPHENATED, {1: "NCR", 2: "ED", 3: "ET"}, year=2023),
        "BraTS-GLI-00000-000/BraTS-GLI-00000-000-t2f.nii.gz, with t1n, t1c, t2w, seg",
    ),
    Layout(
        "brats2024-gli",
        partial(_find, _GLI, _HYPHENATED, {1: "NETC", 2: "SNFH", 3: "ET", 4: "resection cavity"}, year=2024),
        "BraTS-GLI-00005-100/BraTS-GLI-00005-100-t2f.nii.gz, with t1n, t1c, t2w, seg",
    ),
    Layout(
        "brats-ped",
        partial(_find, (r"brats-ped-\d+(-\d+)?",), _HYPHENATED, {1: "ET", 2: "NET", 3: "CC", 4: "ED"}),
        "BraTS-PED-00001-000/BraTS-PED-00001-000-t2f.nii.gz, with t1n, t1c, t2w, seg",
    ),
)
