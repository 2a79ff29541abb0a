"""What the layouts share: listing folders, and files by their stems."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from dwp_pyro.data.case import Case
from dwp_pyro.data.dataset import Found
from dwp_pyro.errors import DataError

__all__ = ["case_of_stems", "distinct", "entries", "found", "modality_name", "nifti_files", "subfolders"]

# What data sets call the modalities → what they are called here.
_MODALITIES = {
    "flair": ("t2f", "t2flair", "3dflair"),
    "t1": ("t1w", "t1n", "3dt1", "mprage"),
    "t1ce": ("t1c", "t1gd", "t1wks", "3dt1gado", "gado"),
    "t2": ("t2w",),
    "pd": ("dp", "pdw"),
}
_NAMES = {alias: name for name, aliases in _MODALITIES.items() for alias in aliases}


def modality_name(name: str) -> str:
    """The one name of a modality: "T1w", "t1n" and "MPRAGE" are "t1"; others keep theirs, in small letters."""
    plain = re.sub(r"[\W_]+", "", name.casefold())
    return _NAMES.get(plain, plain)


def entries(folder: Path) -> list[Path]:
    """What a folder holds, by name, without what is hidden; nothing if it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def subfolders(folder: Path, pattern: str = ".+") -> list[Path]:
    """The folders in a folder whose whole name matches, in capitals or not."""
    matching = (path for path in entries(folder) if re.fullmatch(pattern, path.name, re.IGNORECASE))
    return [path for path in matching if os.path.isdir(path)]


def distinct(folders: Iterable[Path]) -> list[Path]:
    """The folders, each once, by whatever links it is reached."""
    return list({folder.resolve(): folder for folder in reversed(list(folders))}.values())[::-1]


def nifti_files(folder: Path) -> dict[str, Path]:
    """The `.nii` and `.nii.gz` files of a folder by their stems, in small letters.

    Raises:
        DataError: if two have one stem: which of them is meant cannot be known.
    """
    files: dict[str, Path] = {}
    for path in entries(folder):
        name = path.name.casefold()
        stem = name.removesuffix(".gz").removesuffix(".nii")
        if name not in (f"{stem}.nii", f"{stem}.nii.gz") or os.path.isdir(path):
            continue
        if stem in files:
            raise DataError(f"{path}: stands beside {files[stem].name}; remove one of the two")
        files[stem] = path
    return files


def case_of_stems(
    name: str,
    files: Mapping[str, Path],
    images: Mapping[str, tuple[str, ...]],
    label: tuple[str, ...],
    brain: tuple[str, ...] = (),
    patient: str = "",
) -> Case | None:
    """A case of the files whose stems are known; None if no image is there.

    Args:
        name: of the case.
        files: as `nifti_files` gives them.
        images: modality → stems that its file may have, in small letters; the first that is there counts.
        label: stems that the label may have.
        brain: stems that the brain mask may have.
        patient: See `Case`.
    """

    def first(stems: tuple[str, ...]) -> Path | None:
        return next((files[stem] for stem in stems if stem in files), None)

    found = {modality: path for modality, stems in images.items() if (path := first(stems)) is not None}
    return Case(name, found, first(label), first(brain), patient=patient) if found else None


def found(cases: Iterable[Case | None], labels: Mapping[int, str] | None) -> Found | None:
    """What a layout has found, if any case is there; see `Found`."""
    there = [case for case in cases if case is not None]
    return Found(there, labels) if there else None
