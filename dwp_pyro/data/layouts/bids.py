"""BIDS with masks in derivatives.

Images are `sub-X[/ses-Y]/anat/sub-X[_ses-Y]_FLAIR.nii.gz`; labels are lesion masks `…_mask.nii.gz`, or `…_dseg.nii.gz`
with a `.tsv`, in `derivatives/<pipeline>/sub-X[/ses-Y]/anat/`.

A lesion mask has `_label-lesion_mask`, `_desc-lesion_mask` or similar in its name (`_label-L_desc-T1lesion_mask` in
ATLAS; `_lesion-manual` or `_label-lesion_seg` in ivadomed), or `"Type": "Lesion"` in its JSON sidecar. A plain `_mask`
is used if it is the only one. `desc-brain_mask` is the brain mask. Subjects may be one folder deeper, as in ATLAS.
Images in the space of the mask and raw images have priority.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import Layout, LayoutMatch
from dwp_pyro.data.layouts.file_names import distinct, match_cases, nifti_files, subfolders, without_suffix
from dwp_pyro.data.modalities import modality_name
from dwp_pyro.runtime.errors import DataError
from dwp_pyro.runtime.files import read_json

__all__ = ["LAYOUT"]

_IMAGE = re.compile(r"flair|t1w|t2w|pdw|t1|t2|pd|t2star|t2starw|inplanet[12]|unit1|pet|swi|adc|dwi|bold|ct")
_LESION = re.compile(r"lesion|stroke|tumou?r|wmh|infarct|label-l(_|$)")
_DESCRIBED = re.compile(r"(label|desc)-")
_BRAIN = re.compile(r"(desc|label)-brain(_|$)")


@dataclass(frozen=True)
class _File:
    """File of a session, with its stem in lower case; `derived` if it is in derivatives."""

    path: Path
    stem: str
    derived: bool

    @property
    def suffix(self) -> str:
        """BIDS suffix, the last part of the name."""
        return self.stem.rsplit("_", 1)[-1]

    @property
    def modality(self) -> str:
        """Common name of the modality of an image."""
        return "t1ce" if self.suffix == "t1w" and "_ce-" in self.stem else modality_name(self.suffix)

    @property
    def space(self) -> str:
        """Space of the image; "" for the scanner's."""
        match = re.search(r"_space-([a-z0-9]+)", self.stem)
        return "" if match is None or match[1] in ("orig", "native", "individual") else match[1]

    @property
    def is_lesion(self) -> bool:
        """Whether the name or the sidecar marks the file as a lesion mask."""
        if _LESION.search("_".join(part for part in self.stem.split("_") if not part.startswith(("sub-", "ses-")))):
            return True
        sidecar = self.path.with_name(f"{without_suffix(self.path)}.json")
        return os.path.isfile(sidecar) and str(read_json(sidecar, DataError).get("Type", "")).casefold() == "lesion"


def _find(root: Path) -> LayoutMatch | None:
    sessions: dict[str, list[_File]] = {}
    for parent, derived in _subject_parents(root):
        for subject in subfolders(parent, r"sub-[\w-]+"):
            for folder in (subject, *subfolders(subject, r"ses-[\w-]+")):
                name = subject.name if folder == subject else f"{subject.name}_{folder.name}"
                files = nifti_files(folder / "anat")
                sessions.setdefault(name, []).extend(_File(path, stem, derived) for stem, path in files.items())
    for found in sessions.values():
        images: dict[tuple[str, str], Path] = {}
        for file in found:
            if _IMAGE.fullmatch(file.suffix) and not file.derived:
                first = images.setdefault((file.modality, file.space), file.path)
                same = os.path.realpath(first) == os.path.realpath(file.path)
                if not same and os.path.realpath(first.parent) != os.path.realpath(file.path.parent):
                    raise DataError(
                        f"{file.path}: is of the same subject, modality and space as {first}; open each data set by "
                        "itself, or list the scans in a CSV file and give that file instead"
                    )
    labels: Mapping[int, str] | None = {1: "lesion"}
    for find_mask in (_lesion_mask, _plain_mask):  # one kind for all sessions: a control has no lesion mask
        masks = {name: find_mask(files) for name, files in sessions.items()}
        if any(masks.values()):
            break
    else:  # fall back to segmentations with several values
        masks = {name: _segmentation(files) for name, files in sessions.items()}
        labels = _label_names(root, [mask for mask in masks.values() if mask is not None])
    return match_cases((_case(name, files, masks[name]) for name, files in sessions.items()), labels)


