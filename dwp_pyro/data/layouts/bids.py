"""BIDS, the masks in derivatives: `sub-X[/ses-Y]/anat/sub-X[_ses-Y]_FLAIR.nii.gz`, and in
`derivatives/<pipeline>/sub-X[/ses-Y]/anat/` a lesion mask `…_mask.nii.gz`, or `…_dseg.nii.gz` with its `.tsv`.

Masks are told by `_label-lesion_mask`, `_desc-lesion_mask` and their like; in ATLAS by `_label-L_desc-T1lesion_mask`,
in ivadomed by `_lesion-manual` and `_label-lesion_seg`; and by `"Type": "Lesion"` in the file's JSON. A plain `_mask`
is taken where it is the only one. `desc-brain_mask` is the brain. Subjects may lie one folder deeper, as in ATLAS.
Images are those in the space of the mask, the raw ones first.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import Found, Layout
from dwp_pyro.data.layouts.files import distinct, found, modality_name, nifti_files, subfolders
from dwp_pyro.errors import DataError
from dwp_pyro.storage import read_json

__all__ = ["LAYOUT"]

_IMAGE = re.compile(r"flair|t1w|t2w|pdw|t1|t2|pd|t2star|t2starw|inplanet[12]|unit1|pet|swi|adc|dwi|bold|ct")
_LESION = re.compile(r"lesion|stroke|tumou?r|label-l_|label-l$")
_ANATOMY = re.compile(r"(label|desc)-(brain|gm|wm|csf|bg|head|skull|sgm|cgm|hippocampus|sc|cord)(_|$)")
_BRAIN = re.compile(r"(desc|label)-brain(_|$)")


@dataclass(frozen=True)
class _File:
    """A file of a session.

    Args:
        path: of it.
        stem: of its name, in small letters.
        derived: whether it lies in derivatives.
    """

    path: Path
    stem: str
    derived: bool

    @property
    def suffix(self) -> str:
        """The last part of the name: what kind of file it is."""
        return self.stem.rsplit("_", 1)[-1]

    @property
    def space(self) -> str:
        """The space it lies in; that of the scanner is ""."""
        named = re.search(r"_space-([a-z0-9]+)", self.stem)
        return "" if named is None or named[1] in ("orig", "native", "individual") else named[1]

    @property
    def is_lesion(self) -> bool:
        """Whether name or sidecar says so."""
        if _LESION.search(self.stem.partition("_")[2]):
            return True
        sidecar = self.path.with_name(re.sub(r"\.nii(\.gz)?$", ".json", self.path.name, flags=re.IGNORECASE))
        return os.path.isfile(sidecar) and str(read_json(sidecar, DataError).get("Type", "")).casefold() == "lesion"


def _find(root: Path) -> Found | None:
    sessions: dict[str, list[_File]] = {}
    for place, derived in _places(root):
        for subject in subfolders(place, r"sub-\w+"):
            for folder in (subject, *subfolders(subject, r"ses-\w+")):
                name = subject.name if folder == subject else f"{subject.name}_{folder.name}"
                files = nifti_files(folder / "anat")
                sessions.setdefault(name, []).extend(_File(path, stem, derived) for stem, path in files.items())
    masks = {name: _mask(files) for name, files in sessions.items()}
    labels: Mapping[int, str] | None = {1: "lesion"}
    if not any(masks.values()):  # then segmentations of several values, if there are any
        masks = {name: _segmentation(files) for name, files in sessions.items()}
        labels = _names(root, [mask for mask in masks.values() if mask is not None])
    return found((_case(name, files, masks[name]) for name, files in sessions.items()), labels)


def _places(root: Path) -> list[tuple[Path, bool]]:
    """Folders that hold subjects, and whether they are derivatives."""
    raw = [root, *subfolders(root, r"(?!derivatives$|sub-).+")]
    pipelines = [pipeline for folder in subfolders(root, "derivatives") for pipeline in (folder, *subfolders(folder))]
    return [*((place, False) for place in distinct(raw)), *((place, True) for place in distinct(pipelines))]


def _mask(files: Iterable[_File]) -> _File | None:
    """The lesion mask of a session."""
    masks = [file for file in files if file.suffix in ("mask", "seg", "lesion-manual")]
    told = [file for file in masks if file.is_lesion]
    plain = [file for file in masks if file.suffix == "mask" and not _ANATOMY.search(file.stem)]
    return _only(told or plain, "lesion mask")


def _segmentation(files: Iterable[_File]) -> _File | None:
    """The segmentation of a session, FreeSurfer's aside."""
    return _only((file for file in files if file.suffix == "dseg" and "_desc-a" not in file.stem), "segmentation")


def _only(files: Iterable[_File], what: str) -> _File | None:
    candidates = sorted(files, key=lambda file: file.path)
    if len(candidates) > 1:
        raise DataError(
            f"{candidates[1].path}: stands beside {candidates[0].path} as {what}, and which is meant cannot be told; "
            "remove one, or list the scans in a CSV file and give that by --root"
        )
    return candidates[0] if candidates else None


def _case(name: str, files: list[_File], mask: _File | None) -> Case | None:
    """The case of a session; None if it has no image."""
    images: dict[str, Path] = {}
    brain = None
    # In the mask's space before others, raw before derived, few entities before many.
    wanted = "" if mask is None else mask.space
    for file in sorted(files, key=lambda file: (file.space != wanted, file.derived, file.stem.count("_"), file.stem)):
        if file.suffix == "mask" and _BRAIN.search(file.stem) and brain is None and file.space == wanted:
            brain = file.path
        elif _IMAGE.fullmatch(file.suffix):
            contrast = file.suffix == "t1w" and "_ce-" in file.stem
            images.setdefault("t1ce" if contrast else modality_name(file.suffix), file.path)
    if not images:
        return None
    return Case(name, images, None if mask is None else mask.path, brain, patient=name.partition("_ses-")[0])


def _names(root: Path, masks: Iterable[_File]) -> dict[int, str] | None:
    """Value → name by the tables of segmentations: beside each, or `dseg.tsv` in a folder above it; None without."""
    labels: dict[int, str] = {}
    for mask in masks:
        beside = mask.path.with_name(re.sub(r"\.nii(\.gz)?$", ".tsv", mask.path.name, flags=re.IGNORECASE))
        above = [folder / "dseg.tsv" for folder in mask.path.parents if root == folder or root in folder.parents]
        table = next((path for path in (beside, *above) if os.path.isfile(path)), None)
        if table is None:
            return None
        for value, name in _read_table(table).items():
            if labels.setdefault(value, name) != name:
                raise DataError(f"{table}: calls {value} '{name}', another table '{labels[value]}'; make them agree")
    return labels or None


def _read_table(path: Path) -> dict[int, str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            named = {int(line["index"]): line["name"] for line in csv.DictReader(file, delimiter="\t")}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as problem:
        raise DataError(f"{path}: should be a table with the columns 'index' and 'name', by tabs; mend it") from problem
    return {value: name for value, name in named.items() if value and name}


LAYOUT = Layout(
    name="bids",
    find=_find,
    expected="sub-01/anat/sub-01_FLAIR.nii.gz, and derivatives/X/sub-01/anat/sub-01_label-lesion_mask.nii.gz",
)
