"""What the years of BraTS share: where their case folders lie, and how files are named in them."""

from __future__ import annotations

import re
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.layouts.files import case_of_stems, distinct, nifti_files, subfolders

__all__ = ["find_gli", "hyphenated_cases", "underscored_cases"]

_UNDERSCORED = ("flair", "t1", "t1ce", "t2")
_HYPHENATED = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}

# A folder between the root and the cases: a grade, or a release ("MICCAI_BraTS2020_TrainingData").
_RELEASE = r"hgg|lgg|(training|validation)_?data.*|(?!brats20_).*brats.*(train|valid|data|challenge).*"


def _case_folders(root: Path, pattern: str) -> list[Path]:
    """Under the root, or under releases and grades in it."""
    releases = subfolders(root, _RELEASE)
    parts = [part for release in releases for part in subfolders(release, _RELEASE)]
    places = distinct([root, *releases, *parts])
    return [folder for place in places for folder in subfolders(place, pattern)]


def underscored_cases(root: Path, pattern: str, odd_labels: tuple[str, ...] = ()) -> list[Case]:
    """Cases of `<case>/<case>_{flair,t1,t1ce,t2,seg}`.

    Args:
        root: of the data set.
        pattern: of a case folder's name.
        odd_labels: further names that a label goes by, in small letters.
    """
    cases = []
    for folder in _case_folders(root, pattern):
        name = folder.name.casefold()
        images = {modality: (f"{name}_{modality}",) for modality in _UNDERSCORED}
        cases.append(case_of_stems(folder.name, nifti_files(folder), images, (f"{name}_seg", *odd_labels)))
    return [case for case in cases if case is not None]


def hyphenated_cases(root: Path, pattern: str) -> list[Case]:
    """Cases of `<case>/<case>-{t1n,t1c,t2w,t2f,seg}`; arguments as for `underscored_cases`."""
    cases = []
    for folder in _case_folders(root, pattern):
        name = folder.name.casefold()
        images = {modality: (f"{name}-{end}",) for modality, end in _HYPHENATED.items()}
        cases.append(
            case_of_stems(folder.name, nifti_files(folder), images, (f"{name}-seg",), patient=_patient(folder.name))
        )
    return [case for case in cases if case is not None]


def _patient(case: str) -> str:
    """BraTS-GLI-00005-001 is the second visit of BraTS-GLI-00005."""
    return re.sub(r"(-\d+)-\d+$", r"\1", case)


def find_gli(root: Path, year: int) -> list[Case]:
    """The glioma cases of 2023 (before treatment) or 2024 (after it), whose names differ in numbers alone.

    Ids of 2023 end in -000 and so on, those of 2024 in -100 and so on; the release that holds them may name a year.
    Where they say nothing, or contradict each other, the cases may be of either year, and are found for both.
    """
    cases = hyphenated_cases(root, r"brats-gli-\d+(-\d+)?")
    told = {year for case in cases for year in _told_years(case)}
    return cases if told in ({year}, {2023, 2024}) else []


def _told_years(case: Case) -> set[int]:
    """The years that a case may be of, by all that its id and its release say."""
    release = next(iter(case.images.values())).resolve().parents[1].name
    named = re.search(r"brats[^0-9]*(2023|2024)", release, re.IGNORECASE)
    numbered = re.search(r"-\d+-(\d+)$", case.id)
    years = {int(named[1])} if named else set()
    years |= {2023 if int(numbered[1]) < 100 else 2024} if numbered else set()
    return years or {2023, 2024}