def _subject_parents(root: Path) -> list[tuple[Path, bool]]:
    """Return the folders that may contain subjects, and whether they are beside the raw data."""
    beside = "derivatives|sourcedata"
    raw = [root, *subfolders(root, rf"(?!({beside})$|sub-).+")]
    derived = subfolders(root, beside)
    if not derived:  # a folder above one data set; of several, masks would meet subjects of another set
        data_sets = [folder for folder in raw if subfolders(folder, r"sub-.+")]
        derived = subfolders(data_sets[0], beside) if len(data_sets) == 1 else []
    pipelines = [pipeline for folder in derived for pipeline in (folder, *subfolders(folder))]
    return [*((folder, False) for folder in distinct(raw)), *((folder, True) for folder in distinct(pipelines))]


def _lesion_mask(files: Iterable[_File]) -> _File | None:
    """Return the mask of a session that its name or sidecar marks as one of lesions."""
    masks = (file for file in files if file.suffix in ("mask", "seg", "lesion-manual"))
    return _single((file for file in masks if file.is_lesion), "lesion mask")


def _plain_mask(files: Iterable[_File]) -> _File | None:
    """Return the mask of a session whose name does not say of what."""
    return _single((f for f in files if f.suffix == "mask" and not _DESCRIBED.search(f.stem)), "mask")


def _segmentation(files: Iterable[_File]) -> _File | None:
    """Return the segmentation of a session, excluding those of FreeSurfer."""
    return _single((file for file in files if file.suffix == "dseg" and "_desc-a" not in file.stem), "segmentation")


def _single(files: Iterable[_File], what: str) -> _File | None:
    """Return the only file, or None without files; raise DataError if there are several."""
    candidates = sorted(files, key=lambda file: file.path)
    if len(candidates) > 1:
        raise DataError(
            f"{candidates[1].path}: is a second {what} beside {candidates[0].path}; remove one, or list the scans in a "
            "CSV file and give that file instead"
        )
    return candidates[0] if candidates else None


def _case(name: str, files: list[_File], mask: _File | None) -> Case | None:
    """Return the case of a session; None if it has no image."""
    images: dict[str, Path] = {}
    brain_mask = None
    # Priorities: the space of the mask, raw images, few entities in the name.
    space = "" if mask is None else mask.space
    for file in sorted(files, key=lambda file: (file.space != space, file.derived, file.stem.count("_"), file.stem)):
        if file.suffix == "mask" and _BRAIN.search(file.stem) and brain_mask is None and file.space == space:
            brain_mask = file.path
        elif _IMAGE.fullmatch(file.suffix):
            images.setdefault(file.modality, file.path)
    if not images:
        return None
    return Case(name, images, None if mask is None else mask.path, brain_mask, patient=name.partition("_ses-")[0])


def _label_names(root: Path, masks: Iterable[_File]) -> dict[int, str] | None:
    """Return value → name from the table of each segmentation, beside it or `dseg.tsv` in a parent; None without."""
    labels: dict[int, str] = {}
    for mask in masks:
        sidecar = mask.path.with_name(f"{without_suffix(mask.path)}.tsv")
        shared = [folder / "dseg.tsv" for folder in mask.path.parents if root == folder or root in folder.parents]
        table = next((path for path in (sidecar, *shared) if os.path.isfile(path)), None)
        if table is None:
            return None
        for value, name in _read_table(table).items():
            if labels.setdefault(value, name) != name:
                raise DataError(f"{table}: names {value} '{name}', another table '{labels[value]}'; make them agree")
    return labels or None


def _read_table(path: Path) -> dict[int, str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            names = {int(line["index"]): line["name"] for line in csv.DictReader(file, delimiter="\t")}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as problem:
        raise DataError(
            f"{path}: expected a tab-separated table with the columns 'index' and 'name'; fix it"
        ) from problem
    return {value: name for value, name in names.items() if value and name}


LAYOUT = Layout(
    name="bids",
    find=_find,
    expected="sub-01/anat/sub-01_FLAIR.nii.gz, and derivatives/X/sub-01/anat/sub-01_label-lesion_mask.nii.gz",
)
